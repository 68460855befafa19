"""The engine on the device: each reply is that of `generate`, in float32; memory is given back."""

import gc
import random

import pytest
import torch

from qwen.model.qwen_generation_utils import make_context
from qwen.serving.engine import Engine
from tests.on_gpu.device import CUDA
from tests.on_gpu.models import INT8, INT8_KERNEL, load_chat
from tests.serving.test_engine import LENGTHS, generated, served

CONFIGURATIONS = {
    "float cache": {},
    "8-bit cache": INT8,
    "8-bit cache, kernel": INT8_KERNEL,
    "windows": {"use_window_attn": True, "window_sizes": [32, 128]},
}
QUESTIONS = (
    *("Hello!", "What is 47 + 38?", "你好，你是谁？", "My name is Alice. Please remember it."),
    *("Tell me about this repository.", "请问 91 减 27 等于几？", "Which checkpoints are there?", "谢谢，再见！"),
)


@pytest.fixture
def start_engine(tiny_chat_checkpoint):
    """A function that loads a random model with a trained length of 64 and starts an engine."""
    engines = []

    def start(folder=tiny_chat_checkpoint, **options) -> Engine:
        engines.append(Engine(*load_chat(folder, **options), max_batch_size=16, max_queue=64, cache_tokens=32768))
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
    engine = start_engine(fp32=True, **CONFIGURATIONS[name])
    assert served(engine, prompts) == [generated(engine.model, prompt, 20) for prompt in prompts]


def test_penalties_equal_generate(start_engine, prompts):
    engine = start_engine(fp32=True)
    alone = [generated(engine.model, prompt, 20, repetition_penalty=1.3) for prompt in prompts]
    assert served(engine, prompts, repetition_penalty=1.3) == alone


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
        gc.collect()
        return torch.cuda.memory_allocated() if CUDA else 0

    serve(30)
    before = allocated()
    serve(200)
    assert not engine.failed
    grown = allocated() - before
    record_property("figure", f"{grown / 1e6:+.2f} MB allocated")
    assert grown < 1e6


def test_replies_in_16_bits_alone_and_together(start_engine, prompts, record_property):
    """Not promised: kernels are chosen by batch size, and round differently. Reports how often it holds."""
    engine = start_engine(None, bf16=True)  # the bundled model, whose replies are more than noise
    texts = [make_context(engine.tokenizer, question)[1] for question in QUESTIONS]
    prompts = [*prompts, *texts]
    together = served(engine, prompts)
    alone = [served(engine, [prompt])[0] for prompt in prompts]
    assert all(together[len(LENGTHS) :])  # some of the random prompts have no reply
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    record_property("figure", f"{same} of {len(prompts)} greedy replies are the same in bfloat16")
