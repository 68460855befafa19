"""Tests of supervised samples: golden cases, truncation, padding, packing and invalid data."""

import gc
import json
import weakref

import pytest
import torch

from qwen.checkpoint.loading import load_model
from qwen.data.samples import (
    IGNORE_INDEX,
    MalformedSample,
    check_sample,
    encode_conversation,
    encode_sample,
    pack_samples,
    pad_samples,
)
from qwen.model.qwen_generation_utils import DEFAULT_SYSTEM
from qwen.model.tokenization_qwen import QWenTokenizer
from tests.support import GOLDEN_FOLDER

GOLDEN = json.loads((GOLDEN_FOLDER / "sft.json").read_text(encoding="utf-8"))


@pytest.fixture
def tokenizer(real_tokenizer):
    return real_tokenizer


@pytest.fixture(scope="module")
def model_and_tokenizer(bundled_chat):
    """The bundled model in training mode; transformers detects packed samples only with use_cache=False."""
    model, tokenizer = load_model(str(bundled_chat), cpu_only=True)
    model.config.use_cache = False
    return model.train(), tokenizer


def system(value):
    return {"from": "system", "value": value}


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
    ("conversations", "message"),
    [
        ([], "at least one turn"),
        (None, "must be a list"),
        ("user: hi", "must be a list"),
        ({"from": "user", "value": "x"}, "must be a list"),
        (["hi"], r"conversations\[0\] must be"),
        ([user("q"), {"value": "a"}], r'conversations\[1\] has no "from"'),
        ([user("q"), {"from": "assistant"}], r'conversations\[1\] has no "value"'),
        ([user("q"), {"from": "gpt", "value": "a"}], r'conversations\[1\]\["from"\] must be .* not \'gpt\''),
        ([user("q"), system("s")], r'conversations\[1\] is from "system": only the first turn'),
        ([system("s"), system("t"), user("q")], r'conversations\[1\] is from "system": only the first turn'),
        ([system(None), user("q")], r'conversations\[0\]\["value"\] must be a string, not None'),
        ([system("s")], "add a user's"),
        ([system("s"), assistant("a")], "add a user's"),
        ([{"from": [], "value": "s"}], r'conversations\[0\]\["from"\] must be'),
        ([user(None)], r'conversations\[0\]\["value"\] must be a string, not None'),
        ([user("q"), assistant(3)], r'conversations\[1\]\["value"\] must be a string, not 3'),
        ([assistant("a")], "add a user's"),
    ],
)
def test_malformed_samples_are_named(conversations, message, tokenizer):
    with pytest.raises(MalformedSample, match=message):
        encode_conversation(conversations, tokenizer, 32)
    with pytest.raises(MalformedSample, match=r"Sample 'identity_7': .*" + message):
        encode_sample({"id": "identity_7", "conversations": conversations}, tokenizer, 32, index=3)
    with pytest.raises(MalformedSample, match=r"Sample 3: .*" + message):
        encode_sample({"conversations": conversations}, tokenizer, 32, index=3)
    with pytest.raises(MalformedSample, match=r"Sample 3: .*" + message):
        check_sample({"id": None, "conversations": conversations}, 3)


def test_errors_in_truncated_turns_are_found(tokenizer):
    with pytest.raises(MalformedSample, match=r"conversations\[2\]"):
        encode_conversation([user("q"), assistant("a"), user(None)], tokenizer, 4)


@pytest.mark.parametrize("sample", [None, [], "x", {}, {"id": 1, "messages": []}])
def test_sample_without_conversations(sample, tokenizer):
    with pytest.raises(MalformedSample, match=r'Sample 5 must be .*"conversations"'):
        encode_sample(sample, tokenizer, 32, index=5)
    with pytest.raises(MalformedSample, match=r'A sample must be .*"conversations"'):
        check_sample(sample)


def test_sample_equals_its_conversation(tokenizer):
    turns = [user("q"), assistant("a")]
    sample = encode_sample({"id": "x", "conversations": turns}, tokenizer, 32, "s")
    assert sample == encode_conversation(turns, tokenizer, 32, "s")


def test_own_system_message(tokenizer):
    turns = [user("q"), assistant("a")]
    expected = encode_conversation(turns, tokenizer, 64, "be brief")
    assert encode_sample({"system": "be brief", "conversations": turns}, tokenizer, 64, "other") == expected
    assert encode_sample({"conversations": [system("be brief"), *turns]}, tokenizer, 64, "other") == expected
    assert encode_conversation([system("be brief"), *turns], tokenizer, 64, "other") == expected
    # a first turn that is not the user's is also skipped after a system turn
    skipped = [system("be brief"), assistant("welcome"), *turns]
    assert encode_sample({"conversations": skipped}, tokenizer, 64) == expected


