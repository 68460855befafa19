"""Runs the blocks of one page of the documentation as a reader would: in order, each as it is written.

A page is run on a `reader_machine`:

- The Python blocks of a page continue one another, in one process.
- A bash block is run by bash in the root of the repository. At its input there is nothing, or what is asked in the
  transcript ("User> ...") that stands right behind it.
- A block that starts a server runs until the server answers. It stays up for the rest of its section, or until
  another one is started, is then stopped with Ctrl-C, and has to end well.
- What a block prints must have the lines of the ```text block that stands right behind it, in a row; of a
  transcript, the replies. A line "…" there is any number of lines.

    python -m tests.support.run_document README.md     # says how each block went
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import ROOT
from tests.support.fork_python import serve
from tests.support.markdown import Block, Document
from tests.support.processes import preload
from tests.support.reader_machine import Machine, fill_hub, leave_the_network, read_at_import

PORT = 8000
BLOCK_SECONDS = 600
END_SECONDS = 60
SERVER = re.compile(r"^\s*(?:python (?:openai_api|web_demo)\.py|make (?:serve|web))\b(?!.*--help)", re.MULTILINE)
USER, MODEL = "User> ", "Qwen> "


class BlockFailed(Exception):
    """What went wrong, in a sentence."""


@dataclasses.dataclass
class Outcome:
    """How a block went."""

    line: int
    seconds: float
    error: str | None
    output: str
    """What it printed, standard output before standard error."""


class Output:
    """Two files that processes write to, and what is new in them."""

    def __init__(self) -> None:
        # Closed when nobody refers to them any more: a process may write for as long as the page is run.
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  they outlive this call
        self._read = [0, 0]

    def new(self) -> tuple[str, str]:
        """Standard output and standard error since the last call."""
        texts = []
        for index, file in enumerate(self.files):
            data = os.pread(file.fileno(), 10**8, self._read[index])
            self._read[index] += len(data)
            texts.append(data.decode(errors="replace"))
        return texts[0], texts[1]


class Group:
    """A process and those that it starts, which a terminal would call a job."""

    def __init__(self, command: list[str], machine: Machine, text: str = ""):
        self.command = command[-1].lstrip()
        self.output = Output()
        self._input = tempfile.TemporaryFile()  # noqa: SIM115  it outlives this call
        self._input.write(text.encode())
        self._input.seek(0)
        stdout, stderr = self.output.files
        self.process = subprocess.Popen(
            command,
            cwd=machine.repository,
            env=machine.environment,
            stdin=self._input,
            stdout=stdout,
            stderr=stderr,
            process_group=0,
        )

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


class Python:
    """The process that the Python blocks of a page share."""

    def __init__(self, machine: Machine):
        address = machine.repository.with_name("blocks")
        with socket.create_server(str(address), family=socket.AF_UNIX) as listener:
            self.group = Group(["python", str(Path(__file__).with_name("interpreter.py")), str(address)], machine)
            listener.settimeout(END_SECONDS)
            try:
                self._connection, _ = listener.accept()
            except TimeoutError:
                raise BlockFailed("There is no Python.") from None
        self._connection.settimeout(BLOCK_SECONDS)
        self._lines = self._connection.makefile("rw", encoding="utf-8")

    def run(self, block: Block) -> None:
        try:
            request = {"source": block.code, "file": block.page, "line": block.line}
            print(json.dumps(request), file=self._lines, flush=True)
            answer = self._lines.readline()
        except TimeoutError as error:
            self.group.kill()
            raise BlockFailed(f"It did not end within {BLOCK_SECONDS} seconds.") from error
        except OSError as error:
            raise BlockFailed("The Python process ended with an earlier block.") from error
        if not answer:
            raise BlockFailed(f"The Python process ended, with status {self.group.process.wait()}.")
        if not json.loads(answer):
            raise BlockFailed("It raised an exception.")


class Page:
    """Runs the blocks of a page.

    Args:
        page: its path from the root of the repository.
        machine: where.
        part: of the page, or all of it.
    """

    def __init__(self, page: str, machine: Machine, part: str | None = None):
        blocks = Document(page, root=machine.repository).blocks
        self._blocks = [block for block in blocks if block.is_run and part in (None, block.part)]
        self._machine = machine
        self._python: Python | None = None
        self._server: Group | None = None
        self._server_section: tuple[str, ...] = ()

    def run(self) -> Iterator[Outcome]:
        """All of them."""
        try:
            for index, block in enumerate(self._blocks):
                following = self._blocks[index + 1] if index + 1 < len(self._blocks) else None
                yield self._outcome(block, following)
        finally:
            for group in (self._server, self._python and self._python.group):
                if group:
                    group.kill()

    def _outcome(self, block: Block, following: Block | None) -> Outcome:
        start = time.monotonic()
        outputs: list[Output] = []
        error = None
        try:
            if block.language == "python":
                self._python = self._python or Python(self._machine)
                outputs.append(self._python.group.output)
                self._python.run(block)
            else:
                self._bash(block, outputs)
        except BlockFailed as failure:
            error = str(failure)
        said = [output.new() for output in outputs]
        printed, complained = ("".join(texts) for texts in zip(*said, strict=True))
        if error is None and block.prints is not None:
            error = difference(expected_of(block.prints), printed)
        # The server is stopped by the last block that may use it, which so answers for its end.
        if not (following and self._is_served(following)):
            error = self._stop_server() or error
        return Outcome(block.line, time.monotonic() - start, error, printed + complained)

    def _is_served(self, block: Block) -> bool:
        """Whether a block stands in the section of the server, which is a chapter at most."""
        section = self._server_section
        return block.section[: len(section)] == section and block.section[:2] == section[:2]

    def _bash(self, block: Block, outputs: list[Output]) -> None:
        commands = commands_of(block.code) if SERVER.search(block.code) else [block.code]
        for command in commands:
            serves = bool(SERVER.search(command))
            if serves and (complaint := self._stop_server()):
                raise BlockFailed(complaint)
            group = Group(["bash", "-e", "-o", "pipefail", "-c", command], self._machine, questions_of(block.prints))
            outputs.append(group.output)
            if serves:
                self._server, self._server_section = group, block.section
                try:
                    until_it_answers(group)
                except BlockFailed:
                    self._server = None
                    group.kill()
                    raise
                continue
            try:
                status = group.process.wait(BLOCK_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise BlockFailed(f"It did not end within {BLOCK_SECONDS} seconds.") from error
            finally:
                group.kill()
            if status:
                raise BlockFailed(f"It ended with status {status}.")

    def _stop_server(self) -> str | None:
        """Press Ctrl-C; what was wrong with the server's end, if there is a server."""
        group, self._server = self._server, None
        if group is None:
            return None
        group.signal(signal.SIGINT)
        try:
            status = group.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return f"The server did not end within {END_SECONDS} seconds of Ctrl-C."
        finally:
            group.kill()
        said = "".join(group.output.new())
        # make ends with a status of its own, whatever its command did.
        well = (0, 2, 130, -signal.SIGINT) if group.command.startswith("make ") else (0,)
        if status not in well or "Traceback" in said:
            return f"The server ended with status {status} on Ctrl-C:\n{said}"
        return None


