"""What a decoding step asks of the device: kernels per token, and no waits in the forward.

The model has as many layers as 7B, since the number of kernels does not depend on their size. The tests bound what
Python asks for; speed is measured by benchmarks/gpu_speed.py.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from qwen import QWenLMHeadModel
from tests.on_gpu.device import CUDA, DEVICE
from tests.on_gpu.models import INT8_KERNEL, left_padded, new_tokens, random_ids, thin_model
from tests.support.device_profile import profile_device

KERNELS_PER_LAYER = 55  # counted: 45 with a float cache


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """Let torch warn of operations that wait for the GPU, or refuse them."""
    if CUDA:
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def thin() -> QWenLMHeadModel:
    return thin_model()


def test_the_forward_of_a_step_waits_for_nothing(thin):
    ids = random_ids(20, rows=2).to(DEVICE)
    with torch.no_grad():
        cache = thin.transformer.new_cache()
        token = thin(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        thin(token, past_key_values=cache, use_cache=True)  # what is created once may wait
        with sync_debug_mode("error"):
            for _ in range(3):
                token = thin(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    assert cache.get_seq_length() == 24


@pytest.mark.parametrize("case", ["one row", "padded batch", "static cache"])
def test_kernels_per_token(thin, case, record_property):
    ids, settings = random_ids(20), {}
    if case == "padded batch":
        ids, settings["attention_mask"] = left_padded([random_ids(20), random_ids(7)])
    elif case == "static cache":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    count_per_token(thin, ids, settings, record_property)


def test_kernels_per_token_with_the_8_bit_cache(record_property):
    count_per_token(thin_model(**INT8_KERNEL), random_ids(20), {}, record_property)


def count_per_token(model: QWenLMHeadModel, ids: torch.Tensor, settings: dict, record_property) -> None:
    """Count kernels and waits per token of `generate`, from two lengths of reply."""
    counts, waits = [], []
    for new in (3, 3, 11):  # the first is a warm-up
        profile = profile_device(lambda new=new: new_tokens(model, ids, new, **settings))
        counts.append(profile.launches.total())
        with sync_debug_mode("warn"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            new_tokens(model, ids, new, **settings)
        waits.append(sum("synchroniz" in str(warning.message) for warning in caught))
    kernels, waited = (counts[2] - counts[1]) / 8, (waits[2] - waits[1]) / 8
    record_property("figure", f"{kernels:.0f} kernels and {waited:.1f} waits per token")
    assert kernels > 0
    if CUDA:  # operators of the CPU are not kernels
        assert kernels < KERNELS_PER_LAYER * model.config.num_hidden_layers
        assert waited <= 3
