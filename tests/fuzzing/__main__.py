"""Searches for requests that break a server, and files that break what reads them, with random seeds, for some minutes.

    python -m tests.fuzzing [server] [page] [files] [--minutes N] [--seed S] [--out FOLDER]

Starts the server, then the web demo, with the bundled chat model, and then a process that reads files, each with its
own temporary folder. First the inputs in FOLDER and in tests/fuzzing/found are tried again, then new ones: hypothesis
generates them, and makes those that fail as small as it can. Each is kept as FOLDER/KIND-….json, with the answer and
what was logged.

At the end a server must have as much memory, threads, files and processes as after its first requests, it must end at
SIGTERM with status 0, and its temporary folder must be empty. Each folder of files is read by a process of its own. The
exit status is 1 if anything failed.

To keep an input as a test, copy its file to tests/fuzzing/found.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import SearchStrategy

from tests.fuzzing.checks import CheckedPage, CheckedServer, PageProcess
from tests.fuzzing.file_checks import CheckedFiles
from tests.support.server_process import ServerProcess

FOUND = Path(__file__).with_name("found")
SHARES = {"server": 5, "page": 2, "files": 3}  # of the time
BATCH = 20  # inputs of one kind before the next kind is tried
WARM_UP = 0.2  # share of the time after which the memory counts
MORE_MEMORY = 128 * 2**20  # bytes
PROGRESS_SECONDS = 10
SETTLE_SECONDS = 60  # idle threads of the server end after ten


class Usage:
    """What a server process and its children hold now."""

    def __init__(self, process: psutil.Process):
        everything = [process, *process.children(recursive=True)]
        self.memory = sum(each.memory_info().rss for each in everything)
        self.held = {"processes": len(everything), "threads": process.num_threads(), "files": process.num_fds()}

    def __str__(self) -> str:
        return f"rss {self.memory / 2**20:.0f} MiB, " + ", ".join(
            f"{name} {count}" for name, count in self.held.items()
        )


class Search:
    """Checks inputs until the time is over, and keeps those that fail.

    Args:
        checked: the server, or the readers of files.
        out: folder for what fails.
        seconds: how long.
        random_seed: seed of the generated inputs.
    """

    def __init__(self, checked: CheckedServer | CheckedFiles, out: Path, seconds: float, random_seed: int):
        self.checked, self.out, self.seconds, self.random_seed = checked, out, seconds, random_seed
        self.started = self.printed = time.monotonic()
        self.found: dict[str, int] = {}  # failures: file name → how often
        self.settled: set[str] = set()  # those that are not made smaller any more
        self.warm: Usage | None = None
        self.process = psutil.Process(checked.pid)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def replay(self, paths: list[Path]) -> None:
        """Check inputs of files."""
        for path in paths:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not self.checked.accepts(fields):
                continue  # it is one of another search
            case = self.checked.read(fields)
            self.settled |= {*self.found}
            try:
                self.check("again", case)
            except AssertionError:
                print(f"fails again: {path}")

    def run(self) -> None:
        """Check generated inputs, some of each kind in turn."""
        kinds = self.checked.kinds()
        draw = random.Random(self.random_seed)
        for name, cases in itertools.cycle(kinds.items()):
            if self.elapsed > self.seconds or not self.checked.is_running():
                return
            self.settled |= {*self.found}
            try:
                self._batch(name, cases, draw.getrandbits(64))
            except Exception as error:
                if self.settled >= self.found.keys():
                    raise RuntimeError(f"{name}: not a failure of what is tried") from error

    def _batch(self, name: str, cases: SearchStrategy[Any], batch_seed: int) -> None:
        @seed(batch_seed)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,  # the files in `out` stay valid when the strategies change
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(case=cases)
        def attempt(case: Any) -> None:
            if self.elapsed < self.seconds:
                self.check(name, case, seed=batch_seed)

        attempt()

    def check(self, name: str, case: Any, **more: Any) -> None:
        """Check an input; write it to a file if it fails.

        Raises:
            AssertionError: it failed in a new way.
        """
        self._progress()
        try:
            self.checked.check(case)
        except AssertionError as error:
            problem = str(error)
            key = self._keep(name, case, problem, **more)
            if key not in self.settled:
                raise

    def _keep(self, name: str, case: Any, problem: str, **more: Any) -> str:
        """Write an input to a file, of which there is one for each kind of failure. Return its name."""
        reason = re.search(r"^\S*(?:Error|Exception|Interrupt)\b.*", problem, re.MULTILINE)
        # Without what differs from input to input.
        brief = re.sub(r"\d+|'.*'|\".*\"", "", reason[0] if reason else problem.partition("\n")[0])
        digest = hashlib.sha256(f"{self.checked.place(case)} {brief}".encode()).hexdigest()[:8]
        key = re.sub(r"\W+", "-", f"{name} {digest}") + ".json" if name != "again" else f"again-{digest}.json"
        known = next((found for found in self.found if found.endswith(f"-{digest}.json")), None)
        if known is None:
            print(f"FAILED {key}: {' '.join(problem.split())[:300]}", flush=True)
        key = known or key
        self.found[key] = self.found.get(key, 0) + 1
        if key not in self.settled:
            fields = self.checked.fields(case) | {"problem": problem[:20_000]} | self.checked.answer() | more
            (self.out / key).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        return key

    def _progress(self) -> None:
        now = time.monotonic()
        if self.warm is None and self.elapsed > WARM_UP * self.seconds:
            self.warm = Usage(self.process)
            print(f"{self._head()}after warming up: {self.warm}", flush=True)
        if now - self.printed > PROGRESS_SECONDS:
            self.printed = now
            rate = self.checked.inputs / self.elapsed
            print(
                f"{self._head()}{self.checked.inputs:,} inputs, {rate:.0f} a second, {Usage(self.process)}, "
                f"{self.checked.status()}{len(self.found)} failures",
                flush=True,
            )

    def _head(self) -> str:
        return f"{int(self.elapsed) // 60:3}:{int(self.elapsed) % 60:02} "


def problems_at_the_end(search: Search, server: ServerProcess, folder: Path, files: set[str]) -> list[str]:
    """End a server, and return what it has kept that it should not.

    Args:
        folder: its temporary folder.
        files: what it had at the start: a folder of torch.
    """
    if (status := server.process.poll()) is not None:
        return [f"the server ended by itself with status {status}"]
    problems = []
    warm = search.warm or Usage(search.process)
    end = time.monotonic() + SETTLE_SECONDS
    while (more := grown(warm, usage := Usage(search.process))) and time.monotonic() < end:
        time.sleep(1)
    print(f"At the end: {usage}")
    problems += more
    problems += left_files(folder, files, "while the server is idle")
    server.signal()
    try:
        status = server.wait(SETTLE_SECONDS)
        problems += [f"the server ended with status {status}"] if status else []
    except Exception as error:
        problems.append(f"the server did not end: {error}")
        server.stop()
    return problems + left_files(folder, files, "after the server has ended")


def left_files(folder: Path, before: set[str], when: str) -> list[str]:
    left = sorted({*os.listdir(folder)} - before)
    return [f"the temporary folder has {left[:10]} {when}"] if left else []


def grown(before: Usage, after: Usage) -> list[str]:
    """Return what a server holds more than before."""
    problems = [
        f"{after.held[name] - count} more {name}" for name, count in before.held.items() if after.held[name] > count + 3
    ]
    if after.memory > before.memory + MORE_MEMORY:
        problems.append(f"{(after.memory - before.memory) / 2**20:.0f} MiB more memory")
    return problems


def search(
    checker: type[CheckedServer],
    process: type[ServerProcess],
    options: list[str],
    out: Path,
    minutes: float,
    number: int,
) -> int:
    """Start a server, search, and return the number of failures."""
    print(f"{process.script}: {minutes:g} minutes, seed {number}, failures go to {out}", flush=True)
    with tempfile.TemporaryDirectory(prefix="qwen-fuzzing-") as folder:
        server = process("-c", "checkpoints/qwen-tiny-chat", *options, python=True, TMPDIR=folder)
        try:
            checked = checker(server)
            files = {*os.listdir(folder)}
            found = Search(checked, out, minutes * 60, number)
            found.replay([*sorted(out.glob("*.json")), *sorted(FOUND.glob("*.json"))])
            found.run()
            checked.close()
            problems = problems_at_the_end(found, server, Path(folder), files)
        finally:
            server.stop()
            out.joinpath(f"{process.script}.log").write_bytes(Path(server.log.name).read_bytes())
    return report(found, problems)


def search_files(out: Path, minutes: float, number: int) -> int:
    """Search for files that break what reads them, and return the number of failures."""
    print(f"files: {minutes:g} minutes, seed {number}, failures go to {out}", flush=True)
    with tempfile.TemporaryDirectory(prefix="qwen-fuzzing-") as folder:
        checked = CheckedFiles(Path(folder))
        found = Search(checked, out, minutes * 60, number)
        found.replay([*sorted(out.glob("*.json")), *sorted(FOUND.glob("*.json"))])
        found.run()
        if checked.is_running():
            problems = grown(found.warm or Usage(found.process), Usage(found.process))
            checked.close()
        else:
            problems = [f"the process ended by itself:\n{checked.process.child.output()[-2000:]}"]
    for (reader, result), count in sorted(checked.results.items()):
        print(f"{reader}: {result} {count:,}")
    return report(found, problems)


def report(search: Search, problems: list[str]) -> int:
    """Print what failed, and return how much."""
    for key, count in search.found.items():
        print(f"FAILED {count} times: {search.out / key}")
    for problem in problems:
        print(f"FAILED: {problem}")
    failures, inputs = len(search.found) + len(problems), search.checked.inputs
    rate = inputs / search.elapsed
    print(f"{inputs:,} inputs, {rate:.0f} a second, {search.checked.status()}{failures} failures", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*", help=f"what to try: {', '.join(SHARES)} (default: all, one after another)")
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="seed of the inputs (default: a random one)")
    parser.add_argument(
        "--out", type=Path, default=Path("fuzz_results"), help="folder for failures (default: %(default)s)"
    )
    args = parser.parse_args()
    chosen = [name for name in SHARES if name in args.what or not args.what]
    if unknown := {*args.what} - {*SHARES}:
        parser.error(f"{min(unknown)!r} is not one of {', '.join(SHARES)}")
    warnings.simplefilter("ignore", HypothesisWarning)  # of large inputs
    args.out.mkdir(parents=True, exist_ok=True)
    number = random.getrandbits(32) if args.seed is None else args.seed
    minutes = {name: args.minutes * SHARES[name] / sum(SHARES[each] for each in chosen) for name in chosen}
    failures = 0
    if "server" in chosen:
        # A small batch limits the cache, which a CPU takes as it is used: the memory can be watched.
        options = ["--max-batch-size", "16"]
        failures += search(CheckedServer, ServerProcess, options, args.out, minutes["server"], number)
    if "page" in chosen:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        failures += search(CheckedPage, PageProcess, ["--server-port", port], args.out, minutes["page"], number)
    if "files" in chosen:
        failures += search_files(args.out, minutes["files"], number)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
