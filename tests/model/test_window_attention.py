"""Window attention compared with explicit masks, with chunks, padding, all caches, and switched off.

The golden model is loaded with a trained length of 64, and with windows smaller and larger than a block.
"""

import pytest
import torch
from transformers import AttentionInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwen import QWenConfig, QWenLMHeadModel
from qwen.model.kv_cache_qwen import prompt_state
from qwen.model.rope_qwen import apply_rotary_emb, logn_scale, rotary_tables

TOKENS = 330


def window_sizes(layers: int) -> list[int]:
    """From less than one block of queries to more than one."""
    return [40 + 170 * layer // (layers - 1) for layer in range(layers)]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, golden):
    return load(golden, attn_implementation=request.param)


def load(golden, **kwargs) -> QWenLMHeadModel:
    layers = QWenConfig.from_pretrained(golden).num_hidden_layers
    kwargs = {"use_window_attn": True, "window_sizes": window_sizes(layers), "seq_length": 64} | kwargs
    return QWenLMHeadModel.from_pretrained(golden, **kwargs).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def reference_logits(model: QWenLMHeadModel, ids: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """Logits (1, S, V) of a prompt, with all scores computed and those outside the window masked."""
    config, length = model.config, ids.shape[1]
    positions = torch.arange(length)
    distance = positions[:, None] - positions[None]
    cos, sin = rotary_tables(positions[None], config.rotary_dim, config.rotary_emb_base, torch.tensor([alpha]))
    query_scale = logn_scale(positions[None], config.seq_length)
    x = model.transformer.wte(ids)
    for block, size in zip(model.transformer.h, config.window_sizes, strict=True):
        heads = block.attn.c_attn(block.ln_1(x)).view(length, 3, -1, config.kv_channels).permute(1, 2, 0, 3)[:, None]
        query, key, value = (
            apply_rotary_emb(heads[0], cos, sin) * query_scale,
            apply_rotary_emb(heads[1], cos, sin),
            heads[2],
        )
        scores = query @ key.mT / config.kv_channels**0.5
        scores = scores.masked_fill((distance < 0) | (distance >= size), -torch.inf)
        x = x + block.attn.c_proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(1, length, -1))
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(model.transformer.ln_f(x))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(((found - expected).abs().max() < 1e-5 * expected.abs().max()).item())


@torch.no_grad()
def test_prompt_equals_the_reference(model, ids):
    alpha = 15.0  # 330 tokens are 5.2 times 64: 2^(3 + 1) − 1
    expected = reference_logits(model, ids, alpha)
    assert close(model(ids).logits, expected)
    model.config.use_window_attn = False
    try:
        assert not close(model(ids).logits, expected)
    finally:
        model.config.use_window_attn = True


@torch.no_grad()
def test_cache_grows_in_steps_of_any_size(model, ids):
    model.config.use_dynamic_ntk = False  # the RoPE base would be that of the first chunk
    try:
        expected, cache, pieces = reference_logits(model, ids), None, []
        for start, end in ((0, 39), (39, 40), (40, 41), (41, 130), (130, 131), (131, 329), (329, 330)):
            output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache, pieces = output.past_key_values, [*pieces, output.logits]
        assert close(torch.cat(pieces, dim=1), expected)
    finally:
        model.config.use_dynamic_ntk = True


def test_a_row_in_a_batch_equals_the_same_row_alone(model, ids):
    rows = [ids[0, :300], ids[0, 20:150], ids[0, 5:20]]
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    padded = torch.stack([torch.cat([torch.zeros(300 - len(row), dtype=row.dtype), row]) for row in rows])
    mask = torch.stack([(torch.arange(300) >= 300 - len(row)).long() for row in rows])
    together = model.generate(padded, attention_mask=mask, **settings)[:, 300:]
    for row, tokens in zip(rows, together, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones_like(row)[None], **settings)
        assert torch.equal(alone[0, len(row) :], tokens)


def test_weights_are_zero_outside_the_window(golden, ids):
    model = load(golden, attn_implementation="eager")
    weights = model(ids, output_attentions=True).attentions
    assert all(weight.shape[-2:] == (TOKENS, TOKENS) for weight in weights)
    assert all(torch.allclose(weight.sum(-1), torch.ones(())) for weight in weights)
    for weight, size in zip(weights, model.config.window_sizes, strict=True):
        last = weight[0, :, -1]
        assert last[:, : max(0, TOKENS - size)].eq(0).all()
        assert last[:, -min(size, TOKENS) :].gt(0).all()


@torch.no_grad()
def test_a_static_cache(model, ids):
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=400)
    first = model(ids[:, :-2], past_key_values=cache, use_cache=True)
    alpha = prompt_state(cache).alpha.clone()
    second = model(ids[:, -2:-1], past_key_values=cache, use_cache=True)
    third = model(ids[:, -1:], past_key_values=cache, use_cache=True)
    assert alpha.item() == 15.0
    assert close(torch.cat([first.logits, second.logits, third.logits], dim=1), expected)


