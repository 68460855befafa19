"""The engine on a pretended GPU, which the host is one step behind: its replies are those of the CPU."""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen.checkpoint.loading import load_model
from qwen.serving.engine import Engine
from qwen.serving.engine.detokenizer import TokenLogprob
from qwen.serving.engine.grammar import ConstraintFactory
from qwen.serving.engine.paged_attention import uses_varlen
from tests.pretend_gpu.test_generation import EIGHT_BIT
from tests.serving.engine.replies import admit_too_many, generated, is_empty, served, start, token_ids, wait_until
from tests.support import ROOT
from tests.support.cuda_guard import NoGuard
from tests.support.launch_counter import count_device_work
from tests.support.pretend_cuda import pretend_cuda
from tests.support.varlen_attention import varlen_on_cpu

pytestmark = pytest.mark.slow
HOPPER, TURING = (9, 0), (7, 5)  # compute capabilities; torch's flash attention does not run on the second
WINDOWS = {"use_window_attn": True, "window_sizes": [30, 90]}
LENGTHS = (1, 17, 64, 65, 40, 130, 200)  # of prompts; the trained length is 64
LARGE_CACHE, SMALL_CACHE = 8192, 256  # tokens; in the second, sequences are preempted
SHORT = 5  # of the prompts fit together into the small cache, but not with their replies
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["one", "two"]}, "number": {"type": "integer"}},
    "required": ["name", "number"],
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(256) for _ in range(length)] for length in LENGTHS]


@contextlib.contextmanager
def gpu(capability: tuple[int, int] = HOPPER) -> Iterator[None]:
    """Pretend a GPU, with torch's flash attention if GPUs of this capability have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    uses_varlen.cache_clear()
    try:
        with pretend_cuda(capability=capability), varlen_on_cpu():
            yield
    except NoGuard as reason:
        pytest.skip(str(reason))
    finally:
        uses_varlen.cache_clear()
        torch.set_num_threads(threads)


@contextlib.contextmanager
def serving(folder: Path, device: str, config: dict | None = None, **settings) -> Iterator[Engine]:
    """Run an engine with a model on a device; all of its memory must come back."""
    model, tokenizer = load_model(folder, cpu_only=True, **config or {})
    engine = Engine(model.to(device), tokenizer, **{"max_batch_size": 8, "cache_tokens": LARGE_CACHE} | settings)
    try:
        yield engine
        wait_until(lambda: is_empty(engine))
    finally:
        engine.close(timeout=0)


@pytest.mark.parametrize("config", [{}, EIGHT_BIT, WINDOWS], ids=["float", "8 bits", "windows"])
def test_replies_and_reuse_of_prompts_equal_generate(tiny_chat_checkpoint, prompts, config):
    """In float32; all prompts at once, twice."""
    model, _ = load_model(tiny_chat_checkpoint, cpu_only=True, **config)
    alone = [generated(model, prompt, 12) for prompt in prompts]
    with gpu(), serving(tiny_chat_checkpoint, "cuda", config) as engine:
        assert engine.runner.is_asynchronous
        assert served(engine, prompts, max_tokens=12) == alone
        streams = [start(engine, prompt, max_tokens=12) for prompt in prompts]
        assert [token_ids(stream) for stream in streams] == alone
        assert [stream.cached_tokens for stream in streams] == [(length - 1) // 16 * 16 for length in LENGTHS]


@pytest.mark.parametrize("config", [{}, EIGHT_BIT, WINDOWS], ids=["float", "8 bits", "windows"])
def test_preempted_replies_equal_generate(tiny_chat_checkpoint, prompts, config):
    model, _ = load_model(tiny_chat_checkpoint, cpu_only=True, **config)
    alone = [generated(model, prompt, 40) for prompt in prompts[:SHORT]]
    with gpu(), serving(tiny_chat_checkpoint, "cuda", config, cache_tokens=SMALL_CACHE) as engine:
        admit_too_many(engine)
        assert served(engine, prompts[:SHORT], max_tokens=40) == alone
        assert engine.scheduler.num_preemptions > 0


def test_preempted_sampled_replies_equal_the_cpus(tiny_chat_checkpoint, prompts):
    """Penalties count the tokens that the host has not seen, too."""
    with serving(tiny_chat_checkpoint, "cpu") as engine:
        on_cpu = served(engine, prompts[:SHORT], max_tokens=40, **SAMPLING)
    with gpu(), serving(tiny_chat_checkpoint, "cuda", cache_tokens=SMALL_CACHE) as engine:
        admit_too_many(engine)
        assert served(engine, prompts[:SHORT], max_tokens=40, **SAMPLING) == on_cpu
        assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("cache_tokens", [LARGE_CACHE, SMALL_CACHE], ids=["", "preempted"])
def test_grammars_equal_the_cpus(tiny_chat_checkpoint, prompts, cache_tokens):
    """A grammar needs the last token before the next one: the host waits for it, and the others' replies stay right."""

    def replies(engine: Engine) -> list[list[int]]:
        factory = ConstraintFactory(engine.tokenizer, engine.model.config.vocab_size)
        params = engine.params(temperature=0.0, max_tokens=40, top_logprobs=0)
        streams = [start(engine, prompt, max_tokens=32) for prompt in prompts[:3]]
        streams += [engine.start(prompt, params, constraint=factory.json_schema(SCHEMA)) for prompt in prompts[:SHORT]]
        return [token_ids(stream) for stream in streams]

    with serving(tiny_chat_checkpoint, "cpu", max_batch_size=16) as engine:
        on_cpu = replies(engine)
        assert all(engine.tokenizer.decode(reply).startswith('{"name": "') for reply in on_cpu[3:])
    with gpu(), serving(tiny_chat_checkpoint, "cuda", max_batch_size=16, cache_tokens=cache_tokens) as engine:
        if cache_tokens == SMALL_CACHE:
            admit_too_many(engine)
        assert replies(engine) == on_cpu
        assert (engine.scheduler.num_preemptions > 0) == (cache_tokens == SMALL_CACHE)


