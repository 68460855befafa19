"""The 8-bit key/value cache: contents, growth, cache operations, and use in generation."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from qwen import QWenLMHeadModel
from qwen.checkpoint.loading import load_model
from qwen.model.kv_cache_qwen import (
    TILE_SIZE,
    QuantizedKVCache,
    QuantizedKVLayer,
    QuantizedStates,
    decode_attention_torch,
    prompt_state,
    quantize_cache_v,
    quantize_tokens,
)
from tests.support.processes import run_script

KINDS = {"tensors": {}, "kernel": {"use_cache_kernel": True}}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


def states(tokens: int, *, batch: int = 2, heads: int = 3, channels: int = 32, seed: int = 0, dtype=torch.float32):
    """Random keys and values, (2, B, H, S, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, tokens, channels, generator=generator).to(dtype)


def held(layer: QuantizedKVLayer) -> list[torch.Tensor]:
    key, value = layer.quantized
    return [*key, *value]


def tensors(layer: QuantizedKVLayer) -> list[torch.Tensor]:
    return [tensor for segment in layer.states.segments for tensor in segment]


@pytest.fixture(scope="module", params=KINDS)
def model(request, golden):
    return QWenLMHeadModel.from_pretrained(golden, use_cache_quantization=True, **KINDS[request.param]).eval()


@pytest.fixture(scope="module")
def exact(golden):
    return QWenLMHeadModel.from_pretrained(golden).eval()


def prompt(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- contents ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_error_is_at_most_half_a_step(dtype):
    x = states(200, dtype=dtype)[0] * 100 + 30
    q, scale, zero = (tensor.float() for tensor in quantize_tokens(x))
    assert ((scale * (q - zero) - x.float()).abs() <= 0.5001 * scale).all()
    # Each token has its own range: at most 254 steps, plus the rounding of the scale.
    spread = x.float().amax(-1, keepdim=True).clamp(min=0) - x.float().amin(-1, keepdim=True).clamp(max=0)
    assert (scale <= 1.005 * spread / 254).all()


def test_chunk_sizes_make_no_difference():
    whole, parts = QuantizedKVLayer(), QuantizedKVLayer()
    key, value = states(400)
    whole.update(key, value)
    start = 0
    for size in (1, 62, 2, 64, 70, 1, 200):
        parts.update(key[:, :, start : start + size], value[:, :, start : start + size])
        start += size
    assert len(whole.states.segments) == 1 < len(parts.states.segments)
    for one, other in zip(held(whole), held(parts), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_growing_does_not_move_tensors():
    layer = QuantizedKVLayer()
    layer.update(*states(100))
    for seed in range(1, 1200):
        before = [tensor.data_ptr() for tensor in tensors(layer)]
        layer.update(*states(1, seed=seed))
        assert [tensor.data_ptr() for tensor in tensors(layer)][: len(before)] == before
        room = sum(segment[0].shape[2] for segment in layer.states.segments)
        assert 0 <= room - layer.get_seq_length() < max(128, layer.get_seq_length() // 8) + TILE_SIZE
    assert layer.get_seq_length() == 1299
    assert len(layer.states.segments) < 12


@torch.no_grad()
def test_size_in_bytes(golden):
    """2 · layers · C · (1 + 4 / D) per token with 16-bit scales and full segments, and no other tensors."""
    model = QWenLMHeadModel.from_pretrained(golden, use_cache_quantization=True, bf16=True).eval()
    config, batch, tokens = model.config, 3, 128
    cache = model(prompt(tokens, batch), use_cache=True, logits_to_keep=1).past_key_values
    stored = sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in tensors(layer))
    width = config.num_attention_heads * config.kv_channels
    assert stored == batch * tokens * 2 * config.num_hidden_layers * width * (1 + 4 / config.kv_channels)
    others = {name for layer in cache.layers for name, kept in vars(layer).items() if isinstance(kept, torch.Tensor)}
    assert not others


def test_attention_over_bytes_equals_attention_over_values():
    layer = QuantizedKVLayer()
    layer.update(*states(150))
    layer.update(*states(90, seed=1))
    query = states(1, seed=2)[0]
    mask = torch.rand(2, 1, 1, 240, generator=torch.Generator().manual_seed(3)) > 0.4
    key, value = layer.states.dequantize(torch.float32)
    for masking in (None, mask, torch.where(mask, 0.5, -3.0)):
        torch.testing.assert_close(
            decode_attention_torch(query, layer.states, masking, 0.2),
            scaled_dot_product_attention(query, key, value, attn_mask=masking, scale=0.2),
            rtol=1e-4,
            atol=1e-5,
        )


# ---- cache operations ----


def test_cropping_and_continuing():
    layer, fresh = QuantizedKVLayer(), QuantizedKVLayer()
    key, value = states(300)
    layer.update(key[:, :, :100], value[:, :, :100])
    layer.update(key[:, :, 100:], value[:, :, 100:])
    layer.crop(-230)
    assert layer.get_seq_length() == 70
    assert len(layer.states.segments) == 1
    layer.update(key[:, :, 70:], value[:, :, 70:])
    fresh.update(key, value)
    for one, other in zip(held(layer), held(fresh), strict=True):
        assert torch.equal(one, other)
    layer.crop(-1000)
    assert layer.get_seq_length() == 0
    assert not layer.states.segments
    with pytest.raises(ValueError, match="minus the number"):
        layer.crop(3)


def test_tile_table_follows_cropping_and_appending():
    """A new tensor may have the address of a dropped one and another size."""

    def is_current(states: QuantizedStates) -> bool:
        return torch.equal(states.tile_table, QuantizedStates(states.segments, states.length).tile_table)

    layer = QuantizedKVLayer()
    draw = random.Random(0)
    for seed in range(60):
        layer.update(*states(draw.choice([1, 60, 130, 300]), batch=1, heads=1, seed=seed))
        assert is_current(layer.states)
        assert is_current(copy.deepcopy(layer.states))
        layer.crop(-draw.randrange(200))
        assert layer.get_seq_length() == 0 or is_current(layer.states)
    layer.update(*states(60, batch=1, heads=1))
    layer.reorder_cache(torch.tensor([0, 0]))
    assert is_current(layer.states)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: (layer.offload(), layer.prefetch()), [0, 1]),
    ],
    ids=["reorder", "repeat", "select", "offload"],
)
def test_rows_are_reordered(change, rows):
    layer = QuantizedKVLayer()
    layer.update(*states(100))
    layer.update(*states(40, seed=1))
    before = held(layer)
    change(layer)
    for old, new in zip(before, held(layer), strict=True):
        assert torch.equal(new, old[rows])


