"""Replies equal those of `generate`, whatever the cache, and whoever else is being served."""

import random

import pytest

from qwen.checkpoint.loading import load_model
from qwen.model.qwen_generation_utils import DEFAULT_SYSTEM, make_context
from qwen.serving.engine.grammar import ConstraintFactory
from qwen.serving.engine.sequence import SampledToken
from tests.serving.engine.replies import admit_too_many, generated, is_empty, served, start, token_ids, wait_until

MODES = {
    "float": {},
    "8 bits": {"use_cache_quantization": True},
    "8 bits with the kernel": {"use_cache_quantization": True, "use_cache_kernel": True},
    "windows": {"use_window_attn": True},
    "windows in 8 bits": {"use_window_attn": True, "use_cache_quantization": True},
    "neither NTK nor LogN": {"use_dynamic_ntk": False, "use_logn_attn": False},
}
TOKENS = 14  # of the replies that are compared in every mode


@pytest.fixture(scope="module")
def models(tiny_chat_checkpoint):
    """Function that loads the tiny model in a mode, once, and with the replies of `generate` to prompts."""
    loaded = {}

    def load(mode: str):
        if mode not in loaded:
            model, tokenizer = load_model(tiny_chat_checkpoint, cpu_only=True, **MODES[mode])
            if "windows" in mode:
                model.config.window_sizes = [30] * (model.config.num_hidden_layers - 1) + [90]
            loaded[mode] = model, tokenizer, {}
        return loaded[mode]

    return load


