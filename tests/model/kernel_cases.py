"""Triton kernels compared with torch: on the GPU if there is one, else on the CPU under Triton's interpreter.

tests/model/test_kernels.py runs this file in a separate process, because Triton chooses its mode at import.
"""

import os

import pytest
import torch

from qwen import QWenLMHeadModel
from qwen.model.kv_cache_qwen import (
    QuantizedKVLayer,
    decode_attention_torch,
    dequantize_cache_torch,
    quantize_tokens,
    triton_kernels,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def kernels():
    found = triton_kernels(DEVICE)
    assert found is not None, "without a GPU, TRITON_INTERPRET=1 must be set"
    return found


def random_states(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # One outlier channel, as in the keys of these models.
    outlier = torch.ones(shape[-1])
    outlier[3] = 20
    return (torch.randn(shape, generator=generator) * outlier).to(dtype).to(DEVICE)


def filled_layer(*parts: int, batch: int, heads: int, channels: int, dtype: torch.dtype) -> QuantizedKVLayer:
    """A layer filled in torch, with one call for each number of tokens in `parts`."""
    layer = QuantizedKVLayer()
    for seed, tokens in enumerate(parts):
        layer.update(*random_states(2, batch, heads, tokens, channels, dtype=dtype, seed=seed))
    return layer


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels", [128, 48])
def test_appending_quantizes_as_torch_does(kernels, dtype, channels):
    key, value = random_states(2, 2, 3, 5, channels, dtype=dtype)
    key[0, 0, 0], value[0, 0, 1] = 0, 7  # constant rows
    layer = QuantizedKVLayer()
    layer.lazy_initialization(key, value)
    (view, _), *_ = layer.allocate_slots(key)
    # Strided as after the projection: heads and tokens are transposed.
    kernels.append(key.transpose(1, 2).contiguous().transpose(1, 2), value, view)
    for ours, states in ((view[:3], key), (view[3:], value)):
        theirs = quantize_tokens(states)
        # The interpreter truncates to 16-bit floats where torch and GPUs round, so bytes may differ by a step or two.
        torch.testing.assert_close(ours[1], theirs[1], rtol=0.01, atol=0)
        assert (ours[0].int() - theirs[0].int()).abs().max() <= (0 if dtype == torch.float32 else 3)
        error = (dequantize_cache_torch(*(tensor.float() for tensor in ours)) - states.float()).abs()
        assert (error <= (2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.51) * theirs[1].float()).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mask", [None, "padding", "per head", "additive"])
def test_decoding_equals_torch(kernels, dtype, mask):
    """Three segments, the last one not full; 70 tokens more than whole tiles."""
    layer = filled_layer(100, 90, 1, 70, batch=2, heads=3, channels=64, dtype=dtype)
    tokens = layer.get_seq_length()
    assert len(layer.states.segments) == 3
    query = random_states(2, 3, 1, 64, dtype=dtype, seed=9) / 10
    generator = torch.Generator().manual_seed(5)
    if mask == "padding":
        mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
        mask[0, ..., :130] = False  # more than the first tiles, so that some lanes see no token in them
    elif mask == "per head":
        mask = torch.rand(2, 3, 1, tokens, generator=generator) > 0.5
    elif mask == "additive":
        mask = torch.where(torch.rand(1, 1, 1, tokens, generator=generator) > 0.5, 0.0, torch.finfo(dtype).min).to(
            dtype
        )
    mask = None if mask is None else mask.to(DEVICE)
    ours = kernels.decode(query, layer.states, mask, 64**-0.5)
    assert ours.shape == query.shape
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours, decode_attention_torch(query, layer.states, mask, 64**-0.5), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize(("heads", "channels", "tokens"), [(1, 128, 1), (2, 16, 64), (1, 80, 65), (5, 128, 129)])
def test_every_size(kernels, heads, channels, tokens):
    layer = filled_layer(tokens, batch=1, heads=heads, channels=channels, dtype=torch.float32)
    query = random_states(1, heads, 1, channels, seed=9)
    torch.testing.assert_close(
        kernels.decode(query, layer.states, None, 0.1),
        decode_attention_torch(query, layer.states, None, 0.1),
        rtol=1e-4,
        atol=1e-4,
    )


def test_room_after_the_last_token_is_not_read(kernels):
    layer = filled_layer(10, batch=1, heads=2, channels=32, dtype=torch.float32)
    query = random_states(1, 2, 1, 32, seed=9)
    before = kernels.decode(query, layer.states, None, 0.2)
    for tensor in layer.states.segments[0]:
        tensor[:, :, 10:] = 255 if tensor.dtype == torch.uint8 else float("nan")
    assert torch.equal(kernels.decode(query, layer.states, None, 0.2), before)


def test_fully_masked_row_is_zero(kernels):
    layer = filled_layer(70, batch=2, heads=1, channels=32, dtype=torch.float32)
    mask = torch.tensor([True, False], device=DEVICE)[:, None, None, None].expand(2, 1, 1, 70)
    output = kernels.decode(random_states(2, 1, 1, 32, seed=9), layer.states, mask, 0.2)
    assert output.isfinite().all()
    assert output[0].any()
    assert not output[1].any()


def test_tiles_are_updated_when_tensors_move(kernels):
    layer = filled_layer(70, batch=2, heads=2, channels=32, dtype=torch.float32)
    query = random_states(2, 2, 1, 32, seed=9)
    before = kernels.decode(query, layer.states, None, 0.2)
    layer.reorder_cache(torch.tensor([1, 0], device=DEVICE))
    assert torch.equal(kernels.decode(query.flip(0), layer.states, None, 0.2), before.flip(0))


@torch.no_grad()
def test_generation_equals_torch(golden):
    """Left padding, beyond the trained length with NTK and LogN."""
    model = (
        QWenLMHeadModel.from_pretrained(golden, use_cache_quantization=True, use_cache_kernel=True).eval().to(DEVICE)
    )
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    ours = model.generate(ids, **settings)
    model.config.use_cache_kernel = False
    assert torch.equal(ours, model.generate(ids, **settings))


def test_interpreter_runs_only_without_a_gpu():
    assert (os.environ.get("TRITON_INTERPRET") == "1") == (DEVICE == "cpu")
