"""Runs the blocks of documentation pages as a reader would: in order, as written.

A page runs on a `reader_machine`:

- The Python blocks of a page run in one process and share their variables.
- bash runs a bash block in the root of the repository. Its input is empty, or the questions of the transcript
  ("User> ...") that follows the block.
- A block that starts a server runs until the server answers. The server runs for the rest of its section, or until
  another one is started. It is then stopped with Ctrl-C and must exit cleanly.
- The output of a block must contain the lines of the ```text block that follows it, consecutively; for a transcript,
  its replies. A line "…" matches any number of lines.

    python -m tests.support.run_document README.md     # reports the result of each block
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
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
from tests.support.reader_machine import Machine, fill_hub, isolate_network

PORT = 8000
BLOCK_SECONDS = 600
END_SECONDS = 60
SERVER = re.compile(r"^\s*(?:python (?:openai_api|web_demo)\.py|make (?:serve|web))\b(?!.*--help)", re.MULTILINE)
USER, MODEL = "User> ", "Qwen> "


class BlockFailed(Exception):
    """A block failed; the message says why."""


@dataclasses.dataclass
class Outcome:
    """Result of a block."""

    line: int
    seconds: float
    error: str | None
    output: str
    """Standard output, followed by standard error."""


class Output:
    """Two files that processes write to, with incremental reading."""

    def __init__(self) -> None:
        # Closed by garbage collection, because a process may write as long as the page runs.
        self.files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  outlive this call
        self._read = [0, 0]

    def new(self) -> tuple[str, str]:
        """Return the standard output and standard error since the last call."""
        texts = []
        for index, file in enumerate(self.files):
            data = os.pread(file.fileno(), 10**8, self._read[index])
            self._read[index] += len(data)
            texts.append(data.decode(errors="replace"))
        return texts[0], texts[1]


class ProcessGroup:
    """A process and its children, in one process group."""

    def __init__(self, command: list[str], machine: Machine, text: str = ""):
        self.command = command[-1].lstrip()
        self.output = Output()
        self._input = tempfile.TemporaryFile()  # noqa: SIM115  outlives this call
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


class PythonProcess:
    """The process that runs all Python blocks of a page."""

    def __init__(self, machine: Machine):
        address = machine.repository.with_name("blocks")
        with socket.create_server(str(address), family=socket.AF_UNIX) as listener:
            self.group = ProcessGroup(
                ["python", str(Path(__file__).with_name("interpreter.py")), str(address)], machine
            )
            listener.settimeout(END_SECONDS)
            try:
                self._connection, _ = listener.accept()
            except TimeoutError:
                raise BlockFailed("The Python process did not start.") from None
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
            raise BlockFailed(f"The Python process ended with status {self.group.process.wait()}.")
        if not json.loads(answer):
            raise BlockFailed("It raised an exception.")


class PageRunner:
    """Runs the blocks of a page.

    Args:
        page: path from the root of the repository.
        machine: machine to run on.
        part: part of the page (see `Block.part`), or None for all of it.
    """

    def __init__(self, page: str, machine: Machine, part: str | None = None):
        blocks = Document(page, root=machine.repository).blocks
        self._blocks = [block for block in blocks if block.is_run and part in (None, block.part)]
        self._machine = machine
        self._python: PythonProcess | None = None
        self._server: ProcessGroup | None = None
        self._server_section: tuple[str, ...] = ()

    def run(self) -> Iterator[Outcome]:
        """Run all blocks and yield their results."""
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
                self._python = self._python or PythonProcess(self._machine)
                outputs.append(self._python.group.output)
                self._python.run(block)
            else:
                self._bash(block, outputs)
        except BlockFailed as failure:
            error = str(failure)
        texts = [output.new() for output in outputs]
        stdout, stderr = ("".join(parts) for parts in zip(*texts, strict=True))
        if error is None and block.prints is not None:
            error = output_error(expected_lines(block.prints), stdout)
        # Stop the server after the last block that may use it; errors at exit count as errors of that block.
        if not (following and self._is_served(following)):
            error = self._stop_server() or error
        return Outcome(block.line, time.monotonic() - start, error, stdout + stderr)

    def _is_served(self, block: Block) -> bool:
        """Return whether a block is in the section of the server, which is at most a chapter."""
        section = self._server_section
        return block.section[: len(section)] == section and block.section[:2] == section[:2]

    def _bash(self, block: Block, outputs: list[Output]) -> None:
        commands = split_commands(block.code) if SERVER.search(block.code) else [block.code]
        for command in commands:
            serves = bool(SERVER.search(command))
            if serves and (error_message := self._stop_server()):
                raise BlockFailed(error_message)
            group = ProcessGroup(
                ["bash", "-e", "-o", "pipefail", "-c", command], self._machine, user_inputs(block.prints)
            )
            outputs.append(group.output)
            if serves:
                self._server, self._server_section = group, block.section
                try:
                    wait_for_server(group)
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
        """Stop the server with Ctrl-C, if one runs. Returns an error message if it did not exit cleanly."""
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
        output = "".join(group.output.new())
        # make has its own exit status, which differs from that of its command.
        expected = (0, 2, 130, -signal.SIGINT) if group.command.startswith("make ") else (0,)
        if status not in expected or "Traceback" in output:
            return f"The server ended with status {status} on Ctrl-C:\n{output}"
        return None


def wait_for_server(group: ProcessGroup) -> None:
    """Wait until a server answers.

    Raises:
        BlockFailed: it ended, or took too long.
    """
    deadline = time.monotonic() + BLOCK_SECONDS
    while time.monotonic() < deadline:
        if group.process.poll() is not None:
            raise BlockFailed(f"The server ended with status {group.process.returncode}.")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=5).close()
        except urllib.error.HTTPError:  # also an answer
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise BlockFailed(f"The server did not answer on port {PORT} within {BLOCK_SECONDS} seconds.")


def split_commands(code: str) -> list[str]:
    """Split a bash block into commands, as bash parses them."""
    commands, partial = [], ""
    for line in code.splitlines(keepends=True):
        partial += line
        if partial.rstrip("\n").endswith("\\"):
            continue
        check = subprocess.run(["bash", "-n", "-c", partial], capture_output=True, check=False)
        if check.returncode == 0 and not check.stderr:  # bash warns about an unfinished here-document
            commands.append(partial)
            partial = ""
    return [command for command in [*commands, partial] if command.strip()]


def user_inputs(prints: str | None) -> str:
    """Return the user input of a transcript."""
    lines = (prints or "").splitlines()
    return "".join(f"{line.removeprefix(USER)}\n" for line in lines if line.startswith(USER))


def expected_lines(prints: str) -> list[str]:
    """Return the lines that must be printed; of a transcript only the replies, as printed behind a pipe."""
    lines = prints.rstrip().splitlines()
    if lines and lines[0].startswith(USER):
        return [line.removeprefix(MODEL) for line in lines if not line.startswith(USER)]
    return lines


def output_error(expected: list[str], printed: str) -> str | None:
    """Return an error message unless the expected lines were printed consecutively."""
    pattern = "".join(r"(?:.*\n)*?" if line.strip() == "…" else f"{re.escape(line.rstrip())}\n" for line in expected)
    if re.search(f"^{pattern}", "".join(f"{line.rstrip()}\n" for line in printed.splitlines()), re.MULTILINE):
        return None
    return "\n".join(["It did not print what the page says:", *expected])


def port_is_free() -> bool:
    """Return whether the port of the documentation's servers is free."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", PORT)) != 0