def until_it_answers(group: Group) -> None:
    """Wait for a server.

    Raises:
        BlockFailed: it ended, or took too long.
    """
    until = time.monotonic() + BLOCK_SECONDS
    while time.monotonic() < until:
        if group.process.poll() is not None:
            raise BlockFailed(f"The server ended with status {group.process.returncode}.")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=5).close()
        except urllib.error.HTTPError:  # an answer, too
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise BlockFailed(f"The server did not answer on port {PORT} within {BLOCK_SECONDS} seconds.")


def commands_of(code: str) -> list[str]:
    """The commands of a bash block, one by one, as bash reads them."""
    commands, begun = [], ""
    for line in code.splitlines(keepends=True):
        begun += line
        if begun.rstrip("\n").endswith("\\"):
            continue
        read = subprocess.run(["bash", "-n", "-c", begun], capture_output=True, check=False)
        if read.returncode == 0 and not read.stderr:  # which complains of a document that has not come to its end
            commands.append(begun)
            begun = ""
    return [command for command in [*commands, begun] if command.strip()]


def questions_of(prints: str | None) -> str:
    """What a person types in a transcript."""
    lines = (prints or "").splitlines()
    return "".join(f"{line.removeprefix(USER)}\n" for line in lines if line.startswith(USER))


def expected_of(prints: str) -> list[str]:
    """The lines that must be printed: of a transcript the replies, which a program behind a pipe prints alone."""
    lines = prints.rstrip().splitlines()
    if lines and lines[0].startswith(USER):
        return [line.removeprefix(MODEL) for line in lines if not line.startswith(USER)]
    return lines


