"""Chat, streams, batches and the server's engine on pretended GPUs give the CPU's replies."""

import random

import pytest
import torch
from accelerate import dispatch_model

from qwen.checkpoint.loading import load_tokenizer
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.model.tokenization_qwen import QWenTokenizer
from qwen.serving.engine import Engine
from qwen.serving.engine.sampling_params import SamplingParams
from tests.pretend_gpu.models import SPREAD, placed, tiny_model
from tests.pretend_gpu.test_generation import EIGHT_BIT, KERNEL, WINDOWS

pytestmark = [pytest.mark.usefixtures("gpus"), pytest.mark.slow]
QUESTIONS = ["Hello!", "What is 47 + 38?"]
GREEDY = {"temperature": 0.0, "top_logprobs": 0}  # tokens are reported with log-probabilities only
ADJUSTED = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "logit_bias": {3: 1.0},
    "top_logprobs": 2,
}


@pytest.mark.parametrize("devices", ["one", "two"])
def test_replies_equal_the_cpus(bundled_chat, devices):
    tokenizer = load_tokenizer(bundled_chat)
    layers = len(QWenLMHeadModel.from_pretrained(bundled_chat, device_map="cpu").transformer.h)
    spread = {f"transformer.h.{layer}": f"cuda:{layer * 2 // layers}" for layer in range(layers)}
    spread |= {name: device for name, device in SPREAD.items() if ".h." not in name}
    replies = []
    for where in ("cpu", "cuda:0"):
        model = QWenLMHeadModel.from_pretrained(bundled_chat, device_map=where, fp32=True).eval()
        if where != "cpu" and devices == "two":
            model = dispatch_model(model, spread, main_device="cuda:0")
        settings = {"do_sample": False, "max_new_tokens": 8}
        replies.append(
            [
                model.chat(tokenizer, QUESTIONS[1], **settings)[0],
                list(model.chat_stream(tokenizer, QUESTIONS[1], **settings)),
                model.chat_batch(tokenizer, QUESTIONS, **settings)[0],
            ]
        )
    assert model.device == torch.device("cuda:0")
    assert replies[1] == replies[0]
    assert replies[0][1][-1] == replies[0][0]


def served(model: QWenLMHeadModel, tokenizer: QWenTokenizer, params: dict, prompts: list[list[int]]) -> list:
    """Tokens and end of each sequence, from an engine that gets all at once."""
    engine = Engine(model, tokenizer, max_batch_size=4, cache_tokens=2**12)
    try:
        streams = []
        for prompt in prompts:
            sampling = SamplingParams(max_tokens=4 + len(prompt) // 8, seed=len(prompt), **params)
            streams.append(engine.start(prompt, sampling))
        results: list[list] = [[token.token_id for piece in stream for token in piece.tokens] for stream in streams]
        return [[*result, stream.finish_reason] for result, stream in zip(results, streams, strict=True)]
    finally:
        engine.close(timeout=0)


@pytest.mark.parametrize(
    ("config", "params", "where"),
    [
        ({}, GREEDY, "one GPU"),
        ({}, ADJUSTED, "two GPUs"),
        (EIGHT_BIT, GREEDY, "two GPUs"),
        (KERNEL, GREEDY, "two GPUs"),
        (WINDOWS, ADJUSTED, "two GPUs"),
    ],
    ids=["float", "float, sampling", "8 bits", "8 bits, kernel", "windows, sampling"],
)
def test_served_tokens_equal_the_cpus(config, params, where, bundled_chat):
    tokenizer = load_tokenizer(bundled_chat)
    rng = random.Random(0)
    prompts = [[rng.randrange(500) for _ in range(length)] for length in (5, 20, 33, 40)]
    on_gpu = served(placed(tiny_model(**config), where), tokenizer, params, prompts)
    assert on_gpu == served(tiny_model(**config), tokenizer, params, prompts)
