"""Writes checkpoints in the exact layout of the published Int4 and Int8 ones.

Implemented with numpy from the definition of the layout (AutoGPTQ version 1), as an independent reference for loaders.
A linear layer y = W x with `inputs` and `outputs` has the tensors

    qweight  int32 (inputs · bits / 32, outputs)    integers 0 … 2^bits − 1, packed along the inputs, low bits first
    qzeros   int32 (groups, outputs · bits / 32)    zero points minus one, packed along the outputs
    scales   float16 (groups, outputs)
    g_idx    int32 (inputs)                         group of each input
    bias     float16 (outputs)                      zeros if the network has no bias

and represents W[o, i] = scales[g, o] · (integer[i, o] − zero[g, o]) with g = g_idx[i].
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from qwen import QWenConfig, QWenLMHeadModel

# Fields of published config.json files that are never read.
EXTRAS = {"onnx_safe": None, "tokenizer_type": "QWenTokenizer", "torch_dtype": "float16"}


def write_published(
    folder: Path,
    bundled_chat: Path,
    *,
    bits: int,
    group_size: int = 128,
    desc_act: bool = False,
    sym: bool = True,
    seed: int = 0,
) -> QWenLMHeadModel:
    """Write a random two-layer chat model (width 256, MLP 384), quantized by rounding, with `bundled_chat`'s tokenizer.

    Args:
        group_size: number of inputs that share a scale; −1 for all inputs.
        desc_act: group the inputs by importance (random here) instead of position.

    Returns:
        The dequantized model, in float32.
    """
    config = QWenConfig.from_pretrained(
        bundled_chat, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=768
    )
    torch.manual_seed(seed)
    model = QWenLMHeadModel(config).eval()
    generator = np.random.default_rng(seed)
    tensors, dequantized = {}, {}
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if ".h." not in name or weight.dim() == 1:
            # Scaled up for distinct logits, and rounded to half precision.
            tensors[name] = (weight * (1 if "ln_" in name else 5)).half()
            dequantized[name] = tensors[name].float()
            continue
        scaled = 5 * weight.T.numpy()
        parts, matrix = quantized(scaled, bits, group_size, desc_act, sym, generator)
        tensors |= {f"{layer}.{part}": torch.from_numpy(values) for part, values in parts.items()}
        dequantized[name] = torch.from_numpy(matrix.T.copy())
        if f"{layer}.bias" not in model.state_dict():
            tensors[f"{layer}.bias"] = torch.zeros(weight.shape[0], dtype=torch.float16)
    bias = torch.randn(2, 3 * 256, generator=torch.Generator().manual_seed(seed)) / 4
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.c_attn.bias"
        tensors[name] = bias[layer].half()
        dequantized[name] = tensors[name].float()
    model.load_state_dict(dequantized)

    folder.mkdir(parents=True)
    write_shards(folder, tensors, count=3)
    quantization = {
        "bits": bits,
        "damp_percent": 0.01,
        "desc_act": desc_act,
        "group_size": group_size,
        "model_file_base_name": "model",
        "model_name_or_path": None,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": sym,
        "true_sequential": True,
    }
    document = json.loads((bundled_chat / "config.json").read_text(encoding="utf-8"))
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    document |= shape | EXTRAS | {"intermediate_size": 768, "fp16": True, "quantization_config": quantization}
    document["auto_map"] = {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    }
    del document["dtype"]
    (folder / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(bundled_chat / name, folder / name)
    return model


def quantized(
    weight: np.ndarray, bits: int, group_size: int, desc_act: bool, sym: bool, generator: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Quantize a linear layer. Returns its tensors and the dequantized matrix.

    Args:
        weight: (inputs, outputs), float32.
    """
    inputs, outputs = weight.shape
    size, top = inputs if group_size == -1 else group_size, 2**bits - 1
    g_idx = np.arange(inputs) // size
    if desc_act:
        g_idx = g_idx[generator.permutation(inputs)]
    scales = np.empty((inputs // size, outputs), np.float16)
    zeros = np.empty((inputs // size, outputs), np.int64)
    for group in range(inputs // size):
        rows = weight[g_idx == group]
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        if sym:
            high = np.maximum(high, -low)
            low = -high
        scales[group] = (high - low) / top
        # Zero points start at 1: 0 would be stored as −1, which overflows into adjacent bits.
        zeros[group] = 2 ** (bits - 1) if sym else np.clip(np.round(-low / scales[group]), 1, top)
    scale, zero = scales[g_idx].astype(np.float32), zeros[g_idx]
    integers = np.clip(np.round(weight / scale) + zero, 0, top).astype(np.int64)
    parts = {
        "qweight": packed(integers, bits),
        "qzeros": packed((zeros - 1).T, bits).T.copy(),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return parts, scale * (integers - zero)


def packed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers below 2^bits into int32 words along the first axis, the first integer in the lowest bits."""
    count = 32 // bits
    words = np.zeros((integers.shape[0] // count, integers.shape[1]), np.uint32)
    for place in range(count):
        words |= integers[place::count].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """Write `count` files model-0000x-of-0000y.safetensors with about as many tensors each, and the index."""
    names, weight_map = sorted(tensors), {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        here = {name: tensors[name].contiguous() for name in names[shard::count]}
        save_file(here, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(here, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
