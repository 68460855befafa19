"""Reads the weights of a checkpoint one tensor at a time, from safetensors or .bin files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..model.weight_files_qwen import damaged, open_bin
from .files import CheckpointError, weight_files


class Weights(Mapping[str, torch.Tensor]):
    """Mapping from names to tensors, in file order. Tensors are read on access.

    One file is open at a time, so reading in order uses no memory beyond the tensors that the caller keeps.

    Args:
        folder: a checkpoint that passes `check_weights`.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._opened: tuple[str, Mapping[str, torch.Tensor]] | None = None
        self.files = weight_files(folder)
        """Names of the weight files."""
        self._file_of = {name: file for file in self.files for name in self._open(file)}

    def file_of(self, name: str) -> str:
        """Return the one of `files` that contains the tensor."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        file = self._open(self._file_of[name])
        return file.shape(name) if isinstance(file, _Safetensors) else tuple(file[name].shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._open(self._file_of[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _open(self, file: str) -> Mapping[str, torch.Tensor]:
        if self._opened is None or self._opened[0] != file:
            self._opened = None  # close the previous file first
            self._opened = file, _open_file(self._folder / file)
        return self._opened[1]


class _Safetensors(Mapping[str, torch.Tensor]):
    def __init__(self, path: Path):
        # "pread" copies tensors; with mmap, the pages of the file would stay in memory as well.
        self._file = safe_open(path, framework="pt", backend="pread")
        self._names = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open_file(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        return _Safetensors(path) if path.suffix == ".safetensors" else open_bin(path)
    except SafetensorError as error:
        raise CheckpointError(str(damaged(path, error))) from error
    except OSError as error:
        raise CheckpointError(str(error)) from error
