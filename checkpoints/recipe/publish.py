"""Writes a trained model to a checkpoint folder: bf16 weights, configuration, vocabulary, code.

The code is that of `qwen/model`, as `save_pretrained` writes it beside every model. After a change there, this command
writes it to the bundled folders again, in seconds and without touching the weights:

    python -m checkpoints.recipe.publish
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers.dynamic_module_utils import custom_object_save

import qwen
from qwen.checkpoint.files import let_others_read
from qwen.checkpoint.loading import BUNDLED_BASE, BUNDLED_CHAT, BUNDLED_CHAT_INT4


def publish(model: qwen.QWenLMHeadModel, tokenizer: qwen.QWenTokenizer, folder: Path, stage: str) -> None:
    """Writes `folder`. The model in memory stays as it is, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(model).to(torch.bfloat16).eval()
    rounded.save_pretrained(folder)
    let_others_read(folder)
    tokenizer.save_vocabulary(str(folder))
    _json(folder / "tokenizer_config.json", {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"})
    write_code(folder)
    _json(folder / "generation_config.json", generation_config(tokenizer, stage))


def write_code(folder: Path) -> None:
    """Writes the modules of the three classes and of all that they import, and names the classes in `auto_map`.

    With it `from_pretrained(folder, trust_remote_code=True)` works where this package is not installed.
    """
    for path in folder.glob("*.py"):  # some may have gone from qwen/model
        path.unlink()
    config = qwen.QWenConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = qwen.QWenLMHeadModel(config)
    tokenizer = qwen.QWenTokenizer(str(folder / "qwen.tiktoken"))
    for name, objects in (("config.json", (config, model)), ("tokenizer_config.json", (tokenizer,))):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content["auto_map"] = {}
        for written in objects:
            custom_object_save(written, folder, config=content)
        _json(folder / name, dict(sorted(content.items())))


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


if __name__ == "__main__":
    for bundled in (BUNDLED_BASE, BUNDLED_CHAT, BUNDLED_CHAT_INT4):
        write_code(bundled)
        print(f"{bundled}: {len(list(bundled.glob('*.py')))} modules")
