"""The tokenizer compared with reference vectors, on the real vocabulary and on a small one defined here."""

import base64
import copy
import hashlib
import inspect
import json
import pickle
import random
import re
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from qwen.checkpoint.loading import load_tokenizer
from qwen.export.tokenizer_json import fast_tokenizer
from qwen.model import tokenization_qwen
from qwen.model.tokenization_qwen import CONTROL_TOKENS, QWenTokenizer
from tests.support import GOLDEN_FOLDER

GOLDEN = json.loads((GOLDEN_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
SMALL_MERGES = [b"ab", b"cd", b"abcd", b" a", "中".encode()[:2], "中".encode()]


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
    return path


def small_ranks() -> dict[bytes, int]:
    tokens = [bytes([i]) for i in range(256)] + SMALL_MERGES
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="session")
def vocab_file(real_vocab_file):
    return real_vocab_file


@pytest.fixture(scope="session")
def real(real_tokenizer):
    """Shared: tests must not change it."""
    return real_tokenizer


@pytest.fixture
def small_file(tmp_path):
    return write_ranks(tmp_path / "small.tiktoken", small_ranks())


@pytest.fixture
def small(small_file):
    return QWenTokenizer(small_file)


# ---- reference vectors ----


def test_the_vocabulary_is_the_published_one(vocab_file):
    assert hashlib.sha256(vocab_file.read_bytes()).hexdigest() == GOLDEN["vocab_sha256"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=range(len(GOLDEN["cases"])))
def test_reference_case(real, case):
    text, ids = case["text"], case["ids"]
    assert real.encode(text) == ids
    assert real(text) == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert real.convert_tokens_to_ids(real.tokenize(text)) == ids
    for plain in (real.encode(text, allowed_special=set()), real(text, allowed_special=set())["input_ids"]):
        assert plain == case["ids_no_special"]
    assert real.convert_tokens_to_ids(real.tokenize(text, allowed_special=set())) == case["ids_no_special"]
    assert real.decode(ids) == real.convert_tokens_to_string(real.tokenize(text)) == case["decoded"]
    assert real.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]


@pytest.mark.parametrize("case", GOLDEN["partial"], ids=lambda case: str(case["ids"]))
def test_reference_of_partial_characters(real, case):
    for errors in ("replace", "ignore"):
        assert real.decode(case["ids"], errors=errors) == case[errors]


def test_sizes_and_ids_of_the_published_vocabulary(real):
    assert len(real) == real.vocab_size == len(real.get_vocab()) == len(real.decoder) == GOLDEN["n"] == 151851
    assert (real.eod_id, real.im_start_id, real.im_end_id) == (151643, 151644, 151645)
    assert real.eod_id == GOLDEN["eod_id"]
    assert real.im_end_id == GOLDEN["im_end_id"]
    assert real.special_tokens["<|extra_0|>"] == 151646
    assert real.special_tokens["<|extra_204|>"] == 151850
    assert real.mergeable_ranks[b"!"] == 0
    assert len(real.mergeable_ranks) == 151643


def test_batch_of_all_cases_equals_single_texts(real):
    texts = [case["text"] for case in GOLDEN["cases"]]
    batch = real(texts)
    assert batch["input_ids"] == [case["ids"] for case in GOLDEN["cases"]]
    assert batch["attention_mask"] == [[1] * len(case["ids"]) for case in GOLDEN["cases"]]
    assert real.batch_decode(batch["input_ids"]) == [case["decoded"] for case in GOLDEN["cases"]]


# ---- properties ----


def random_text(rng: random.Random, length: int) -> str:
    ranges = [(0x20, 0x7F), (0x09, 0x0E), (0xA0, 0x250), (0x300, 0x370), (0x600, 0x700), (0x1100, 0x1200)]
    ranges += [(0x2000, 0x2070), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0x1F300, 0x1F700), (0x10FFF0, 0x10FFFF)]
    pieces = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(length)]
    return "".join(rng.choice(CONTROL_TOKENS) if rng.random() < 0.03 else piece for piece in pieces)


@pytest.mark.parametrize("seed", range(20))
def test_random_texts_come_back_normalised(real, seed):
    rng = random.Random(seed)
    for _ in range(20):
        text = random_text(rng, rng.randrange(80))
        normalised = unicodedata.normalize("NFC", text)
        assert real.decode(real.encode(text)) == normalised
        plain = real.encode(text, allowed_special=set())
        assert all(i < real.eod_id for i in plain)
        assert real.decode(plain, skip_special_tokens=True) == normalised


def test_random_ids_decode_without_loss_of_bytes(real):
    rng = random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(len(real)) for _ in range(rng.randrange(1, 50))]
        tokens = real.convert_ids_to_tokens(ids)
        assert real.convert_tokens_to_ids(tokens) == ids
        assert real.decode(ids) == real.convert_tokens_to_string(tokens)
        text = real.decode(ids, errors="surrogateescape").encode("utf-8", "surrogateescape")
        assert text == b"".join(token.encode() if isinstance(token, str) else token for token in tokens)


def test_random_bytes_round_trip_in_a_small_vocabulary(small):
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choice("abcd 中é\n<|im_end|>") for _ in range(rng.randrange(40)))
        assert small.decode(small.encode(text)) == text


# ---- control tokens ----