@torch.no_grad()
def test_copies_are_independent(model):
    """Encode a prompt once and continue it twice."""
    ids = prompt(20)
    cache = model(ids, use_cache=True).past_key_values
    ours = copy.deepcopy(cache)
    first = model(ids[:, :1], past_key_values=ours).logits
    model(ids[:, 1:2], past_key_values=cache)
    assert cache.get_seq_length() == ours.get_seq_length() == 21
    assert not torch.equal(model(ids[:, 2:3], past_key_values=cache).logits, first)
    cache.reset()
    assert cache.get_seq_length() == 0
    cache = model(ids, use_cache=True, past_key_values=cache).past_key_values
    assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, first)


def test_works_with_gradients_enabled(model):
    """As in a notebook without torch.no_grad, or in training with use_cache=True."""
    ids = prompt(20)
    outputs = model(ids, labels=ids, use_cache=True)
    outputs.loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()
    model.zero_grad()
    with torch.no_grad():
        expected = model(ids[:, :3], past_key_values=copy.deepcopy(outputs.past_key_values)).logits
    torch.testing.assert_close(model(ids[:, :3], past_key_values=outputs.past_key_values).logits, expected)


def test_prompt_encoded_in_inference_mode_can_be_continued(model):
    ids = prompt(20)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
    with torch.no_grad():
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()


# ---- legacy tuples ----


@torch.no_grad()
def test_published_layout_round_trip(model):
    ids = prompt(24)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    layers = tuple(cache)
    assert len(layers) == len(cache) == model.config.num_hidden_layers
    (q_key, scale, zero), value = cache[0]
    heads, channels = model.config.num_attention_heads, model.config.kv_channels
    assert q_key.shape == (1, heads, 20, channels)
    assert q_key.dtype == torch.uint8
    assert scale.shape == zero.shape == (1, heads, 20, 1)
    assert len(value) == 3

    expected = model(ids[:, 20:], past_key_values=copy.deepcopy(cache)).logits
    again = QuantizedKVCache.from_legacy_cache(layers)
    prompt_state(again).alpha = prompt_state(cache).alpha
    torch.testing.assert_close(model(ids[:, 20:], past_key_values=again).logits, expected, rtol=1e-4, atol=1e-5)
    outputs = model(ids[:, 20:], past_key_values=layers)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-4, atol=1e-5)
    assert all(layer.fused == model.config.use_cache_kernel for layer in outputs.past_key_values.layers)