@pytest.mark.parametrize("cache_tokens", [LARGE_CACHE, SMALL_CACHE], ids=["", "preempted"])
def test_limits_of_tokens_and_scores_of_prompts_equal_the_cpus(tiny_chat_checkpoint, prompts, cache_tokens):
    """Those that depend on the number of tokens need not wait for the last one; bad words of several tokens do."""
    alone = generated(load_model(tiny_chat_checkpoint, cpu_only=True)[0], prompts[0], 20)
    settings = [
        {"temperature": 1.0, "min_p": 0.1, "seed": 7},
        {"bad_words": [alone[:1], alone[1:3]], "temperature": 0.0},
        {"allowed_token_ids": range(60, 90), "temperature": 1.5, "seed": 3},
        {"stop_token_ids": frozenset(range(0, 512, 3)), "min_tokens": 15, "temperature": 1.5, "seed": 4},
        {"prompt_logprobs": 2},
        {"prompt_logprobs": 0, "max_tokens": 0},
    ]

    def replies(engine: Engine) -> tuple[list[list[int]], list[float]]:
        used = [prompts[index] for index in (0, 0, 1, 4, 3, 5)]
        with engine._changed:
            streams = [
                start(engine, prompt, **{"max_tokens": 30} | each) for prompt, each in zip(used, settings, strict=True)
            ]
        pieces = [list(stream) for stream in streams]
        tokens = [[token.token_id for piece in each for token in piece.tokens] for each in pieces]
        scores = [score for each in pieces for piece in each for score in piece.prompt or ()]
        assert len(scores) == len(prompts[3]) - 1 + len(prompts[5]) - 1
        return tokens, [score.logprob for score in scores]

    with serving(tiny_chat_checkpoint, "cpu") as engine:
        on_cpu, scores = replies(engine)
    assert 15 <= len(on_cpu[3]) < 30
    assert set(on_cpu[2]) <= set(range(60, 90))
    with gpu(), serving(tiny_chat_checkpoint, "cuda", cache_tokens=cache_tokens) as engine:
        if cache_tokens == SMALL_CACHE:
            admit_too_many(engine)
        tokens, logprobs = replies(engine)
        assert tokens == on_cpu
        assert logprobs == pytest.approx(scores, abs=1e-4)
        assert (engine.scheduler.num_preemptions > 0) == (cache_tokens == SMALL_CACHE)


Reply = list[TokenLogprob]


def replies_in_16_bits(engine: Engine, prompts: list[list[int]]) -> list[Reply]:
    streams = [start(engine, prompt, max_tokens=12) for prompt in prompts]
    return [[token for piece in stream for token in piece.tokens] for stream in streams]


def assert_alike(replies: list[Reply], others: list[Reply], least: int) -> None:
    """Most replies are the same. Log-probabilities differ, and tokens that are almost equally likely, by rounding: on
    the CPU alone, bfloat16 changes log-probabilities by up to 0.08 here."""
    same = 0
    for reply, other in zip(replies, others, strict=True):
        for token, expected in zip(reply, other, strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=0.2)
            if token.token_id != expected.token_id:  # two that are almost equally likely
                break
        else:
            same += 1
    assert same >= least


@pytest.mark.parametrize("config", [{}, WINDOWS], ids=["", "windows"])
def test_flash_attention_of_prompts(tiny_chat_checkpoint, prompts, config):
    """In bfloat16: beside the attention of GPUs that do not have it, and that of the CPU. Twice, to reuse blocks."""
    config = {**config, "bf16": True}
    prompts = [*prompts, [*prompts[6], *prompts[5], *prompts[6]]]
    with serving(tiny_chat_checkpoint, "cpu", config) as engine:
        on_cpu = replies_in_16_bits(engine, prompts)
    with gpu(TURING), serving(tiny_chat_checkpoint, "cuda", config) as engine:
        masked = replies_in_16_bits(engine, prompts)
    with gpu(), serving(tiny_chat_checkpoint, "cuda", config) as engine, count_device_work() as work:
        for _ in range(2):
            flash = replies_in_16_bits(engine, prompts)
            assert_alike(flash, masked, least=len(prompts) - 2)
            assert_alike(flash, on_cpu, least=len(prompts) - 2)
        assert "flash_attention_forward" in {name for name, _ in work.launches}


@pytest.mark.process
def test_triton_operations():
    """Run engine_cases.py in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    with gpu():  # skips where there is none to pretend
        pass
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/pretend_gpu/engine_cases.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
