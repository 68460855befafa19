"""The engine on the device: each reply is that of `generate`, in float32; captured steps change nothing; memory is
given back."""

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qwen.kernels.fused_block import has_gpu_kernels
from qwen.model.qwen_generation_utils import make_context
from qwen.serving.engine import Engine
from qwen.serving.engine.decode_step import DecodeStep
from qwen.serving.engine.model_runner import ModelRunner
from qwen.serving.engine.paged_attention import uses_varlen
from tests.on_gpu.device import CUDA
from tests.on_gpu.models import INT8, INT8_KERNEL, load_chat
from tests.serving.engine.conftest import LENGTHS
from tests.serving.engine.replies import admit_too_many, generated, is_empty, served, start, token_ids, wait_until

WINDOWS = {"use_window_attn": True, "window_sizes": [32, 128]}
CONFIGURATIONS = {
    "float cache": {},
    "8-bit cache": INT8,
    "8-bit cache, kernel": INT8_KERNEL,
    "windows": WINDOWS,
}
QUESTIONS = (
    *("Hello!", "What is 47 + 38?", "你好，你是谁？", "My name is Alice. Please remember it."),
    *("Tell me about this repository.", "请问 91 减 27 等于几？", "Which checkpoints are there?", "谢谢，再见！"),
)


@pytest.fixture
def start_engine(tiny_chat_checkpoint) -> Iterator[Callable[..., Engine]]:
    """A function that loads a random model with a trained length of 64 and starts an engine."""
    engines = []

    def start(folder: Path | None = tiny_chat_checkpoint, cache_tokens: int = 32768, **options) -> Engine:
        model, tokenizer = load_chat(folder, **options)
        engines.append(Engine(model, tokenizer, max_batch_size=16, max_queue=64, cache_tokens=cache_tokens))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(timeout=0)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(256) for _ in range(length)] for length in LENGTHS]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_replies_equal_generate(start_engine, prompts, name):
    """Twice: the second time, the beginnings of the prompts are in the cache."""
    engine = start_engine(fp32=True, **CONFIGURATIONS[name])
    alone = [generated(engine.model, prompt, 20) for prompt in prompts]
    assert served(engine, prompts) == alone
    streams = [start(engine, prompt) for prompt in prompts]
    assert [token_ids(stream) for stream in streams] == alone
    assert [stream.cached_tokens for stream in streams] == [(length - 1) // 16 * 16 for length in LENGTHS]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_preempted_replies_equal_generate(start_engine, prompts, name):
    engine = start_engine(fp32=True, cache_tokens=336, **CONFIGURATIONS[name])
    admit_too_many(engine)
    prompts = [prompts[3][:43], prompts[7][:44], prompts[4][:46], prompts[5][:60], prompts[6][:76]]
    assert served(engine, prompts, max_tokens=40) == [generated(engine.model, prompt, 40) for prompt in prompts]
    assert engine.scheduler.num_preemptions > 0
    wait_until(lambda: is_empty(engine))


def test_penalties_equal_generate(start_engine, prompts):
    engine = start_engine(fp32=True)
    alone = [generated(engine.model, prompt, 20, repetition_penalty=1.3) for prompt in prompts]
    assert served(engine, prompts, repetition_penalty=1.3) == alone


@pytest.mark.parametrize("precision", [{"fp32": True}, {"bf16": True}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [{}, INT8, WINDOWS], ids=["float cache", "8-bit cache", "windows"])
def test_captured_steps_give_the_same_tokens(start_engine, prompts, monkeypatch, precision, config):
    """They have the same kernels. In 16 bits for one prompt after the other, so that both engines take the same steps:
    which rows decode together differs with timing, and may change a reply."""
    captured = start_engine(**precision, **config)
    replayed = []
    run = DecodeStep.run

    def counted_run(step: DecodeStep) -> torch.Tensor:
        replayed.append(step._graph is not None)
        return run(step)

    with monkeypatch.context() as patch:
        patch.setattr(DecodeStep, "run", counted_run)
        replies = [served(captured, [prompt])[0] for prompt in prompts]
    assert any(replayed) == CUDA
    monkeypatch.setattr(ModelRunner, "_is_capturable", lambda runner: False)
    eager = start_engine(**precision, **config)
    assert [served(eager, [prompt])[0] for prompt in prompts] == replies
    if "fp32" in precision:
        assert served(captured, prompts) == served(eager, prompts) == replies


def test_a_seeded_reply_is_repeated(start_engine, prompts):
    engine = start_engine(fp32=True)
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 40}
    drawn = [served(engine, prompts[3:4], **settings | {"seed": seed}) for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_two_hundred_sequences_join_and_leave(start_engine, record_property):
    """Rows are reused and memory is given back: nothing may grow with the number of requests."""
    engine = start_engine(fp32=True)
    draw = random.Random(1)

    def serve(count: int) -> None:
        running = []
        for _ in range(count):
            prompt = [draw.randrange(256) for _ in range(draw.choice((1, 3, 40, 130, 300)))]
            running.append(engine.start(prompt, engine.params(temperature=0.0, max_tokens=draw.randrange(1, 12))))
            if len(running) > 20:
                finish(running.pop(draw.randrange(len(running))))
        for stream in running:
            finish(stream)

    def finish(stream) -> None:
        if draw.random() < 0.2:
            stream.cancel()
        for _ in stream:
            pass
        assert stream.finish_reason in ("length", "stop", "cancelled")

    def allocated() -> int:
        wait_until(lambda: is_empty(engine))
        gc.collect()
        return torch.cuda.memory_allocated() if CUDA else 0

    serve(60)  # captures steps for most numbers of rows; each graph keeps its logits
    before = allocated()
    serve(200)
    assert not engine.failed
    grown = allocated() - before
    record_property("figure", f"{grown / 1e6:+.2f} MB allocated")
    assert grown < 1e6


def test_replies_in_16_bits_alone_and_together(start_engine, prompts, record_property):
    """Not promised: kernels are chosen by batch size, and round differently. Reports how often it holds, and how often
    `generate` has the same reply."""
    engine = start_engine(None, bf16=True)  # the bundled model, whose replies are more than noise
    texts = [make_context(engine.tokenizer, question)[1] for question in QUESTIONS]
    prompts = [*prompts, *texts]
    together = served(engine, prompts)
    alone = [served(engine, [prompt])[0] for prompt in prompts]
    assert all(together[len(LENGTHS) :])  # some of the random prompts have no reply
    transformers = [generated(engine.model, prompt, 20) for prompt in texts]
    ends = {*engine.end_token_ids}
    transformers = [[token for token in reply if token not in ends] for reply in transformers]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    equal = sum(a == b for a, b in zip(alone[len(LENGTHS) :], transformers, strict=True))
    assert equal >= len(texts) / 2
    flash = "flash attention" if uses_varlen(engine.model.device, engine.model.dtype) else "no flash attention"
    attention = "Triton" if has_gpu_kernels(engine.model) else "torch"
    record_property(
        "figure",
        f"{same} of {len(prompts)} greedy replies are the same in bfloat16, {equal} of {len(texts)} equal generate's; "
        f"{attention} decodes, {flash} of prompts",
    )
