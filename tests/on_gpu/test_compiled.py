"""Decoding steps recorded as CUDA graphs: the tokens of the eager model, from one graph."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from qwen import QWenLMHeadModel
from tests.on_gpu.device import CUDA
from tests.on_gpu.models import load_chat, new_tokens, random_ids

pytestmark = pytest.mark.slow

ROOM = 128  # tokens of the static cache
# On the CPU, the tests are tried without a compiler.
COMPILER = {"mode": "reduce-overhead"} if CUDA else {"backend": "eager"}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def prefill(model: QWenLMHeadModel, ids: torch.Tensor, cache: StaticCache) -> torch.Tensor:
    """Reset the cache, and return the first token (B, 1) after a prompt."""
    cache.reset()
    return model(ids.to(model.device), past_key_values=cache).logits[:, -1:].argmax(-1)


@torch.no_grad()
def turn(model: QWenLMHeadModel, step: Callable, ids: torch.Tensor, cache: StaticCache, count: int) -> list[list[int]]:
    """Return `count` greedy tokens after a prompt, from a step that is a graph."""
    token = prefill(model, ids, cache)
    tokens = [token]
    for _ in range(count - 1):
        torch.compiler.cudagraph_mark_step_begin()
        token = step(token, past_key_values=cache).logits[:, -1:].argmax(-1).clone()
        tokens.append(token)
    return torch.cat(tokens, dim=1).tolist()


@pytest.mark.parametrize("rows", [1, 4])
def test_three_turns_on_one_static_cache_are_one_graph(model, rows, record_property):
    prompts = [random_ids(length, rows) for length in (40, 9, 70)]
    expected = [new_tokens(model, ids, 24) for ids in prompts]  # first: `generate` changes the classes of the layers
    step = torch.compile(model.forward, fullgraph=True, **COMPILER)
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    assert [turn(model, step, ids, cache, 24) for ids in prompts] == expected
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
    record_property("figure", "1 graph, nothing skipped")


def test_generate_with_a_static_cache(model, record_property):
    """`generate` compiles the step by itself on a GPU, with a new cache for each call."""
    settings = {"cache_implementation": "static", "max_cache_len": ROOM}
    for length in (40, 9):
        ids = random_ids(length)
        assert new_tokens(model, ids, **settings) == new_tokens(model, ids)
    record_property("figure", f"{counters['stats']['unique_graphs']} graphs")
    assert counters["stats"]["unique_graphs"] <= 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_chat_stream_with_a_static_cache():
    """The graphs of torch belong to a thread, and `chat_stream` generates in one of its own."""
    model, tokenizer = load_chat(fp32=True)
    settings = {"do_sample": False, "max_new_tokens": 12}
    static = {**settings, "cache_implementation": "static", "max_cache_len": 256}
    expected = [model.chat(tokenizer, question, **settings)[0] for question in ("Hello!", "What is 47 + 38?")]
    found = [list(model.chat_stream(tokenizer, question, **static))[-1] for question in ("Hello!", "What is 47 + 38?")]
    assert found == expected
    assert model.chat(tokenizer, "Hello!", **static)[0] == expected[0]


@pytest.mark.parametrize("rows", [1, 4])
@torch.no_grad()
def test_an_eager_step_is_captured_by_hand(model, rows):
    """The step allocates nothing that it needs later, and waits for nothing."""
    ids = random_ids(40, rows)
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    slot = prefill(model, ids, cache).clone()

    def step() -> None:
        slot.copy_(model(slot, past_key_values=cache).logits[:, -1:].argmax(-1))

    replay = step
    if CUDA:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up, as torch asks for
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    slot.copy_(prefill(model, ids, cache))
    tokens = [slot.clone()]
    for _ in range(23):
        replay()
        tokens.append(slot.clone())
    assert torch.cat(tokens, dim=1).tolist() == new_tokens(model, ids)