def test_control_tokens_follow_the_ranks_of_any_vocabulary(small):
    first = 256 + len(SMALL_MERGES)
    assert [small.special_tokens[token] for token in CONTROL_TOKENS] == list(range(first, first + 208))
    assert small.eod_id == first
    assert len(small) == first + 208
    assert small.encode("abcd ab<|im_end|>") == [258, 32, 256, small.im_end_id]
    assert small.tokenize("a中<|im_end|>") == [b"a", "中".encode(), "<|im_end|>"]


def test_types_of_tokens(real):
    tokens = real.tokenize("hi<|im_end|>")
    assert tokens == [b"hi", "<|im_end|>"] == real.convert_ids_to_tokens(real.encode("hi<|im_end|>"))
    vocab = real.get_vocab()
    assert vocab[b"hi"] == 6023
    assert vocab["<|im_end|>"] == 151645
    assert real.decoder[6023] == b"hi"
    assert real.decoder[151645] == "<|im_end|>"


def test_allowed_special_takes_all_none_or_some(small):
    text = "<|im_start|>a<|im_end|>"
    a = small.encode("a")
    assert small.encode(text) == [small.im_start_id, *a, small.im_end_id]
    assert small(text, allowed_special="all")["input_ids"] == small.encode(text)
    some = small.encode(text, allowed_special={"<|im_end|>"})
    assert some == [*b"<|im_start|>a", small.im_end_id]
    assert small.encode(text, allowed_special=["<|im_end|>"]) == some
    assert small.encode(text, allowed_special="<|im_end|>") == some
    assert small([text], allowed_special=())["input_ids"] == [list(text.encode())]
    assert small.encode(text, split_special_tokens=True) == list(text.encode())


def test_disallowed_special_raises_and_names_the_token(small):
    text = "a<|im_end|>"
    for call in (small, small.encode, small.tokenize):
        with pytest.raises(ValueError, match=re.escape("'<|im_end|>'")):
            call(text, disallowed_special=("<|endoftext|>", "<|im_end|>"))
        with pytest.raises(ValueError, match="disallowed_special"):
            call(text, allowed_special=set(), disallowed_special="all")
        call(text, disallowed_special=("<|endoftext|>",))
        call(text, allowed_special={"<|im_end|>"}, disallowed_special="all")


def test_skipping_drops_only_control_tokens(tmp_path):
    ranks = small_ranks()
    ranks[b"abab"] = 256 + len(SMALL_MERGES) + 208
    tokenizer = QWenTokenizer(write_ranks(tmp_path / "v.tiktoken", ranks))
    ids = tokenizer.encode("abab<|im_end|>")
    assert ids == [len(tokenizer) - 1, tokenizer.im_end_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abab"  # an id above eod_id
    assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) == [b"abab"]
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == [0, 1]


ENDS = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def test_special_tokens_can_be_set(small):
    assert small.special_tokens_map == ENDS
    assert small.bos_token is small.bos_token_id is small.unk_token is None
    small.pad_token = "<|extra_0|>"
    small.eos_token_id = small.im_end_id
    assert small.pad_token_id == small.special_tokens["<|extra_0|>"]
    assert small.eos_token == "<|im_end|>"
    assert small.add_special_tokens({"unk_token": "<|extra_1|>", "extra_special_tokens": ["<|extra_2|>"]}) == 0
    assert small.unk_token == "<|extra_1|>"
    assert small.extra_special_tokens == ["<|extra_2|>"]
    assert small.encode("a") == [97]  # no tokens are added around a text


@pytest.mark.parametrize(
    ("generation_config", "eos"),
    [
        ('{"chat_format": "chatml", "eos_token_id": 0}', "<|im_end|>"),
        ('{"chat_format": "raw"}', "<|endoftext|>"),
        ("{}", "<|endoftext|>"),
        ("[]", "<|endoftext|>"),
        ('{"chat_format": "chatml"', "<|endoftext|>"),
        ("[" * 100_000, "<|endoftext|>"),
        (None, "<|endoftext|>"),
    ],
    ids=["chat", "raw", "no format", "a list", "cut off", "nested", "missing"],
)
def test_eos_follows_the_generation_config(small_file, tmp_path, generation_config, eos):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "qwen.tiktoken").write_bytes(small_file.read_bytes())
    if generation_config is not None:
        (folder / "generation_config.json").write_text(generation_config)
    tokenizer = QWenTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (eos, "<|endoftext|>")
    assert tokenizer.encode("ab") == [256]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "generation_config" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    assert QWenTokenizer.from_pretrained(tmp_path / "saved").eos_token == eos
    for chosen in (None, "<|extra_0|>"):
        tokenizer = QWenTokenizer.from_pretrained(folder, eos_token=chosen, pad_token=chosen)
        tokenizer.save_pretrained(tmp_path / "saved")
        again = QWenTokenizer.from_pretrained(tmp_path / "saved")
        assert tokenizer.eos_token == tokenizer.pad_token == again.eos_token == again.pad_token == chosen


def test_repr_is_short(small):
    assert len(repr(small).splitlines()) <= 20
    assert "'eos_token': '<|endoftext|>'" in repr(small)
    assert f"<|extra_204|> ({len(small) - 1})" in repr(small)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "image_token"])
