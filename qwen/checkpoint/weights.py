"""The weights of a checkpoint, one tensor at a time.

Knows the two ways in which they are stored, and not what they mean.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .files import CheckpointError, first_line, weight_files


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by name, in the order of the files that they lie in; each is read when it is asked for.

    One file is open at a time, so reading in order costs no more memory than what is kept.

    Args:
        folder: a checkpoint that `check_weights` passes.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._opened: tuple[str, Mapping[str, torch.Tensor]] | None = None
        self.files = weight_files(folder)
        """Names of the files of weights."""
        self._file_of = {name: file for file in self.files for name in self._open(file)}

    def file_of(self, name: str) -> str:
        """The one of `files` that a tensor lies in."""
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which is not read for it."""
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
            self._opened = None  # the one before goes first
            self._opened = file, _opened(self._folder / file)
        return self._opened[1]


class _Safetensors(Mapping[str, torch.Tensor]):
    def __init__(self, path: Path):
        # "pread" copies what is read; pages of a mapped file would stay in memory beside it.
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


def _opened(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return _Safetensors(path)
        # Files of torch before 1.6 are no archives and cannot be mapped.
        tensors = torch.load(path, mmap=zipfile.is_zipfile(path), weights_only=True, map_location="cpu")
        return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    except (AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} holds something else than tensors by name, and is not read: take the weights from where they were "
            "published."
        ) from error
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}): its download stopped early, or it is damaged. Delete it "
            "and download it again."
        ) from error
