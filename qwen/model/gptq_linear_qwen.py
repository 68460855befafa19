"""Linear layers that compute with GPTQ weights in plain torch (Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

The packed weights stay as they are in the published files and are dequantized for each call, exactly up to one rounding
to the type of the activations. `qwen.kernels` has faster versions for few tokens.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

BITS = (4, 8)
"""Sizes of the integers that fill 32-bit words without remainder and were published."""


class DequantizedWeight(nn.Parameter):
    """A copy of packed weights. It cannot be replaced, because that would not change the packed ones.

    Tools that merge adapters assign to `weight.data`.
    """

    @property
    def data(self) -> torch.Tensor:
        """The values."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise RuntimeError(
            "GPTQ weights cannot be changed: they are packed, and this is a dequantized copy. To merge an adapter, "
            "load it on the model without -Int4 or -Int8."
        )


class GPTQLinear(nn.Linear):
    """A linear layer with integers of 4 or 8 bits: W[n, k] = scale[g, n] · (integer[k, n] − zero[g, n]).

    It is created with the tensors of a file, which `finish_loading` replaces by those that are listed here.

    Attributes:
        qweight: (K · bits / 32, N), int32; integers packed along the inputs, the first one in the lowest bits.
        scales: (K / group_size, N), float32, also after `to(dtype)`.
        zeros: (K / group_size, N), uint8; None if all are equal.
        zero: the zero point if all are equal.
        order: (K), int32, the input that each packed weight belongs to; None if they are in order.
        bias: (N) or None.
        dtype: of `weight`.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    zero: float
    order: torch.Tensor | None
    qzeros: torch.Tensor  # this and the next only until `finish_loading`
    g_idx: torch.Tensor
    dtype: torch.dtype

    def __init__(self, in_features: int, out_features: int, bias: bool, bits: int, group_size: int):
        """Create a layer whose tensors are to be loaded.

        Args:
            bits: one of `BITS`.
            group_size: number of inputs that share a scale; −1 for all inputs.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits = bits
        self.group_size = in_features if group_size == -1 else group_size
        groups, per_word = math.ceil(in_features / self.group_size), 32 // bits
        if in_features % per_word or out_features % per_word or self.group_size % per_word:
            raise ValueError(
                f"{bits}-bit weights of {in_features} inputs and {out_features} outputs in groups of {self.group_size} "
                f"do not fill 32-bit words: all three must be multiples of {per_word}."
            )
        self.dtype = torch.get_default_dtype()
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.register_buffer("qweight", torch.empty(in_features // per_word, out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.empty(groups, out_features, dtype=torch.float32))
        self.register_buffer("qzeros", torch.empty(groups, out_features // per_word, dtype=torch.int32))
        self.register_buffer("g_idx", torch.empty(in_features, dtype=torch.int32))
        self._is_hf_initialized = True  # transformers would initialize `weight` at random

    @torch.no_grad()
    def finish_loading(self, checkpoint_format: str = "gptq") -> None:
        """Unpack the zero points, and sort the weights by group if they are in another order.

        Args:
            checkpoint_format: "gptq" if zero points are stored minus one, "gptq_v2" if as they are.

        Raises:
            ValueError: the inputs are not divided into groups of `group_size`.
        """
        per_word = 32 // self.bits
        # Subtracted from whole words: a zero point of 0 is stored as −1, which borrows from the next one.
        ones = sum(1 << shift for shift in range(0, 32, self.bits)) if checkpoint_format == "gptq" else 0
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.qzeros.device)
        zeros = (((self.qzeros + ones)[:, :, None] >> shifts) & (1 << self.bits) - 1).flatten(1).to(torch.uint8)
        is_constant = bool((zeros == zeros[0, 0]).all())
        self.zero = float(zeros[0, 0])
        self.register_buffer("zeros", None if is_constant else zeros)

        order = self.g_idx.argsort(stable=True)
        groups = torch.arange(self.in_features, dtype=torch.int32, device=order.device) // self.group_size
        if not torch.equal(self.g_idx[order], groups):
            raise ValueError(
                f"g_idx does not divide the {self.in_features} inputs into groups of {self.group_size}, the group_size "
                "in config.json"
            )
        if torch.equal(self.g_idx, groups):
            self.register_buffer("order", None)
        else:
            integers = ((self.qweight[:, None] >> shifts[:, None]) & (1 << self.bits) - 1).flatten(0, 1)
            integers = integers[order].view(-1, per_word, self.out_features)
            self.qweight = (integers << shifts[:, None]).sum(1, dtype=torch.int32)
            self.register_buffer("order", order.to(torch.int32))
        del self.qzeros, self.g_idx

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix (N, K): scale · (integer − zero), which float32 represents exactly, rounded to `dtype`."""
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.qweight.device)[:, None]
        matrix = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.qweight.device)
        # A few inputs at a time, of one group, so that intermediate results stay in the processor's cache.
        step = math.gcd(self.group_size, 128)
        for start in range(0, self.in_features, step):
            stop, group = min(start + step, self.in_features), start // self.group_size
            words = self.qweight[start * self.bits // 32 : stop * self.bits // 32, None]
            integers = (words >> shifts).bitwise_and_((1 << self.bits) - 1).flatten(0, 1)
            zero = self.zero if self.zeros is None else self.zeros[group]
            values = integers.float().sub_(zero).mul_(self.scales[group])
            columns = slice(start, stop) if self.order is None else self.order[start:stop]
            matrix[:, columns] = values.T.to(dtype)
        return matrix

    @property
    def weight(self) -> DequantizedWeight:  # type: ignore[override]  # computed, not stored
        """The matrix (N, K) in `dtype`, dequantized at each access."""
        with torch.no_grad():
            return DequantizedWeight(self.dequantize(self.dtype), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (…, K) → (…, N)."""
        with torch.no_grad():
            weight = self.dequantize(input.dtype)
        return nn.functional.linear(input, weight, self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """As in torch, but scales stay in float32: in 16 bits they would be rounded."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """As in torch."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


def replace_linear_layers(model: nn.Module, quantization: Mapping[str, Any], kept: nn.Module | None) -> None:
    """Replace the linear layers of a model on the meta device by `GPTQLinear`, except `kept`.

    Args:
        quantization: `quantization_config` of config.json.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not kept:
            with torch.device("meta"):
                layer = GPTQLinear(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    quantization["bits"],
                    quantization.get("group_size", 128),
                )
            layer.to(module.weight.dtype)
            model.set_submodule(name, layer)
