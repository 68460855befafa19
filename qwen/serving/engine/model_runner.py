"""Runs a step of the model: one forward pass over the tokens of all sequences, and the sampling of their next ones.

What a step needs goes to the device in one copy, and its result comes back in one. On CUDA the host does not wait for
it: it launches the next step first, which reads the tokens of this one on the device. Steps that only decode are
captured in CUDA graphs, one for each of a few numbers of rows, which a step is padded to.

Shapes: N tokens of a step, R rows that a token is sampled for, V vocabulary, C hidden size.
"""

from __future__ import annotations

import logging
from collections import abc
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch

from ...kernels.cpu import Places
from ...kernels.fused_block import FUSED_LINEAR, FusedBlock, has_gpu_kernels, is_spread
from ...kernels.gpu import gpu_kernels
from ...model.modeling_qwen import QWenLMHeadModel, execution_device
from ...model.rope_qwen import MAX_DOUBLINGS, logn_scale, ntk_alpha, rotary_tables
from .block_manager import BlockManager
from .decode_step import DecodeStep, DecodeSteps, to_pinned
from .paged_kv_cache import PagedKVCache
from .sampler import Sampler, SampleRequest, not_finite, token_logprobs, unpack
from .scheduler import Chunk
from .sequence import PromptLogprob, SampledToken, Sequence
from .step_layout import Row, StepLayout, query_tiles

logger = logging.getLogger(__name__)

# Logits of prompts that are computed at once: 64 MiB in float32, where those of 8,192 tokens would take 5 GB.
SCORED_LOGITS = 2**24


class ScoredTokens(NamedTuple):
    """Log-probabilities of consecutive tokens of a prompt.

    Args:
        values: (tokens, 2 + 2k), float64: for each its log-probability and rank, k likely tokens, and theirs.
    """

    sequence: Sequence
    token_ids: list[int]
    values: torch.Tensor

    def logprobs(self) -> list[PromptLogprob]:
        """Return them for the sequence; the step must have ended. Raises FloatingPointError if some are NaN."""
        if self.values.isnan().any():
            raise not_finite()
        width = (self.values.shape[1] - 2) // 2
        logprobs = []
        for token_id, (logprob, rank, *top) in zip(self.token_ids, self.values.tolist(), strict=True):
            likely = zip(map(int, top[:width]), top[width:], strict=True)
            logprobs.append(PromptLogprob(token_id, logprob, int(rank), list(likely)))
        return logprobs


