"""Supervised samples: every golden case, truncation, padding, and data with mistakes in it."""

import json
from pathlib import Path

import pytest
import torch

from qwen.chat_data import IGNORE_INDEX, MalformedSample, encode_conversation, encode_sample, pad_samples

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sft.json").read_text(encoding="utf-8"))


@pytest.fixture
def tokenizer(real_tokenizer):
    return real_tokenizer


def user(value):
    return {"from": "user", "value": value}


def assistant(value):
    return {"from": "assistant", "value": value}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{len(case['conversations'])}-turns-{case['max_len']}")
def test_golden(case, tokenizer):
    sample = encode_conversation(case["conversations"], tokenizer, case["max_len"])
    used = sum(case["attention_mask"])
    assert sample == {"input_ids": case["input_ids"][:used], "labels": case["labels"][:used]}
    batch = pad_samples([sample], tokenizer.eod_id, length=case["max_len"])
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].tolist() == [case[name]], name


def test_learned_tokens(tokenizer):
    sample = encode_conversation([user("q q q"), assistant("a b"), user("r"), assistant("c")], tokenizer, 100, "S")
    learned = [label for label in sample["labels"] if label != IGNORE_INDEX]
    frame = "<|im_start|><|im_end|>\n"
    expected = frame + frame + "<|im_start|>a b<|im_end|>\n" + frame + "<|im_start|>c<|im_end|>\n"
    assert tokenizer.decode(learned) == expected
    assert all(
        label in (IGNORE_INDEX, token) for token, label in zip(sample["input_ids"], sample["labels"], strict=True)
    )


def test_control_tokens_in_texts_are_parsed(tokenizer):
    sample = encode_conversation([user("<|im_end|>"), assistant("<|endoftext|>")], tokenizer, 100)
    assert sample["input_ids"].count(tokenizer.im_end_id) == 4
    assert sample["labels"].count(tokenizer.im_end_id) == 3
    assert sample["labels"].count(tokenizer.eod_id) == 1


def test_repeated_calls_agree(tokenizer):
    turns = [user("q"), assistant("a")]
    first = encode_conversation(turns, tokenizer, 100, "be brief")
    first["input_ids"].clear()
    first["labels"].clear()
    other = encode_conversation(turns, tokenizer, 100, "be long")
    again = encode_conversation(turns, tokenizer, 100, "be brief")
    assert tokenizer.decode(again["input_ids"]).startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nq"
    )
    assert other != again


@pytest.mark.parametrize("max_length", range(1, 30))
def test_truncation_is_a_prefix(max_length, tokenizer):
    turns = [user("q"), assistant("a b c")]
    whole = encode_conversation(turns, tokenizer, 100)
    cut = encode_conversation(turns, tokenizer, max_length)
    assert cut == {name: ids[:max_length] for name, ids in whole.items()}


def test_two_user_turns_in_a_row_are_encoded(tokenizer):
    sample = encode_conversation([user("a"), user("b"), assistant("c")], tokenizer, 100)
    assert "user\na<|im_end|>\n<|im_start|>user\nb<|im_end|>" in tokenizer.decode(sample["input_ids"])


@pytest.mark.parametrize(
    "conversations, complaint",
    [
        ([], "at least one turn"),
        (None, "must be a list"),
        ("user: hi", "must be a list"),
        ({"from": "user", "value": "x"}, "must be a list"),
        (["hi"], r"conversations\[0\] must be"),
        ([user("q"), {"value": "a"}], r'conversations\[1\] has no "from"'),
        ([user("q"), {"from": "assistant"}], r'conversations\[1\] has no "value"'),
        ([user("q"), {"from": "gpt", "value": "a"}], r'conversations\[1\]\["from"\] must be .* not \'gpt\''),
        ([{"from": "system", "value": "s"}, user("q")], r'conversations\[0\]\["from"\] must be'),
        ([{"from": [], "value": "s"}], r'conversations\[0\]\["from"\] must be'),
        ([user(None)], r'conversations\[0\]\["value"\] must be a string, not None'),
        ([user("q"), assistant(3)], r'conversations\[1\]\["value"\] must be a string, not 3'),
        ([assistant("a")], "add a user's"),
    ],
)
def test_malformed_samples_are_named(conversations, complaint, tokenizer):
    with pytest.raises(MalformedSample, match=complaint):
        encode_conversation(conversations, tokenizer, 32)
    with pytest.raises(MalformedSample, match=r"Sample 'identity_7': .*" + complaint):
        encode_sample({"id": "identity_7", "conversations": conversations}, tokenizer, 32, index=3)
    with pytest.raises(MalformedSample, match=r"Sample 3: .*" + complaint):
        encode_sample({"conversations": conversations}, tokenizer, 32, index=3)


def test_mistakes_behind_the_cut_are_found(tokenizer):
    with pytest.raises(MalformedSample, match=r"conversations\[2\]"):
        encode_conversation([user("q"), assistant("a"), user(None)], tokenizer, 4)


@pytest.mark.parametrize("sample", [None, [], "x", {}, {"id": 1, "messages": []}])
def test_sample_without_conversations(sample, tokenizer):
    with pytest.raises(MalformedSample, match='Sample 5 must be .*"conversations"'):
        encode_sample(sample, tokenizer, 32, index=5)


def test_sample_equals_its_conversation(tokenizer):
    turns = [user("q"), assistant("a")]
    sample = encode_sample({"id": "x", "conversations": turns}, tokenizer, 32, "s")
    assert sample == encode_conversation(turns, tokenizer, 32, "s")


def test_max_length_below_one(tokenizer):
    with pytest.raises(ValueError, match="max_length is 0"):
        encode_conversation([user("q")], tokenizer, 0)


def test_padding_goes_to_the_longest():
    samples = [{"input_ids": [1, 9], "labels": [-100, 9]}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    batch = pad_samples(samples, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 9, 9], [1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 9, -100], [-100, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]  # a sample's own pad_id is seen
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_errors():
    with pytest.raises(ValueError, match="no samples"):
        pad_samples([], pad_id=9)
    with pytest.raises(ValueError, match="3 tokens, but length is 2"):
        pad_samples([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], pad_id=9, length=2)
