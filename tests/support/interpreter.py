"""A Python process that runs the blocks of a page one after another, like a notebook runs its cells.

All blocks share one namespace. They arrive through a socket, each with its file and first line, so that tracebacks show
the page.

    python tests/support/interpreter.py SOCKET     # path of the socket
"""

import code
import json
import socket
import sys


class Namespace(code.InteractiveInterpreter):
    """Interpreter that records whether the last block failed."""

    failed = False

    def showtraceback(self) -> None:
        self.failed = True
        super().showtraceback()

    def run(self, source: str, file: str, line: int) -> bool:
        """Run a block and return whether it succeeded."""
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
    """Run blocks from the socket until it is closed."""
    sys.path[0] = ""  # the current folder instead of this file's, as for an interactive python
    namespace = Namespace({"__name__": "__main__"})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        with connection.makefile("rw", encoding="utf-8") as lines:
            for request in lines:
                print(json.dumps(namespace.run(**json.loads(request))), file=lines, flush=True)


if __name__ == "__main__":
    main()