def json_file(folder: Path, part: str) -> Path:
    """Return the file for the results of a part."""
    return folder / f"{part.replace('/', '-')}.jsonl"


def write_outcome(file: Path | None, part: str, outcome: Outcome) -> None:
    """Append a result to a file, or print it if there is no file."""
    if file:
        with file.open("a", encoding="utf-8") as lines:
            print(json.dumps(dataclasses.asdict(outcome)), file=lines, flush=True)
        return
    failure = "" if outcome.error is None else f", FAILED\n{outcome.error}\n{outcome.output}"
    print(f"{part}, line {outcome.line}: {outcome.seconds:.1f} s{failure}", flush=True)


def start_fork(function: Callable[[], object]) -> int:
    """Call a function in a fork of this process.

    Returns:
        The process id. The exit status of the process is 0 if the function returned a true value.
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


def terminate(pid: int) -> None:
    """Send SIGTERM to a process if it still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def run_part(part: str, folder: Path, hub: Path, fork: bool, report: Callable[[Outcome], None]) -> bool:
    """Run a part of a page on a machine in an empty folder. Returns whether all blocks succeeded."""
    page, _, number = part.partition(":")
    with contextlib.ExitStack() as stack:
        if not isolate_network():
            # Run one page at a time, because all use the same port.
            fcntl.flock(stack.enter_context(Path(__file__).open()), fcntl.LOCK_EX)
            if not port_is_free():
                print(f"Port {PORT} is in use, but the blocks need it: stop what listens there.", file=sys.stderr)
                return False
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # run the cleanup
        stack.callback(signal.signal, signal.SIGTERM, signal.SIG_IGN)  # do not interrupt the cleanup
        address = stack.enter_context(fork_server(folder / "python")) if fork else None
        machine = Machine(folder, hub, address)
        failed = False
        with contextlib.closing(PageRunner(page, machine, part if number else None).run()) as outcomes:
            for outcome in outcomes:
                report(outcome)
                failed |= outcome.error is not None
    return not failed


@contextlib.contextmanager
def fork_server(address: Path) -> Iterator[Path]:
    """Fork a process that serves `fork_python`."""
    with socket.create_server(str(address), family=socket.AF_UNIX) as listener:
        pid = start_fork(lambda: serve(listener))
    try:
        yield address
    finally:
        terminate(pid)
        os.waitpid(pid, 0)


def run_parts(parts: list[str], folder: Path | None = None, fork: bool = False) -> bool:
    """Run pages, or parts of pages, in parallel.

    Args:
        parts: README.md, or a part of it (see markdown.py) like README.md:1.
        folder: folder for a file of results for each part; None prints them.
        fork: fork each `python` from this process, which is forked from one that has imported the libraries.

    Returns:
        Whether all blocks succeeded.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore Ctrl-C by default
    with tempfile.TemporaryDirectory(prefix="qwen-documents-") as name:
        if fork:
            hub = Path(os.environ["HF_HUB_CACHE"])  # the one that was set when the libraries were imported
        else:
            fill_hub(hub := Path(name) / "hub", ROOT / "checkpoints")
        pids = []
        for number, part in enumerate(parts):
            machine = Path(name) / str(number)
            machine.mkdir()
            report = functools.partial(write_outcome, json_file(folder, part) if folder else None, part)
            pids.append(start_fork(functools.partial(run_part, part, machine, hub, fork, report)))
        signal.signal(signal.SIGTERM, lambda *_: [terminate(pid) for pid in pids])
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        return not any(statuses)


def main() -> int:
    """Run pages. Returns the exit status: 0, or 1 if a block failed."""
    parser = argparse.ArgumentParser(description="Run the blocks of documentation pages in parallel.")
    parser.add_argument(
        "parts", nargs="+", metavar="PAGE", help="README.md, or a part of it (see markdown.py) like README.md:1"
    )
    return int(not run_parts(parser.parse_args().parts))


if __name__ == "__main__":
    sys.exit(main())
