"""Finds the files of a checkpoint by its name: in a local folder, on the Hugging Face Hub or on ModelScope."""

import difflib
from pathlib import Path

from transformers.utils import CONFIG_NAME

from .files import CheckpointError, download_advice, join_names
from .hub import HUB_ID, PUBLISHED, DownloadOptions, Files, HubOptions, default_hub
from .hub_huggingface import HuggingFaceFiles
from .hub_modelscope import ModelScopeFiles
from .staging import interrupted_moves


def find(name: str, options: HubOptions) -> Files:
    """Return the files of a checkpoint by its name: a folder or a hub id.

    Raises:
        CheckpointError: `name` is neither a folder nor a hub id, or $QWEN_HUB is invalid.
    """
    path = Path(name)
    if name and path.is_dir():
        return LocalFiles(path / (options.subfolder or ""), name)
    if path.is_file():
        raise CheckpointError(f"{name} is a file. Name the folder that contains it (with config.json and the weights).")
    if HUB_ID.fullmatch(name):
        if name not in PUBLISHED and (found := sorted(file.parent.name for file in path.parent.glob("*/config.json"))):
            raise CheckpointError(f"There is no folder {name!r}; {path.parent} holds {join_names(found)}.")
        if (options.hub or default_hub()) == "huggingface":
            return HuggingFaceFiles(name, options)
        return ModelScopeFiles(name, options)
    matches = difflib.get_close_matches(f"Qwen/{path.name}", PUBLISHED, n=1, cutoff=0.75)
    raise CheckpointError(
        f"There is no folder {name!r}, and it is not a hub id (OWNER/NAME) either. "
        + (f"Did you mean {matches[0]}?" if matches else "Check the path, or name a model, e.g. Qwen/Qwen-7B-Chat.")
    )


class LocalFiles:
    """A checkpoint in a local folder.

    Args:
        path: the folder, including the subfolder.
        name: the name given by the user.
    """

    def __init__(self, path: Path, name: str):
        self.path, self._name = path, name

    def find(self, name: str) -> Path | None:
        return self.path / name if (self.path / name).is_file() else None

    def config(self) -> Path:
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} does not exist. Omit `subfolder`, or name an existing subfolder of {self._name}."
            )
        if not (self.path / CONFIG_NAME).is_file():
            if (staging := interrupted_moves(self.path)) is not None:
                raise CheckpointError(
                    f"{self.path} has no config.json: the run that wrote it was killed while it moved the finished "
                    f"model from {staging}. Repeat its command, which finishes that first."
                )
            raise CheckpointError(
                f"{self.path} has no config.json: it is no model folder, or an incomplete one. "
                + download_advice(self.path)
            )
        return self.path / CONFIG_NAME

    def from_pretrained_args(self, *, weights: bool = False) -> tuple[str, DownloadOptions]:
        return str(self.path), {}

    def folder(self) -> Path:
        return self.path