def difference(expected: list[str], printed: str) -> str | None:
    """What is wrong, if the expected lines do not stand in a row in what was printed."""
    pattern = "".join(r"(?:.*\n)*?" if line.strip() == "…" else f"{re.escape(line.rstrip())}\n" for line in expected)
    if re.search(f"^{pattern}", "".join(f"{line.rstrip()}\n" for line in printed.splitlines()), re.MULTILINE):
        return None
    return "\n".join(["It did not print what the page says:", *expected])


def port_is_free() -> bool:
    """Whether nobody listens where the servers of the documentation want to."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) != 0


def json_file(folder: Path, part: str) -> Path:
    """Where the outcomes of a part are written to."""
    return folder / f"{part.replace('/', '-')}.jsonl"


def tell(file: Path | None, part: str, outcome: Outcome) -> None:
    """Append an outcome to a file, or print it."""
    if file:
        with file.open("a", encoding="utf-8") as lines:
            print(json.dumps(dataclasses.asdict(outcome)), file=lines, flush=True)
        return
    how = "" if outcome.error is None else f", FAILED\n{outcome.error}\n{outcome.output}"
    print(f"{part}, line {outcome.line}: {outcome.seconds:.1f} s{how}", flush=True)


def start_fork(function: Callable[[], object]) -> int:
    """Call a function in a fork of this process.

    Returns:
        its process id. It ends with status 0 if the function has returned something true.
    """
    if pid := os.fork():
        return pid
    status = 1
    try:
        status = int(not function())
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end(pid: int) -> None:
    """Let a process end itself, if it has not yet."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def run_part(part: str, folder: Path, hub: Path, fork: bool, report: Callable[[Outcome], None]) -> bool:
    """Run a part of a page on a machine in an empty folder; returns whether all went well."""
    page, _, number = part.partition(":")
    with contextlib.ExitStack() as stack:
        if not leave_the_network():
            # One page after the other, for all of them want that port.
            fcntl.flock(stack.enter_context(Path(__file__).open()), fcntl.LOCK_EX)
            if not port_is_free():
                print(f"Port {PORT} is taken, and the blocks want it: stop what listens there.", file=sys.stderr)
                return False
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the clean-up
        stack.callback(signal.signal, signal.SIGTERM, signal.SIG_IGN)  # nor does it disturb the clean-up
        address = stack.enter_context(forking(folder / "python")) if fork else None
        machine = Machine(folder, hub, address)
        failed = False
        with contextlib.closing(Page(page, machine, part if number else None).run()) as outcomes:
            for outcome in outcomes:
                report(outcome)
                failed |= outcome.error is not None
    return not failed


@contextlib.contextmanager
def forking(address: Path) -> Iterator[Path]:
    """A process that serves `fork_python`, forked from this one."""
    with socket.create_server(str(address), family=socket.AF_UNIX) as listener:
        pid = start_fork(lambda: serve(listener))
    try:
        yield address
    finally:
        end(pid)
        os.waitpid(pid, 0)


def main() -> int:
    """Returns the exit status: 0, or 1 where a block failed."""
    parser = argparse.ArgumentParser(description="Run the blocks of pages of the documentation, side by side.")
    parser.add_argument(
        "parts", nargs="+", metavar="PAGE", help="README.md, or a part of it (markdown.py): README.md:1"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FOLDER", help="write a line for each block to FOLDER/PAGE instead"
    )
    parser.add_argument(
        "--fork", action="store_true", help="fork each `python` from one that has the libraries imported"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background ignores Ctrl-C
    with tempfile.TemporaryDirectory(prefix="qwen-documents-") as name:
        hub = Path(name) / "hub"
        fill_hub(hub, ROOT / "checkpoints")
        os.environ.update(read_at_import(hub))
        if arguments.fork:
            preload()
            gc.freeze()
        pids = []
        for number, part in enumerate(arguments.parts):
            folder = Path(name) / str(number)
            folder.mkdir()
            report = functools.partial(tell, json_file(arguments.json, part) if arguments.json else None, part)
            pids.append(start_fork(functools.partial(run_part, part, folder, hub, arguments.fork, report)))
        signal.signal(signal.SIGTERM, lambda *_: [end(pid) for pid in pids])
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