@dataclass
class PendingStep:
    """A step that was launched, and its result once the device has finished."""

    chunks: list[Chunk]
    sequences: list[Sequence]
    values: torch.Tensor
    scored: list[ScoredTokens]
    ready: torch.cuda.Event | None
    failures: dict[int, Exception]

    def wait(self) -> list[SampledToken | Exception]:
        """Wait for the device; return a token for each sequence, or its error."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens = unpack(self.values.tolist(), self.sequences)
        return [self.failures.get(row, token) for row, token in enumerate(tokens)]


class ModelRunner:
    """The model, its cache, and the sampler.

    Args:
        model: model in eval mode.
        block_manager: blocks of the cache.
        max_num_seqs: maximum number of running sequences.
        max_length: maximum number of tokens of a sequence.
    """

    def __init__(self, model: QWenLMHeadModel, block_manager: BlockManager, max_num_seqs: int, max_length: int):
        self.model, self.block_manager, self.device = model, block_manager, model.device
        self.max_length = max_length
        self._gpu_kernels = gpu_kernels(self.device) if has_gpu_kernels(model) else None
        self.cache = PagedKVCache(model, block_manager.num_blocks, block_manager.block_size)
        self.sampler = Sampler(model.config.vocab_size, max_num_seqs + 1, self.device)  # one for rows that are not used
        self._cos, self._sin, self._query_scale = _position_tables(model, max_length)
        self._slots: dict[int, Sequence] = {}  # whose state the sampler has there
        self.decode_steps = DecodeSteps(
            self._decode_step,
            capturable=self._is_capturable(),
            max_rows=max_num_seqs,
            max_width=block_manager.blocks_for(max_length),
            fixed_width=self._gpu_kernels is not None,
        )

    @property
    def is_asynchronous(self) -> bool:
        """Whether the host need not wait for a step before it launches the next one."""
        return self.device.type == "cuda"

    def warm_up(self) -> None:
        """Compile the kernels, and capture the steps that decode, so that no request waits for it."""
        if self._gpu_kernels is not None:
            layers = *cast("FusedBlock", self.model.transformer.h[0]).linear_layers, self.model.lm_head
            if all(isinstance(layer, FUSED_LINEAR) for layer in layers):  # else captures compile most of them
                pages = self.cache.layers[0]
                self._gpu_kernels.warm_up(self.model, pages.pools, pages.block_size, self.decode_steps.table_width)
        self.decode_steps.warm_up()

    def launch(self, chunks: list[Chunk]) -> PendingStep:
        """Start a step. Its tokens are counted as pending."""
        chunks = sorted(chunks, key=lambda chunk: not chunk.is_single)  # attention needs single tokens first
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        request = SampleRequest.of(sequences)
        failures: dict[int, Exception] = {}
        self._update_slots(sequences)
        values = torch.empty(0, 1, dtype=torch.float64, device=self.device)
        scored: list[ScoredTokens] = []
        if self.device.type != "cpu" and all(chunk.samples and chunk.is_single for chunk in chunks):
            width = max(len(sequence.blocks) for sequence in sequences)
            step = self.decode_steps.load(chunks, width)
            logits, slots = step.run()[: len(chunks)], step.sampler_slots[: len(chunks)]
            settings = to_device(np.array(request.settings, dtype=np.float64), self.device)
        else:
            numbers, layout = self._inputs(chunks, request)
            hidden = self._forward(numbers.ids, numbers.positions, layout)
            slots, settings = numbers.sampling_slots, numbers.settings
            if any(chunk.sequence.num_to_score for chunk in chunks):
                scored = self._score_prompts(chunks, hidden)
            logits = self.model.lm_head(hidden[numbers.ends.to(hidden.device)]).to(self.device) if sequences else values
        if sequences:
            allowed = _allowed_tokens(sequences, failures, logits)
            forbidden = to_device(np.array(request.forbidden), self.device) if request.forbidden else None
            values = self.sampler.sample(logits, request, slots, settings, allowed, forbidden)
        ready = None
        if self.is_asynchronous:
            values, scored = to_host(values), [each._replace(values=to_host(each.values)) for each in scored]
            ready = torch.cuda.Event()
            ready.record()
        for sequence in sequences:  # last: a step that fails counts nothing
            sequence.num_pending += 1
        for sequence, token_ids, _ in scored:
            sequence.num_scored += len(token_ids)
        return PendingStep(chunks, sequences, values, scored, ready, failures)

    def _score_prompts(self, chunks: list[Chunk], hidden: torch.Tensor) -> list[ScoredTokens]:
        """Return the log-probabilities of the tokens of prompts after those of a step, as far as they are wanted.

        Args:
            hidden: (N, C), of the tokens of the chunks.
        """
        scored = []
        offset = 0
        for chunk in chunks:
            sequence = chunk.sequence
            start, end = max(chunk.start, sequence.num_scored), min(chunk.end, sequence.num_to_score)
            if start < end:
                token_ids = sequence.token_ids[start + 1 : end + 1]
                rows = hidden[offset + start - chunk.start : offset + end - chunk.start]
                targets = to_device(np.array(token_ids), self.device)
                pieces = max(1, SCORED_LOGITS // self.sampler.vocab_size)
                values = [
                    token_logprobs(self.model.lm_head(part).to(self.device), ids, sequence.params.prompt_logprobs or 0)
                    for part, ids in zip(rows.split(pieces), targets.split(pieces), strict=True)
                ]
                scored.append(ScoredTokens(sequence, token_ids, torch.cat(values)))
            offset += chunk.end - chunk.start
        return scored

    def _decode_step(self, rows: int, width: int) -> DecodeStep:
        return DecodeStep(
            rows,
            width,
            block_size=self.block_manager.block_size,
            spare_block=self.block_manager.num_blocks,
            spare_slot=self.sampler.num_slots - 1,
            max_length=self.max_length,
            compute=self._decode_logits,
            device=self.device,
        )

    def _decode_logits(self, positions: torch.Tensor, slots: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        """Return the logits (R, V) of the last tokens of the sequences in some slots."""
        hidden = self._forward(self.sampler.last_tokens[slots], positions, layout)
        return self.model.lm_head(hidden).to(self.device)

    def _update_slots(self, sequences: list[Sequence]) -> None:
        """Give the sampler the state of sequences that have a new slot."""
        for sequence in sequences:
            if self._slots.get(sequence.slot) is not sequence:
                self.sampler.add(sequence)
                self._slots[sequence.slot] = sequence

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, also where it was before it was preempted."""
        self._slots = {slot: other for slot, other in self._slots.items() if other is not sequence}

    def _inputs(self, chunks: list[Chunk], request: SampleRequest) -> tuple[StepNumbers, StepLayout]:
        """Copy what a step needs to the device."""
        size = self.block_manager.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []
        rows: list[Row] = []
        # Kernels are compiled for one width.
        widest = self.decode_steps.table_width if self._gpu_kernels else max(len(c.sequence.blocks) for c in chunks)
        for chunk in chunks:
            sequence, first = chunk.sequence, len(ids)
            known = sequence.token_ids[chunk.start : chunk.end]
            ids += known + [-1 - sequence.slot] * (chunk.end - chunk.start - len(known))
            offset = sequence.alpha_index * self.max_length
            positions += range(offset + chunk.start, offset + chunk.end)
            places = (divmod(position, size) for position in range(chunk.start, chunk.end))
            slots += [sequence.blocks[block] * size + offset for block, offset in places]
            rows.append(Row(len(rows), first, len(ids), chunk.end))
            if chunk.samples:
                ends.append(len(ids) - 1)
        numbers = StepNumbers.upload(
            [ids, positions, slots, ends, [each.slot for each in request.sequences]], request.settings, self.device
        )
        if any(token_id < 0 for token_id in ids):  # sampled on the device, and not seen here yet
            last = self.sampler.last_tokens[(-1 - numbers.ids).clamp(min=0)]
            numbers.ids = numbers.ids.where(numbers.ids >= 0, last)
        table = np.full((len(chunks), widest), self.block_manager.num_blocks, dtype=np.int32)  # the spare block
        for index, chunk in enumerate(chunks):
            table[index, : len(chunk.sequence.blocks)] = chunk.sequence.blocks
        packed = np.concatenate(
            [table.ravel(), [row.length for row in rows], [0], [row.query_end for row in rows]], dtype=np.int32
        )
        whole = to_device(packed, self.device)
        tables = whole[: table.size].view(table.shape)
        lengths, starts = whole[table.size : table.size + len(rows)], whole[table.size + len(rows) :]
        layout = StepLayout(
            numbers.slots,
            lengths,
            tables,
            starts,
            rows,
            sum(row.query_end - row.query_start == 1 for row in rows),
            max(row.query_end - row.query_start for row in rows),
            max(row.length for row in rows),
            Places(
                numbers.slots,
                tables,
                query_tiles(rows),
                max(row.length for row in rows),
                not any(row.is_long for row in rows),
            ),
        )
        return numbers, layout

    def _is_capturable(self) -> bool:
        if self.device.type != "cuda":
            return False
        if is_spread(self.model):
            logger.warning("Decoding is not captured in CUDA graphs, and slower: the model is spread over devices.")
            return False
        return True

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, layout: StepLayout) -> torch.Tensor:
        """Return the hidden states (N, C).

        Args:
            ids: (N), tokens.
            positions: (N), rows of the tables of rotary angles.
        """
        network = self.model.transformer
        self.cache.begin_step(layout)
        cos, sin = self._cos[positions][None, None], self._sin[positions][None, None]
        scale = None
        if self._query_scale is not None:
            scale = self._query_scale[positions % self.max_length][None, None, :, None]
        hidden = network.wte(ids[None])
        for block in network.h:
            device = execution_device(block)
            if device is not None and device != cos.device:
                cos, sin, scale = cos.to(device), sin.to(device), None if scale is None else scale.to(device)
            hidden = block(hidden, past_key_values=self.cache, position_embeddings=(cos, sin, scale))
        return network.ln_f(hidden)[0]


