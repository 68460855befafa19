"""Checkpoints in the layouts of the published ones, made of the bundled toy."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support.published_gptq import quantized

FIRST_RELEASE = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "ffn_hidden_size",
    "emb_dropout_prob": "embd_pdrop",
    "attn_dropout_prob": "attn_pdrop",
    "vocab_size": "padded_vocab_size",
}
TRAP = "raise RuntimeError('the code beside the weights was run')\n"


def write_published(folder: Path, source: Path, *, first_release: bool = False, **fields: Any) -> Path:
    """Copy a checkpoint, with code beside the weights that must not be run.

    Args:
        first_release: name the fields of config.json as the very first release did.
        fields: further fields of config.json.
    """
    folder.mkdir()
    for name in ("model.safetensors", "qwen.tiktoken", "generation_config.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    for name in ("configuration_qwen.py", "modeling_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text(TRAP)
    config = json.loads((source / "config.json").read_text()) | fields
    config["torch_dtype"] = config.pop("dtype")
    config["auto_map"].pop("AutoModel", None)
    if first_release:
        config = {FIRST_RELEASE.get(name, name): value for name, value in config.items()} | {"resid_pdrop": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_quantized(folder: Path, source: Path, bits: int) -> Path:
    """Write a checkpoint in the layout of the published Int4 and Int8 ones: packed, with biases of zeros."""
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 128, "desc_act": False, "sym": True}
    write_published(folder, source, quantization_config=settings)
    generator, tensors = np.random.default_rng(0), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, part = name.rsplit(".", 1)
        if ".h." not in name or part != "weight" or tensor.dim() == 1:
            tensors[name] = tensor.half()
            continue
        parts, _ = quantized(tensor.float().T.numpy(), bits, 128, False, True, generator)
        tensors |= {f"{module}.{part}": torch.from_numpy(values) for part, values in parts.items()}
        if not module.endswith("c_attn"):
            tensors[f"{module}.bias"] = torch.from_numpy(np.zeros(len(tensor), np.float16))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
