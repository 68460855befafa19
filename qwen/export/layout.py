"""Tensor layout of this family's checkpoints, float or GPTQ.

Used by all target formats: tensor names, the parts of a GPTQ matrix, and the values that packed integers encode.
"""

import torch

from ..checkpoint.files import CheckpointError
from ..checkpoint.weights import Weights
from ..model.configuration_qwen import QWenConfig
from ..model.gptq_qwen import GPTQ_SUFFIXES

EMBEDDING, NORM, HEAD = "transformer.wte", "transformer.ln_f", "lm_head"
LAYER_MODULES = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.w1", "mlp.w2", "mlp.c_proj")
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
QKV_MODULE = "attn.c_attn"
"""Query, key and value in one matrix. The only module that always has a bias, independent of the config."""


def module_names(config: QWenConfig) -> list[str]:
    """Return the names of all modules with weights, from the embedding to the output."""
    layers = [f"transformer.h.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in LAYER_MODULES]
    return [EMBEDDING, *layers, NORM, *([] if config.tie_word_embeddings else [HEAD])]


def weight_shapes(config: QWenConfig) -> dict[str, tuple[int, ...]]:
    """Return the weight shape of each module, keyed by its name without the layer; matrices are (outputs, inputs)."""
    hidden, mlp_size = config.hidden_size, config.intermediate_size // 2
    projection_size = config.num_attention_heads * config.kv_channels
    embedding_shape = (config.vocab_size, hidden)
    return {
        EMBEDDING: embedding_shape,
        HEAD: embedding_shape,
        NORM: (hidden,),
        "ln_1": (hidden,),
        "ln_2": (hidden,),
        "attn.c_attn": (3 * projection_size, hidden),
        "attn.c_proj": (hidden, projection_size),
        "mlp.w1": (mlp_size, hidden),
        "mlp.w2": (mlp_size, hidden),
        "mlp.c_proj": (hidden, mlp_size),
    }


def split_name(name: str) -> tuple[str, str, str]:
    """Split a tensor name into layer ("" outside the layers), module and part.

    "transformer.h.3.mlp.w1.weight" gives ("3", "mlp.w1", "weight").
    """
    module, _, part = name.rpartition(".")
    if not module.startswith("transformer.h."):
        return "", module, part
    layer, _, module = module.removeprefix("transformer.h.").partition(".")
    return layer, module, part


def exported_tensors(weights: Weights, config: QWenConfig) -> list[str]:
    """Return the names of the tensors to export, in file order.

    Skips the zero biases of published GPTQ files where the network has no bias, and tables that follow from the config.

    Raises:
        CheckpointError: tensors are missing, shapes contradict the config, or biases that other architectures lack are
            not zero.
    """
    names = []
    layers = {layer for layer, _, _ in map(split_name, weights) if layer}
    if len(layers) > config.num_hidden_layers:
        raise CheckpointError(
            f"The weight files have {len(layers)} layers, but config.json has num_hidden_layers "
            f"{config.num_hidden_layers}: they belong to different models. Download the whole checkpoint again."
        )
    for module in module_names(config):
        found = [part for part in ("weight", *(part[1:] for part in GPTQ_SUFFIXES)) if f"{module}.{part}" in weights]
        needed = [part[1:] for part in GPTQ_SUFFIXES] if "qweight" in found else ["weight"]
        if module.endswith(QKV_MODULE):
            needed.append("bias")
        if missing := [part for part in needed if f"{module}.{part}" not in weights]:
            raise CheckpointError(
                f"{module}.{missing[0]} is missing from the weight files: the checkpoint is incomplete, or its "
                "config.json belongs to another model. Download the whole checkpoint again."
            )
        names += [f"{module}.{part}" for part in needed]
        _check_shape(f"{module}.{needed[0]}", weights, config)
        bias = f"{module}.bias"
        if bias in weights and not module.endswith(QKV_MODULE) and weights[bias].any():
            raise CheckpointError(
                f"{bias} is not zero, but Qwen2 and llama.cpp have no such bias: this model cannot be exported."
            )
    exported = set(names)
    return [name for name in weights if name in exported]


def _check_shape(name: str, weights: Weights, config: QWenConfig) -> None:
    _, module, part = split_name(name)
    unpacked_shape = weight_shapes(config)[module]
    shape: tuple[int, ...] | None = unpacked_shape
    if part == "qweight":
        bits = (getattr(config, "quantization_config", None) or {}).get("bits")
        shape = (unpacked_shape[1] * bits // 32, unpacked_shape[0]) if bits else None
    if (found := weights.shape(name)) != shape:
        raise CheckpointError(
            f"{name} has the shape {found}, but config.json gives {shape or 'no quantized weights'}: they belong to "
            "different models. Download the whole checkpoint again."
        )


def dequantize_weight(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, config: dict
) -> torch.Tensor:
    """Dequantize a GPTQ layer to a float32 matrix (outputs, inputs): scale · (integer − zero).

    Args:
        qweight: (inputs · bits / 32, outputs), integers packed along the inputs, low bits first.
        qzeros: (groups, outputs · bits / 32), packed along the outputs; stored minus one in AutoGPTQ's first layout.
        scales: (groups, outputs).
        g_idx: (inputs), the group of each input.
        config: `quantization_config`, for bits and layout.

    Raises:
        CheckpointError: 3-bit weights, whose integers cross word boundaries.
    """
    bits = config["bits"]
    if 32 % bits:
        raise CheckpointError(f"{bits}-bit weights cannot be converted to another type.")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    max_int = 2**bits - 1
    quantized = (qweight[:, None, :] >> shifts[:, None] & max_int).flatten(0, 1)
    zeros = (qzeros[:, :, None] >> shifts & max_int).flatten(1)
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    groups = g_idx.long()
    return (scales.float()[groups] * (quantized - zeros[groups])).T
