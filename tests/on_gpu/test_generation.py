"""Generation on the device in every mode: the tokens of the CPU, in float32."""

import pytest
import torch
from transformers import ContinuousBatchingConfig

from qwen import QWenLMHeadModel
from tests.on_gpu.device import CUDA, DEVICE
from tests.on_gpu.models import (
    INT8,
    INT8_KERNEL,
    left_padded,
    load_chat,
    load_golden,
    new_tokens,
    random_ids,
)
from tests.support import GOLDEN_FOLDER

QUESTIONS = ["Hello, who are you?", "What is 47 + 38?", "你好，你能做什么？", "Tell me about this repository."]
GREEDY = {"do_sample": False}
MODES = {  # settings of `generate`, and whether a batch is possible
    "greedy": ({}, True),
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, True),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, False),
    "chunked prefill": ({"prefill_chunk_size": 16}, True),
    "repetition penalty": ({"repetition_penalty": 1.3}, True),
    "no cache": ({"use_cache": False}, True),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, True),
}


@pytest.fixture(scope="module")
def chat():
    return load_chat(fp32=True)


@pytest.fixture(scope="module")
def replies():
    """Replies of the bundled model on the CPU, each with its history."""
    model, tokenizer = load_chat(cpu_only=True, fp32=True)
    return [model.chat(tokenizer, question, **GREEDY)[0] for question in QUESTIONS]


def test_the_bundled_model_replies_as_on_the_cpu(chat, replies):
    model, tokenizer = chat
    assert model.device.type == DEVICE
    assert [model.chat(tokenizer, question, **GREEDY)[0] for question in QUESTIONS] == replies


def test_streamed_and_batched_replies(chat, replies):
    model, tokenizer = chat
    assert [list(model.chat_stream(tokenizer, question, **GREEDY))[-1] for question in QUESTIONS] == replies
    assert model.chat_batch(tokenizer, QUESTIONS, **GREEDY)[0] == replies


@pytest.mark.parametrize("length", [9, 28, 40], ids=["short", "crossing seq_length", "beyond seq_length"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_tokens_of_the_cpu(model, reference, mode, length):
    settings, batch = MODES[mode]
    ids = random_ids(length, rows=2 if batch else 1)
    assert new_tokens(model, ids, **settings) == new_tokens(reference, ids, **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batch_gives_the_tokens_of_each_row_alone(reference, attention):
    model = load_golden(attn_implementation=attention)
    rows = [random_ids(length) for length in (7, 40, 69)]
    ids, mask = left_padded(rows)
    together = new_tokens(model, ids, attention_mask=mask)
    assert together == [new_tokens(reference, row)[0] for row in rows]


@pytest.mark.parametrize("length", [9, 28])
def test_assisted_decoding_equals_greedy_decoding(model, reference, length):
    assistant = load_golden(num_hidden_layers=1)
    ids = random_ids(length)
    assert new_tokens(model, ids, assistant_model=assistant) == new_tokens(reference, ids)


@pytest.mark.skipif(not CUDA, reason="an offloaded cache moves tensors over CUDA streams")
def test_offloaded_cache(model, reference):
    ids = random_ids(30, rows=2)
    assert new_tokens(model, ids, 40, cache_implementation="offloaded") == new_tokens(reference, ids, 40)


def test_windows(reference):
    windows = {"use_window_attn": True, "window_sizes": [16, 64], "seq_length": 64}
    ids = random_ids(200, rows=2)
    found = new_tokens(load_golden(**windows), ids)
    assert found == new_tokens(load_golden("cpu", **windows), ids)
    assert found != new_tokens(reference, ids)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_8_bit_cache_gives_the_same_tokens_with_kernel_and_in_torch(mode, rows):
    ids = random_ids(40, rows)
    settings, _ = MODES[mode]
    in_torch = new_tokens(load_golden(**INT8), ids, 40, **settings)
    assert in_torch == new_tokens(load_golden("cpu", **INT8), ids, 40, **settings)
    assert in_torch == new_tokens(load_golden(**INT8_KERNEL), ids, 40, **settings)


def test_sampling_is_reproducible_with_a_seed(model):
    ids, samples = random_ids(40, rows=2), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(new_tokens(model, ids, do_sample=True, top_p=0.9))
    assert samples[0] == samples[1] != samples[2]


def continuously_batched(lengths: tuple[int, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of `generate_batch`, and of `generate` for each prompt alone."""
    model = load_golden()
    rows = [random_ids(length) for length in lengths]
    alone = [new_tokens(model, row, 10)[0] for row in rows]
    config = model.generation_config
    config.update(max_new_tokens=10, do_sample=False, eos_token_id=-1)
    settings = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=512)
    outputs = model.generate_batch([row[0].tolist() for row in rows], config, continuous_batching_config=settings)
    together = {len(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [together[length] for length in lengths], alone


def test_generate_batch_equals_generate():
    together, alone = continuously_batched((5, 11, 17))
    assert together == alone


def test_generate_batch_beyond_seq_length_is_right_or_refused():
    """Prompts of other lengths must not change the rotary base of a prompt."""
    try:
        together, alone = continuously_batched((11, 100, 200))
    except ValueError:
        return
    assert together == alone


def test_offloaded_layers():
    """A model that does not fit onto the GPU: the other layers stay in main memory, and are copied for each forward."""
    # The embedding and one of two layers fit beside the room for a layer that is copied.
    memory = ({0: 450_000} if CUDA else {}) | {"cpu": 8 * 10**9}
    model = QWenLMHeadModel.from_pretrained(GOLDEN_FOLDER, fp32=True, device_map="auto", max_memory=memory).eval()
    if CUDA:
        assert {str(place) for place in model.hf_device_map.values()} == {"0", "cpu"}
    ids = random_ids(40, rows=2)
    assert new_tokens(model, ids) == new_tokens(load_golden("cpu"), ids)
