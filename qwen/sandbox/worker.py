"""The process in the sandbox: confines itself, then runs cells in one namespace, like a notebook.

Started by `Sandbox` with the settings as JSON in its first argument. Reads one JSON line `{"cell", "code"}` per cell
from standard input and answers `{"cell", "status"}` on a pipe. Output of the cell goes to standard output. The parent
enforces time limits: it interrupts or kills this process, and stops it between cells.
"""

import ast
import contextlib
import io
import json
import linecache
import os
import signal
import sys
import traceback
import types
from pathlib import Path
from typing import TextIO

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not added in isolated mode
from confinement import confine


class Notebook:
    """Runs cells in one namespace that persists between them."""

    def __init__(self, output: TextIO):
        self.output = output
        self.main = types.ModuleType("__main__")  # as in a script: classes can be pickled, dataclasses resolve names
        sys.modules["__main__"] = self.main

    def run(self, number: int, code: str) -> str:
        """Run a cell and print the value of its last expression or the traceback; return "ok" or "error"."""
        name = f"<cell {number}>"
        linecache.cache[name] = (len(code), None, [line + "\n" for line in code.split("\n")], name)
        status = "ok"
        if sys.stdin is None or sys.stdin.closed:  # exit() closes it
            sys.stdin = io.StringIO()
        try:
            body = ast.parse(code, name).body
            last = None
            if body and isinstance(end := body[-1], ast.Expr):
                last = ast.Expression(end.value)
                body.pop()
            exec(compile(ast.Module(body, []), name, "exec", dont_inherit=True), self.main.__dict__)
            if last is not None:
                value = eval(compile(last, name, "eval", dont_inherit=True), self.main.__dict__)
                if value is not None:
                    self.main.__dict__["_"] = value
                    print(repr(value))
            self.save_figures()
        except BaseException as error:  # SystemExit and KeyboardInterrupt, too, only end the cell
            status = "error"
            self.print_traceback(error, name)
        for stream in {sys.stdout, sys.stderr, self.output}:
            with contextlib.suppress(Exception):  # the cell may have replaced them with anything
                stream.flush()
        return status

    def print_traceback(self, error: BaseException, name: str) -> None:
        """Print the traceback, starting at the cell and omitting the frames of this module."""
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != name:
            frames = frames.tb_next
        if isinstance(error, EOFError) and "reading a line" in str(error):
            error = EOFError("there is nobody to type an input: put the value into the code")
        for line in traceback.format_exception(type(error), error, frames):
            self.output.write(line)

    def save_figures(self) -> None:
        """Save open matplotlib figures to files and close them."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if not pyplot:
            return
        for figure in pyplot.get_fignums():
            count = 1
            while (path := Path(f"figure-{count}.png")).exists():
                count += 1
            pyplot.figure(figure).savefig(path)
            pyplot.close(figure)
            print(f"[figure saved as {path}]")


def main() -> None:
    """Serve cells until the other end of the pipe closes."""
    settings = json.loads(sys.argv[1])
    output = sys.stdout
    os.dup2(output.fileno(), sys.stderr.fileno())
    for stream in (output, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # true for both at process start
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        missing = confine(settings["limits"], isolated=settings["isolated"], user=settings["user"])
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull) as nothing:  # in the namespace that `confine` has made
        os.dup2(nothing.fileno(), 0)
    os.write(settings["results"], json.dumps({"missing": missing}).encode() + b"\n")
    sys.path[0] = os.getcwd()
    sys.argv[:] = [""]

    notebook = Notebook(output)
    for line in commands:
        cell = json.loads(line)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = notebook.run(cell["cell"], cell["code"])
        except KeyboardInterrupt:  # raised just after the cell had ended
            status = "error"
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.write(settings["results"], json.dumps({"cell": cell["cell"], "status": status}).encode() + b"\n")


if __name__ == "__main__":
    main()
