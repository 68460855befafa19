"""Quantizes the bundled chat model to 4 bits: `python -m checkpoints.recipe.quantize`, from the repository root.

GPTQModel does the arithmetic. What it writes beside the weights (a temporary path, its own settings, a changed
configuration) is dropped: `write_checkpoint` makes a folder that looks like a published `-Chat-Int4` one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from itertools import islice
from pathlib import Path

# With one or two cores GPTQModel gives itself one worker, and then fails because it wants two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel, QuantizeConfig

from qwen.loading import BUNDLED_CHAT, BUNDLED_CHAT_INT4, load_tokenizer

from .conversations import conversations
from .train import SEQ_LENGTH, encode_sample

# As in the published config.json files.
QUANTIZATION = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}
SEED = 4


def calibration(folder: Path, count: int = 128, seed: int = SEED) -> list[dict[str, list[int]]]:
    """`input_ids` and `attention_mask` of generated conversations, up to the trained length each."""
    tokenizer = load_tokenizer(folder)
    encoded = (encode_sample(sample, tokenizer, SEQ_LENGTH["chat"]) for sample in conversations(seed))
    ids = (sample["input_ids"] for sample in encoded if sample)
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in islice(ids, count)]


def quantize(source: Path, target: Path, samples: list[dict[str, list[int]]]) -> None:
    """Writes the checkpoint `source` to the folder `target`, quantized with `samples` as calibration."""
    source, target = source.absolute(), target.absolute()
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):  # where GPTQModel leaves its logs
        staged, raw = Path(work, "staged"), Path(work, "raw")
        _stage(source, staged)
        model = GPTQModel.load(str(staged), QuantizeConfig(**QUANTIZATION), device="cpu", dtype=torch.float16)
        model.quantize(samples, batch_size=1)
        model.tokenizer = None  # its save would ask a wrapped tokenizer for a length that it does not know
        model.save(str(raw))
        write_checkpoint(raw, source, target, QUANTIZATION)


def write_checkpoint(raw: Path, source: Path, target: Path, quantization: dict) -> None:
    """Makes `target`: the weights that GPTQModel saved in `raw`, all else from the checkpoint `source`.

    The configuration is that of `source` with `quantization` and float16: what GPTQModel saves of it has fields that
    the model does not know, and lacks none that it needs.
    """
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.safetensors*"):
        old.unlink()
    for weights in raw.glob("*.safetensors*"):  # with the index, where there are several
        shutil.copyfile(weights, target / weights.name)
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, target / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float16"
    config["quantization_config"] = {**quantization, "model_file_base_name": "model", "quant_method": "gptq"}
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")


def _stage(source: Path, staged: Path) -> None:
    """A folder of links to `source` whose tokenizer names a padding token: GPTQModel insists on one."""
    staged.mkdir()
    for path in source.resolve().iterdir():
        if path.name != "tokenizer_config.json":
            (staged / path.name).symlink_to(path)
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["pad_token"] = "<|endoftext|>"
    (staged / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    quantize(BUNDLED_CHAT, BUNDLED_CHAT_INT4, calibration(BUNDLED_CHAT))