def test_only_control_tokens_serve_as_special_tokens(small_file, name):
    message = re.escape("'[PAD]' is not a control token")
    with pytest.raises(ValueError, match=message + r".*<\|endoftext\|>.*<\|extra_0\|>"):
        QWenTokenizer(small_file, **{name: "[PAD]"})
    tokenizer = QWenTokenizer(small_file)
    with pytest.raises(ValueError, match=message):
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", name: "[PAD]"})
    with pytest.raises(ValueError, match=message):
        tokenizer.add_special_tokens({"extra_special_tokens": ["[PAD]"]})
    with pytest.raises(ValueError, match=message):
        tokenizer.extra_special_tokens = ["[PAD]"]
    assert tokenizer.special_tokens_map.keys() <= {*ENDS}
    assert tokenizer.extra_special_tokens == []


def test_setting_an_attribute_to_a_regular_token_raises(small):
    with pytest.raises(ValueError, match="'x' is not a control token"):
        small.pad_token = "x"
    with pytest.raises(ValueError, match="not a control token"):
        small.pad_token_id = 5


def test_adding_regular_tokens_raises(small):
    with pytest.raises(ValueError, match=r"'word'.*extra_vocab_file"):
        small.add_tokens("word")
    with pytest.raises(ValueError, match="not a control token"):
        small.add_tokens(["<tool>"], special_tokens=True)
    assert small.add_tokens(["<|extra_3|>"], special_tokens=True) == 0
    assert small.add_tokens([]) == 0


# ---- ids and tokens ----


def test_conversions_of_one_and_of_several(small):
    assert small.convert_tokens_to_ids(b"ab") == 256
    assert small.convert_tokens_to_ids("<|im_end|>") == small.im_end_id
    assert small.convert_tokens_to_ids([b"ab", "<|im_end|>"]) == [256, small.im_end_id]
    assert small.convert_ids_to_tokens(256) == b"ab"
    assert small.convert_ids_to_tokens(torch.tensor([256, small.im_end_id])) == [b"ab", "<|im_end|>"]
    assert small.convert_tokens_to_string([b"\xe4", b"\xb8", b"\xad", "<|im_end|>", b"a"]) == "中<|im_end|>a"


def test_unknown_tokens_have_no_id(small):
    assert small.convert_tokens_to_ids("ab") is None  # a regular token is bytes
    assert small.convert_tokens_to_ids([b"ab", b"zz", "<|x|>"]) == [256, None, None]
    small.unk_token = "<|extra_1|>"
    assert small.convert_tokens_to_ids([b"zz"]) == [small.special_tokens["<|extra_1|>"]]


def test_ids_without_a_token_have_no_text(tmp_path):
    ranks = small_ranks()
    gap = len(ranks) + 208
    tokenizer = QWenTokenizer(write_ranks(tmp_path / "v.tiktoken", ranks | {b"abab": gap + 1}))
    for index in (gap, len(tokenizer), len(tokenizer) + 100, 2**40):
        assert tokenizer.convert_ids_to_tokens(index) is None
        assert tokenizer.convert_ids_to_tokens([97, index]) == [b"a", None]
        assert tokenizer.convert_ids_to_tokens([index, tokenizer.eod_id], skip_special_tokens=True) == [None]
        assert tokenizer.convert_tokens_to_string([b"a", None]) == "a"
        assert tokenizer.decode(index) == tokenizer.decode([index], skip_special_tokens=True) == ""
        assert tokenizer.batch_decode(torch.tensor([[97, index], [index, gap + 1]])) == ["a", "abab"]
    for index in (-1, -100):
        for call in (tokenizer.convert_ids_to_tokens, tokenizer.decode):
            with pytest.raises(ValueError, match=f"id {index} is negative"):
                call([97, index])
            with pytest.raises(ValueError, match=f"id {index} is negative"):
                call(index)


def test_decode_takes_ints_tensors_and_batches(small):
    assert small.decode(97) == small.decode(torch.tensor(97)) == "a"
    assert small.decode([]) == ""
    assert small.decode(torch.tensor([97, 256])) == "aab"
    assert small.decode([[97], [256]]) == small.batch_decode(torch.tensor([[97], [256]])) == ["a", "ab"]


def test_errors_at_construction_and_per_call(small_file):
    half = [0xE4, 97]
    tokenizer = QWenTokenizer(small_file)
    assert tokenizer.decode(half) == "\ufffda"
    assert tokenizer.decode(half, errors="ignore") == "a"
    strict = QWenTokenizer(small_file, errors="strict")
    with pytest.raises(UnicodeDecodeError):
        strict.decode(half)
    assert strict.decode(half, errors="ignore") == "a"
    with pytest.raises(LookupError, match="no_such_handler"):
        QWenTokenizer(small_file, errors="no_such_handler")


def test_saved_clean_up_option_is_ignored(small_file):
    tokenizer = QWenTokenizer(small_file, clean_up_tokenization_spaces=True)
    assert tokenizer.decode(tokenizer.encode("a , b .")) == "a , b ."
    assert tokenizer.decode(tokenizer.encode("a , b ."), clean_up_tokenization_spaces=True) == "a, b."


# ---- calls ----


