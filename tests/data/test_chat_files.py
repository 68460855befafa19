"""Tests of conversation files (formats, chunk borders, broken files, memory), datasets, packing and data loaders."""

import codecs
import json
import os
import pickle
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from qwen.data import conversation_file, datasets
from qwen.data.conversation_file import ConversationFile, DataFileError
from qwen.data.datasets import Collator, PackedDataset, SupervisedDataset, best_fit_decreasing
from qwen.data.samples import IGNORE_INDEX, MalformedSample, encode_sample, pack_samples, pad_samples
from qwen.model.tokenization_qwen import QWenTokenizer
from tests.support import ROOT
from tests.support.processes import Child


def sample(number, question="q", answer="a", **fields):
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"id": f"identity_{number}", **fields, "conversations": turns}


# Escapes, brackets and quotes in texts, characters of one to four bytes, numbers and words that chunks may split.
SAMPLES = [
    sample(0, "Who are you?", 'I am "Qwen" \\ {[,]} \n\t/'),
    sample(1, "你好，größe 😀 \U0010ffff", "é" * 30, system="Ω"),
    sample(2, "", "", score=-12.5e-3, nested=[[1, [2, {}]], None, True], bad=float("-inf")),
    sample(3, "x" * 200, "\ud83d\ude00 \u2028"),
]
ESCAPED = json.dumps(SAMPLES)  # pairs of \uXXXX


@pytest.fixture
def tokenizer(bundled_chat):
    return QWenTokenizer(str(bundled_chat / "qwen.tiktoken"))


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "data.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def as_lines(samples, newline="\n", **options):
    return newline.join(json.dumps(sample, ensure_ascii=False, **options) for sample in samples)


TEXTS = json.loads(ESCAPED)  # with the surrogate pair as one character
FORMATS = {
    "list": json.dumps(TEXTS, ensure_ascii=False),
    "escaped": ESCAPED,
    "indented": json.dumps(TEXTS, ensure_ascii=False, indent=4),
    "blank": " \n\t" * 20 + "[" + ("\r\n" * 20 + ",").join(map(json.dumps, TEXTS)) + "\n" * 40 + "]" + " \n" * 20,
    "lines": as_lines(TEXTS),
    "lines with final newline": as_lines(TEXTS) + "\n",
    "Windows lines": as_lines(TEXTS, "\r\n") + "\r\n",
    "lines and blank lines": "\n\n" + as_lines(TEXTS, "\n\n \n") + "\n\n",
    "multi-line values": as_lines(TEXTS, indent=2),
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["", "BOM"])
def test_formats(text, mark, write, monkeypatch):
    path = write(mark + text.encode())
    for chunk in (*range(1, 20), 61, 1 << 18):  # every possible chunk border
        monkeypatch.setattr(conversation_file, "_CHUNK", chunk)
        samples = ConversationFile(path)
        assert list(samples) == TEXTS, chunk


def test_is_a_sequence(write):
    samples = ConversationFile(str(write(FORMATS["list"])))
    assert len(samples) == 4
    assert samples[-1] == TEXTS[-1]
    assert samples[torch.tensor(2)] == TEXTS[2]
    assert samples[1:3] == TEXTS[1:3]
    assert samples[::-1] == TEXTS[::-1]
    assert TEXTS[1] in samples
    for index in (4, -5):
        with pytest.raises(IndexError):
            samples[index]
    with pytest.raises(TypeError):
        samples["0"]


