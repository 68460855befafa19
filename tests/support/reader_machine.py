"""Makes the machine of somebody who reads the documentation: a copy of the repository, downloads done, data in place.

It is one folder, with a network of its own where the kernel gives one. What the documentation names and cannot be
shipped is made up here: the published checkpoints are the bundled toys, and each data set has a few questions in the
layout of the real one.
"""

import ast
import csv
import ctypes
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import sys
from pathlib import Path

from tests.support import ROOT
from tests.support.fork_python import write_command
from tests.support.markdown import repository_files

REVISION = "0123456789abcdef0123456789abcdef01234567"
PUBLISHED = {
    f"Qwen/Qwen-{size}{kind}": f"qwen-tiny-{toy}"
    for size in ("1_8B", "7B", "14B", "72B")
    for kind, toy in (("", "base"), ("-Chat", "chat"), ("-Chat-Int4", "chat-int4"), ("-Chat-Int8", "chat-int4"))
}
STAMP = re.compile(r"\.ready(?:-\w+)?\b")

CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWNET = 0x04000000, 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


class Machine:
    """All of it, made in a folder.

    Args:
        folder: an empty one.
        hub: what `fill_hub` has filled.
        forks: where a process serves `fork_python`, if its `python` is to be that.
    """

    def __init__(self, folder: Path, hub: Path, forks: Path | None = None):
        self.repository = folder / "repository"
        self.home = folder / "home"
        self._hub = hub
        self.home.mkdir()
        copy_of_the_repository(self.repository)
        link_environment(self.repository / ".venv")
        if forks:
            python = self.repository / ".venv" / "bin" / "python"
            python.unlink()
            write_command(python, forks)
        write_data(self.repository)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a command of the documentation sees."""
        ours = ("QWEN_", "HF_", "OPENAI_", "DASHSCOPE_", "MODELSCOPE_", "PIP_", "XDG_", "PYTEST_", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        kept.pop("VIRTUAL_ENV", None)
        return (
            kept
            | {
                "PATH": os.pathsep.join((str(self.repository / ".venv" / "bin"), os.environ["PATH"])),
                "HOME": str(self.home),
                "PYTHONPATH": str(self.repository),  # what `make` and `pip install -e .` do for this copy
                "TERM": "dumb",
                "LC_ALL": "C.UTF-8",
                # What pip is asked to install is there already, or pip says that it is not; the tests' environment
                # stays as it is.
                "PIP_NO_INDEX": "1",
                "PIP_DRY_RUN": "1",
                "PIP_NO_BUILD_ISOLATION": "0",
            }
            | read_at_import(self._hub)
        )


def read_at_import(hub: Path) -> dict[str, str]:
    """The variables that libraries read when they are imported: nothing is downloaded, no graphics card is used."""
    return {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # what the pages print was computed in float32
        "DS_ACCELERATOR": "cpu",
        "MPLCONFIGDIR": matplotlib_folder(),
    }


def matplotlib_folder() -> str:
    """Where matplotlib keeps its list of fonts, which takes seconds to make."""
    return os.environ.get("MPLCONFIGDIR") or str(Path.home() / ".cache" / "matplotlib")


def copy_of_the_repository(target: Path) -> None:
    """What belongs to it, without what was made in it."""
    for name in repository_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def link_environment(target: Path) -> None:
    """The environment that the tests run in, as `make` would have made it: it finds nothing to install."""
    (target / "bin").mkdir(parents=True)
    links = {target: Path(sys.prefix), target / "bin": Path(sys.prefix) / "bin"}
    for folder, original in links.items():
        for entry in original.iterdir():
            if not entry.name.startswith(".") and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    # Sorted: make compares their times, and .ready comes before those of the extras.
    for name in sorted({*STAMP.findall((ROOT / "Makefile").read_text(encoding="utf-8"))}):
        (target / name).touch()


def fill_hub(hub: Path, checkpoints: Path) -> None:
    """A cache of the Hugging Face hub in which every published id is one of the bundled toys."""
    for name, toy in PUBLISHED.items():
        folder = hub / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        (folder / "snapshots").mkdir()
        (folder / "snapshots" / REVISION).symlink_to(checkpoints / toy)


def write_data(repository: Path) -> None:
    """The files that the commands of the documentation name, with little in them."""
    samples = json.loads((repository / "examples" / "identity.json").read_text(encoding="utf-8"))
    (repository / "data.json").write_text(json.dumps(samples[:16], ensure_ascii=False), encoding="utf-8")
    data = repository / "data"
    sums = [[f"What is {n} + {n}?", 2 * n, n, n + 3, 0, "A"] for n in range(1, 7)]
    for subject in mmlu_subjects():
        write_rows(data / "mmlu" / "dev" / f"{subject}_dev.csv", sums[:5])
        write_rows(data / "mmlu" / "test" / f"{subject}_test.csv", sums[5:])
    for split, numbers in (("train", range(1, 10)), ("test", range(10, 12))):
        path = data / "gsm8k" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        records = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in numbers]
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def mmlu_subjects() -> list[str]:
    """All 57, read from the source: to import it would take the seconds that torch takes."""
    tree = ast.parse((ROOT / "qwen" / "evaluation" / "subjects.py").read_text(encoding="utf-8"))
    (mmlu,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "MMLU")
    (groups,) = (ast.literal_eval(keyword.value) for keyword in mmlu.keywords if keyword.arg == "groups")
    return sorted({subject for subjects in groups.values() for subject in subjects})


def write_rows(path: Path, rows: list[list[object]]) -> None:
    """A file of comma-separated values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def leave_the_network() -> bool:
    """Give this process, and those that it starts, a network of their own with nothing but the loopback interface.

    Port 8000 is free there, whatever runs on this machine, and nothing can be downloaded. Needs no privileges, but a
    kernel and a container that allow user namespaces, and a process without threads.

    Returns:
        whether it worked.
    """
    if not sys.platform.startswith("linux"):
        return False
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWUTS):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket() as loopback:
        fcntl.ioctl(loopback, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    socket.sethostname("localhost")  # processes that train together look for one another under the machine's name
    return True