@dataclass
class StepNumbers:
    """Views of one tensor on the device, which came there in one copy.

    Args:
        ids: (N), tokens.
        positions: (N), rows of the tables of rotary angles.
        slots: (N), slots of the cache.
        ends: (R), which tokens a next one is sampled for.
        sampling_slots: (R), rows of the sampler's state.
        settings: (R, 8), as `SampleRequest.settings`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    ends: torch.Tensor
    sampling_slots: torch.Tensor
    settings: torch.Tensor

    @classmethod
    def upload(
        cls, integers: abc.Sequence[list[int]], settings: list[list[float]], device: torch.device
    ) -> StepNumbers:
        """Copy lists of integers, and the settings, to the device."""
        parts = [np.array(part, dtype=np.int64) for part in integers]
        reals = np.array(settings, dtype=np.float64)
        whole = to_device(np.concatenate([*parts, reals.ravel().view(np.int64)]), device)
        *views, settings_view = whole.split([*map(len, parts), reals.size])
        ids, positions, slots, ends, sampling_slots = views
        reals_view = settings_view.view(torch.float64).view(reals.shape)
        return cls(ids, positions, slots, ends, sampling_slots, reals_view)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device; a GPU copies it while the host goes on."""
    host = to_pinned(array) if device.type == "cuda" else torch.from_numpy(array)
    return host.to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start to copy a tensor of a GPU to the host."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _position_tables(model: QWenLMHeadModel, max_length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return cosines and sines of all positions for each α, one after the other: (tables · max_length, R), and the
    factors of LogN: (max_length), or None without."""
    config, device = model.config, model.device
    positions = torch.arange(max_length, device=device)[None]
    count = alpha_index(max_length, config.seq_length) + 1 if config.use_dynamic_ntk else 1
    tables = []
    for index in range(count):
        longest = torch.tensor([config.seq_length << index], device=device)
        alpha = ntk_alpha(longest, config.seq_length) if config.use_dynamic_ntk else None
        tables.append(rotary_tables(positions, config.rotary_dim, config.rotary_emb_base, alpha))
    cos, sin = (torch.cat([table[part][0, 0] for table in tables]) for part in (0, 1))
    scale = logn_scale(positions, config.seq_length)[0, 0, :, 0] if config.use_logn_attn else None
    return cos, sin, scale


def alpha_index(prompt_tokens: int, seq_length: int) -> int:
    """Return how often the trained length must double to hold a prompt; α is 2^(that + 1) − 1, as in `ntk_alpha`."""
    return next((index for index in range(MAX_DOUBLINGS) if prompt_tokens <= seq_length << index), MAX_DOUBLINGS)


def _allowed_tokens(
    sequences: list[Sequence], failures: dict[int, Exception], logits: torch.Tensor
) -> torch.Tensor | None:
    """Return which tokens the constraints allow, (R, V) on the device, or None without any.

    Args:
        failures: receives the errors, by row.
    """
    constrained = [(row, sequence.constraint) for row, sequence in enumerate(sequences) if sequence.constraint]
    if not constrained:
        return None
    allowed = torch.ones(logits.shape, dtype=torch.bool)
    for row, constraint in constrained:
        assert constraint is not None
        try:
            allowed[row] = constraint.allowed()
        except Exception as error:  # raised by the constraint of one request
            failures[row] = error
    return allowed.to(logits.device)