def expected(model, replies: dict, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    key = tuple(prompt)
    if key not in replies:
        replies[key] = generated(model, prompt, TOKENS)
    return replies[key][:tokens]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
def test_replies_equal_generate(models, start_engine, prompts, mode, reuse):
    """All prompts at once, twice, and then with their replies and a few more tokens, like the next turn."""
    model, tokenizer, replies = models(mode)
    engine = start_engine(model, tokenizer, prefix_reuse=reuse)
    prompts = [prompts[index] for index in (0, 2, 4, 5, 6, 8)]  # 1, 17, 64, 65, 130, 257 tokens
    alone = [expected(model, replies, prompt) for prompt in prompts]
    assert served(engine, prompts, max_tokens=TOKENS) == alone
    assert served(engine, prompts, max_tokens=TOKENS) == alone
    longer = [[*prompt, *reply, 5, 6, 7] for prompt, reply in zip(prompts[2:], alone[2:], strict=True)]
    assert served(engine, longer, max_tokens=TOKENS) == [expected(model, replies, prompt) for prompt in longer]
    wait_until(lambda: is_empty(engine))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no reuse"])
def test_replies_of_preempted_sequences_equal_generate(models, start_engine, prompts, mode, reuse):
    model, tokenizer, replies = models(mode)
    engine = start_engine(model, tokenizer, prefix_reuse=reuse, cache_tokens=336)
    admit_too_many(engine)
    prompts = [prompts[3][:43], prompts[7][:44], prompts[4][:46], prompts[5][:60], prompts[6][:76]]
    assert served(engine, prompts, max_tokens=TOKENS) == [expected(model, replies, prompt) for prompt in prompts]
    assert engine.scheduler.num_preemptions > 0
    wait_until(lambda: is_empty(engine))


@pytest.mark.parametrize(
    ("mode", "budget"), [("float", 1), ("float", 7), ("8 bits", 7), ("windows", 7), ("float", 48), ("windows", 48)]
)
def test_chunked_prompts(models, start_engine, prompts, mode, budget, monkeypatch):
    monkeypatch.setattr("qwen.serving.engine.engine.PREFILL_TOKENS", budget)
    model, tokenizer, replies = models(mode)
    engine = start_engine(model, tokenizer)
    prompts = prompts[1:3] if budget == 1 else [prompts[index] for index in (0, 2, 5, 6)]
    assert served(engine, prompts, max_tokens=4) == [expected(model, replies, prompt, 4) for prompt in prompts]


@pytest.mark.parametrize("length", [1, 16, 17, 33, 200])
def test_equal_prompts_of_one_request(tiny, engine, length):
    """Encoded once, also those that arrive in the same step."""
    prompt = list(range(length))
    with engine._changed:  # all arrive in the same step
        streams = [start(engine, prompt, group="request", max_tokens=8) for _ in range(5)]
    assert [token_ids(stream) for stream in streams] == [generated(tiny[0], prompt, 8)] * 5
    assert sorted(stream.cached_tokens for stream in streams) == [0] + 4 * [(length - 1) // 16 * 16]


def test_equal_prompts_of_several_requests(tiny, engine):
    prompt = list(range(50))
    assert served(engine, [prompt] * 5, max_tokens=8) == [generated(tiny[0], prompt, 8)] * 5


def test_ntk_base_changes_replies_past_the_trained_length(models, prompts):
    """Shows that the comparison of tokens above would detect rows that share an NTK base."""
    assert generated(models("float")[0], prompts[8], 20) != generated(models("neither NTK nor LogN")[0], prompts[8], 20)


def test_windows_change_replies(models, prompts):
    assert generated(models("float")[0], prompts[7], 20) != generated(models("windows")[0], prompts[7], 20)


def test_keys_of_another_alpha_are_not_reused(tiny, engine):
    """A prompt that crosses the trained length is encoded again, and the next turn reuses it."""
    draw = random.Random(3)
    prompt, cached = [draw.randrange(256) for _ in range(50)], []
    for _ in range(5):
        stream = start(engine, prompt)
        reply = token_ids(stream)
        assert reply == generated(tiny[0], prompt, 20)
        cached.append(stream.cached_tokens)
        prompt = [*prompt, *reply]
    # Prompts of 50, 70, 90, 110 and 130 tokens: α changes after 64 and 128.
    assert cached == [0, 0, 80, 96, 0]


def test_salts_separate_requests(engine):
    prompt = list(range(50))
    cached = []
    for salt in (None, None, "a", "a", "b"):
        stream = start(engine, prompt, salt=salt)
        token_ids(stream)
        cached.append(stream.cached_tokens)
    assert cached == [0, 48, 0, 48, 0]


def test_repetition_penalty_equals_transformers(tiny, start_engine, prompts):
    alone = [generated(tiny[0], prompt, 20, repetition_penalty=1.3) for prompt in prompts]
    assert alone != [generated(tiny[0], prompt, 20) for prompt in prompts]
    assert served(start_engine(), prompts, repetition_penalty=1.3) == alone
    engine = start_engine(cache_tokens=320)
    admit_too_many(engine)
    assert served(engine, prompts, repetition_penalty=1.3) == alone
    assert engine.scheduler.num_preemptions > 0


SETTINGS = [
    {"temperature": 1.0, "top_p": 0.9, "seed": 7},
    {"temperature": 1.0, "top_k": 20, "seed": 8, "repetition_penalty": 1.2},
    {"temperature": 0.7, "seed": 9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 1.5, "top_p": 0.5, "seed": 10, "logit_bias": {65: 2.0, 66: -100.0}, "min_p": 0.1},
    {"temperature": 0.0, "frequency_penalty": 1.0, "bad_words": [[70], [65, 66]], "allowed_token_ids": range(60, 80)},
    {"temperature": 0.0, "logit_bias": {70: 0.5}},
]


def test_seeded_replies_do_not_depend_on_the_others(start_engine, prompts):
    """The same tokens alone, among others, with preemption, and with reuse."""
    requests = [(prompt, settings) for prompt, settings in zip(prompts[2:8], SETTINGS, strict=True)]
    engine = start_engine()
    alone = [token_ids(start(engine, prompt, **settings, max_tokens=40)) for prompt, settings in requests]
    for settings in ({}, {"cache_tokens": 384}, {"cache_tokens": 384, "prefix_reuse": False}, {"max_batch_size": 3}):
        other = start_engine(**settings)
        if "cache_tokens" in settings:
            admit_too_many(other)
        for _ in range(2):
            streams = [start(other, prompt, **each, max_tokens=40) for prompt, each in requests]
            assert [token_ids(stream) for stream in streams] == alone
        assert (other.scheduler.num_preemptions > 0) == ("cache_tokens" in settings)


def test_requests_that_come_and_go_do_not_change_a_reply(start_engine, prompts):
    engine = start_engine(cache_tokens=480, max_batch_size=4)
    admit_too_many(engine)
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 60, "presence_penalty": 0.3}
    alone = token_ids(start(engine, prompts[3], **settings))
    stream = start(engine, prompts[3], **settings)
    draw = random.Random(1)
    others, interleaved = [], []
    for piece in stream:
        interleaved += [token.token_id for token in piece.tokens]
        if draw.random() < 0.5 and engine.load().queued < 4:
            others.append(start(engine, draw.choice(prompts), max_tokens=draw.randrange(1, 30)))
        if others and draw.random() < 0.3:
            others.pop(draw.randrange(len(others))).cancel()
    assert interleaved == alone


def test_a_preempted_reply_keeps_its_penalties(start_engine, prompts):
    """Others use the sampler's row of a preempted sequence, which may get the same row again."""
    engine = start_engine(cache_tokens=160, max_batch_size=3)
    admit_too_many(engine)
    settings = {"max_tokens": 60, "repetition_penalty": 1.5, "frequency_penalty": 0.5}
    alone = [token_ids(start(engine, prompt, **settings)) for prompt in prompts[1:5]]
    assert served(engine, prompts[1:5], **settings) == alone
    assert engine.scheduler.num_preemptions > 0


def test_same_seed_repeats_and_another_differs(engine, prompts):
    drawn = [served(engine, [prompts[2]], temperature=1.0, top_p=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    unseeded = [served(engine, [prompts[2]], temperature=1.0, top_p=1.0)[0] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("settings", [{}, {"cache_tokens": 320}], ids=["", "preempted"])
def test_grammars_with_reuse_and_preemption(tiny, start_engine, prompts, settings):
    """A reply in a grammar is the same alone and among others that have one or none."""
    model, tokenizer = tiny
    factory = ConstraintFactory(tokenizer, model.config.vocab_size)
    schema = {"type": "object", "properties": {"name": {"enum": ["one", "two"]}, "number": {"type": "integer"}}}
    compiled = factory.json_schema({**schema, "required": ["name", "number"]})
    engine = start_engine(**settings)
    if settings:
        admit_too_many(engine)

    def begin(prompt):
        params = engine.params(temperature=0.0, max_tokens=40, top_logprobs=0)
        return engine.start(prompt, params, constraint=compiled.copy())

    alone = [token_ids(begin(prompt)) for prompt in prompts[:8]]
    assert all(tokenizer.decode(reply).startswith('{"name": "') for reply in alone)
    free = [start(engine, prompt) for prompt in prompts[:6]]
    streams = [begin(prompt) for prompt in prompts[:8]]
    assert [token_ids(stream) for stream in streams] == alone
    assert [token_ids(stream) for stream in free] == [generated(model, prompt, 20) for prompt in prompts[:6]]
    assert (engine.scheduler.num_preemptions > 0) == ("cache_tokens" in settings)


def test_reply_of_the_bundled_model_equals_chat(bundled_chat, start_engine):
    """Whole replies, with their ends."""
    model, tokenizer = load_model(bundled_chat, cpu_only=True)
    queries = ["Hello!", "What is 47 + 38?", "你好，你是谁？", "My name is Alice. Please remember it."]
    expected = [model.chat(tokenizer, query, do_sample=False)[0] for query in queries]
    engine = start_engine(model, tokenizer)
    streams = [
        engine.start(
            make_context(tokenizer, query, system=DEFAULT_SYSTEM)[1],
            engine.params(temperature=0),
            lstrip=True,
            rstrip=True,
        )
        for query in queries
    ]
    assert ["".join(piece.text for piece in stream) for stream in streams] == expected
    assert {stream.finish_reason for stream in streams} == {"stop"}
    assert [stream.completion_tokens for stream in streams] == [len(tokenizer.encode(text)) for text in expected]


def test_log_probabilities_equal_the_model(tiny, engine, prompts):
    """At every position, with a prompt that is found in the cache."""
    import torch

    for _ in range(2):
        stream = start(engine, prompts[7], top_logprobs=2)
        tokens: list[SampledToken] = [token for piece in stream for token in piece.tokens]
    ids = torch.tensor([prompts[7] + [token.token_id for token in tokens]])
    with torch.no_grad():
        # α is that of the prompt, and the reply does not cross the next doubling.
        expected = tiny[0](ids).logits[0, len(prompts[7]) - 1 : -1].log_softmax(-1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=1e-4)
        assert [token_id for token_id, _ in token.top] == row.topk(2).indices.tolist()
    assert stream.cached_tokens == 192
