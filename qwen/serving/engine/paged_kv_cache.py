"""Key/value cache in blocks.

Every layer has one pool of slots, a slot for each token of each block: block b of size n has the slots from b · n on.
Pools are allocated once and never moved.

Shapes: N tokens of a step, R sequences of a step, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...model.kv_cache_qwen import CacheStates, dequantize_cache_torch, quantize_tokens
from ...model.modeling_qwen import QWenLMHeadModel, execution_device
from .paged_attention import attend
from .step_layout import REGION_SLOTS, RunGroup, StepLayout


class LayerPages(CacheStates):
    """Keys and values of one layer: tensors of (H, slots, D), or in 8 bits bytes, scales and zero points of each.

    Args:
        pools: the tensors of the keys, then those of the values.
        block_size: tokens per block.
        window: how many tokens back the layer attends; None for all.
    """

    def __init__(self, pools: list[torch.Tensor], block_size: int, window: int | None):
        self.pools, self.block_size, self.window = pools, block_size, window
        self.is_quantized = len(pools) == 6
        self.new: tuple[torch.Tensor, torch.Tensor]  # keys and values of the step
        self.layout: StepLayout

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the new tokens, (1, H, N, D) each."""
        self.new = key, value
        stored = (*quantize_tokens(key), *quantize_tokens(value)) if self.is_quantized else (key, value)
        for pool, tensor in zip(self.pools, stored, strict=True):
            pool.index_copy_(1, self.layout.slots, tensor[0])

    def read(self, slots: slice | torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values in some slots, dequantized: (1, H, T, D) each. A slice of floats is not copied."""
        return self._dequantize([pool[:, slots][None] for pool in self.pools], dtype)

    def read_group(self, group: RunGroup, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of some runs, dequantized: (runs, H, T, D) each. Floats are not copied."""
        runs = group.count if group.stride else 1
        parts = []
        for pool in self.pools:
            heads, slots, width = pool.shape
            strides = (group.stride * width, slots * width, width, 1)
            parts.append(pool.as_strided((runs, heads, group.length, width), strides, group.first * width))
        return self._dequantize(parts, dtype)

    def read_tables(self, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the keys and values in (R, T) slots, dequantized: (R, H, T, D) each."""
        return self._dequantize([pool[:, slots].transpose(0, 1) for pool in self.pools], dtype)

    def _dequantize(self, parts: list[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_quantized:
            return parts[0], parts[1]
        return dequantize_cache_torch(*parts[:3]).to(dtype), dequantize_cache_torch(*parts[3:]).to(dtype)

    def attention(  # type: ignore[override]  # needs fewer arguments
        self, module: torch.nn.Module, query: torch.Tensor, *args: object, scaling: float, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        """Attention of the new tokens to those in the cache and to themselves. query: (1, H, N, D) → (1, N, H, D)."""
        return attend(query, self, self.layout, scaling), None


class PagedKVCache:
    """The pools of all layers, with the interface that the network's attention uses.

    Args:
        model: its layers decide the number, shape, dtype, device and window of the pools.
        num_blocks, block_size: blocks, and tokens per block.
    """

    def __init__(self, model: QWenLMHeadModel, num_blocks: int, block_size: int):
        config = model.config
        blocks = model.transformer.h
        sizes = config.layer_window_sizes if config.use_window_attn else [None] * len(blocks)
        self.layers: list[LayerPages] = []
        heads, size, dtype = config.num_attention_heads, config.kv_channels, model.dtype
        kinds = [(size, dtype)]
        if config.use_cache_quantization:
            kinds = [(size, torch.uint8), (1, dtype), (1, dtype)]
        for window, block in zip(sizes, blocks, strict=True):
            device = execution_device(block) or model.device
            # One block more, for rows that are not used.
            slots = -(-(num_blocks + 1) * block_size // REGION_SLOTS) * REGION_SLOTS
            pools = [lazy_zeros((heads, slots, width), kind, device) for width, kind in 2 * kinds]
            self.layers.append(LayerPages(pools, block_size, window))

    def begin_step(self, layout: StepLayout) -> None:
        """Set where the tokens of the next forward are."""
        for layer in self.layers:
            layer.layout = layout = layout.to(layer.pools[0].device)

    def zero(self, blocks: list[int]) -> None:
        """Overwrite blocks that held NaN: who takes them next reads them whole, and masks what is not written yet."""
        for layer in self.layers:
            for pool in layer.pools:
                for block in blocks:
                    pool[:, block * layer.block_size : (block + 1) * layer.block_size].zero_()

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy the contents of blocks, (from, to) each; all are read before any is written."""
        sources, targets = torch.tensor(copies).unbind(1)
        for layer in self.layers:
            for pool in layer.pools:
                blocks = pool.unflatten(1, (-1, layer.block_size))
                blocks[:, targets] = blocks[:, sources]

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[LayerPages, LayerPages]:
        """Append (1, H, N, D) keys and values; return the layer twice, for its own attention."""
        layer = self.layers[layer_idx]
        layer.append(key, value)
        return layer, layer


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros: masked slots are read, too, and NaN times a weight of zero is NaN.

    On a CPU, memory that is never written is not taken: numpy leaves zeroing to the operating system, torch does not.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)).view(dtype)


def bytes_per_token(model: QWenLMHeadModel) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    config, itemsize = model.config, model.dtype.itemsize
    channels = config.kv_channels + 2 * itemsize if config.use_cache_quantization else config.kv_channels * itemsize
    return 2 * config.num_hidden_layers * config.num_attention_heads * channels
