"""Attention on the CPU, which reads the cache in place, equals attention to a copy of each sequence's tokens."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.engine_steps import EngineSteps
from qwen.kernels import fused_block
from qwen.serving.engine.paged_kv_cache import LayerPages

BEGINNINGS = (1, 17, 64, 65, 130, 200, 40)  # lengths of prompts, several of which are the same


@pytest.fixture
def errors(monkeypatch) -> list[float]:
    """The largest difference in each decoding step of a layer, as it is computed."""
    attend_fused, found = LayerPages.attend, []

    def attend(pages, kernels, query):
        output, size = attend_fused(pages, kernels, query), pages.block_size
        for row in pages.layout.rows[: pages.layout.num_decoding]:
            positions = torch.arange(row.length)
            slots = pages.layout.block_tables[row.table, positions // size] * size + positions % size
            key, value = pages.read(slots[None], query.dtype)
            own = query[None, row.query_start : row.query_end].transpose(1, 2)
            expected = scaled_dot_product_attention(own, key, value, scale=pages._scaling)[0].transpose(0, 1)
            found.append((output[row.query_start : row.query_end] - expected).abs().max().item())
        return output

    monkeypatch.setattr(LayerPages, "attend", attend)
    # The kernels' own composition for few tokens does not call it.
    monkeypatch.setattr(fused_block, "first_rows_for_torch", lambda layer, dtype: 0)
    return found


@pytest.mark.parametrize("seed", range(12))
@torch.inference_mode()
def test_sequences_that_share_beginnings_and_come_and_go(tiny, errors, seed):
    """Runs of blocks may begin together and have different lengths: only one sequence owns the block that follows."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(256) for _ in range(length)] for length in BEGINNINGS]
    waiting = [draw.choice(prompts) for _ in range(11)]
    steps = EngineSteps(tiny[0], rows=16, cache_tokens=8192, max_length=512)
    while waiting or steps.sequences:
        while waiting and draw.random() < 0.5:
            steps.add(waiting.pop(), max_tokens=100, temperature=0.0)
        if steps.sequences:
            steps.take()
        for sequence in list(steps.sequences):
            if len(sequence.reply_ids) >= 30:
                steps.remove(sequence)
    assert len(errors) > 500
    assert max(errors) < 1e-5
