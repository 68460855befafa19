"""The process that the processes of a test run are forked from: it imports the libraries, once for all workers.

`processes.start_forking` starts it. It imports when the first client connects. A client sends its import path, its key
for shared memory, and what to call; it receives the process id, the result, and at the end the exit status. If it
disconnects, the process is killed.

    python -m tests.support.fork_server LISTENER     # file descriptor of a socket; ends when standard input is closed
"""

import importlib
import multiprocessing.connection
import os
import selectors
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

# Modules that scripts import. Without gptqmodel, which starts threads that a fork would lose, but with its imports.
PRELOADED = [
    *("qwen_cli.finetune", "qwen.finetuning.run", "qwen.serving.api.app", "qwen.serving.api.server"),
    *("transformers.trainer", "transformers.models.auto.processing_auto", "peft.tuners.lora", "datasets", "requests"),
    *("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.fsdp", "torch.distributed.run"),
    *("torch.utils.cpp_extension", "torch.utils.tensorboard", "matplotlib.figure", "gradio"),
    *("pytest", "tests.support.processes"),
]


def main() -> None:
    """Fork until standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with (
        socket.socket(fileno=int(sys.argv[1])) as listener,
        tempfile.TemporaryDirectory(prefix="qwen-hub-") as name,
        selectors.DefaultSelector() as selector,
    ):
        for file in (listener, sys.stdin):
            selector.register(file, selectors.EVENT_READ)
        preloaded = False
        while sys.stdin not in [key.fileobj for key, _ in selector.select()]:
            if not preloaded:
                _preload(Path(name))
                preloaded = True
            fork_for(listener, _handle)


def _preload(hub: Path) -> None:
    """Import what scripts import, with the environment variables that are read meanwhile."""
    from tests.support import ROOT
    from tests.support.reader_machine import fill_hub, import_time_variables

    fill_hub(hub, ROOT / "checkpoints")
    os.environ.update(import_time_variables(hub))
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
    for module in PRELOADED:
        importlib.import_module(module)


def fork_for(listener: socket.socket, handle: Callable[[socket.socket], None]) -> None:
    """Accept a client and handle it in a fork of this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reap children automatically
    connection, _ = listener.accept()
    if os.fork() == 0:
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            handle(connection)
        except OSError:  # the client has ended
            pass
        finally:
            os._exit(0)
    connection.close()


def _handle(accepted: socket.socket) -> None:
    """Fork the process of a client and report its exit status."""
    with Connection(accepted.detach()) as connection:
        sys.path[:], multiprocessing.current_process().authkey = connection.recv()
        call = connection.recv_bytes()
        process = multiprocessing.get_context("fork").Process(target=_run, args=(connection, call))
        process.start()
        multiprocessing.connection.wait([process.sentinel, connection])
        if process.is_alive():  # the client has ended
            process.kill()
        process.join()
        connection.send(("status", process.exitcode))


def _run(connection: Connection, call: bytes) -> None:
    """Call a function and send its result."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connection.send(("pid", os.getpid()))
    function, arguments = ForkingPickler.loads(call)
    result = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(("result", result))


if __name__ == "__main__":
    main()
