"""Where `generate` of a chat model ends: at the end of its turn, as `chat` does, unless the caller names the ends."""

import copy
import json
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextStreamer, pipeline
from transformers.generation import ContinuousBatchingConfig

import qwen
from qwen.model.chat_qwen import add_turn_ends

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
EOD, IM_START, IM_END = 151643, 151644, 151645


@pytest.fixture(scope="module")
def chat(bundled_chat):
    return qwen.load_model(bundled_chat, cpu_only=True)


@pytest.fixture(scope="module")
def prompt(chat):
    return chat[1].apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)


@pytest.fixture(scope="module")
def reply(chat):
    model, tokenizer = chat
    return model.chat(tokenizer, MESSAGES[0]["content"], do_sample=False)[0]


def greedy(**fields: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, temperature=1.0, top_k=50, top_p=1.0, **fields)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"generation_config": greedy(max_new_tokens=200)},
        {"generation_config": greedy(max_new_tokens=200, eos_token_id=3376)},  # the model's own
        {"do_sample": False, "stop_words_ids": [[1, 2, 3, 4]]},
    ],
    ids=["greedy", "beams", "assisted", "config", "config with the model's eos", "stop words"],
)
def test_generate_gives_the_reply_of_chat(chat, prompt, reply, arguments):
    model, tokenizer = chat
    row = model.generate(**prompt, **arguments).flatten()
    assert tokenizer.decode(row[prompt["input_ids"].shape[1] :], skip_special_tokens=True) == reply
    assert row[-1] == tokenizer.im_end_id


def test_a_streamer_ends_with_the_reply(chat, prompt, reply, capsys):
    model, tokenizer = chat
    model.generate(
        **prompt, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    assert capsys.readouterr().out.strip() == reply


def test_pipelines_end_with_the_reply(chat, reply):
    model, tokenizer = chat
    generate = pipeline("text-generation", model, tokenizer=tokenizer)
    (output,) = generate(MESSAGES, do_sample=False)
    assert output["generated_text"] == [*MESSAGES, {"role": "assistant", "content": reply}]
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    (output,) = generate(text, do_sample=False, return_full_text=False)
    assert output["generated_text"] == reply


def test_continuous_batches_end_with_the_reply(chat, prompt, reply):
    model, tokenizer = chat
    before = copy.deepcopy(model.generation_config)
    small = ContinuousBatchingConfig(block_size=16, num_blocks=64, max_batch_tokens=256)
    ids = prompt["input_ids"][0].tolist()
    outputs = model.generate_batch([ids], greedy(max_new_tokens=200), continuous_batching_config=small)
    assert tokenizer.decode(outputs["req_0"].generated_tokens, skip_special_tokens=True) == reply
    assert model.generation_config == before


def test_the_caller_names_other_ends(chat, prompt):
    model, tokenizer = chat
    start = prompt["input_ids"].shape[1]
    for arguments in (
        {"do_sample": False, "eos_token_id": tokenizer.eod_id},
        {"do_sample": False, "eos_token_id": None},
        {"generation_config": greedy(eos_token_id=[tokenizer.eod_id])},
        {"generation_config": greedy(chat_format="raw")},
    ):
        row = model.generate(**prompt, max_new_tokens=40, **arguments)[0, start:]
        assert tokenizer.im_end_id in row[:-1], arguments  # went on


def test_ends_are_suppressed_before_min_new_tokens(chat, prompt, reply):
    model, tokenizer = chat
    row = model.generate(**prompt, do_sample=False, min_new_tokens=40, max_new_tokens=40)
    row = row[0, prompt["input_ids"].shape[1] :]
    assert len(tokenizer.encode(reply)) < len(row) == 40
    assert not {tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id}.intersection(row.tolist())


def test_what_is_saved_is_what_was_loaded(chat, prompt, tmp_path, bundled_chat):
    model, _ = chat
    model.generate(**prompt, do_sample=False, max_new_tokens=4)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    saved.pop("transformers_version")
    assert saved == json.loads((bundled_chat / "generation_config.json").read_text())


def test_a_base_model_keeps_its_ends(bundled_base):
    model, tokenizer = qwen.load_model(bundled_base, cpu_only=True)
    assert model.end_token_ids() == tokenizer.eod_id
    prompt = torch.tensor([tokenizer.encode("The")])
    assert model.generate(prompt, do_sample=False, max_new_tokens=8).shape == (1, 9)


@pytest.mark.parametrize(
    ("eos", "pad", "ends"),
    [
        (EOD, EOD, [EOD, IM_START, IM_END]),  # as published
        ([EOD], None, [EOD, IM_START, IM_END]),
        ([IM_END, EOD], EOD, [IM_END, EOD, IM_START]),  # as Trainer writes it
        (IM_END, EOD, [IM_END, IM_START]),
        (EOD, 151646, [EOD, IM_START, IM_END]),  # padded with <|extra_0|>, as in the published batch example
        (EOD, 0, [EOD, IM_START, IM_END]),
        ([198, EOD], EOD, [198, EOD, IM_START, IM_END]),
        (198, EOD, 198),  # ends at newlines only
        (-1, EOD, -1),
        (None, EOD, None),
        (151935, 151935, 151935),  # nothing follows it
    ],
)
def test_ends_of_edited_generation_configs(eos, pad, ends):
    assert add_turn_ends(eos, pad, 151936) == ends
