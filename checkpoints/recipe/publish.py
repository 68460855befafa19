"""A trained model to a checkpoint folder: bf16 weights, configuration, vocabulary.

Without the code that other saved checkpoints carry: in this repository that is `qwen/`, and copies of it would age.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

import qwen
from qwen.checkpoint.files import let_others_read


def publish(model: qwen.QWenLMHeadModel, tokenizer: qwen.QWenTokenizer, folder: Path, stage: str) -> None:
    """Writes `folder`. The model in memory stays as it is, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
    rounded.save_pretrained(folder)
    let_others_read(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _json(folder / "config.json", {name: value for name, value in config.items() if name != "auto_map"})
    tokenizer.save_vocabulary(str(folder))
    _json(folder / "tokenizer_config.json", {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"})
    _json(folder / "generation_config.json", generation_config(tokenizer, stage))


def generation_config(tokenizer: qwen.QWenTokenizer, stage: str) -> dict:
    """In the style of the published files; cooler sampling, for a toy strays sooner."""
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
