"""Builds and loads `cuda_guard.cpp`, once for all processes and runs."""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

SOURCE = Path(__file__).with_suffix(".cpp")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qwen-tests"


class NoGuard(Exception):
    """The guard cannot be built or loaded here."""


@functools.cache
def cuda_guard() -> ctypes.CDLL:
    """Register the guard in this process; return the library, with `pretend_current_device` and `pretend_set_device`.

    Raises:
        NoGuard: there is a real GPU, no C++ compiler, or no folder to build in.
    """
    return ctypes.CDLL(str(built_guard()))


def built_guard() -> Path:
    """Return the path of the library, built if needed. Preloaded, it also serves the backward pass.

    Raises:
        NoGuard: as for `cuda_guard`.
    """
    if torch.cuda.is_available():
        raise NoGuard("this machine has a GPU: set CUDA_VISIBLE_DEVICES= to pretend others")
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = CACHE / f"pretend_cuda_guard_{key}.so"
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NoGuard(f"{CACHE} cannot be created ({error.strerror}): set XDG_CACHE_HOME") from error
    with FileLock(f"{library}.lock"):
        if not library.exists():
            _build(library)
    return library


def _build(library: Path) -> None:
    from torch.utils import cpp_extension  # takes a second

    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        built = Path(folder) / library.name
        flags = [
            "-std=c++20",
            "-shared",
            "-fPIC",
            *includes,
            str(SOURCE),
            "-o",
            str(built),
            *libraries,
            "-lc10",
            "-ltorch_cpu",
        ]
        try:
            done = subprocess.run([cpp_extension.get_cxx_compiler(), *flags], capture_output=True, text=True)
        except FileNotFoundError as error:
            raise NoGuard("there is no C++ compiler: apt install g++") from error
        if done.returncode != 0:
            raise NoGuard(f"{SOURCE.name} does not compile: {done.stderr[-2000:]}")
        built.replace(library)  # never half written, whoever else looks
