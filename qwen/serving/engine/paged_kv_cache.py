"""Key/value cache in blocks.

Every layer has one pool of slots, a slot for each token of each block: block b of size n has the slots from b · n on.
Pools are allocated once and never moved.

Shapes: N tokens of a step, R sequences of a step, H heads, D head size.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from ...kernels.cpu import TYPES, CPUKernels, pages_handle
from ...kernels.fused_block import FusedCacheLayer, Kernels
from ...kernels.gpu import GPUPages
from ...model.kv_cache_qwen import CacheStates, dequantize_cache_torch, quantize_tokens
from ...model.modeling_qwen import QWenBlock, QWenLMHeadModel, execution_device
from .paged_attention import attend, attend_chunk
from .step_layout import Row, StepLayout


class LayerPages(CacheStates, FusedCacheLayer):
    """Keys and values of one layer: tensors of (H, slots, D), or in 8 bits bytes, scales and zero points of each.

    Args:
        pools: the tensors of the keys, then those of the values.
        block_size: tokens per block.
        window: how many tokens back the layer attends; None for all.
        dtype: type of the activations.
        rotary: rotated channels.
        scaling: factor of the scores.
    """

    def __init__(
        self,
        pools: list[torch.Tensor],
        block_size: int,
        window: int | None,
        dtype: torch.dtype,
        rotary: int,
        scaling: float,
    ):
        self.pools, self.block_size, self.window = pools, block_size, window
        self._scaling = scaling
        if pools[0].device.type == "cpu" and dtype in TYPES:
            self._handle = pages_handle(pools, dtype, block_size, rotary, scaling, window)
            self.pages = self._handle.address
        else:
            self.pages = GPUPages(pools, block_size, scaling, window)
        self.is_quantized = len(pools) == 6
        self.layout: StepLayout

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the new tokens, (1, H, N, D) each."""
        stored = (*quantize_tokens(key), *quantize_tokens(value)) if self.is_quantized else (key, value)
        for pool, tensor in zip(self.pools, stored, strict=True):
            pool.index_copy_(1, self.layout.slots, tensor[0])

    def read(self, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the keys and values in (R, T) slots, dequantized: (R, H, T, D) each."""
        parts = [pool[:, slots].transpose(0, 1) for pool in self.pools]
        if not self.is_quantized:
            return parts[0], parts[1]
        return dequantize_cache_torch(*parts[:3]).to(dtype), dequantize_cache_torch(*parts[3:]).to(dtype)

    def attend(self, kernels: Kernels, query: torch.Tensor) -> torch.Tensor:
        """Attention of the new tokens: by the kernels, except that of chunks. query: (N, H, D), returned like that."""
        layout, places = self.layout, self.layout.places
        if isinstance(kernels, CPUKernels):
            output = kernels.attend(query, self.pages, places) if len(places.tiles) else torch.empty_like(query)
            return self._attend_chunks(query, output, [row for row in layout.rows if row.is_long])
        count = layout.num_decoding
        rows, lengths = layout.query_starts[:count], layout.lengths[:count]  # each has one token
        if count == len(query):
            return kernels.attend(query, self.pages, layout.block_tables, rows, lengths)
        output = torch.empty_like(query)
        if count:
            output[:count] = kernels.attend(query[:count], self.pages, layout.block_tables, rows, lengths)
        return self._attend_chunks(query, output, layout.rows[count:])

    def _attend_chunks(self, query: torch.Tensor, output: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """Write the attention of some sequences to `output`, and return it."""
        for row in rows:
            chunk = query[row.query_start : row.query_end].transpose(0, 1)[None]
            attended = attend_chunk(chunk, self, self.layout, row, self._scaling)
            output[row.query_start : row.query_end] = attended[0].transpose(0, 1)
        return output

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
        blocks = cast("list[QWenBlock]", list(model.transformer.h))
        sizes = config.layer_window_sizes if config.use_window_attn else [None] * len(blocks)
        self.layers: list[LayerPages] = []
        heads, size, dtype = config.num_attention_heads, config.kv_channels, model.dtype
        kinds = [(size, dtype)]
        if config.use_cache_quantization:
            kinds = [(size, torch.uint8), (1, dtype), (1, dtype)]
        for window, block in zip(sizes, blocks, strict=True):
            device = execution_device(block) or model.device
            slots = (num_blocks + 1) * block_size  # one block more, for rows that are not used
            pools = [lazy_zeros((heads, slots, width), kind, device) for width, kind in 2 * kinds]
            self.layers.append(LayerPages(pools, block_size, window, dtype, config.rotary_dim, block.attn.scaling))

    def begin_step(self, layout: StepLayout) -> None:
        """Set where the tokens of the next forward are."""
        for layer in self.layers:
            layer.layout = layout = layout.to(layer.pools[0].device)
            layer.places = layout.places

    def zero(self, blocks: list[int]) -> None:
        """Overwrite blocks that held NaN: who takes them next reads them whole, and masks what is not written yet."""
        for layer in self.layers:
            for pool in layer.pools:
                for block in blocks:
                    pool[:, block * layer.block_size : (block + 1) * layer.block_size].zero_()

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
