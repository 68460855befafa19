"""Compiles kernels.c for this machine, once, and loads it.

The library lies in a folder of this user that nobody else can write to, under a name that depends on the source, the
compiler and the processor. Without a compiler or such a folder nothing is loaded, one line says why, and torch
computes.

    python -m qwen.kernels.compile       compiles ahead of time: for images, read-only homes and shared ones
    QWEN_KERNELS=torch                   never compiles
    QWEN_KERNELS_CACHE=folder            where libraries are kept, instead of ~/.cache/qwen/kernels
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
LOCK_SECONDS = 60  # another process may be compiling
COMPILE_SECONDS = 120
# No -ffast-math: a library that is linked with it switches off denormal numbers in the whole process. No interposition:
# else the calls within the library would go to functions of the same names in other libraries, if there are some.
FLAGS = ["-O3", "-shared", "-fPIC", "-fno-semantic-interposition", "-std=gnu11"]


class KernelsUnavailable(Exception):
    """The library cannot be compiled or loaded; the message says why and what to do."""


def find_compiler() -> list[str] | None:
    """Return the command of the C compiler: that of CC, or the first of gcc and cc that is installed, or None.

    Raises:
        KernelsUnavailable: the command of CC is not installed.
    """
    chosen = os.environ.get("CC", "")
    try:
        command = shlex.split(chosen)
    except ValueError as error:
        raise KernelsUnavailable(f"CC={chosen} is not a command: {error}") from error
    for name in [command[0]] if command else ["gcc", "cc"]:
        if path := shutil.which(name):
            return [path, *command[1:]]
    if command:
        raise KernelsUnavailable(f"the compiler CC={chosen} was not found. Unset CC, or name one that is installed")
    return None


def target_flags() -> list[str]:
    """Return the options for this processor and for OpenMP, as torch uses it."""
    native = "-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"
    if sys.platform == "darwin":  # Apple's compiler has no OpenMP of its own; torch's is loaded already
        return [native, "-Xpreprocessor", "-fopenmp", "-undefined", "dynamic_lookup"]
    # Tuned for some processors, GCC forms fused multiply-adds in some loops only, and the last bit of a result would
    # depend on the number of rows.
    return [native, *(["-mtune=generic"] if native == "-march=native" else []), "-fopenmp"]


def processor() -> str:
    """Return what tells the instruction sets of processors apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def cache_folder() -> Path:
    """Return the folder of the libraries, created if need be.

    Raises:
        KernelsUnavailable: it cannot be created, or somebody else could put a library there.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = Path(os.environ.get("QWEN_KERNELS_CACHE") or base / "qwen" / "kernels")
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = folder.resolve()
        check_ownership(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        raise KernelsUnavailable(f"the folder {folder} for compiled code cannot be used: {error}") from error
    return folder


def check_ownership(path: Path) -> None:
    """Check that only this user and root can change what is at a path.

    Raises:
        KernelsUnavailable: somebody else owns it or a folder above it, or may write to one of them.
    """
    for part in (path, *path.parents):
        info = part.stat()
        shared = info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and not is_private_group(info.st_gid))
        # In a folder with the sticky bit, like /tmp, others cannot replace what is not theirs.
        sticky = part != path and info.st_mode & stat.S_ISVTX
        if info.st_uid not in (os.getuid(), 0) or (shared and not sticky):
            raise KernelsUnavailable(
                f"others own or can write to {part}. "
                f"Choose a folder of your own with QWEN_KERNELS_CACHE, or `chmod go-w {part}`"
            )


def is_private_group(group_id: int) -> bool:
    """Whether a group is named after this user and has no other members: many systems make one for each user, and let
    it write to the user's folders."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(group_id)
    except KeyError:  # not in the lists of users and groups
        return False
    return user.pw_gid == group_id and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def command_line(compiler: list[str]) -> list[str]:
    """Return the command that compiles, without its input and output."""
    return [*compiler, *FLAGS, *target_flags()]


def run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command to its end, and return its status and output.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it does not end.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"LC_ALL": "C"},  # errors in English
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=COMPILE_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # also what a compiler has started
            raise
    return process.returncode, output


