"""A `python` that is forked from a process which has imported the libraries: to start one takes seconds each time.

`serve` is that process. The command that `write_command` writes hands its arguments, its environment, its folder and
its three files over to it, waits for the forked process, and ends as that one has. That one joins its process group, so
that Ctrl-C and a kill of the group reach it, unless they are of different sessions; then it passes signals on. What it
does not do so it leaves to the real interpreter: options, -c, and code from standard input.

    python -I -S fork_python.py SOCKET REAL_PYTHON ARGUMENTS     # what the command runs
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path


def write_command(path: Path, address: Path) -> None:
    """Write an executable `python` that asks the process which serves at `address`, a path for a socket."""
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {address} {sys.executable} "$@"\n')
    path.chmod(0o755)


def ask(address: str, real: str, words: list[str]) -> int:
    """Run `python WORDS`.

    Returns:
        its exit status; the negative number of a signal if that has ended it.
    """
    if not words or (words[0].startswith("-") and words[0] != "-m"):
        os.execv(real, [real, *words])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the forked process says how that ends
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ), "group": os.getpgrp()}
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
    """Listen there, and `serve`. Once the path exists, it can be connected to."""
    begun = address.with_suffix(".begun")
    with socket.create_server(str(begun), family=socket.AF_UNIX) as listener:
        begun.rename(address)
        serve(listener)


def serve(listener: socket.socket) -> None:
    """Fork a process for each call of the command. Does not return."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                _wait_for_one(connection)
            except OSError:  # who asked has been killed, as its whole group
                pass
            finally:
                os._exit(0)
        connection.close()


def _wait_for_one(connection: socket.socket) -> None:
    import multiprocessing.connection

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    files = socket.recv_fds(connection, 1, 3)[1]
    with connection.makefile("rw", encoding="utf-8") as lines:
        request = json.loads(lines.readline())
        group = request.pop("group")
        process = multiprocessing.get_context("fork").Process(target=_be_python, args=(files,), kwargs=request)
        process.start()
        for file in files:
            os.close(file)
        try:
            os.setpgid(process.pid, group)
            joined = True
        except PermissionError:  # of another session
            joined = False
        print(process.pid, int(joined), file=lines, flush=True)
        multiprocessing.connection.wait([process.sentinel, connection])
        if process.is_alive():  # who asked has been killed
            process.kill()
        process.join()
        print(process.exitcode, file=lines, flush=True)


def _be_python(files: list[int], *, words: list[str], folder: str, environment: dict[str, str]) -> None:
    """What `python WORDS` does, in this process."""
    import runpy

    from tests.support.processes import open_standard_files, settle

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    settle(Path(folder), environment)
    open_standard_files()
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, folder)
        sys.modules.pop(words[1], None)  # else there is a warning that it is run a second time
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    status = ask(sys.argv[1], sys.argv[2], sys.argv[3:])
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)