def test_default_system_message(tokenizer):
    turns = [user("q"), assistant("a")]
    for sample in ({"conversations": turns}, {"system": None, "conversations": turns}):
        assert encode_sample(sample, tokenizer, 64) == encode_conversation(turns, tokenizer, 64, DEFAULT_SYSTEM)
        assert encode_sample(sample, tokenizer, 64, "S") == encode_conversation(turns, tokenizer, 64, "S")
    for sample in ({"system": "", "conversations": turns}, {"conversations": [system(""), *turns]}):
        empty = encode_sample(sample, tokenizer, 64, "S")
        assert tokenizer.decode(empty["input_ids"]).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize(
    ("own", "turns", "message"),
    [
        ("s", [system("t"), user("q")], 'both "system" and a first turn'),
        ("", [system("t"), user("q")], 'both "system" and a first turn'),
        (7, [user("q")], '"system" must be a string, not 7'),
        (["s"], [user("q")], r'"system" must be a string, not \[\'s\'\]'),
    ],
)
def test_malformed_system_messages(own, turns, message, tokenizer):
    sample = {"id": "x_1", "system": own, "conversations": turns}
    with pytest.raises(MalformedSample, match=f"Sample 'x_1': .*{message}"):
        check_sample(sample, 0)
    with pytest.raises(MalformedSample, match=f"Sample 'x_1': .*{message}"):
        encode_sample(sample, tokenizer, 64)


def test_conversation_without_an_answer(tokenizer):
    check_sample({"conversations": [user("q")]}, 0)
    sample = encode_conversation([user("q")], tokenizer, 64)
    learned = [label for label in sample["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "<|im_start|><|im_end|>\n" * 2


def test_long_ids_do_not_fill_the_message():
    with pytest.raises(MalformedSample) as error:
        check_sample({"id": "x" * 10_000, "conversations": []}, 0)
    assert len(str(error.value)) < 300


def test_many_system_messages_are_not_kept(tokenizer, bundled_chat):
    own = QWenTokenizer(str(bundled_chat / "qwen.tiktoken"))
    turns = [user("q"), assistant("a")]
    for number in range(100):  # more than are cached: evicted ones are encoded again, with the same result
        first = encode_conversation(turns, own, 64, f"be {number}")
        assert own.decode(first["input_ids"]).startswith(f"<|im_start|>system\nbe {number}<|im_end|>")
    other = encode_conversation(turns, tokenizer, 64, "be 99")
    assert other["input_ids"] != first["input_ids"]  # each tokenizer has its own cache
    own_ref = weakref.ref(own)
    del own
    gc.collect()
    assert own_ref() is None


def test_max_length_below_one(tokenizer):
    with pytest.raises(ValueError, match="max_length is 0"):
        encode_conversation([user("q")], tokenizer, 0)


def test_samples_are_padded_to_the_longest():
    samples = [{"input_ids": [1, 9], "labels": [-100, 9]}, {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    batch = pad_samples(samples, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 9, 9], [1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 9, -100], [-100, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]  # pad_id within a sample is not masked
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_errors():
    with pytest.raises(ValueError, match="no samples"):
        pad_samples([], pad_id=9)
    with pytest.raises(ValueError, match="3 tokens, but length is 2"):
        pad_samples([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], pad_id=9, length=2)


def test_packing():
    samples = [{"input_ids": [1, 9], "labels": [1, 9]}, {"input_ids": [7], "labels": [7]}]
    row = pack_samples([*samples, {"input_ids": [1, 2, 3], "labels": [1, -100, 3]}])
    assert row["input_ids"].tolist() == [[1, 9, 7, 1, 2, 3]]
    assert row["labels"].tolist() == [[-100, 9, -100, -100, -100, 3]]
    assert row["position_ids"].tolist() == [[0, 1, 0, 0, 1, 2]]
    assert all(tensor.dtype == torch.int64 for tensor in row.values())
    assert samples[0]["labels"] == [1, 9]  # unchanged
    with pytest.raises(ValueError, match="no samples"):
        pack_samples([])


CONVERSATIONS = [
    [user("Hello, who are you?"), assistant("I am Qwen, a tiny toy model.")],
    [user("hi")],
    [system("Be brief."), user("What is 47 + 38?"), assistant("85"), user("And 1 + 1?"), assistant("2")],
    [user("你好！"), assistant("你好！有什么可以帮你的吗？")],
]


@pytest.fixture
def encoded(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    samples = [encode_conversation(turns, tokenizer, 64) for turns in CONVERSATIONS]
    return [*samples, {name: ids[:1] for name, ids in samples[0].items()}]  # and the shortest possible sample


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_do_not_attend_to_each_other(attention, encoded, model_and_tokenizer):
    model, _ = model_and_tokenizer
    model.set_attn_implementation(attention)
    with torch.no_grad():
        row = model(**pack_samples(encoded)).logits[0]
        alone = torch.cat([model(torch.tensor([sample["input_ids"]])).logits[0] for sample in encoded])
    torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)


def test_packed_and_padded_samples_give_the_same_loss_and_gradients(encoded, model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.set_attn_implementation("sdpa")
    losses, gradients = [], []
    for batch in (pad_samples(encoded, tokenizer.eod_id), pack_samples(encoded)):
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=1).loss  # the sum over all learned tokens
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, padded in gradients[0].items():
        difference = (gradients[1][name] - padded).norm()
        assert padded.norm() > 0, name
        assert difference <= 1e-4 * padded.norm(), name
    # Trainer divides by the number of labels from the second position on
    learned = [
        (batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in (pad_samples(encoded, 0), pack_samples(encoded))
    ]
    assert learned[0] == learned[1]
