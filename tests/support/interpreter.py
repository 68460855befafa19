"""A Python process that runs the blocks of a page one after another, as a notebook runs its cells.

All blocks share one namespace. They come through a socket, each with its file and its first line, so that a traceback
shows the page.

    python tests/support/interpreter.py SOCKET     # a path
"""

import code
import json
import socket
import sys


class Namespace(code.InteractiveInterpreter):
    """Remembers whether the last block failed."""

    failed = False

    def showtraceback(self) -> None:
        self.failed = True
        super().showtraceback()

    def run(self, source: str, file: str, line: int) -> bool:
        """Run a block; whether it came to its end."""
        self.failed = False
        try:
            block = compile("\n" * (line - 1) + source, file, "exec", dont_inherit=True)
        except SyntaxError:
            self.failed = True
            self.showsyntaxerror(file)
        else:
            self.runcode(block)
        sys.stdout.flush()
        sys.stderr.flush()
        return not self.failed


def main() -> None:
    """Run what comes through the socket until it is closed."""
    sys.path[0] = ""  # as for a person who types python: the current folder, not this file's
    here = Namespace({"__name__": "__main__"})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        with connection.makefile("rw", encoding="utf-8") as lines:
            for request in lines:
                print(json.dumps(here.run(**json.loads(request))), file=lines, flush=True)


if __name__ == "__main__":
    main()