@torch.no_grad()
def test_tuples_of_the_published_functions(model, exact):
    """Tuples that user code made with quantize_cache_v can be continued; so can tuples of plain tensors."""
    ids = prompt(24)
    plain = tuple((layer.keys, layer.values) for layer in exact(ids[:, :20], use_cache=True).past_key_values.layers)
    expected = exact(ids).logits[:, 20:]
    coarse = tuple((quantize_cache_v(key), quantize_cache_v(value)) for key, value in plain)
    near = model(ids[:, 20:], past_key_values=coarse).logits
    assert 1e-6 < ((near - expected).abs().max() / expected.abs().max()).item() < 0.05
    torch.testing.assert_close(exact(ids[:, 20:], past_key_values=plain).logits, expected, rtol=1e-4, atol=1e-4)
    new = exact.generate(
        ids, past_key_values=tuple((key[:, :, :20], value[:, :, :20]) for key, value in plain), **GREEDY
    )
    assert torch.equal(new, exact.generate(ids, **GREEDY))


# ---- generation ----


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"prompt_lookup_num_tokens": 3},
        {"max_new_tokens": 80},
    ],
    ids=["beams", "several beams", "samples", "prompt lookup", "long"],
)
def test_generation_equals_a_full_precision_cache_with_the_same_rounding(model, exact, settings, monkeypatch):
    """All generation modes, beyond the trained length (NTK, LogN), with one left-padded row.

    Both caches round in the same way, so that only storing and reading can differ.
    """
    ids = prompt(50, batch=1 if "prompt_lookup_num_tokens" in settings else 2)
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, :15] = 0
    settings = GREEDY | settings | {"attention_mask": mask}

    class Rounding(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            rounded = [scale * (q - zero) for q, scale, zero in map(quantize_tokens, (key_states, value_states))]
            return super().update(*rounded, layer_idx, *args, **kwargs)

    torch.manual_seed(0)
    expected = exact.generate(ids, past_key_values=Rounding(), **settings)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, **settings), expected)


@pytest.mark.slow
def test_chat_is_the_same_with_and_without_the_kernel(bundled_chat):
    """The bundled model, several turns, in float32 and bfloat16."""
    for precision in ("fp32", "bf16"):
        answers = []
        for kind in ({}, {"use_cache_quantization": True}, {"use_cache_quantization": True, "use_cache_kernel": True}):
            model, tokenizer = load_model(bundled_chat, cpu_only=True, **{precision: True}, **kind)
            reply, history = model.chat(tokenizer, "My name is Alice.", history=None, do_sample=False)
            batch = model.chat_batch(tokenizer, ["What is 47 + 38?", "Who are you?"], do_sample=False)[0]
            stream = list(model.chat_stream(tokenizer, "What is my name?", history=history, do_sample=False))[-1]
            answers.append([reply, *batch, stream])
        assert answers[0] == answers[1] == answers[2]
        assert answers[0][1] == "47 + 38 = 85."
        assert "Alice" in answers[0][3]


def test_requested_static_cache_is_used(model, exact):
    ids = prompt(20)
    for settings in ({"cache_implementation": "static"}, {"past_key_values": StaticCache(exact.config, 40)}):
        new = model.generate(ids, disable_compile=True, **settings, **GREEDY)
        assert torch.equal(new, exact.generate(ids, **GREEDY))


def test_eager_attention_returns_weights(golden):
    model = AutoModelForCausalLM.from_pretrained(
        golden, use_cache_quantization=True, use_cache_kernel=True, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        cache = model(prompt(10), use_cache=True).past_key_values
        weights = model(prompt(1), past_key_values=cache, output_attentions=True).attentions
    assert len(weights) == model.config.num_hidden_layers
    assert weights[0].shape[-1] == 11
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(1, model.config.num_attention_heads, 1))


@torch.no_grad()
def test_flex_attention_with_its_own_masks(golden, exact):
    flags = {"use_cache_quantization": True, "use_cache_kernel": True}
    model = AutoModelForCausalLM.from_pretrained(golden, attn_implementation="flex_attention", **flags).eval()
    with torch.compiler.set_stance("force_eager"):
        new = model.generate(prompt(12), **GREEDY)
    assert torch.equal(new, exact.generate(prompt(12), **GREEDY))


def test_transformers_continuous_batching_is_rejected(model):
    with pytest.raises(ValueError, match="without use_cache_quantization=True"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)


# ---- scripts ----


@pytest.mark.process
def test_the_terminal_demo():
    done = run_script("cli_demo.py", "--cpu-only", "--int8-cache", text="What is 47 + 38?\n")
    assert (done.returncode, done.stdout) == (0, "47 + 38 = 85.\n"), done.stderr


def test_the_server(start_server, bundled_chat):
    """Concurrent answers equal single ones."""
    url = start_server("-c", str(bundled_chat), "--int8-cache").url

    def answer(a: int) -> str:
        body = {"messages": [{"role": "user", "content": f"What is {a} + 38?"}], "temperature": 0}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()["choices"][0]["message"][
            "content"
        ]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, (47, 12, 30, 25)))
    assert together == [answer(a) for a in (47, 12, 30, 25)]
    assert together[0] == "47 + 38 = 85."
