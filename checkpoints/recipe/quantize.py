"""Quantizes the bundled chat model to 4 bits: `python -m checkpoints.recipe.quantize`, from the repository root.

`qwen.quantization` does it, for this model as for any other. The folder carries no code, as `publish` leaves it out of
the others.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qwen.checkpoint.loading import BUNDLED_CHAT, BUNDLED_CHAT_INT4, load_tokenizer
from qwen.data.conversation_file import ConversationFile
from qwen.quantization import calibration_samples, quantize

from .data_files import CALIBRATION, CONVERSATIONS
from .train import SEQ_LENGTH


def quantize_without_code(source: Path, target: Path, samples: list[list[int]]) -> None:
    """Writes `target`: the bundled model `source` in 4 bits, with its very tokenizer files and no code."""
    quantize(source, target, samples, overwrite=True, cpu_only=True, progress=True)
    for path in (*target.glob("*.py"), target / "chat_template.jinja"):  # qwen/ has the template as well
        path.unlink()
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    del config["auto_map"]
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    conversations = ConversationFile(CALIBRATION)
    ids = calibration_samples(conversations, load_tokenizer(BUNDLED_CHAT), SEQ_LENGTH["chat"], CONVERSATIONS)
    quantize_without_code(BUNDLED_CHAT, BUNDLED_CHAT_INT4, ids)