def test_padding_and_tensors(small_file):
    tokenizer = QWenTokenizer(small_file, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left")
    pad = tokenizer.pad_token_id
    assert pad == tokenizer.eod_id + 3
    assert tokenizer.eos_token_id == tokenizer.eod_id
    batch = tokenizer(["ab", "ba"], padding="longest", return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[pad, 256], [98, 97]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert tokenizer(["ab", "ba"], padding="longest")["input_ids"] == [[pad, 256], [98, 97]]
    right = tokenizer(["ab", "ba"], padding=True, padding_side="right")
    assert right["input_ids"] == [[256, pad], [98, 97]]
    assert tokenizer("ab", padding="max_length", max_length=3)["input_ids"] == [pad, pad, 256]
    assert tokenizer.pad([{"input_ids": [1]}, {"input_ids": [2, 3]}])["input_ids"] == [[pad, 1], [2, 3]]
    assert tokenizer("ab", return_tensors="pt").to("cpu")["input_ids"].tolist() == [[256]]
    assert tokenizer("", return_tensors="pt")["input_ids"].dtype == torch.long


def test_padding_without_a_pad_token_says_what_to_set(small):
    assert small(["a", "bb"], padding=True)["input_ids"] == [[97, small.eod_id], [98, 98]]
    small.pad_token = None
    for call in (lambda: small(["a", "bb"], padding=True), lambda: small.pad({"input_ids": [[1], [2, 3]]})):
        with pytest.raises(ValueError, match=r"pad_token = '<\|endoftext\|>'"):
            call()


def test_truncation_pairs_and_words(small):
    assert small("bbbbb", truncation=True, max_length=2) == {"input_ids": [98, 98], "attention_mask": [1, 1]}
    assert small.encode("bbbbb", max_length=2, truncation=True) == [98, 98]
    overflow = small("bbbcc", truncation=True, max_length=3, return_overflowing_tokens=True)
    assert overflow["overflowing_tokens"] == [99, 99]
    assert overflow["num_truncated_tokens"] == 2
    batch = small(["bbbcc", "b"], truncation=True, max_length=3, stride=1, return_overflowing_tokens=True)
    assert batch["overflowing_tokens"] == [[98, 99, 99], []]
    assert batch["num_truncated_tokens"] == [2, 0]
    with pytest.raises(ValueError, match="leave out return_tensors"):
        small(["bbbcc", "b"], truncation=True, max_length=3, return_overflowing_tokens=True, return_tensors="pt")
    assert small(["bb", "b"], return_length=True)["length"] == [2, 1]
    assert small("b<|im_end|>", return_special_tokens_mask=True)["special_tokens_mask"] == [0, 0]
    assert small("a", text_target="b")["labels"] == [98]
    assert small("a", "b")["input_ids"] == [97, 98] == small([("a", "b")])["input_ids"][0]
    assert small(["a", "b"], ["c", "d"])["input_ids"] == [[97, 99], [98, 100]]
    assert small(["a", "b"], is_split_into_words=True)["input_ids"] == [97, 98]
    assert small("ab", return_token_type_ids=True)["token_type_ids"] == [0]
    assert small("", "")["input_ids"] == []


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["a", None], ["a", 5]])
def test_encoding_other_types_raises_value_error(small, text):
    with pytest.raises(ValueError, match=r"str|text"):
        small(text)


def test_a_list_beside_a_text_raises(small):
    with pytest.raises(ValueError, match="text_pair is a list"):
        small("a", ["b", "c"])


def test_tokenizing_bytes_raises(small):
    with pytest.raises(ValueError, match="must be a str, not bytes"):
        small.tokenize(b"a")


# ---- offsets ----


def test_offsets_are_characters_of_the_text_passed(small):
    def offsets(text):
        encoding = small(text, return_offsets_mapping=True)
        assert len(encoding["offset_mapping"]) == len(encoding["input_ids"]) == len(small.encode(text))
        return encoding["offset_mapping"]

    assert offsets("abcd ab<|im_end|>") == [(0, 4), (4, 5), (5, 7), (7, 17)]
    assert offsets("中a😀") == [(0, 1), (1, 2)] + [(2, 3)] * 4  # each part of a character covers it
    assert offsets("ae\u0301ab") == [(0, 1), (1, 3), (1, 3), (3, 5)]  # NFC makes one character of two
    assert offsets("b\u0344b") == [(0, 2)] * 5 + [(2, 3)]  # and three of two
    assert offsets("\u1100\u1161\u11a8b") == [(0, 3)] * 3 + [(3, 4)]
    assert offsets("a\ud83d\ude00\ud800b") == [(0, 1)] + [(1, 3)] * 4 + [(3, 4)] * 3 + [(4, 5)]
    assert offsets("") == []


