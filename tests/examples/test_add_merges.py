"""Vocabulary expansion: from a word list to a tiktoken file, the tokenizer and the rows of a model."""

import itertools
import json
import os
import pickle
import random
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import add_merges
import pytest
import tiktoken
import torch

from qwen.checkpoint.loading import load_model
from qwen.data.samples import encode_sample, pad_samples
from qwen.finetuning.vocabulary import expand_embeddings, merge_pieces, single_bytes
from qwen.model.configuration_qwen import QWenConfig
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.model.tokenization_qwen import SPLIT_PATTERN, QWenTokenizer
from tests.support import GOLDEN_FOLDER, ROOT
from tests.support.processes import run_script

EXAMPLES = ROOT / "examples"
WORDS = EXAMPLES / "words.txt"
PAGE = (EXAMPLES / "vocabulary_expansion.md").read_text(encoding="utf-8")
TEXTS = [line.partition("\t")[0] for line in WORDS.read_text(encoding="utf-8").splitlines()]


class Result(NamedTuple):
    status: int | None
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """Run add_merges.py with arguments, in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["add_merges.py", *map(str, arguments)])
        capsys.readouterr()
        status = add_merges.main()
        return Result(status, *capsys.readouterr())

    return call


@pytest.fixture
def words(tmp_path: Path) -> Callable[[str], Path]:
    """Write a word list with the given text."""

    def write(text: str) -> Path:
        path = tmp_path / "words.txt"
        path.write_bytes(text.encode())
        return path

    return write


@pytest.fixture(scope="session")
def toy_base(bundled_chat: Path) -> QWenTokenizer:
    return QWenTokenizer(bundled_chat / "qwen.tiktoken")


@pytest.fixture(scope="session")
def toy_extra(bundled_chat: Path, toy_base: QWenTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens that words.txt adds to the toy's vocabulary."""
    path = tmp_path_factory.mktemp("vocabulary") / "plants.tiktoken"
    add_merges.add_merges(bundled_chat / "qwen.tiktoken", path, WORDS, None)
    return path


@pytest.fixture(scope="session")
def toy(bundled_chat: Path, toy_extra: Path) -> QWenTokenizer:
    """The toy's tokenizer with words.txt."""
    return QWenTokenizer.from_pretrained(bundled_chat, extra_vocab_file=str(toy_extra))


def boundaries(tokenizer: QWenTokenizer, text: str) -> set[int]:
    """Return the token boundaries of a text, in bytes."""
    return set(itertools.accumulate(len(token) for token in tokenizer.tokenize(text, allowed_special=set())))


# Merging


