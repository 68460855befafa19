"""Reads folders, each in a fork of a process that has imported the libraries, and measures what that costs."""

import contextlib
import importlib
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener
from pathlib import Path

from tests.support.processes import Child

PROCESSOR_LIMIT = 60  # seconds after which a reader is killed
TIME_LIMIT = 600  # seconds after which it waits for something that does not come
ADDRESS_SPACE = 4 << 30  # bytes more than at the start: larger allocations fail


@dataclass
class Outcome:
    """What came of reading a folder.

    Attributes:
        error: text of the error with which the library refused it; None if it was read.
        used: whether the error came when what was read was used.
        failure: what went wrong; None if nothing did.
        memory: bytes that the process grew by at most.
        seconds: processor time.
        output: what was printed.
    """

    error: str | None = None
    used: bool = False
    failure: str | None = None
    memory: int = 0
    seconds: float = 0.0
    output: str = ""


class FileProcess:
    """The process that is forked for each folder. It first writes valid folders into `folder`."""

    def __init__(self, folder: Path):
        address = folder / "socket"
        self.originals = folder / "originals"
        self.child = Child(folder, serve, str(address), self.originals, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        self.child.wait_for("ready\n", seconds=600)
        self._connection = Client(str(address))

    def read(self, reader: str, folder: Path) -> Outcome:
        """Let a reader read a folder."""
        self._connection.send((reader, folder))
        return self._connection.recv()

    def close(self) -> None:
        self._connection.close()
        self.child.wait(60)


def serve(address: str, originals: Path) -> None:
    """Write the valid folders, then read others until the client closes the connection."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would be lost in forks
    readers = importlib.import_module("tests.fuzzing.file_readers")
    originals.mkdir()
    readers.write_originals(originals)
    with Listener(address) as listener:
        print("ready", flush=True)
        with listener.accept() as connection, contextlib.suppress(EOFError):
            while True:
                connection.send(read_in_fork(*connection.recv()))


def read_in_fork(reader: str, folder: Path) -> Outcome:
    """Read a folder in a fork of this process."""
    receiver, sender = os.pipe()
    output = folder.with_name("output.txt")
    pid = os.fork()
    if pid == 0:
        try:
            os.close(receiver)
            outcome = read_here(reader, folder, output)
            with open(sender, "wb") as file:
                pickle.dump(outcome, file)
        finally:
            os._exit(0)
    os.close(sender)
    data = b""
    with open(receiver, "rb", buffering=0) as file:
        end = time.monotonic() + TIME_LIMIT
        while select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
            if not (part := file.read(1 << 20)):
                break
            data += part
        else:
            os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    try:
        outcome = pickle.loads(data)
    except (EOFError, pickle.UnpicklingError):
        ended = os.waitstatus_to_exitcode(status)
        outcome = Outcome(failure=f"the process was ended: {signal.Signals(-ended).name if ended < 0 else ended}")
    outcome.seconds = usage.ru_utime + usage.ru_stime
    outcome.output = output.read_text(encoding="utf-8", errors="replace")
    return outcome


def read_here(reader: str, folder: Path, output: Path) -> Outcome:
    """Read a folder in this process, which is then only good for ending."""
    from tests.fuzzing.file_readers import READERS

    with output.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_LIMIT, PROCESSOR_LIMIT + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = memory()["VmSize"] + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = memory()
    outcome = Outcome()
    try:
        use = READERS[reader].read(folder)
        outcome.used = True
        if use is not None:
            use()
    except BaseException as error:
        describe(error, outcome)
    sys.stderr.flush()
    end = memory()
    # Pages of libraries, which the fork maps again as it needs them, are not counted.
    outcome.memory = max(0, end["VmHWM"] - start["RssAnon"] - start["RssShmem"] - end["RssFile"])
    return outcome


def describe(error: BaseException, outcome: Outcome) -> None:
    """Tell the library's own errors from others."""
    from safetensors import SafetensorError

    from qwen.library_errors import is_memory_full

    own = isinstance(error, (OSError, ValueError)) and not isinstance(error, UnicodeError)
    if not own or any(is_memory_full(each) for each in chain(error)) or isinstance(error, SafetensorError):
        outcome.failure = "".join(traceback.format_exception(error, limit=-12))
    outcome.error = str(error)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def memory() -> dict[str, int]:
    """Return what Linux counts of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    rows = (line.split() for line in status.splitlines())
    return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows if row[0].startswith(("Vm", "Rss"))}