def test_offsets_follow_truncation_and_padding(small):
    text = "abcd b中"
    small.truncation_side = "left"
    assert small(text, truncation=True, max_length=2, return_offsets_mapping=True)["offset_mapping"] == [(5, 6), (6, 7)]
    small.truncation_side = "right"
    one = small(text, padding="max_length", max_length=5, pad_to_multiple_of=3, return_offsets_mapping=True)
    assert one["offset_mapping"] == [(0, 4), (4, 5), (5, 6), (6, 7), (0, 0), (0, 0)]
    assert one["attention_mask"] == [1, 1, 1, 1, 0, 0]
    assert small(text, truncation=True, max_length=1, return_offsets_mapping=True)["offset_mapping"] == [(0, 4)]
    batch = small([text, "b"], padding=True, padding_side="left", return_tensors="pt", return_offsets_mapping=True)
    assert batch["offset_mapping"].tolist() == [[[0, 4], [4, 5], [5, 6], [6, 7]], [[0, 0]] * 3 + [[0, 1]]]
    assert [batch.char_to_token(0, index) for index in (0, 3, 4, 6, 7)] == [0, 0, 1, 3, None]
    assert [batch.char_to_token(1, index) for index in (0, 1)] == [3, None]
    assert batch.token_to_chars(1, 3) == (0, 1)
    assert batch.token_to_chars(1, 0) is None
    padded = small.pad([small("ab", return_offsets_mapping=True), small("bb", return_offsets_mapping=True)])
    assert padded["offset_mapping"] == [[(0, 2), (0, 0)], [(0, 1), (1, 2)]]
    lengths = small("ab", return_length=True, padding="max_length", max_length=3, return_offsets_mapping=True)
    assert lengths["length"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "a", "text_pair": "b"}, "no pairs"),
        ({"text": [("a", "b")]}, "no pairs"),
        ({"text": ["a", "b"], "is_split_into_words": True}, "no words"),
        ({"text": [97, 98]}, "pass the text"),
        ({"text": [[97, 98]]}, "pass the text"),
    ],
)
def test_offsets_of_other_inputs_raise(small, arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments, return_offsets_mapping=True)


@pytest.mark.parametrize("seed", range(5))
def test_offsets_equal_those_of_the_exported_tokenizer(small, seed):
    fast = PreTrainedTokenizerFast(tokenizer_object=fast_tokenizer(small), **ENDS)
    rng = random.Random(seed)
    settings = [{}, {"truncation": True, "max_length": 5}, {"padding": "max_length", "max_length": 99}]
    for _ in range(100):
        # Normalised already: in a text that is not, the exported one gives only the first character of several.
        text = unicodedata.normalize("NFC", random_text(rng, rng.randrange(1, 20)))
        for arguments in settings:
            ours, theirs = (t(text, return_offsets_mapping=True, **arguments) for t in (small, fast))
            assert ours["input_ids"] == theirs["input_ids"]
            assert ours["offset_mapping"] == theirs["offset_mapping"]
            found = [[encoding.char_to_token(i) for i in range(len(text) + 1)] for encoding in (ours, theirs)]
            assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_normalised_apart(seed):
    rng = random.Random(seed)
    characters = [chr(code) for code in range(0x20, 0x20000) if unicodedata.decomposition(chr(code))]
    characters += [*"a\u0301\u0327\u3099か\u0f73\u0344\u1100\u1161\u11a8\ud83d\ude00"] * 200
    for _ in range(1000):
        text = "".join(rng.choices(characters, k=rng.randrange(9)))
        pieces = [*tokenization_qwen._normalized_apart(text)]
        assert "".join(pieces) == text
        assert "".join(map(tokenization_qwen._normalize, pieces)) == tokenization_qwen._normalize(text)


# ---- hostile texts ----


def test_surrogates_become_their_character_or_a_replacement(real):
    assert real.decode(real.encode("a\ud83d\ude00b")) == "a😀b"
    assert real.decode(real.encode("a\ud800<|im_end|>")) == "a\ufffd<|im_end|>"
    assert real.encode("\udc00<|im_end|>")[-1] == real.im_end_id


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 1_000_000,
        " " * 1_000_000 + "<|im_end|>" + "\t" * 1_000_000 + "x",
        "\n" + "\u3000" * 1_000_000 + "\n中",
        "<|" * 500_000,
        "a" + "\u0301\u0327" * 200_000,  # unicodedata takes minutes for unordered marks
        "\ud800" + " " * 1_000_000,
    ],
    ids=["letters", "blanks", "blanks before others", "wide blanks", "almost control", "marks", "surrogate"],
)
def test_long_runs_take_seconds_and_do_not_crash(real, text):
    original = text
    start = time.process_time()
    ids = real.encode(text)
    assert time.process_time() - start < 10  # about half a second; process time, because the machine may be shared
    if "\u0327" in text:
        marks = sorted(text[1:], key=unicodedata.combining)
        text = unicodedata.normalize("NFC", "a" + "".join(marks))
    assert real.decode(ids) == text.replace("\ud800", "\ufffd")
    start = time.process_time()
    offsets = real(original, return_offsets_mapping=True)["offset_mapping"]
    assert time.process_time() - start < 30  # a few seconds
    assert (offsets[0][0], offsets[-1][1]) == (0, len(original))


@pytest.mark.slow
def test_cutting_long_whitespace_changes_no_id(small, monkeypatch):
    monkeypatch.setattr(tokenization_qwen, "LONG_WHITESPACE", re.compile(r"[^\S\r\n\x1c-\x1f]{3,}"))
    rng = random.Random(0)
    alphabet = [*"    \t\u3000\n\r\x1c\x85\xa0\va!1中", "<|im_end|>", "'s"]
    for _ in range(1000):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(25)))
        for allowed in (set(), {"<|im_end|>"}):
            assert small._encode_long_whitespace(text, allowed) == small.encode(text, allowed_special=allowed)


