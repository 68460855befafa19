"""Creates the environment of a reader of the documentation: a copy of the repository, with downloads and data in place.

It is a folder, with an isolated network if the kernel allows it. Published checkpoints are replaced by the bundled
toys, and each data set by a few questions in the layout of the real one.
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
    """The environment of a reader, in a folder.

    Args:
        folder: an empty folder.
        hub: a folder filled by `fill_hub`.
        forks: socket of a process that serves `fork_python`, to use its `python`; None for the real one.
    """

    def __init__(self, folder: Path, hub: Path, forks: Path | None = None):
        self.repository = folder / "repository"
        self.home = folder / "home"
        self._hub = hub
        self.home.mkdir()
        copy_repository(self.repository)
        link_environment(self.repository / ".venv")
        if forks:
            python = self.repository / ".venv" / "bin" / "python"
            python.unlink()
            write_command(python, forks)
        write_data(self.repository)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for commands of the documentation."""
        ours = ("QWEN_", "HF_", "OPENAI_", "DASHSCOPE_", "MODELSCOPE_", "PIP_", "XDG_", "PYTEST_", "PYTHON")
        shared = "QWEN_KERNELS_CACHE"  # set by conftest.py: compiled once, not once a machine
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours) or name == shared}
        kept.pop("VIRTUAL_ENV", None)
        return (
            kept
            | {
                "PATH": os.pathsep.join((str(self.repository / ".venv" / "bin"), os.environ["PATH"])),
                "HOME": str(self.home),
                "PYTHONPATH": str(self.repository),  # has the effect of `pip install -e .` for this copy
                "TERM": "dumb",
                "LC_ALL": "C.UTF-8",
                # pip installs nothing, so that the test environment stays unchanged, and fails for missing packages.
                "PIP_NO_INDEX": "1",
                "PIP_DRY_RUN": "1",
                "PIP_NO_BUILD_ISOLATION": "0",
            }
            | import_time_variables(self._hub)
        )


def import_time_variables(hub: Path) -> dict[str, str]:
    """Environment variables that libraries read when they are imported: no downloads, no GPU."""
    return {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # outputs in the pages were computed in float32
        "DS_ACCELERATOR": "cpu",
        "MPLCONFIGDIR": matplotlib_folder(),
    }


def matplotlib_folder() -> str:
    """Return the folder of matplotlib's font list, which takes seconds to create."""
    return os.environ.get("MPLCONFIGDIR") or str(Path.home() / ".cache" / "matplotlib")


def copy_repository(target: Path) -> None:
    """Copy the files of the repository, without generated and ignored ones."""
    for name in repository_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def link_environment(target: Path) -> None:
    """Link the test environment as if `make` had created it, so that `make` installs nothing."""
    (target / "bin").mkdir(parents=True)
    links = {target: Path(sys.prefix), target / "bin": Path(sys.prefix) / "bin"}
    for folder, original in links.items():
        for entry in original.iterdir():
            if not entry.name.startswith(".") and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    # Sorted, because make compares times: .ready must be older than the stamps of the extras.
    for name in sorted({*STAMP.findall((ROOT / "Makefile").read_text(encoding="utf-8"))}):
        (target / name).touch()


def fill_hub(hub: Path, checkpoints: Path) -> None:
    """Create a Hugging Face cache where every published id leads to one of the bundled toys."""
    for name, toy in PUBLISHED.items():
        folder = hub / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        (folder / "snapshots").mkdir()
        (folder / "snapshots" / REVISION).symlink_to(checkpoints / toy)


def write_data(repository: Path) -> None:
    """Write small versions of the data files used by commands of the documentation."""
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
    """Return all 57 MMLU subjects, parsed from the source because importing it takes seconds."""
    tree = ast.parse((ROOT / "qwen" / "evaluation" / "subjects.py").read_text(encoding="utf-8"))
    (mmlu,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "MMLU")
    (groups,) = (ast.literal_eval(keyword.value) for keyword in mmlu.keywords if keyword.arg == "groups")
    return sorted({subject for subjects in groups.values() for subject in subjects})


def write_rows(path: Path, rows: list[list[object]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def isolate_network() -> bool:
    """Move this process and its children into a network namespace that has only the loopback interface.

    Port 8000 is free there, and nothing can be downloaded. Needs no privileges, but a kernel and container that allow
    user namespaces, and a process without threads.

    Returns:
        Whether it succeeded.
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
    socket.sethostname("localhost")  # distributed training connects to the host name
    return True
