"""Opens the checkpoint that is exported."""

import os

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import CheckpointError
from ..model.tokenization_qwen import QWenTokenizer


def open_source(checkpoint: str | os.PathLike | None, hub: str | None = None) -> tuple[Checkpoint, QWenTokenizer]:
    """Open a checkpoint, fetch it if need be, and check that it can be exported as a whole.

    Returns:
        The checkpoint and its tokenizer.

    Raises:
        CheckpointError: it is incomplete, an adapter, or its vocabulary does not fit its weights.
    """
    source = Checkpoint(checkpoint, hub=hub)
    if source.is_adapter:
        raise CheckpointError(
            f"{source.name} is an adapter, not a model. Merge it first: `qwen merge {source.name} MERGED`."
        )
    source.check()
    _ = source.folder  # fetched now, so that what is missing is reported first
    tokenizer = source.tokenizer()
    if len(tokenizer) > source.config.vocab_size:
        raise CheckpointError(
            f"The vocabulary of {source.name} has {len(tokenizer)} tokens, and its matrices have "
            f"{source.config.vocab_size} rows: the two come from different models."
        )
    return source, tokenizer