def test_ordering_long_marks_changes_no_text():
    rng = random.Random(0)
    marks = "\u0301\u0327\u0344\u0f73\u0345\u3099\u05b0\U0001d165\u0308"
    for _ in range(10):
        run = "".join(rng.choice(marks) for _ in range(700))
        text = ("e" + run + "가" + run[:255] + "\u1fb7" + run[:257] + "か" + run) * 3
        assert tokenization_qwen._normalize(text) == unicodedata.normalize("NFC", text)


# ---- vocabulary files ----


def expanded_ranks() -> dict[bytes, int]:
    ranks = small_ranks()
    start = len(ranks) + 208
    return ranks | {b"abab": start, b"abababab": start + 1}


def assert_expanded(tokenizer: QWenTokenizer, first: int) -> None:
    assert tokenizer.eod_id == first
    assert len(tokenizer) == tokenizer.vocab_size == first + 210
    assert tokenizer.encode("ababababab<|im_end|>") == [first + 209, 256, first + 2]
    assert tokenizer.decode([first + 208, first]) == "abab<|endoftext|>"


def test_expanded_vocabulary_keeps_the_control_tokens_also_when_saved(tmp_path):
    first = len(small_ranks())
    tokenizer = QWenTokenizer(write_ranks(tmp_path / "expanded.tiktoken", expanded_ranks()))
    assert_expanded(tokenizer, first)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert_expanded(QWenTokenizer.from_pretrained(tmp_path / "saved"), first)


def test_extra_vocab_file_adds_ranks_and_skips_what_is_taken(tmp_path, small_file, caplog):
    first = len(small_ranks())
    extra = {b"abab": first + 208, b"abababab": first + 209, b"ab": 5000, b"zz": 97, b"yy": first}
    path = write_ranks(tmp_path / "extra.tiktoken", extra)
    tokenizer = QWenTokenizer(small_file, extra_vocab_file=path)
    assert_expanded(tokenizer, first)
    assert tokenizer.mergeable_ranks[b"ab"] == 256
    assert b"zz" not in tokenizer.mergeable_ranks
    messages = [record.getMessage() for record in caplog.records]
    assert [any(text in message for message in messages) for text in ("b'ab'", "b'zz'", "b'yy'")] == [True] * 3
    tokenizer.save_pretrained(tmp_path / "saved")
    assert_expanded(QWenTokenizer.from_pretrained(tmp_path / "saved"), first)


def b64(token: bytes) -> bytes:
    return base64.b64encode(token)


SMALL_LINES = [b"%s %d" % (b64(token), rank) for token, rank in small_ranks().items()]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([b"version https://git-lfs.github.com/spec/v1", b"oid sha256:00", b"size 2561218"], "git lfs pull"),
        ([*SMALL_LINES[:10], b"no"], "line 11: expected"),
        ([*SMALL_LINES[:10], b"YQ== 1 2"], "line 11: expected"),
        ([*SMALL_LINES[:10], b"!!!! 10"], "line 11: expected"),
        ([*SMALL_LINES[:10], b"YWJ 10"], "line 11: expected"),
        ([*SMALL_LINES[:10], b"YWJj x"], "line 11: expected"),
        ([*SMALL_LINES[:10], b"YWJj -1"], "line 11: the rank -1 is out of range"),
        ([*SMALL_LINES[:10], b"YWJj 99999999999"], "line 11: the rank 99999999999 is out of range"),
        ([*SMALL_LINES[:10], b"YWJj 3"], r"line 11: rank 3 belongs to b'\\x03'"),
        ([*SMALL_LINES[:10], b64(b"\x02") + b" 77"], r"line 11: the token b'\\x02' has rank 2"),
        (SMALL_LINES[:200], "lacks 56 of the 256 single bytes, the first is 0xc8"),
        ([*SMALL_LINES, b64(b"xyz") + b" %d" % (len(SMALL_LINES) + 5)], "in the range of the control tokens"),
        (SMALL_LINES[:257] + SMALL_LINES[258:], "rank 258 is in the range of the control tokens, 257 to 464"),
    ],
)
def test_broken_vocabulary_files_say_what_is_wrong(tmp_path, lines, message):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"\n".join(lines))
    for load in (lambda: QWenTokenizer(path), lambda: QWenTokenizer.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=message) as error:
            load()
        assert str(path) in str(error.value)


def test_download_truncated_within_a_line_is_detected(tmp_path, vocab_file):
    contents = vocab_file.read_bytes()
    path = tmp_path / "qwen.tiktoken"
    middle = contents.index(b"\n", len(contents) // 2)
    for end in (middle - 1, middle - 8):  # within the rank, within the token
        path.write_bytes(contents[:end])
        with pytest.raises(ValueError, match=r"line .*download it again"):
            QWenTokenizer(path)


def test_download_truncated_between_lines_is_detected_by_the_saved_ids(tmp_path, small):
    small.save_pretrained(tmp_path)
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"<\|endoftext\|> the id 262.*has id 261.*download it again"):
        QWenTokenizer.from_pretrained(tmp_path)


def test_missing_vocabulary_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.tiktoken: cannot read"):
        QWenTokenizer(tmp_path / "nowhere.tiktoken")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} has no qwen\.tiktoken"):
        QWenTokenizer.from_pretrained(tmp_path)