def random_vocabulary(rng: random.Random) -> dict[bytes, int]:
    """Return all bytes and random merges of existing tokens over a small alphabet."""
    tokens = [bytes([byte]) for byte in range(256)]
    alphabet = [b"a", b"b", b"c", *map(bytes, ([0xC3], [0xA9]))]
    for _ in range(rng.randrange(25)):
        token = rng.choice(alphabet) + rng.choice(alphabet)
        if token not in tokens:
            tokens.append(token)
            alphabet.append(token)
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("seed", range(10))
def test_pieces_are_merged_as_tiktoken_does(seed: int) -> None:
    rng = random.Random(seed)
    ranks = random_vocabulary(rng)
    encoding = tiktoken.Encoding("test", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for _ in range(50):
        word = bytes(rng.choices(b"abc\xc3\xa9", k=rng.randrange(1, 40)))
        assert [ranks[piece] for piece in merge_pieces(single_bytes(word), ranks)] == encoding._encode_single_piece(
            word
        )
    assert merge_pieces([], ranks) == []


@pytest.mark.parametrize("seed", range(10))
def test_merges_match_recounting_after_each_merge(seed: int) -> None:
    rng = random.Random(seed)
    ranks = random_vocabulary(rng)
    words = {bytes(rng.choices(b"abc", k=rng.randrange(2, 12))): rng.randrange(1, 30) for _ in range(12)}

    known, expected = dict(ranks), []
    while True:
        weights: dict[bytes, int] = {}
        for word, frequency in words.items():
            for left, right in itertools.pairwise(merge_pieces(single_bytes(word), known)):
                weights[left + right] = weights.get(left + right, 0) + frequency
        if not weights:
            break
        best = min(weights, key=lambda pair: (-weights[pair], pair))
        expected.append(best)
        known[best] = len(known)

    assert add_merges.learn_merges(words, ranks) == expected
    assert all(merge_pieces(single_bytes(word), known) == [word] for word in words)


def test_most_frequent_pair_is_merged_first() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    assert add_merges.learn_merges({b"xyz": 5, b"yzw": 1}, ranks) == [b"yz", b"xyz", b"yzw"]
    assert add_merges.learn_merges({b"xyz": 5, b"xyw": 9, b"yzw": 20}, ranks)[0] == b"yz"
    assert add_merges.learn_merges({b"aaaa": 1}, ranks) == [b"aa", b"aaaa"]


# The published vocabulary


@pytest.mark.slow
def test_published_vocabulary_is_extended(
    real_vocab_file: Path, real_tokenizer: QWenTokenizer, run: Callable[..., Result], tmp_path: Path
) -> None:
    extra = tmp_path / "extra.tiktoken"
    done = run(real_vocab_file, extra, WORDS)
    assert done.status == 0
    assert not done.err
    lines = extra.read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(151851, 151851 + len(lines)))
    assert f"{len(lines)} tokens with ids 151851 to {151850 + len(lines)}, 10 words" in done.out

    tokenizer = QWenTokenizer(real_vocab_file, extra_vocab_file=extra)
    assert tokenizer.special_tokens == real_tokenizer.special_tokens
    assert len(tokenizer) == 151851 + len(lines)
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert all(len(each) == 1 and each[0] >= 151851 for each in ids)
    assert len(tokenizer.tokenize("在叶绿体上")) == 3
    assert tokenizer.tokenize("叶绿体内")[1] == "体内".encode()
    sentence = f"Leaves do{TEXTS[0]}<|im_end|>"
    assert tokenizer.encode(sentence) == real_tokenizer.encode("Leaves do") + ids[0] + [tokenizer.im_end_id]

    # Texts without the words are tokenized as before. With them, boundaries may disappear, but no new ones appear.
    golden = json.loads((GOLDEN_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["chlor", "oph", "光合", "作", "的", "叶绿", "s", " ", *TEXTS]) for _ in range(12))
        assert boundaries(tokenizer, text) <= boundaries(real_tokenizer, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    tokenizer.save_pretrained(tmp_path / "saved")
    extra.unlink()
    saved = QWenTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.get_vocab() == tokenizer.get_vocab()
    assert [saved.encode(text) for text in TEXTS] == ids


def test_joined_pickled_and_saved_vocabularies_are_equal(
    bundled_chat: Path, toy: QWenTokenizer, toy_extra: Path, tmp_path: Path
) -> None:
    joined = tmp_path / "joined.tiktoken"
    joined.write_bytes((bundled_chat / "qwen.tiktoken").read_bytes() + toy_extra.read_bytes())
    toy.save_pretrained(tmp_path)
    copies = QWenTokenizer(joined), pickle.loads(pickle.dumps(toy)), QWenTokenizer.from_pretrained(tmp_path)
    for copied in copies:
        assert copied.get_vocab() == toy.get_vocab()
        assert [copied.encode(text) for text in TEXTS] == [toy.encode(text) for text in TEXTS]


# The list of words


@pytest.mark.process
def test_command_on_the_page_prints_what_it_shows(tmp_path: Path) -> None:
    command, printed = re.search(r"^```(?:ba)?sh\n(mkdir .*?)^```\n\n```text\n(.*?)^```$", PAGE, re.S | re.M).groups()
    for name in ("examples", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    folder, script = map(shlex.split, command.splitlines())
    subprocess.run(folder, cwd=tmp_path, check=True)
    done = run_script(*script[1:], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed, done.stderr


def test_tokens_on_the_page_are_current(toy: QWenTokenizer, toy_base: QWenTokenizer) -> None:
    sentence = "Leaves use chlorophyll for photosynthesis."
    for printed in (
        f"{toy_base.tokenize(sentence)}\n{toy.tokenize(sentence)}\n{len(toy_base)} {len(toy)}\n",
        f"{toy.tokenize('(chlorophyll)')}\n1 {len(toy.encode('的光合作用'))}\n",
    ):
        assert f"```text\n{printed}```" in PAGE


def test_skipped_lines_are_reported(
    bundled_chat: Path, run: Callable[..., Result], words: Callable[[str], Path], tmp_path: Path
) -> None:
    lines = [
        "\ufeffgrönlandhai\t3",  # with a byte order mark
        "New York\t7",
        "",
        "the",
        "gro\u0308nlandhai",  # line 1 in NFD
        "\t5",
        " xyzzy\tmany",
        "x" * 300,
        " plugh\t0",
        " plover\t-1\r",
        " frotz\t1.5",
        " gnusto\t",
        " rezrov\t1\t2",
        " klaatu\t" + "9" * 5000,
        " barada\r",
        "don't",
        "<|im_end|>",
        "\x00",
    ]
    path = words("\n".join(lines) + "\n")
    done = run(bundled_chat / "qwen.tiktoken", tmp_path / "out.tiktoken", path)
    assert done.status == 0
    warnings = {}
    for line in done.err.splitlines():
        number, message = re.fullmatch(re.escape(str(path)) + r", line (\d+): (.*)", line).groups()
        warnings.setdefault(int(number), []).append(message)
    assert sorted(warnings) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 18]
    assert "'New' + ' York'" in warnings[2][0]
    assert "'don' + \"'t\"" in warnings[16][0]
    assert "no word" in warnings[3][0]
    assert "no word" in warnings[6][0]
    assert "already a token (id " in warnings[4][0]
    assert "already a token" in warnings[18][0]
    assert "duplicate of line 1" in warnings[5][0]
    assert "300 bytes" in warnings[8][0]
    for number, frequency in ((7, "many"), (9, "0"), (10, "-1"), (11, "1.5"), (12, ""), (13, r"1\t2"), (14, "999")):
        assert f"frequency '{frequency}" in warnings[number][0]
        assert "counted as 1" in warnings[number][0]
    assert len(done.err) < 4000

    tokenizer = QWenTokenizer(bundled_chat / "qwen.tiktoken", extra_vocab_file=tmp_path / "out.tiktoken")
    added = ["grönlandhai", " xyzzy", " plugh", " plover", " frotz", " gnusto", " rezrov", " klaatu", " barada"]
    assert all(len(tokenizer.encode(word)) == 1 for word in added)
    assert f"9 of the {len(added)} words are one token" in done.out


def test_words_split_after_a_space_are_reported(
    bundled_chat: Path, run: Callable[..., Result], words: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = (bundled_chat / "qwen.tiktoken", tmp_path / "out.tiktoken")
    done = run(*arguments, words("chlorophyll\n光合作用\n"))
    assert "line 1: after a space, 'chlorophyll' is still split into ' ch' + 'l' + 'or'" in done.err
    assert "光合作用" not in done.err
    assert not run(*arguments, words("chlorophyll\n chlorophyll\n")).err


def test_frequent_words_are_merged_first(
    bundled_chat: Path, run: Callable[..., Result], words: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.tiktoken"

    def first_word(text: str) -> str:
        assert run(bundled_chat / "qwen.tiktoken", out, words(text)).status == 0
        tokenizer = QWenTokenizer(bundled_chat / "qwen.tiktoken", extra_vocab_file=out)
        return min((" xyzzy", " qwfpg"), key=lambda word: tokenizer.mergeable_ranks[word.encode()])

    assert first_word(" xyzzy\t9\n qwfpg\t2\n") == " xyzzy"
    assert first_word(" xyzzy\t9\n qwfpg\t20\n") == " qwfpg"
    assert first_word(" xyzzy\t3\n qwfpg\n") == " xyzzy"


def test_long_word_lists_are_fast(real_tokenizer: QWenTokenizer) -> None:
    rng = random.Random(0)
    words = {"".join(rng.choices("aeioubdfgklmnprst", k=10)).encode(): rng.randrange(1, 99) for _ in range(3000)}
    merges = add_merges.learn_merges(
        words, real_tokenizer.mergeable_ranks
    )  # recounting at each merge would take minutes
    assert words.keys() <= set(merges)
    assert len(merges) == len(set(merges))


# Ids and files


def test_second_word_list_continues_after_the_first(
    bundled_chat: Path, toy: QWenTokenizer, run: Callable[..., Result], words: Callable[[str], Path], tmp_path: Path
) -> None:
    toy.save_pretrained(tmp_path)
    out = tmp_path / "out.tiktoken"
    done = run(tmp_path / "qwen.tiktoken", out, words(" xyzzy\n chlorophyll\n"))
    assert done.status == 0
    assert "line 2: ' chlorophyll' skipped: already a token" in done.err
    assert int(out.read_bytes().split()[1]) == len(toy)
    both = QWenTokenizer(tmp_path / "qwen.tiktoken", extra_vocab_file=out)
    assert both.special_tokens == toy.special_tokens
    assert len(both.encode(" xyzzy")) == 1


def test_start_id_can_leave_a_gap(
    bundled_chat: Path, run: Callable[..., Result], words: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.tiktoken"
    done = run(bundled_chat / "qwen.tiktoken", out, words(" xyzzy\n"), "--start-id", 4000)
    assert done.status == 0
    assert "3584 to 3999 have no token" in done.err
    tokenizer = QWenTokenizer(bundled_chat / "qwen.tiktoken", extra_vocab_file=out)
    assert tokenizer.encode(" xyzzy") == [len(tokenizer) - 1]
    assert f"a model needs {len(tokenizer)} rows" in done.out
    assert min(tokenizer.decoder.keys() - QWenTokenizer(bundled_chat / "qwen.tiktoken").decoder.keys()) == 4000


@pytest.mark.parametrize("start", [0, 3370, 3376, 3583])
def test_taken_ids_are_rejected(
    start: int, bundled_chat: Path, run: Callable[..., Result], words: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.tiktoken"
    done = run(bundled_chat / "qwen.tiktoken", out, words(" xyzzy\n"), "--start-id", start)
    assert done.status == 1
    assert f"id {start} is taken" in done.err
    assert "3584" in done.err
    assert not done.out
    assert not out.exists()


@pytest.mark.parametrize("start", ["-1", "1.5", "first", "9" * 30])
def test_invalid_start_ids_are_rejected(start: str, run: Callable[..., Result], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("base", "out", "words", f"--start-id={start}")
    assert f"not {start!r}" in capsys.readouterr().err


def test_too_large_ids_are_rejected(
    bundled_chat: Path, run: Callable[..., Result], words: Callable[[str], Path], tmp_path: Path
) -> None:
    done = run(bundled_chat / "qwen.tiktoken", tmp_path / "out", words(" xyzzy\n"), "--start-id", 2**31 - 1)
    assert done.status == 1
    assert "the maximum is 2147483647" in done.err


BASE, OUT, LIST = "base.tiktoken", "out.tiktoken", "words.txt"


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [
        (lambda folder: (folder / BASE).unlink(), (BASE, "No such file")),
        (lambda folder: (folder / BASE).write_bytes(b"!!! 0\n"), (BASE, "line 1", "base64")),
        (lambda folder: (folder / BASE).write_bytes(b""), (BASE, "empty")),
        (lambda folder: (folder / BASE).write_bytes(b"YQ== 0\n"), (BASE, "255 of the 256")),
        (lambda folder: (folder / LIST).unlink(), (LIST, "No such file")),
        (lambda folder: (folder / LIST).write_bytes(b""), (LIST, "no word")),
        (lambda folder: (folder / LIST).write_bytes(b"the\nNew York\n"), (LIST, "no words to add")),
        (lambda folder: (folder / LIST).write_bytes(b"one\nxyzzy\xff\n"), (LIST, "line 2", "not UTF-8")),
        (lambda folder: (folder / LIST).write_bytes("xyzzy".encode("utf-16")), (LIST, "line 1", "not UTF-8")),
        (lambda folder: ((folder / LIST).unlink(), (folder / LIST).mkdir()), (LIST, "Is a directory")),
        (lambda folder: ((folder / OUT).unlink(), (folder / OUT).mkdir()), (OUT, "is a folder")),
        (lambda folder: ((folder / OUT).unlink(), os.mkfifo(folder / OUT)), (OUT, "not a regular file")),
        (
            lambda folder: ((folder / OUT).unlink(), (folder / OUT).symlink_to(folder / BASE)),
            (OUT, BASE, "overwrite"),
        ),
    ],
)
def test_errors_name_the_file_and_the_cause(
    mistake: Callable[[Path], object],
    expected: tuple[str, ...],
    bundled_chat: Path,
    run: Callable[..., Result],
    words: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    (tmp_path / BASE).write_bytes((bundled_chat / "qwen.tiktoken").read_bytes())
    (tmp_path / OUT).write_bytes(b"old\n")
    words(" xyzzy\n")
    mistake(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = run(tmp_path / BASE, tmp_path / OUT, tmp_path / LIST)
    assert done.status == 1
    assert not done.out
    assert all(text in done.err.splitlines()[-1] for text in expected), done.err
    assert sorted(tmp_path.iterdir()) == before
    if (tmp_path / OUT).is_file() and not (tmp_path / OUT).is_symlink():
        assert (tmp_path / OUT).read_bytes() == b"old\n"


def test_missing_output_folder_is_reported(bundled_chat: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    done = run(bundled_chat / "qwen.tiktoken", tmp_path / "no" / "out.tiktoken", WORDS)
    assert done.status == 1
    assert f"the folder {tmp_path / 'no'} does not exist" in done.err


def test_interrupted_run_keeps_the_old_file(
    bundled_chat: Path, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.tiktoken"
    out.write_bytes(b"old\n")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)  # Ctrl-C after everything is written
        assert run(bundled_chat / "qwen.tiktoken", out, WORDS).status == 130
    assert out.read_bytes() == b"old\n"
    assert list(tmp_path.iterdir()) == [out]

    target = tmp_path / "target.tiktoken"
    out.rename(target)
    out.symlink_to(target)
    assert run(bundled_chat / "qwen.tiktoken", out, WORDS).status == 0
    assert out.is_symlink()
    assert target.read_bytes().startswith(b"IGNobA== 3584\n")
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(fresh.stat().st_mode)


# The rows of a model


def small_model(rows: int, tied: bool = False, dtype: torch.dtype = torch.float32) -> QWenLMHeadModel:
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=rows,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        kv_channels=16,
        intermediate_size=64,
        tie_word_embeddings=tied,
    )
    model = QWenLMHeadModel(config)
    model.tie_weights()
    return model.to(dtype).eval()


def pieces_of(token: bytes, base: QWenTokenizer) -> list[int]:
    return base.tokenizer._encode_single_piece(token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [3584, 3590, 3700])
def test_new_rows_are_means_of_old_rows(
    rows: int, tied: bool, dtype: torch.dtype, toy: QWenTokenizer, toy_base: QWenTokenizer
) -> None:
    model = small_model(rows, tied, dtype)
    before = [model.transformer.wte.weight.detach().clone(), model.lm_head.weight.detach().clone()]
    new = expand_embeddings(model, toy, toy_base)

    assert new == list(range(3584, len(toy)))
    after = [model.transformer.wte.weight, model.lm_head.weight]
    assert (after[0] is after[1]) == tied
    for old, weight in zip(before, after, strict=True):
        assert weight.shape == (max(rows, len(toy)), 32)
        assert weight.dtype == dtype
        assert weight.requires_grad
        assert torch.equal(weight[:3584], old[:3584])
        assert torch.equal(weight[len(toy) :], old[len(toy) :])
        for index in new:
            mean = old[pieces_of(toy.decoder[index], toy_base)].float().mean(0).to(dtype)
            assert torch.equal(weight[index], mean)
    assert (
        model.config.vocab_size == len(after[0]) == model.transformer.wte.num_embeddings == model.lm_head.out_features
    )


def test_model_is_unchanged_without_new_tokens(toy_base: QWenTokenizer) -> None:
    model = small_model(3584)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert expand_embeddings(model, toy_base, toy_base) == []
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_ids_after_a_gap_get_rows(toy_base: QWenTokenizer, bundled_chat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tiktoken"
    add_merges.add_merges(bundled_chat / "qwen.tiktoken", out, WORDS, 4000)
    tokenizer = QWenTokenizer(bundled_chat / "qwen.tiktoken", extra_vocab_file=out)
    model = small_model(3584)
    assert expand_embeddings(model, tokenizer, toy_base)[0] == 4000
    assert len(model.lm_head.weight) == len(tokenizer)
    assert model.lm_head.weight.isfinite().all()


def test_mismatched_vocabularies_are_rejected(
    toy: QWenTokenizer, toy_base: QWenTokenizer, real_tokenizer: QWenTokenizer
) -> None:
    model = small_model(3584)
    with pytest.raises(ValueError, match=r"does not extend the model's.*token b'.*add_merges.py"):
        expand_embeddings(model, real_tokenizer, toy_base)
    with pytest.raises(ValueError, match="id 3584 is missing"):
        expand_embeddings(small_model(4000), toy_base, toy)
    with pytest.raises(ValueError, match=r"3583 embedding rows .* vocabulary of 3584"):
        expand_embeddings(small_model(3583), toy, toy_base)
    assert model.config.vocab_size == 3584


def test_model_learns_new_tokens(
    bundled_chat: Path, toy: QWenTokenizer, toy_base: QWenTokenizer, tmp_path: Path
) -> None:
    model, _ = load_model(bundled_chat, cpu_only=True)
    prompt = toy_base("Hello! How are you?", return_tensors="pt")
    with torch.no_grad():
        before = model(**prompt).logits
        expand_embeddings(model, toy, toy_base)
        after = model(**prompt).logits
    torch.testing.assert_close(after[..., :3584], before)
    question, answer = "Where is the chlorophyll?", "In the chloroplasts of a leaf."
    (stored,) = toy.encode(" chloroplasts")
    assert stored not in toy.encode(model.chat(toy, question, history=None, do_sample=False)[0])

    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    batch = pad_samples([encode_sample({"conversations": turns}, toy, 100)], toy.eod_id)
    assert stored in batch["labels"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    toy.save_pretrained(tmp_path)

    model, tokenizer = load_model(tmp_path, cpu_only=True)
    query = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(query, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**ids, do_sample=False, max_new_tokens=20)[0, ids["input_ids"].shape[1] :].tolist()
    assert stored in reply
    assert model.chat(tokenizer, question, history=None, do_sample=False)[0] == answer


def test_adapters_are_loaded_with_their_new_tokens(
    bundled_chat: Path, toy: QWenTokenizer, toy_base: QWenTokenizer, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    model, _ = load_model(bundled_chat, cpu_only=True)
    expand_embeddings(model, toy, toy_base)
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["wte", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    model.save_pretrained(tmp_path)
    toy.save_pretrained(tmp_path)

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = toy("Leaves use chlorophyll.", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits)
    assert merged.config.vocab_size == len(toy)
