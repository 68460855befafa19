"""Chat, streams, batches and the server's engine on pretended GPUs give the CPU's replies."""

import random

import pytest
import torch
from accelerate import dispatch_model

from qwen.checkpoint.loading import load_tokenizer
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.serving.engine.sampler import SamplingParams
from qwen.serving.engine.scheduler import EndReason, GenerationSequence, Scheduler
from tests.pretend_gpu.models import SPREAD, placed, tiny_model
from tests.pretend_gpu.test_generation import EIGHT_BIT, KERNEL, WINDOWS

pytestmark = [pytest.mark.usefixtures("gpus"), pytest.mark.slow]
QUESTIONS = ["Hello!", "What is 47 + 38?"]
GREEDY = {"temperature": 0.0}
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


def served(model: QWenLMHeadModel, params: dict, prompts: list[list[int]]) -> list:
    """Tokens and end of each sequence, from a scheduler that gets all at once."""
    scheduler = Scheduler(model)
    results: list[list] = [[] for _ in prompts]
    with scheduler.changed:
        for result, prompt in zip(results, prompts, strict=True):

            def on_token(token, result=result):
                result.append(token.token_id)
                return False

            def on_end(reason: EndReason, error: Exception | None, result=result):
                result.append((reason, error))

            sampling = SamplingParams(max_tokens=4 + len(prompt) // 8, seed=len(prompt), **params)
            scheduler.submit(GenerationSequence(prompt, sampling, frozenset([511]), on_token, on_end))
    scheduler.close()
    assert not any(result[-1][1] for result in results), results
    return results


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
def test_served_tokens_equal_the_cpus(config, params, where):
    rng = random.Random(0)
    prompts = [[rng.randrange(500) for _ in range(length)] for length in (5, 20, 33, 40)]
    on_gpu = served(placed(tiny_model(**config), where), params, prompts)
    assert on_gpu == served(tiny_model(**config), params, prompts)