def test_blank_lines_and_windows_line_ends_are_fine(tmp_path, small):
    path = tmp_path / "windows.tiktoken"
    path.write_bytes(b"\r\n".join([*SMALL_LINES, b"", b""]))
    assert QWenTokenizer(path).get_vocab() == small.get_vocab()


@pytest.mark.slow
def test_the_published_vocabulary_loads_fast(vocab_file):
    times = []
    for _ in range(3):
        start = time.process_time()
        QWenTokenizer(vocab_file)
        times.append(time.process_time() - start)
    assert min(times) < 1  # about a quarter of a second


# ---- copies, saving, loading ----


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_work_and_are_independent(small_file, duplicate):
    original = QWenTokenizer(small_file, errors="ignore", pad_token="<|extra_0|>")
    twin = duplicate(original)
    text = "abcd é<|im_end|>"
    assert twin(text) == original(text)
    assert twin.pad_token_id == original.pad_token_id
    assert twin.decode([0xE4, 97]) == "a"
    twin.pad_token = "<|extra_1|>"
    assert original.pad_token == "<|extra_0|>"


def test_saving_writes_the_published_file_back(real, vocab_file, tmp_path):
    assert real.save_vocabulary(str(tmp_path), filename_prefix="x") == (str(tmp_path / "x-qwen.tiktoken"),)
    assert (tmp_path / "x-qwen.tiktoken").read_bytes() == vocab_file.read_bytes()


def test_settings_survive_saving(small_file, tmp_path):
    QWenTokenizer(
        small_file,
        errors="ignore",
        pad_token="<|extra_0|>",
        padding_side="left",
        model_max_length=77,
        resume_download=True,
    ).save_pretrained(tmp_path)
    loaded = QWenTokenizer.from_pretrained(tmp_path, resume_download=True, eos_token="<|im_end|>")
    assert (loaded.errors, loaded.pad_token, loaded.padding_side) == ("ignore", "<|extra_0|>", "left")
    assert (loaded.model_max_length, loaded.eos_token_id) == (77, loaded.im_end_id)
    assert "resume_download" not in (tmp_path / "tokenizer_config.json").read_text()


def test_saved_tokenizer_contains_its_code(small_file, tmp_path, monkeypatch, isolated_python):
    monkeypatch.setattr(QWenTokenizer, "_auto_class", "AutoTokenizer")
    folder = tmp_path / "checkpoint"
    QWenTokenizer(small_file, pad_token="<|extra_0|>").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen"}')
    assert (folder / "tokenization_qwen.py").exists()
    code = """
        import sys
        from transformers import AutoTokenizer
        for folder in sys.argv[1:]:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, resume_download=True)
            tokenizer.save_pretrained(sys.argv[2])
            print(tokenizer("abcd<|im_end|>")["input_ids"], tokenizer.pad_token)
    """
    printed = isolated_python(code, folder, tmp_path / "again")
    assert printed == [f"[258, {len(SMALL_LINES) + 2}] <|extra_0|>"] * 2


def test_folder_without_tokenizer_config_loads(small_file, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(small_file.read_bytes())
    for load in (QWenTokenizer.from_pretrained, load_tokenizer):
        assert load(tmp_path).encode("abcd") == [258]
    (tmp_path / "config.json").write_text('{"model_type": "qwen"}')
    for load in (AutoTokenizer.from_pretrained, QWenTokenizer.from_pretrained, load_tokenizer):
        tokenizer = load(tmp_path)
        assert type(tokenizer) is QWenTokenizer
        assert tokenizer.encode("abcd") == [258]


def test_package_replaces_the_code_next_to_published_weights(small_file, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "qwen.tiktoken").write_bytes(small_file.read_bytes())
    (folder / "config.json").write_text('{"model_type": "qwen"}')
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    config = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_qwen.py").write_text("raise RuntimeError('the code next to the weights ran')")
    for trust in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        assert type(tokenizer) is QWenTokenizer
        assert tokenizer.model_max_length == 8192


# ---- chat template ----


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def test_chat_template_is_chatml(real):
    system = ("system", "You are a helpful assistant.")
    messages = [{"role": "user", "content": "你好"}]
    text = real.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == chatml(system, ("user", "你好")) + "<|im_start|>assistant\n"
    ids = real.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == real.encode(text)
    assert ids[:3] == [151644, 8948, 198]
    assert ids[-3:] == [151644, 77091, 198]

    own = [("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", " and\n2+2? ")]
    messages = [{"role": role, "content": content} for role, content in own]
    assert real.apply_chat_template(messages, tokenize=False) == chatml(*own)


def test_chat_template_takes_parts_developers_and_nothing(small):
    def render(*messages, **arguments):
        conversation = [{"role": role, "content": content} for role, content in messages]
        return small.apply_chat_template(conversation, tokenize=False, **arguments)

    system = ("system", "You are a helpful assistant.")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    assert render(("user", parts)) == chatml(system, ("user", "a\nb "))
    assert render(("user", None), ("assistant", None)) == chatml(system, ("user", ""), ("assistant", ""))
    assert small.apply_chat_template([{"role": "user"}], tokenize=False) == chatml(system, ("user", ""))
    assert render(("developer", "D"), ("user", [])) == chatml(("system", "D"), ("user", ""))
    turns = [("user", "a"), ("user", "b"), ("system", "c"), ("assistant", "d"), ("developer", "e"), ("assistant", "f")]
    for count in range(1, len(turns) + 1):  # a later message changes nothing before it
        written = [("system" if role == "developer" else role, text) for role, text in turns[:count]]
        assert render(*turns[:count]) == chatml(system, *written)
    for content in ("Sure, ", [{"type": "text", "text": "Sure, "}]):
        continued = render(("user", "a"), ("assistant", content), continue_final_message=True)
        assert continued == chatml(system, ("user", "a")) + "<|im_start|>assistant\nSure, "


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "x"}, r"messages\[1\] is a tool call or its result.*qwen\.tools"),
        ({"role": "function", "content": "x"}, r"messages\[1\] is a tool call or its result"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, r"messages\[1\] is a tool call or its result"),
        ({"role": "assistant", "function_call": {"name": "f"}}, r"messages\[1\] is a tool call or its result"),
        ({"role": "robot", "content": "x"}, r"messages\[1\] needs a role: .*user or assistant, not robot\."),
        ({"content": "x"}, r"messages\[1\] needs a role: system, developer, user or assistant\."),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "x"}]},
            r"\[1\] is not",
        ),
        ({"role": "user", "content": ["a"]}, r"messages\[1\]\.content\[0\] is not a text part.*replace it by"),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[1\]\.content\[0\] is not a text part"),
        ({"role": "user", "content": 5}, r"messages\[1\]\.content is neither a string nor a list of text parts"),
        ({"role": "user", "content": False}, r"messages\[1\]\.content is neither"),
    ],
)
def test_chat_template_names_what_it_cannot_write(small, message, error):
    with pytest.raises(TemplateError, match=error):
        small.apply_chat_template([{"role": "user", "content": "a"}, message], tokenize=False)


