"""The network compared with reference vectors, and common uses of a transformers model."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, StaticCache

from qwen import QWenConfig, QWenLMHeadModel
from qwen.model.kv_cache_qwen import dequantize_cache_torch, quantize_cache_v, quantize_tokens
from qwen.model.rope_qwen import ntk_alpha, rotary_tables

VARIANTS = {
    "default": {},
    "no_ntk": {"use_dynamic_ntk": False},
    "no_logn": {"use_logn_attn": False},
    "plain": {"use_dynamic_ntk": False, "use_logn_attn": False},
    "int8kv": {"use_cache_quantization": True},
}


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def expected(golden):
    return load_file(golden / "expected.safetensors")


@pytest.fixture(scope="module")
def cases(golden):
    return {case["name"]: case for case in json.loads((golden / "cases.json").read_text())}


@pytest.fixture(scope="module")
def model(golden):
    return QWenLMHeadModel.from_pretrained(golden).eval()


def decode_one_by_one(model, ids, n_prompt):
    """Logits of the first n_prompt tokens from one call, and of the others one at a time with the cache."""
    outputs = model(ids[:, :n_prompt], use_cache=True)
    logits = [outputs.logits]
    for position in range(n_prompt, ids.shape[1]):
        outputs = model(ids[:, position : position + 1], past_key_values=outputs.past_key_values)
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def golden_case_names():
    variants = ("default", "no_ntk", "no_logn", "plain")
    names = [f"{variant}/{length}" for variant in variants for length in ("short", "long")]
    return [*names, "default/batch_short", "default/batch_long", "default/decode_cross", "default/decode_long"]


def test_every_golden_case_is_run(cases):
    assert set(cases) == {*golden_case_names(), "int8kv/decode"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", golden_case_names())
@torch.no_grad()
def test_logits_equal_the_reference(golden, expected, cases, name, attention):
    variant = VARIANTS[name.split("/")[0]]
    model = QWenLMHeadModel.from_pretrained(golden, attn_implementation=attention, **variant).eval()
    ids, mask = expected[f"{name}.input_ids"].long(), expected.get(f"{name}.attention_mask")
    if "n_prompt" in cases[name]:
        logits = decode_one_by_one(model, ids, cases[name]["n_prompt"])
    else:
        logits = model(ids, attention_mask=mask).logits
    here = slice(None) if mask is None else mask.bool()
    assert relative_error(logits[here], expected[f"{name}.logits"][here]) < 1e-4


def test_greedy_generation_equals_the_reference(model, expected):
    prompt, full, stopped = (expected[f"greedy.{name}"].long() for name in ("prompt", "full", "stopped"))
    new_tokens = full.shape[1] - prompt.shape[1]
    assert torch.equal(model.generate(prompt, max_new_tokens=new_tokens, do_sample=False), full)
    ours = model.generate(
        prompt,
        max_new_tokens=new_tokens,
        do_sample=False,
        stop_words_ids=[expected["greedy.stop"].tolist()],
        eos_token_id=stopped[0, -1].item(),
    )
    assert torch.equal(ours, stopped)


@torch.no_grad()
def test_int8_cache_is_closer_to_full_precision_than_the_reference(golden, expected, cases):
    name = "int8kv/decode"
    ids, n_prompt = expected[f"{name}.input_ids"].long(), cases[name]["n_prompt"]
    quantized = QWenLMHeadModel.from_pretrained(golden, use_cache_quantization=True).eval()
    exact = QWenLMHeadModel.from_pretrained(golden).eval()(ids).logits
    ours = relative_error(decode_one_by_one(quantized, ids, n_prompt), exact)
    assert 1e-6 < ours < relative_error(expected[f"{name}.logits"], exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_cache_keeps_extreme_rows(dtype):
    rows = torch.stack(
        [
            torch.zeros(16),
            torch.full((16,), 100.0),
            torch.full((16,), -3.0),
            torch.tensor([1e-6, -1e-6] * 8),
            torch.tensor([100.0, 100.1] * 8),
            torch.randn(16, generator=torch.Generator().manual_seed(0)),
        ]
    ).to(dtype)[None, None]
    back = dequantize_cache_torch(*quantize_tokens(rows)).float()
    largest = rows.float().abs().amax(-1, keepdim=True)
    assert ((back - rows.float()).abs() <= largest / 100 + 1e-4).all()


def test_the_published_quantization_functions(expected):
    q, scale, zero = quantize_cache_v(expected["kv/input"])
    assert torch.equal(q, expected["kv/q"].to(torch.uint8))
    torch.testing.assert_close(scale, expected["kv/scale"])
    torch.testing.assert_close(zero, expected["kv/zero"])
    torch.testing.assert_close(dequantize_cache_torch(q, scale, zero), expected["kv/dequantized"])
    again = quantize_cache_v(expected["kv/input"], 8, torch.tensor(255), torch.tensor(0))
    assert torch.equal(again[0], q)
    with pytest.raises(ValueError, match="bits=8"):
        quantize_cache_v(expected["kv/input"], bits=4)


def test_ntk_alpha_steps_at_the_powers_of_two():
    lengths = torch.tensor([1, 31, 32, 33, 64, 65, 128, 129, 256, 257])
    assert ntk_alpha(lengths, 32).tolist() == [1, 1, 1, 3, 3, 7, 7, 15, 15, 31]


def test_rotary_tables_depend_on_position_and_frequency():
    cos, sin = rotary_tables(torch.tensor([[0, 5]]), rotary_dim=4, base=100.0)
    angle = torch.tensor([5.0, 0.5, 5.0, 0.5])
    torch.testing.assert_close(cos[0, 0], torch.stack((torch.ones(4), angle.cos())))
    torch.testing.assert_close(sin[0, 0], torch.stack((torch.zeros(4), angle.sin())))
    stretched, _ = rotary_tables(torch.tensor([[5]]), 4, 100.0, alpha=torch.tensor([3.0]))
    assert stretched[0, 0, 0, 1].item() == pytest.approx(torch.tensor(5 / 900**0.5).cos().item())


@torch.no_grad()
def test_a_row_in_a_padded_batch_equals_the_row_alone(model):
    rows = [torch.randint(0, 512, (1, n), generator=torch.Generator().manual_seed(n)) for n in (7, 40, 69)]
    alone = [model.generate(row, max_new_tokens=12, do_sample=False)[0, row.shape[1] :] for row in rows]
    width = max(row.shape[1] for row in rows)
    padded = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=511) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    together = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, width:]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
def test_right_padding_changes_nothing(model):
    ids = torch.randint(0, 512, (1, 50), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(ids, (0, 20), value=511)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 20))
    assert relative_error(model(padded, attention_mask=mask).logits[:, :50], model(ids).logits) < 1e-5


def test_missing_mask_is_derived_from_the_pad_token(model):
    ids = torch.randint(0, 500, (1, 20), generator=torch.Generator().manual_seed(0))
    batch = torch.cat((torch.nn.functional.pad(ids, (9, 0), value=511), torch.arange(29)[None]))
    alone = model.generate(ids, max_new_tokens=8, do_sample=False)[:, 20:]
    for eos in (510, 511):  # transformers derives no mask if pad equals eos, as in published checkpoints
        ours = model.generate(batch, pad_token_id=511, eos_token_id=eos, max_new_tokens=8, do_sample=False)
        assert torch.equal(ours[:1, 29:], alone)


@torch.no_grad()
def test_chunked_prefill_keeps_the_rope_base(model):
    ids = torch.randint(0, 512, (2, 70), generator=torch.Generator().manual_seed(0))
    whole = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False, prefill_chunk_size=16), whole)


@pytest.mark.parametrize("length", [9, 28, 40])
def test_assisted_decoding_equals_greedy_decoding(model, golden, length):
    assistant = QWenLMHeadModel.from_pretrained(golden, num_hidden_layers=1).eval()
    ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(length))
    alone = model.generate(ids, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=assistant), alone)
    drafted = model.generate(ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted, alone)


def test_a_static_cache_gives_the_same_tokens(model):
    ids = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(0))
    dynamic = model.generate(ids, max_new_tokens=40, do_sample=False)
    static = model.generate(ids, max_new_tokens=40, do_sample=False, cache_implementation="static")
    assert torch.equal(static, dynamic)


@torch.no_grad()
def test_a_static_cache_is_reused_for_another_prompt(model):
    cache = StaticCache(config=model.config, max_cache_len=128)
    for length in (70, 20):
        ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(length))
        cache.reset()
        ours = model(ids, past_key_values=cache).logits
        assert relative_error(ours, model(ids).logits) < 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("length", [9, 40])
def test_the_decoding_step_compiles_to_one_graph(model, length):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model.forward, fullgraph=True)
    ids = torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(length))
    eager = model.generate(ids, max_new_tokens=30, do_sample=False)[:, length:]
    cache = StaticCache(config=model.config, max_cache_len=96)
    token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    tokens = [token]
    for _ in range(29):
        token = step(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(token)
    assert torch.equal(torch.cat(tokens, dim=1), eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_beam_search_in_a_padded_batch_equals_each_row_alone(model):
    rows = [torch.randint(0, 500, (1, n), generator=torch.Generator().manual_seed(n)) for n in (20, 40)]
    settings = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    alone = torch.cat([model.generate(row, **settings)[:, row.shape[1] :] for row in rows])
    batch = torch.cat((torch.nn.functional.pad(rows[0], (20, 0), value=511), rows[1]))
    mask = (batch != 511).long()
    assert torch.equal(model.generate(batch, attention_mask=mask, **settings)[:, 40:], alone)


def test_sampling_is_reproducible_with_a_seed(model):
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.9))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_continuous_batching_equals_generate(golden):
    model = QWenLMHeadModel.from_pretrained(golden).eval()
    lengths = (5, 11, 31)  # the last reply passes the trained length of 32
    rows = [torch.randint(0, 512, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    alone = [model.generate(row, max_new_tokens=10, do_sample=False)[0, row.shape[1] :].tolist() for row in rows]
    config = model.generation_config
    config.update(max_new_tokens=10, do_sample=False, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    outputs = model.generate_batch([row[0].tolist() for row in rows], config, continuous_batching_config=small)
    together = [output.generated_tokens for _, output in sorted(outputs.items())]
    assert together == alone


def test_continuous_batching_refuses_prompts_that_need_ntk(golden):
    model = QWenLMHeadModel.from_pretrained(golden).eval()
    short, long = list(range(32)), list(range(33))
    refusal = "has 33 tokens.*no dynamic NTK.*seq_length=32.*use generate, chat_batch or openai_api.py"
    with pytest.raises(ValueError, match=refusal):
        model.generate_batch([short, long], max_new_tokens=1)
    manager = model.init_continuous_batching()
    with pytest.raises(ValueError, match=refusal):
        manager.add_requests([short, long])
    without = QWenLMHeadModel.from_pretrained(golden, use_dynamic_ntk=False).eval()
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
    expected = without.generate(torch.tensor([long]), max_new_tokens=3, do_sample=False)[0, 33:].tolist()
    without.generation_config.update(do_sample=False)
    (output,) = without.generate_batch([long], max_new_tokens=3, continuous_batching_config=small).values()
    assert output.generated_tokens == expected


def test_a_small_max_cache_len_is_reported(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("qwen"), "propagate", True)
    ids = torch.arange(20)[None]
    settings = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    expected = model.generate(ids, **settings)
    for length in (24, None):
        model.generate(ids, cache_implementation="static", max_cache_len=length, **settings)
    model.generate(ids, max_cache_len=10, **settings)  # has no effect, as transformers warns
    assert "too small" not in caplog.text
    small = model.generate(ids, cache_implementation="static", max_cache_len=23, **settings)
    assert "max_cache_len=23 is too small" in caplog.text
    assert "together 24 tokens" in caplog.text
    assert torch.equal(small, expected)


@torch.no_grad()
def test_embeddings_instead_of_ids(model):
    ids = torch.randint(0, 512, (1, 40), generator=torch.Generator().manual_seed(0))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    new = model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(new, model.generate(ids, max_new_tokens=6, do_sample=False)[:, 40:])
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeds)


@torch.no_grad()
def test_loss_counts_the_labelled_tokens(model):
    ids = torch.randint(0, 512, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = -100
    outputs = model(ids, labels=labels)
    losses = torch.nn.functional.cross_entropy(outputs.logits[:, 4:-1].transpose(1, 2), ids[:, 5:], reduction="sum")
    assert outputs.loss.item() == pytest.approx(losses.item() / 14, rel=1e-5)
    halved = model(ids, labels=labels, num_items_in_batch=28).loss
    assert halved.item() == pytest.approx(outputs.loss.item() / 2, rel=1e-5)


@torch.no_grad()
def test_partial_logits_and_recorded_outputs(golden):
    model = QWenLMHeadModel.from_pretrained(golden, attn_implementation="eager").eval()
    ids = torch.arange(10)[None]
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(1, 10, 64)] * 3
    assert [tuple(a.shape) for a in outputs.attentions] == [(1, 4, 10, 10)] * 2
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, outputs.logits[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, outputs.logits[:, [2, 5]])


def test_training_ignores_the_long_context_techniques(golden):
    ids = torch.randint(0, 512, (1, 80), generator=torch.Generator().manual_seed(0))
    plain = QWenLMHeadModel.from_pretrained(golden, use_dynamic_ntk=False, use_logn_attn=False)
    model = QWenLMHeadModel.from_pretrained(golden).train()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert relative_error(model.eval()(ids).logits, plain(ids).logits) > 1e-2


def test_gradient_checkpointing_gives_the_same_gradients(golden):
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = QWenLMHeadModel.from_pretrained(golden).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_resized_and_tied_embeddings(golden, tmp_path):
    model = QWenLMHeadModel.from_pretrained(golden).eval()
    before = model(torch.arange(8)[None]).logits
    model.resize_token_embeddings(520)
    assert model.config.vocab_size == 520
    assert model.lm_head.weight.shape == (520, 64)
    assert torch.equal(model(torch.arange(8)[None]).logits[..., :512], before)

    tied = QWenLMHeadModel(QWenConfig(**small_shape(), tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    tied.save_pretrained(tmp_path)
    loaded = QWenLMHeadModel.from_pretrained(tmp_path, fp32=True)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)


def small_shape(**changes):
    shape = {
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 16,
        "intermediate_size": 64,
        "seq_length": 32,
        "max_position_embeddings": 128,
    }
    return shape | changes


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"rotary_pct": 0.5}, {"kv_channels": 128}, {"no_bias": False}])
def test_less_common_shapes_decode_like_prefill(changes):
    torch.manual_seed(0)
    model = QWenLMHeadModel(QWenConfig(**small_shape(**changes))).eval()
    ids = torch.randint(0, 128, (2, 20))
    assert relative_error(decode_one_by_one(model, ids, 11), model(ids).logits) < 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("attention", ["flex_attention", "eager", "sdpa"])
def test_attention_implementations_agree(golden, attention):
    ids = torch.randint(0, 512, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    reference = QWenLMHeadModel.from_pretrained(golden, attn_implementation="eager").eval()
    model = QWenLMHeadModel.from_pretrained(golden, attn_implementation=attention).eval()
    ours, theirs = model(ids, attention_mask=mask).logits, reference(ids, attention_mask=mask).logits
    assert relative_error(ours[mask.bool()], theirs[mask.bool()]) < 1e-5


@torch.no_grad()
def test_half_precision_stays_close(golden):
    ids = torch.randint(0, 512, (2, 60), generator=torch.Generator().manual_seed(0))
    exact = QWenLMHeadModel.from_pretrained(golden, fp32=True).eval()(ids).logits
    for flag in ("bf16", "fp16"):
        model = QWenLMHeadModel.from_pretrained(golden, **{flag: True}).eval()
        assert model.dtype is {"bf16": torch.bfloat16, "fp16": torch.float16}[flag]
        assert relative_error(model(ids).logits.float(), exact) < 0.1
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 64)


def test_lora_trains_the_adapter_only(golden, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    torch.manual_seed(0)
    ids = torch.randint(0, 512, (2, 20))
    base = AutoModelForCausalLM.from_pretrained(golden)
    targets = ["c_attn", "c_proj", "w1", "w2"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        merged = loaded.merge_and_unload()
        assert relative_error(merged(ids).logits, model.eval()(ids).logits) < 1e-4


@torch.no_grad()
def test_the_cache_can_be_continued_by_hand(model):
    ids = torch.randint(0, 512, (1, 60), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    model(ids[:, :40], past_key_values=cache)
    continued = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    logits = decode_one_by_one(model, continued[:, :-1], 40)
    assert torch.equal(logits[:, 59:].argmax(-1), continued[:, 60:])
