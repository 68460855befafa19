"""Key/value cache of a batch whose sequences have different lengths.

Rows are added and removed while the batch runs. Each row has its own length, and a new token is written after the row's
last one.

Stored as (rows, tokens, H, D), H heads of D channels, so that a token is contiguous in memory. The number of allocated
rows is a power of two. Layers are reallocated one by one, so that growing needs little memory besides the cache itself.
"""

from typing import cast

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from ...model.kv_cache_qwen import QuantizedStates, prompt_state, quantize_tokens, triton_kernels


class Lengths:
    """Number of tokens in each row; shared by the layers of a cache. `tokens` is also shared with its `PromptState`."""

    def __init__(self, device: torch.device):
        self.tokens: list[int] = []
        self.device = device
        self.refresh()

    def refresh(self) -> None:
        """Update the derived values. Call this after changing `tokens`."""
        self.longest = max(self.tokens, default=0)
        self.tensor = torch.tensor(self.tokens, dtype=torch.long, device=self.device)


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer; in 8 bits if `quantized`, attended to without dequantizing if also `fused`."""

    def __init__(self, lengths: Lengths, capacity: int, quantized: bool, fused: bool):
        super().__init__()
        self.lengths, self.capacity, self.quantized, self.fused = lengths, capacity, quantized, fused
        self.states = QuantizedStates()  # views of the rows in use
        # Keys and values, each a tensor or quantized to (q, scale, zero point): (rows, capacity, H, D or 1).
        self.store: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(  # type: ignore[override]  # returns quantized states, too, to the attention that reads them
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[QuantizedStates, QuantizedStates]:
        """Append one token to every row: (B, H, 1, D) each → (B, H, longest + 1, D). The attention mask must hide what
        follows a row's own length."""
        ends = self.lengths.tensor.to(key_states.device)
        if not self.states.segments or len(self.states.segments[0][0]) != len(ends):
            self.states.segments = [tuple(stored[: len(ends)].transpose(1, 2) for stored in self.store)]
        held = self.states.segments[0]
        kernels = triton_kernels(key_states.device.type) if self.fused else None
        if kernels is not None:
            kernels.append(key_states, value_states, held, ends)
        else:
            rows = torch.arange(len(ends), device=ends.device)
            for stored, new in zip(self.store, self._encode(key_states, value_states), strict=True):
                stored[rows, ends] = new[:, :, 0]
        if not self.quantized:
            return held[0][:, :, : self.lengths.longest + 1], held[1][:, :, : self.lengths.longest + 1]
        self.states.length = self.lengths.longest + 1
        return (self.states, self.states) if self.fused else self.states.dequantize(self.dtype)

    def write(self, row: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write a whole sequence, (1, H, S, D) each, to a row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = self._encode(key_states, value_states)
        if not self.store:
            self.store = [tensor.new_zeros(0, self.capacity, tensor.shape[1], tensor.shape[3]) for tensor in new]
        if row >= len(self.store[0]):
            self.resize(max(1, 2 * len(self.store[0])))
        for stored, tensor in zip(self.store, new, strict=True):
            stored[row, : tensor.shape[2]] = tensor[0].transpose(0, 1)

    def vacate(self, row: int, last: int) -> None:
        """Move the last row to the place of another one.

        The freed memory is zeroed: a NaN after the end of a later, shorter row would be masked but still turn its
        weighted sum into NaN.
        """
        ends = self.lengths.tokens
        for stored in self.store:
            if row != last:
                stored[row, : ends[last]] = stored[last, : ends[last]]
                stored[row, ends[last] : ends[row]] = 0
            stored[last, : ends[last]] = 0

    def resize(self, rows: int) -> None:
        """Reallocate to `rows` rows, and keep the contents of those that fit."""
        for index, stored in enumerate(self.store):
            # Zeros instead of uninitialized memory: a masked NaN would still spoil the weighted sum.
            resized = stored.new_zeros(rows, *stored.shape[1:])
            kept = min(rows, len(stored))
            resized[:kept] = stored[:kept]
            self.store[index] = resized
        self.states.segments = []

    def _encode(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.quantized:
            return *quantize_tokens(key_states), *quantize_tokens(value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.lengths.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.lengths.longest + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity


class RaggedCache(Cache):
    """Key/value cache of one batch of the scheduler.

    Args:
        num_layers: number of layers of the model.
        capacity: maximum number of tokens per row.
        device: device of the lengths; each layer's tensors are on the device of its keys.
        quantized: store in 8 bits.
        fused: attend to the 8-bit values directly, for `use_cache_kernel=True`.
    """

    def __init__(
        self, num_layers: int, capacity: int, device: torch.device, quantized: bool = False, fused: bool = False
    ):
        self.lengths = Lengths(device)
        self.capacity = capacity
        super().__init__(
            layers=[RaggedLayer(self.lengths, capacity, quantized, quantized and fused) for _ in range(num_layers)]
        )
        self.prompt_state = prompt_state(self)  # read by the model
        self.prompt_state.seq_lens = self.lengths.tokens  # the same list, which is only changed in place

    @property
    def _layers(self) -> list[RaggedLayer]:
        return cast("list[RaggedLayer]", self.layers)

    @property
    def rows(self) -> int:
        """Number of sequences in the batch."""
        return len(self.lengths.tokens)

    @staticmethod
    def room_for(rows: int) -> int:
        """Return the number of rows allocated for `rows` sequences."""
        return 1 << (rows - 1).bit_length() if rows else 0

    @property
    def allocated_tokens(self) -> int:
        """Allocated rows × capacity, in use or not."""
        return self.room_for(self.rows) * self.capacity

    def join(self, prompts: DynamicCache, row: int, length: int) -> None:
        """Append a sequence as the last row: the first `length` tokens of row `row` of `prompts`."""
        for layer, encoded in zip(self._layers, cast("list[CacheLayerMixin]", prompts.layers), strict=True):
            keys, values = cast("torch.Tensor", encoded.keys), cast("torch.Tensor", encoded.values)
            layer.write(self.rows, keys[row : row + 1, :, :length], values[row : row + 1, :, :length])
        if (alpha := prompt_state(prompts).alpha) is not None:
            kept = [] if self.prompt_state.alpha is None else [self.prompt_state.alpha]
            self.prompt_state.alpha = torch.cat([*kept, alpha[row : row + 1]])
        self.lengths.tokens.append(length)
        self.lengths.refresh()

    def leave(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        last = self.rows - 1
        for layer in self._layers:
            layer.vacate(row, last)
        if (alpha := self.prompt_state.alpha) is not None:
            alpha[row] = alpha[last].clone()
            self.prompt_state.alpha = alpha[:last].clone()
        self.lengths.tokens[row] = self.lengths.tokens[last]
        self.lengths.tokens.pop()
        self.lengths.refresh()
        for layer in self._layers:
            if self.room_for(self.rows) < len(layer.store[0]):
                layer.resize(self.room_for(self.rows))

    def advance(self) -> None:
        """Increment the length of every row. Call this after each forward."""
        self.lengths.tokens[:] = [length + 1 for length in self.lengths.tokens]
        self.lengths.refresh()

    def attention_mask(self) -> torch.Tensor:
        """Return the mask for one more token in every row: (B, longest + 1), 1 for tokens and 0 after a row's end."""
        positions = torch.arange(self.lengths.longest + 1, device=self.lengths.device)
        return (positions <= self.lengths.tensor[:, None]).long()