def compile_library(folder: Path, key: str, compiler: list[str]) -> Path:
    """Compile kernels.c to a file of a folder, which is there as a whole or not at all.

    Raises:
        KernelsUnavailable: the compiler fails, or the file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            library = Path(scratch) / "kernels.so"
            status, output = run([*command_line(compiler), str(SOURCE), "-o", str(library), "-lm"])
            if status:
                lines = output.split("\n")
                reason = next((line for line in lines if "error" in line), output[-200:].strip() or f"status {status}")
                raise KernelsUnavailable(f"{shlex.join(compiler)} cannot compile {SOURCE.name}: {reason}")
            check_works(library)
            return library.replace(folder / f"kernels-{key}-{_digest(library.read_bytes())}.so")
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailable(f"{SOURCE.name} could not be compiled in {folder}: {error}") from error


def check_works(library: Path) -> None:
    """Load a library in a process of its own: a damaged file, or instructions that the processor lacks, end only that.

    Raises:
        KernelsUnavailable: it cannot be loaded.
    """
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).self_test() != 1)"
    status, _ = run([sys.executable, "-I", "-c", code, str(library)])
    if status:
        raise KernelsUnavailable(f"the compiled library does not run on this processor (status {status})")


def load_library() -> ctypes.CDLL:
    """Load the library, compiled if this machine has not done so yet.

    Raises:
        KernelsUnavailable: see the message.
    """
    try:
        return ctypes.CDLL(str(compiled_library()))
    except OSError as error:
        raise KernelsUnavailable(str(error)) from error


def compiled_library() -> Path:
    """Return the file of the library, compiled if this machine has not done so yet.

    Raises:
        KernelsUnavailable: see the message.
    """
    if os.environ.get("QWEN_KERNELS") == "torch":
        raise KernelsUnavailable("QWEN_KERNELS=torch")
    if os.name != "posix":
        raise KernelsUnavailable("the kernels are for Linux and macOS")
    if not torch.backends.openmp.is_available():
        raise KernelsUnavailable("this build of torch has no OpenMP, whose threads the kernels share")
    try:
        compiler, folder = find_compiler(), cache_folder()
        key = library_key(compiler)
        library = find_library(folder, key)
        if library is None and compiler is None:
            raise KernelsUnavailable(
                "no C compiler was found. Installing one (`apt install gcc`) makes replies on the CPU faster"
            )
        if library is None:
            assert compiler is not None
            with FileLock(folder / f"{key}.lock", timeout=LOCK_SECONDS, mode=0o600):  # another process may be at it
                library = find_library(folder, key)
                if library is None:
                    logger.info("Compiling the kernels for this processor, once")
                    library = compile_library(folder, key, compiler)
        return library
    except (
        OSError,
        NotImplementedError,
        subprocess.SubprocessError,
        Timeout,
    ) as error:  # NotImplementedError: no locks
        raise KernelsUnavailable(str(error)) from error


def library_key(compiler: list[str] | None) -> str:
    """Return a name for the library of this source and processor, and of this compiler if there is one.

    Raises:
        KernelsUnavailable: the compiler has no OpenMP that shares the threads of torch's.
    """
    key = _digest(SOURCE.read_bytes() + processor().encode())
    if compiler is None:
        return key
    version = run([*compiler, "--version"])[1]
    if "clang" in version and sys.platform == "linux":
        raise KernelsUnavailable(
            f"{compiler[0]} is Clang, whose OpenMP would compete with torch's for the cores: "
            "install GCC (`apt install gcc`), and set CC=gcc"
        )
    return f"{key}-{_digest(version.encode() + shlex.join(command_line(compiler)).encode())}"


def find_library(folder: Path, key: str) -> Path | None:
    """Return a library whose contents are those that were compiled: loading a damaged one would end the process."""
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        if path.stem.endswith(_digest(path.read_bytes())):
            return path
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def main() -> int:
    """Compile ahead of time."""
    try:
        print(compiled_library())
    except KernelsUnavailable as error:
        print(f"The kernels are not available: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
