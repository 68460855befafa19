"""Quantizes the bundled chat model to 4 bits: `python -m checkpoints.recipe.quantize`, from the repository root.

`qwen.quantization` quantizes it like any other model. The tokenizer's files are copied from the float model.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen.checkpoint.loading import BUNDLED_CHAT, BUNDLED_CHAT_INT4, load_tokenizer
from qwen.data.conversation_file import ConversationFile
from qwen.quantization import calibration_samples, quantize

from .data_files import CALIBRATION, CONVERSATIONS
from .train import SEQ_LENGTH


def quantize_bundled(source: Path, target: Path, samples: list[list[int]]) -> None:
    """Quantizes the bundled model `source` to 4 bits and writes it to `target`."""
    quantize(source, target, samples, overwrite=True, cpu_only=True, progress=True)
    (target / "chat_template.jinja").unlink()  # also in the tokenizer's code
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    conversations = ConversationFile(CALIBRATION)
    ids = calibration_samples(conversations, load_tokenizer(BUNDLED_CHAT), SEQ_LENGTH["chat"], CONVERSATIONS)
    quantize_bundled(BUNDLED_CHAT, BUNDLED_CHAT_INT4, ids)
