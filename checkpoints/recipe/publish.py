"""Writes a trained model to a checkpoint folder: bf16 weights, configuration, vocabulary, code.

The code is a copy of `qwen/model`, as written by `save_pretrained`. After a change there, this command updates the
copies in the bundled folders in seconds, without changing the weights:

    python -m checkpoints.recipe.publish
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

import qwen
from qwen.checkpoint import adoption
from qwen.checkpoint.loading import BUNDLED_BASE, BUNDLED_CHAT, BUNDLED_CHAT_INT4


def publish(model: qwen.QWenLMHeadModel, tokenizer: qwen.QWenTokenizer, folder: Path, stage: str) -> None:
    """Writes `folder`. The model in memory is not modified."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
    rounded.save_pretrained(folder)
    tokenizer.save_vocabulary(str(folder))
    _json(folder / "tokenizer_config.json", {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"})
    write_code(folder)
    _json(folder / "generation_config.json", generation_config(tokenizer, stage))


def write_code(folder: Path) -> None:
    """Writes the modules of the three classes and their imports, and the classes' names in `auto_map`.

    `from_pretrained(folder, trust_remote_code=True)` then works without this package.
    """
    for path in folder.glob("*.py"):  # some may have been removed from qwen/model
        path.unlink()
    auto_maps = adoption.write_code(folder, qwen.QWenTokenizer(str(folder / "qwen.tiktoken")))
    for name, auto_map in zip(("config.json", "tokenizer_config.json"), auto_maps, strict=True):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        _json(folder / name, dict(sorted((content | {"auto_map": auto_map}).items())))


def generation_config(tokenizer: qwen.QWenTokenizer, stage: str) -> dict:
    """Returns a generation config like the published ones, with a lower top_p, because a toy makes more errors."""
    end = tokenizer.eod_id
    return {
        "chat_format": "chatml" if stage == "chat" else "raw",
        "eos_token_id": end,
        "pad_token_id": end,
        **({} if stage == "chat" else {"stop_words_ids": [[end]]}),
        "max_window_size": 768,
        "max_new_tokens": 256,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.5,
    }


def _json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for bundled in (BUNDLED_BASE, BUNDLED_CHAT, BUNDLED_CHAT_INT4):
        write_code(bundled)
        print(f"{bundled}: {len(list(bundled.glob('*.py')))} modules")
