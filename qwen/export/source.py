"""Opens the checkpoint to export."""

import os

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import CheckpointError
from ..model.tokenization_qwen import QWenTokenizer


def open_checkpoint(checkpoint: str | os.PathLike | None, hub: str | None = None) -> tuple[Checkpoint, QWenTokenizer]:
    """Open a checkpoint, download it if needed, and check that it is complete and can be exported.

    Returns:
        The checkpoint and its tokenizer.

    Raises:
        CheckpointError: incomplete, an adapter, or vocabulary and weights do not match.
    """
    source = Checkpoint(checkpoint, hub=hub)
    if source.is_adapter:
        raise CheckpointError(
            f"{source.name} is an adapter, not a model. Merge it first: `qwen merge {source.name} MERGED`."
        )
    source.check()
    _ = source.folder  # downloads now, so that missing files are reported first
    tokenizer = source.tokenizer()
    source.check_vocabulary_size(tokenizer)
    return source, tokenizer