GOOD = json.dumps(sample(0))
BROKEN = {
    "empty": ("", "is empty"),
    "blank": (" \n\n", "is empty"),
    "only a byte order mark": (codecs.BOM_UTF8, "is empty"),
    "empty list": ("[ \n]", "empty list"),
    "an object": (json.dumps({"data": [sample(0)]}), "under 'data': write only that list"),
    "a string": ('"x"', r"line 1, column 1: this is not JSON.*here: '\"x\"'"),
    "csv": ("id,text\n1,x\n", "line 1, column 1: this is not JSON"),
    "cut in a sample": (
        f"[{GOOD},\n{GOOD[:-20]}",
        r"line 2, .*ends within a sample, it was cut off",
    ),
    "cut in a string": (f"[{GOOD},\n{GOOD[:-4]}", r"line 2, column 103: .*\(Unterminated string\) .here: '\"a"),
    "cut after a sample": (f"[{GOOD},\n{GOOD}\n", "line 3, column 1: the file ends before the list does"),
    "cut after a comma": (f"[{GOOD},", r"ends within a sample, it was cut off.*\(Expecting value\)"),
    "cut line": (f"{GOOD}\n{GOOD[:-9]}", "line 2.*Unterminated string"),
    "cut line in between": (f"{GOOD}\n{GOOD[:-9]}\n{GOOD}\n", r"line 2, .*control character\).*begins on line 2"),
    "line without an end": (f"{GOOD}\n{GOOD[:-1]}\n{GOOD}\n", r"line 3, column 1: .*',' delimiter.*begins on line 2"),
    "comma before the end": (f"[{GOOD},\n]", 'line 2, column 1: there is a "," before the end'),
    "two commas": (f"[{GOOD},\n,{GOOD}]", "line 2, column 1: .*Expecting value"),
    "no comma": (f"[{GOOD}\n{GOOD}]", 'line 2, column 1: "," or "]" should follow'),
    "two lists": (f"[{GOOD}]\n[{GOOD}]", r"line 2, column 1: text follows the end of the list.*here: '\[\{"),
    "one bracket too many": (f"[{GOOD}]]", "text follows the end"),
    "lines with commas": (f"{GOOD},\n{GOOD}", "line 1, column .*this is not a sample: JSON Lines"),
    "lines of other things": (f"{GOOD}\n17\n", "line 2, column 1: this is not a sample.*here: '17"),
    "no quotes": (
        '[{"id": "0", conversations: []}]',
        r"line 1, column 14: .*Expecting property name.*'conversations: ",
    ),
    "Latin-1": ('[{"id": "é"}]'.encode("latin-1"), "line 1, column 10: the byte 0xe9 is not UTF-8"),
    "cut in a character": (GOOD.encode() + "\n😀".encode()[:3], "line 2, column 1: the byte 0xf0 is not UTF-8"),
    "UTF-16": (f"[{GOOD}]".encode("utf-16"), "UTF-16 or binary"),
    "UTF-16 without a mark": (f"[{GOOD}]".encode("utf-16-le"), "UTF-16 or binary"),
    "UTF-32": (f"[{GOOD}]".encode("utf-32"), "UTF-16 or binary"),
    "gzip": (b"\x1f\x8b\x08\x08" + bytes(range(256)), "0x8b is not UTF-8.*unpack"),
    "binary": (b"PAR1\x15\x04" + b"\xff" * 100, "line 1, column 7: the byte 0xff is not UTF-8"),
    "zeros at the end": (f"[{GOOD}]".encode() + bytes(100), "text follows the end"),
    "deeply nested": (f"[{GOOD},\n" + "[" * 100_000, "line 2, column 1: .*nested too deeply"),
    "missing colon": ('[{"id" "0"}]', r"line 1, column 8: this is not JSON \(Expecting ':' delimiter\) .here: '\"0"),
    "a huge number": (f'[{{"id": {"9" * 5000}}}]', "line 1, column 2: .*digits"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("chunk", [1, 64, 1 << 18])
def test_broken_files(content, message, chunk, write, monkeypatch):
    monkeypatch.setattr(conversation_file, "_CHUNK", chunk)
    path = write(content)
    with pytest.raises(DataFileError, match=message) as error:
        ConversationFile(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[17]", 'line 1: Sample 0 must be .*"conversations".* not 17'),
        ("[NaN]", "Sample 0 must be .* not nan"),
        (f"[[{GOOD}]]", r"Sample 0 must be .* not \[\{"),
        (f"[{GOOD},\n{GOOD},\n\nnull]", "line 4: Sample 2 must be .* not None"),
        (f'{GOOD}\n{{"messages": []}}', r"line 2: Sample 1 must be .* not \{'messages'"),
        (f"{GOOD}\r\n\r\n" + GOOD.replace("user", "human"), "line 3: Sample 'identity_0': .*not 'human'"),
        (GOOD.replace('"q"', "NaN"), r"line 1: Sample 'identity_0': conversations\[0\]\[\"value\"\] .* not nan"),
        (json.dumps([{"data": []}]), "line 1: Sample 0 must be"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_malformed_samples_are_reported_with_their_line(content, message, chunk, write, monkeypatch):
    monkeypatch.setattr(conversation_file, "_CHUNK", chunk)
    path = write(content)
    with pytest.raises(MalformedSample, match=message) as error:
        ConversationFile(path)
    assert str(path) in str(error.value)


def test_columns_count_characters(write, monkeypatch):
    monkeypatch.setattr(conversation_file, "_CHUNK", 7)
    path = write(codecs.BOM_UTF8 + f"[\n{json.dumps('你好' * 50, ensure_ascii=False)} 😀".encode())
    with pytest.raises(DataFileError, match="line 2, column 104"):
        list(conversation_file._JsonReader(path.open("rb"), path))


def test_paths_that_are_not_files(tmp_path):
    with pytest.raises(DataFileError, match=r"nothing.json does not exist"):
        ConversationFile(tmp_path / "nothing.json")
    with pytest.raises(DataFileError, match="is a folder"):
        ConversationFile(tmp_path)
    with pytest.raises(DataFileError, match="cannot be read: File name too long"):
        ConversationFile(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataFileError, match="not a regular file"):
        ConversationFile(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission(write):
    path = write(f"[{GOOD}]")
    path.chmod(0)
    with pytest.raises(DataFileError, match="cannot be read: Permission denied"):
        ConversationFile(path)


def test_changed_files_are_detected(write):
    path = write(f"[{GOOD}]")
    samples = ConversationFile(path)
    assert samples[0] == sample(0)
    status = path.stat()
    write(f" [{GOOD}]")  # another size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataFileError, match="has changed"):
        samples[0]
    write(f"[{GOOD}]")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert samples[0] == sample(0)
    write(f"[{GOOD}]".replace("q", "r"))  # the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(DataFileError, match="has changed"):
        samples[0]
    write("x" * status.st_size)  # same size and time
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataFileError, match="has changed"):
        samples[0]
    path.unlink()
    with pytest.raises(DataFileError, match="does not exist"):
        samples[0]


def test_change_during_indexing(write, monkeypatch):
    monkeypatch.setattr(conversation_file, "_CHUNK", 64)
    path = write(as_lines([sample(i) for i in range(50)]))

    def append(checked, index):
        if index == 3:
            with path.open("a") as file:
                file.write("\n" + GOOD)

    monkeypatch.setattr(conversation_file, "check_sample", append)
    with pytest.raises(DataFileError, match="has changed"):
        ConversationFile(path)


def test_pickled_file_reads_elsewhere(write, monkeypatch, tmp_path):
    path = write(FORMATS["list"])
    monkeypatch.chdir(tmp_path)
    samples = ConversationFile(path.name)
    data = pickle.dumps(samples)
    monkeypatch.chdir("/")
    assert list(pickle.loads(data)) == TEXTS
    assert list(samples) == TEXTS


OPEN_LARGE_FILES = """
import sys
from qwen.data.conversation_file import ConversationFile

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # reset the peak
    before = peak()
    samples = ConversationFile(path)
    for index in range(0, len(samples), 1001):
        assert samples[index]["id"] == str(index % 1000), index
    print(len(samples), peak() - before)
"""


@pytest.mark.process
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
def test_large_files_are_streamed(tmp_path):
    samples = [sample(0, "Why? " * 50, "Because. 你好 " * 50) | {"id": str(number)} for number in range(1000)]
    blocks = 45
    paths = []
    for opening, separator, closing in (("[", ",\n", "]"), ("", "\n", "")):
        block = separator.join(json.dumps(one, ensure_ascii=False) for one in samples).encode()
        paths.append(tmp_path / f"large{len(paths)}")
        with paths[-1].open("wb") as file:
            file.write(opening.encode())
            for _ in range(blocks - 1):
                file.write(block + separator.encode())
            file.write(block + closing.encode())
    assert all(path.stat().st_size > 40e6 for path in paths)
    command = [sys.executable, "-c", OPEN_LARGE_FILES, *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for path in paths:
        path.unlink()  # pytest does not delete the folder
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines()[-2:]:
        count, growth = map(int, line.split())
        assert count == 1000 * blocks
        assert growth < 16 * count + 10e6, "more memory than the index and a few windows"


def test_one_enormous_sample(write, monkeypatch):
    reads = []
    read_more = conversation_file._JsonReader._read_more
    monkeypatch.setattr(
        conversation_file._JsonReader, "_read_more", lambda reader: reads.append(1) or read_more(reader)
    )
    enormous = sample(0, "你好 " * 2_000_000, 'a "quoted" word ' * 500_000)  # 22 MB, 90 chunks
    path = write(json.dumps([sample(1), enormous, sample(2)], ensure_ascii=False))
    samples = ConversationFile(path)
    assert samples[1] == enormous
    assert samples[2] == sample(2)
    assert len(reads) < 20  # each read parses the text again from the start


@pytest.mark.parametrize("progress", [False, True])
def test_progress(progress, write, tokenizer, monkeypatch, capsys):
    for module in (conversation_file, datasets):
        monkeypatch.setattr(module, "PROGRESS_DELAY", 0)
    samples = ConversationFile(write(FORMATS["list"]), progress=progress)
    SupervisedDataset(samples, tokenizer, 64, progress=progress)
    assert SupervisedDataset(samples, tokenizer, 64, lazy=True, progress=progress).lengths
    shown = capsys.readouterr()
    assert shown.out == ""
    for title in ("Reading data.json: 100%", "Encoding: 100%", "Counting tokens: 100%"):
        assert (title in shown.err) == progress


# ---- datasets ----


@pytest.fixture
def samples(write):
    return ConversationFile(write(as_lines(sample(i, "q " * (i % 7), "a " * (i % 13)) for i in range(40))))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("system", [{}, {"system_message": "be brief"}])
def test_dataset_items(lazy, system, samples, tokenizer):
    for data in (samples, list(samples), [*SAMPLES[:2], *samples[:3]]):
        dataset = SupervisedDataset(data, tokenizer, 32, **system, lazy=lazy)
        expected = [encode_sample(one, tokenizer, 32, *system.values()) for one in data]
        assert [dataset[i] for i in range(len(dataset))] == expected
        assert list(dataset) == expected  # by indexing until IndexError
        assert dataset[-1] == expected[-1]
        assert dataset[torch.tensor(1)] == expected[1]
        assert list(dataset.lengths) == [len(one["input_ids"]) for one in expected]
        assert max(dataset.lengths) == 32 > min(dataset.lengths)
        with pytest.raises(IndexError):
            dataset[-len(expected) - 1]


def test_dataset_arguments(tokenizer):
    for lazy in (False, True):
        with pytest.raises(ValueError, match="no samples"):
            SupervisedDataset([], tokenizer, 32, lazy=lazy)
        with pytest.raises(ValueError, match="max_length is 0"):
            SupervisedDataset([sample(0)], tokenizer, 0, lazy=lazy)
    with pytest.raises(MalformedSample, match="Sample 1 must be"):
        SupervisedDataset([sample(0), {}], tokenizer, 32)
    with pytest.raises(MalformedSample, match="Sample 1 must be"):
        SupervisedDataset([sample(0), {}], tokenizer, 32, lazy=True)[1]


def test_lazy_keeps_no_samples(samples, tokenizer):
    eager, lazy = (SupervisedDataset(samples, tokenizer, 512, lazy=lazy) for lazy in (False, True))
    without = pickle.dumps(tokenizer)
    assert len(pickle.dumps(lazy)) - len(without) < 40 * 16 + 1000
    tokens = sum(eager.lengths)
    assert len(pickle.dumps(eager)) - len(without) < 40 * 28 + 8 * tokens + 1000


@pytest.fixture(params=[False, True], ids=["padded", "packed"])
def loader(request, samples, tokenizer) -> dict:
    """Arguments of a DataLoader."""
    dataset = SupervisedDataset(samples, tokenizer, 64, lazy=True)
    if request.param:
        dataset = PackedDataset(dataset, 64)
    return {"dataset": dataset, "batch_size": 3, "collate_fn": Collator(tokenizer.eod_id)}


def batches(loader: dict, **arguments) -> list[dict[str, list]]:
    """The batches of a DataLoader as lists."""
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in DataLoader(**loader, **arguments)]


@pytest.mark.process
def test_loader_workers(loader):
    alone = batches(loader)
    assert len(alone) == -(-len(loader["dataset"]) // 3)
    assert batches(loader, num_workers=2, multiprocessing_context="fork") == alone


@pytest.mark.process
def test_a_loader_is_pickled(loader, tmp_path):
    """As for workers that are spawned: everything is sent to a process that has none of it."""
    assert Child(tmp_path, batches, loader).result() == batches(loader)


# ---- packing ----


@pytest.mark.parametrize("lazy", [False, True])
def test_rows_hold_every_sample_once(lazy, samples, tokenizer):
    dataset = SupervisedDataset(samples, tokenizer, 50, lazy=lazy)
    rows = PackedDataset(dataset, 64)
    assert len(rows) < len(dataset)
    held = [one for row in rows for one in row]
    assert sorted(map(str, held)) == sorted(map(str, dataset))
    assert all(sum(len(one["input_ids"]) for one in row) <= 64 for row in rows)
    assert [rows[i - len(rows)] for i in range(len(rows))] == [*rows]
    assert [*rows] == [*PackedDataset(dataset, 64)]
    with pytest.raises(IndexError):
        rows[len(rows)]
    with pytest.raises(ValueError, match=r"50 tokens, .* row of 49: encode samples with max_length=49"):
        PackedDataset(dataset, 49)


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([1], 1, [0]),
        ([4, 4, 4], 4, [0, 1, 2]),
        ([2, 3, 5, 5, 3, 2], 10, [1, 1, 0, 0, 1, 1]),
        # 7 and 6 open rows; 3 fits row 0 best although row 1 has more space, 4 fits only row 1
        ([3, 6, 4, 7], 10, [0, 1, 1, 0]),
    ],
)
def test_best_fit_decreasing(lengths, capacity, rows):
    assert list(best_fit_decreasing(lengths, capacity)) == rows


def test_best_fit_equals_a_linear_search():
    generator = torch.Generator().manual_seed(0)
    for capacity in (8, 50, 1000):
        lengths = torch.randint(1, capacity + 1, (400,), generator=generator).tolist()
        spaces, used = [], []
        for length in sorted(lengths, reverse=True):
            fitting = [space for space in spaces if space >= length]
            if fitting:
                spaces.remove(min(fitting))
            spaces.append((min(fitting) if fitting else capacity) - length)
        filled = torch.zeros(len(spaces), dtype=torch.int64)
        filled.index_add_(0, torch.tensor(best_fit_decreasing(lengths, capacity)), torch.tensor(lengths))
        used = sorted(capacity - space for space in spaces)
        assert sorted(filled.tolist()) == used


def test_many_samples_are_packed_quickly():
    lengths = array("i", torch.randint(1, 2049, (300_000,), generator=torch.Generator().manual_seed(0)).tolist())
    began = time.process_time()
    rows = best_fit_decreasing(lengths, 2048)
    assert time.process_time() - began < 10  # a quadratic search takes hours
    assert sum(lengths) / (2048 * (max(rows) + 1)) > 0.99


def test_collator(samples, tokenizer):
    dataset = SupervisedDataset(samples, tokenizer, 64)
    collator = pickle.loads(pickle.dumps(Collator(tokenizer.eod_id)))
    items = [dataset[i] for i in (0, 5, 9)]
    padded, packed = collator(items), collator([items[:2], items[2:]])
    for batch, expected in ((padded, pad_samples(items, tokenizer.eod_id)), (packed, pack_samples(items))):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)
    width = max(len(one["input_ids"]) for one in items)
    assert padded["input_ids"].shape == (3, width)
    first = len(items[0]["input_ids"])
    assert padded["labels"][0, first:].eq(IGNORE_INDEX).all()
    assert padded["input_ids"][0, first:].eq(tokenizer.eod_id).all()
    assert packed["input_ids"].shape == (1, sum(len(one["input_ids"]) for one in items))


def test_what_training_skips_is_named(tmp_path):
    """A conversation may begin with the assistant, whose first turn is not learned, and may have no reply to learn."""
    said = {"user": {"from": "user", "value": "q"}, "assistant": {"from": "assistant", "value": "a"}}
    order = ["user assistant", "assistant user assistant", "user", "assistant user", "assistant user assistant"]
    samples = [{"id": str(i), "conversations": [said[role] for role in roles.split()]} for i, roles in enumerate(order)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    begins, no_reply = ConversationFile(path).notes
    assert begins.startswith("3 of 5 samples begin with an assistant's turn, which is skipped")
    assert begins.endswith(f"The first: {path}, line 2.")
    assert no_reply.startswith("2 of 5 samples have no assistant's turn to learn")
    assert no_reply.endswith(f"The first: {path}, line 3.")
    path.write_text(json.dumps(samples[0]))
    assert ConversationFile(path).notes == []
