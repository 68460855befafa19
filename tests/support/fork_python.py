"""A `python` command that forks a process with the libraries imported, because starting a new one takes seconds.

`serve` runs in that process. The command written by `write_command` sends it its arguments, environment, folder and
standard files, waits for the forked process, and exits with the same status. The forked process joins the process group
of the command, so that Ctrl-C and a kill of the group reach it; across sessions, the command forwards signals instead.
Interpreter options except -u, -c, and code from standard input are passed to the real interpreter.

    python -I -S fork_python.py SOCKET REAL_PYTHON EXECUTABLE ARGUMENTS     # what the command runs
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path


def write_command(path: Path, address: Path, nested: bool = False) -> None:
    """Write an executable `python` that forks from the process serving at `address`, the path of a socket.

    Args:
        path: where to write it.
        address: path of the socket.
        nested: make it the `sys.executable` of the forked processes, so that what they start with that is forked, too.
            The sandbox cannot use it.
    """
    executable = path if nested else sys.executable
    arguments = f"{__file__} {address} {sys.executable} {executable}"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {arguments} "$@"\n')
    path.chmod(0o755)


def run_in_fork(address: str, real: str, executable: str, words: list[str]) -> int:
    """Run `python WORDS`.

    Args:
        address: path of the socket.
        real: path of the real interpreter.
        executable: `sys.executable` of the forked process.
        words: options and arguments.

    Returns:
        The exit status, or the negative number of the signal that ended it.
    """
    unbuffered = words[:1] == ["-u"]  # torchrun starts its processes so
    call = words[unbuffered:]
    if not call or (call[0].startswith("-") and call[0] != "-m"):
        os.execv(real, [real, *words])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the forked process handles it
    request = {"words": call, "unbuffered": unbuffered, "folder": os.getcwd(), "environment": dict(os.environ)}
    request |= {"group": os.getpgrp(), "executable": executable}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        lines = connection.makefile("rw", encoding="utf-8")
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        print(json.dumps(request), file=lines, flush=True)
        pid, joined = map(int, lines.readline().split())
        for number in (signal.SIGTERM, *([] if joined else [signal.SIGINT])):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        return int(lines.readline())


def serve_at(address: Path) -> None:
    """Listen on a socket at `address` and `serve`. Once the path exists, clients can connect."""
    staged = address.with_suffix(".staged")
    with socket.create_server(str(staged), family=socket.AF_UNIX) as listener:
        staged.rename(address)
        serve(listener)


def serve(listener: socket.socket) -> None:
    """Fork a process for each call of the command. Does not return."""
    from tests.support.fork_server import fork_for

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        fork_for(listener, _handle)


def _handle(connection: socket.socket) -> None:
    """Fork a process for one call of the command and report its exit status."""
    import multiprocessing.connection

    files = socket.recv_fds(connection, 1, 3)[1]
    with connection.makefile("rw", encoding="utf-8") as lines:
        request = json.loads(lines.readline())
        group = request.pop("group")
        process = multiprocessing.get_context("fork").Process(target=_run_python, args=(files,), kwargs=request)
        process.start()
        for file in files:
            os.close(file)
        try:
            os.setpgid(process.pid, group)
            joined = True
        except PermissionError:  # in another session
            joined = False
        print(process.pid, int(joined), file=lines, flush=True)
        multiprocessing.connection.wait([process.sentinel, connection])
        if process.is_alive():  # the command was killed
            process.kill()
        process.join()
        print(process.exitcode, file=lines, flush=True)


def _run_python(
    files: list[int], *, executable: str, words: list[str], unbuffered: bool, folder: str, environment: dict[str, str]
) -> None:
    """Do what `python WORDS` does, in this process."""
    import runpy

    from tests.support.processes import open_standard_files, set_up_fork

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    set_up_fork(Path(folder), environment)
    open_standard_files()
    sys.stdout.reconfigure(write_through=unbuffered)
    sys.executable = executable
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, folder)
        sys.modules.pop(words[1], None)  # avoids a warning from runpy that it is already imported
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    status = run_in_fork(*sys.argv[1:4], sys.argv[4:])
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
