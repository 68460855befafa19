"""Attention on the CPU, which reads the cache in place, equals attention to a copy of each sequence's tokens."""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.engine_steps import EngineSteps
from qwen.serving.engine import paged_attention

BEGINNINGS = (1, 17, 64, 65, 130, 200, 40)  # lengths of prompts, several of which are the same


@pytest.fixture
def errors(monkeypatch) -> list[float]:
    """The largest difference in each decoding step of a layer, as it is computed."""
    attend_in_place, found = paged_attention._attend_in_place, []

    def attend(query, pages, layout, scaling):
        output = attend_in_place(query, pages, layout, scaling)
        for index, row in enumerate(layout.rows[: layout.num_decoding]):
            slots = torch.cat([torch.arange(*run) for run in row.runs])
            key, value = pages.read(slots, query.dtype)
            expected = scaled_dot_product_attention(query[:, :, index : index + 1], key, value, scale=scaling)
            found.append((output[:, :, index : index + 1] - expected).abs().max().item())
        return output

    monkeypatch.setattr(paged_attention, "_attend_in_place", attend)
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