def test_empty_conversations_raise(small):
    with pytest.raises((ValueError, TemplateError), match="empty"):
        small.apply_chat_template([], tokenize=False)


def test_assistant_mask_marks_replies_and_their_ends(small):
    conversations = [
        [("user", "ab"), ("assistant", "é中<"), ("user", "assistant"), ("assistant", "e\u0301 abcd"), ("user", "q")],
        [("system", "s"), ("assistant", "")],
    ]
    messages = [[{"role": role, "content": text} for role, text in turns] for turns in conversations]
    arguments = {"return_assistant_tokens_mask": True, "return_dict": True}

    def marked(ids, mask):
        assert len(ids) == len(mask)
        return small.decode([index for index, flag in zip(ids, mask, strict=True) if flag])

    expected = ["é中<<|im_end|>é abcd<|im_end|>", "<|im_end|>"]
    for one, text in zip(messages, expected, strict=True):
        encoding = small.apply_chat_template(one, **arguments)
        assert [*encoding] == ["input_ids", "attention_mask", "assistant_masks"]
        assert marked(encoding["input_ids"], encoding["assistant_masks"]) == text
    length = len(small.encode(small.apply_chat_template(messages[0], tokenize=False).partition("<<|im_end|>")[0]))
    cut = small.apply_chat_template(messages[0], truncation=True, max_length=length, **arguments)
    assert marked(cut["input_ids"], cut["assistant_masks"]) == "é中"
    for side in ("left", "right"):
        small.padding_side = side
        batch = small.apply_chat_template(messages, padding=True, return_tensors="pt", **arguments)
        assert batch["input_ids"].shape == batch["assistant_masks"].shape
        rows = zip(batch["input_ids"].tolist(), batch["assistant_masks"].tolist(), strict=True)
        assert [marked(ids, mask) for ids, mask in rows] == expected
    kept = small.apply_chat_template(messages[0], tokenizer_kwargs={"return_offsets_mapping": True}, **arguments)
    assert "offset_mapping" in kept


SANITIZES = "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizer.apply_chat_template).parameters


@pytest.mark.skipif(not SANITIZES, reason="transformers before 5.20 does not sanitize")
def test_chat_template_parses_control_tokens_unless_sanitized(real):
    messages = [{"role": "user", "content": "x<|im_end|>y"}]
    parsed = real.apply_chat_template(messages, return_dict=False)
    sanitized = real.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
    assert (parsed.count(real.im_end_id), sanitized.count(real.im_end_id)) == (3, 2)
    assert real.decode(sanitized) == real.decode(parsed)


def test_sanitizing_raises_if_transformers_does_not_support_it(real, monkeypatch):
    messages = [{"role": "user", "content": "x<|im_end|>y"}]
    monkeypatch.setattr(PreTrainedTokenizer, "apply_chat_template", lambda self, conversation, **kwargs: "rendered")
    monkeypatch.setattr(tokenization_qwen, "_SANITIZES", False)
    assert real.apply_chat_template(messages, add_generation_prompt=True) == "rendered"
    with pytest.raises(ValueError, match=r"needs transformers 5\.20 or newer.*make_context"):
        real.apply_chat_template(messages, sanitize_control_tokens=True)


def test_chat_template_of_the_checkpoint_is_used_and_saved(small_file, tmp_path):
    QWenTokenizer(small_file, chat_template="{{ messages[0].content }}!").save_pretrained(tmp_path)
    loaded = QWenTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
