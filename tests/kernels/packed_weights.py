"""Random linear layers with packed weights, beside the same layers in float32."""

import torch
from torch import nn

from qwen.model.gptq_linear_qwen import GPTQLinear
from tests.support.published_gptq import packed


def packed_linear(
    inputs: int,
    outputs: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    act_order: bool,
    bias: bool,
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> tuple[GPTQLinear, nn.Linear]:
    """Return a layer with random packed weights, and one with the same weights and bias in float32.

    Args:
        group_size: inputs with one scale; -1 for all.
        symmetric: one zero point for all weights.
        act_order: packed weights are not in the order of the inputs.
        dtype: of the bias.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = GPTQLinear(inputs, outputs, bias, bits, group_size)
    groups = torch.arange(inputs) // layer.group_size
    if act_order:
        groups = groups[torch.randperm(inputs, generator=generator)]
    numbers = torch.randint(2**bits, (inputs, outputs), generator=generator)
    scales = (0.5 + torch.rand(layer.scales.shape, generator=generator)) / (2**bits * inputs**0.5)
    zeros = torch.randint(2**bits, scales.shape, generator=generator)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    dense = nn.Linear(inputs, outputs, bias).requires_grad_(False)
    dense.weight.copy_((scales[groups] * (numbers - zeros[groups])).T)
    layer.qweight.copy_(torch.from_numpy(packed(numbers.numpy(), bits)))
    layer.qzeros.copy_(torch.from_numpy(packed(zeros.T.numpy(), bits)).T)
    layer.scales.copy_(scales)
    layer.g_idx.copy_(groups)
    if bias:
        dense.bias.copy_(torch.randn(outputs, generator=generator).to(dtype))
        layer.bias.data.copy_(dense.bias)
    layer.finish_loading("gptq_v2")
    return layer.to(device, dtype), dense.to(device)


def loaded_linear(
    inputs: int, outputs: int, bits: int, group_size: int, *, bias: bool = False, act_order: bool = True, seed: int = 0
) -> GPTQLinear:
    """Return a layer with random tensors, as it is after loading a file; the last group need not be full."""
    generator = torch.Generator().manual_seed(seed)
    layer = GPTQLinear(inputs, outputs, bias, bits, group_size).requires_grad_(False)
    for words in (layer.qweight, layer.qzeros):
        words.copy_(torch.randint(-(2**31), 2**31, words.shape, generator=generator))
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator) / (2**bits * inputs**0.5))
    order = torch.randperm(inputs, generator=generator) if act_order else torch.arange(inputs)
    layer.g_idx.copy_(order // layer.group_size)
    if bias:
        layer.bias.copy_(torch.randn(outputs, generator=generator))
    layer.finish_loading()
    return layer
