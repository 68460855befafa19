"""The process in the sandbox: confines itself, then runs cells in one namespace, like a notebook.

Started by `Sandbox` with the settings as JSON in its first argument. Reads one JSON line `{"cell", "code"}` per cell
from a pipe and answers `{"cell", "status"}` on another one. Output of the cell goes to standard output. The parent
enforces time limits by interrupting or killing this process.
"""

import ast
import contextlib
import io
import json
import linecache
import os
import queue
import resource
import signal
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import TextIO, TypedDict

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not added in isolated mode
from confinement import confine, forbid_processes, set_limit

SESSION_CPU_FACTOR = 100  # processor time of a session, as a multiple of the limit of a cell


class Cell(TypedDict):
    """A cell to run: its number and its code."""

    cell: int
    code: str


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
    cells: queue.SimpleQueue[Cell] = queue.SimpleQueue()

    def receive() -> None:
        with open(settings["commands"], encoding="utf-8") as lines:
            for line in lines:
                cells.put(json.loads(line))
        os._exit(0)  # the session or the parent has ended; nobody reads the result of a running cell

    def send(message: dict[str, object]) -> None:
        os.write(settings["results"], json.dumps(message).encode() + b"\n")

    output = sys.stdout
    os.dup2(output.fileno(), sys.stderr.fileno())
    for stream in (output, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # true for both at process start
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cpu_seconds = settings["cpu_seconds"]
    set_limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds * SESSION_CPU_FACTOR)
    missing = confine(Path(settings["folder"]), **settings["limits"])
    threading.Thread(target=receive, daemon=True).start()
    if missing:
        forbid_processes()
    send({"missing": missing})
    sys.path[0] = settings["folder"]
    sys.argv[:] = [""]

    notebook = Notebook(output)
    while True:
        cell = cells.get()
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + cpu_seconds
        set_limit(resource.RLIMIT_CPU, min(limit, cpu_seconds * SESSION_CPU_FACTOR), cpu_seconds * SESSION_CPU_FACTOR)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = notebook.run(cell["cell"], cell["code"])
        except KeyboardInterrupt:  # raised just after the cell had ended
            status = "error"
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        send({"cell": cell["cell"], "status": status})


if __name__ == "__main__":
    main()