@pytest.mark.parametrize("kernel", [False, True])
@torch.no_grad()
def test_8_bit_cache_uses_the_same_windows(golden, ids, kernel):
    exact, rounded = load(golden), load(golden, use_cache_quantization=True, use_cache_kernel=kernel)
    expected, found = [], []
    for model, logits in ((exact, expected), (rounded, found)):
        cache = None
        for start, end in ((0, 300), (300, 301), (301, 302), (302, TOKENS)):
            output = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    expected, found = torch.cat(expected, dim=1), torch.cat(found, dim=1)
    error = (found - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.05


@torch.no_grad()
def test_flash_attention_gets_the_window(golden, ids):
    """Flash attention needs a GPU, so a stand-in with a similar name implements its `sliding_window` argument."""

    def flash(module, query, key, value, attention_mask, sliding_window=None, **kwargs):
        positions = torch.arange(key.shape[2])
        distance = positions[-query.shape[2] :, None] - positions[None]
        visible = distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)
        return sdpa_attention_forward(module, query, key, value, visible[None, None], **kwargs)

    AttentionInterface.register("flash_stand_in", flash)
    expected = load(golden)(ids).logits
    model = load(golden)
    model.config._attn_implementation = "flash_stand_in"
    assert close(model(ids).logits, expected)


@torch.no_grad()
def test_off_and_short_contexts_are_exact(golden, ids):
    plain = QWenLMHeadModel.from_pretrained(golden, seq_length=64).eval()
    assert plain.config.use_window_attn is False
    windowed = load(golden)
    assert torch.equal(plain(ids[:, :40]).logits, windowed(ids[:, :40]).logits)
    windowed.config.use_window_attn = False
    assert torch.equal(plain(ids).logits, windowed(ids).logits)


def test_training_uses_no_windows(golden, ids):
    plain, windowed = QWenLMHeadModel.from_pretrained(golden).train(), load(golden).train()
    assert torch.equal(plain(ids).logits, windowed(ids).logits)


def test_default_sizes_grow_from_half_to_four_times_the_trained_length():
    config = QWenConfig(num_hidden_layers=8, seq_length=2048, use_window_attn=True)
    assert config.layer_window_sizes == [1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192]
    assert QWenConfig(num_hidden_layers=1, seq_length=100, use_window_attn=True).layer_window_sizes == [50]


@pytest.mark.parametrize("sizes", [[64], [0] * 32, []])
def test_invalid_sizes_are_rejected(sizes):
    with pytest.raises(ValueError, match="window_sizes needs a number of tokens above 0 for each of the 32 layers"):
        QWenConfig(window_sizes=sizes)


def test_incompatible_options_are_rejected(golden, ids):
    with pytest.raises(ValueError, match=r"window_sizes=.* without use_window_attn=True would do nothing"):
        QWenLMHeadModel.from_pretrained(golden, window_sizes=[64, 64])
    model = load(golden)
    with pytest.raises(ValueError, match=r"generate_batch.*use_window_attn"):
        model.generate_batch([[1, 2, 3]])
    model.config._attn_implementation = "flex_attention"
    with torch.no_grad(), pytest.raises(ValueError, match="use_window_attn=True works with"):
        model(ids)


def test_saved_model_keeps_its_windows(golden, tmp_path):
    load(golden).save_pretrained(tmp_path)
    assert (tmp_path / "window_attention_qwen.py").is_file()
    again = QWenConfig.from_pretrained(tmp_path)
    assert again.use_window_attn
    assert again.layer_window_sizes == window_sizes(again.num_hidden_layers)
