"""How the matrices of this family lie in its checkpoints, float or GPTQ.

What every target format has to know: which tensors there are, which parts belong to one matrix, and what numbers packed
integers stand for.
"""

import torch

from ..checkpoint.files import CheckpointError
from ..checkpoint.weights import Weights
from ..model.configuration_qwen import QWenConfig
from ..model.gptq_qwen import PARTS

EMBEDDING, NORM, HEAD = "transformer.wte", "transformer.ln_f", "lm_head"
IN_LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.w1", "mlp.w2", "mlp.c_proj")
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
BIASED = "attn.c_attn"
"""The one module that has a bias whatever the config says."""


def modules(config: QWenConfig) -> list[str]:
    """The names of all modules with weights, from the embedding to the output."""
    layers = [f"transformer.h.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in IN_LAYERS]
    return [EMBEDDING, *layers, NORM, *([] if config.tie_word_embeddings else [HEAD])]


def shapes(config: QWenConfig) -> dict[str, tuple[int, ...]]:
    """The weight of each kind of module, by its name without the layer: (outputs, inputs) of matrices."""
    hidden, width = config.hidden_size, config.intermediate_size // 2
    heads = config.num_attention_heads * config.kv_channels
    table = (config.vocab_size, hidden)
    return {
        EMBEDDING: table,
        HEAD: table,
        NORM: (hidden,),
        "ln_1": (hidden,),
        "ln_2": (hidden,),
        "attn.c_attn": (3 * heads, hidden),
        "attn.c_proj": (hidden, heads),
        "mlp.w1": (width, hidden),
        "mlp.w2": (width, hidden),
        "mlp.c_proj": (hidden, width),
    }


def split_name(name: str) -> tuple[str, str, str]:
    """A tensor's name as layer ("" outside of the layers), module and part: "transformer.h.3.mlp.w1.weight" is "3",
    "mlp.w1", "weight"."""
    module, part = name.rsplit(".", 1)
    if not module.startswith("transformer.h."):
        return "", module, part
    layer, module = module.removeprefix("transformer.h.").split(".", 1)
    return layer, module, part


def wanted(weights: Weights, config: QWenConfig) -> list[str]:
    """The names of the tensors that make the model, in the order of their files.

    Left out are biases of zeros, which published GPTQ files have where the network has none, and tables that some
    files carry though they follow from the config.

    Raises:
        CheckpointError: tensors are missing or have other shapes than the config gives, or biases are not zero where
            other architectures have none.
    """
    names = []
    layers = {layer for layer, _, _ in map(split_name, weights) if layer}
    if len(layers) > config.num_hidden_layers:
        raise CheckpointError(
            f"There are weights of {len(layers)} layers, and config.json names {config.num_hidden_layers}: the two "
            "come from different models. Download the checkpoint again as a whole."
        )
    for module in modules(config):
        found = [part for part in ("weight", *(part[1:] for part in PARTS)) if f"{module}.{part}" in weights]
        needed = [part[1:] for part in PARTS] if "qweight" in found else ["weight"]
        if module.endswith(BIASED):
            needed.append("bias")
        if missing := [part for part in needed if f"{module}.{part}" not in weights]:
            raise CheckpointError(
                f"{module}.{missing[0]} is in none of the weight files: the checkpoint is incomplete, or its "
                "config.json belongs to another model. Download it again as a whole."
            )
        names += [f"{module}.{part}" for part in needed]
        _check_shape(f"{module}.{needed[0]}", weights, config)
        bias = f"{module}.bias"
        if bias in weights and not module.endswith(BIASED) and weights[bias].any():
            raise CheckpointError(
                f"{bias} is not zero. Neither Qwen2 nor llama.cpp has a bias there: this model cannot be exported."
            )
    kept = set(names)
    return [name for name in weights if name in kept]


def _check_shape(name: str, weights: Weights, config: QWenConfig) -> None:
    _, module, part = split_name(name)
    whole = shapes(config)[module]
    shape: tuple[int, ...] | None = whole
    if part == "qweight":
        bits = (getattr(config, "quantization_config", None) or {}).get("bits")
        shape = (whole[1] * bits // 32, whole[0]) if bits else None
    if (found := weights.shape(name)) != shape:
        raise CheckpointError(
            f"{name} has the shape {found}, and config.json means {shape or 'no quantized weights'}: the two come from "
            "different models. Download the checkpoint again as a whole."
        )


def dequantized(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, config: dict
) -> torch.Tensor:
    """The matrix (outputs, inputs), float32, that the parts of a GPTQ layer stand for: scale · (integer − zero).

    Args:
        qweight: (inputs · bits / 32, outputs), integers packed along the inputs, low bits first.
        qzeros: (groups, outputs · bits / 32), packed along the outputs; less one in AutoGPTQ's first layout.
        scales: (groups, outputs).
        g_idx: (inputs), the group of each.
        config: `quantization_config`, for bits and layout.

    Raises:
        CheckpointError: integers of 3 bits, which lie across words.
    """
    bits = config["bits"]
    if 32 % bits:
        raise CheckpointError(f"Weights of {bits} bits cannot be written in another type than their own.")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    top = 2**bits - 1
    integers = (qweight[:, None, :] >> shifts[:, None] & top).flatten(0, 1)
    zeros = (qzeros[:, :, None] >> shifts & top).flatten(1)
    if config.get("checkpoint_format", "gptq") == "gptq":
        zeros = zeros + 1
    groups = g_idx.long()
    return (scales.float()[groups] * (integers - zeros[groups])).T
