"""The evaluation harness: data files, batches, resuming after a crash, and the prompts of a model."""

import argparse
import gzip
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from qwen.checkpoint.loading import load_model
from qwen.evaluation.benchmarks import long_context
from qwen.evaluation.data_files import DataError, read_csv, read_json, read_jsonl, require_files
from qwen.evaluation.language_model import LanguageModel, StopStringsCriteria, truncate_at_stop
from qwen.evaluation.task import Case, Score, Task
from qwen.evaluation.texts import read_texts
from tests.support.evaluation_runs import evaluate, read_records
from tests.support.processes import Script

SUMS = [(12, 30), (47, 38), (5, 6), (21, 13), (60, 19), (33, 44), (8, 90)]


class Sums(Task):
    """Additions for the bundled chat model, grouped by the parity of the first number."""

    name = "sums"
    chat = True
    broken_at: int | None = None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sums", type=int, default=len(SUMS))

    def cases(self):
        return [
            Case(f"{a}+{b}", f"What is {a} + {b}?", a + b, group="even" if a % 2 == 0 else "odd")
            for a, b in SUMS[: self.arguments.sums]
        ]

    def answer(self, lm, cases):
        if cases[0].name == self.broken_at:
            raise KeyboardInterrupt
        return [{"reply": reply} for reply in lm.chat(cases, max_new_tokens=20)]

    def score(self, case, answer):
        return {"correct": answer["reply"].endswith(f"= {case.gold}.")}


class Broken(Sums):
    broken_at = "60+19"


@pytest.fixture(scope="module")
def base(bundled_base):
    return load_model(bundled_base, cpu_only=True)


@pytest.fixture(scope="module")
def chat(bundled_chat):
    return load_model(bundled_chat, cpu_only=True)


@pytest.fixture
def loaded_once(monkeypatch, chat):
    monkeypatch.setattr("qwen.evaluation.harness.load_model_quietly", lambda *args, **kwargs: chat)


def test_a_run_writes_records_and_summary(tmp_path, capsys):
    out = tmp_path / "deep" / "out.jsonl"
    assert evaluate(Sums, ["-o", str(out), "--batch-size", "3", "--cpu-only"]) == 0
    found = read_records(out)
    assert [record["name"] for record in found] == [f"{a}+{b}" for a, b in SUMS]
    assert found[1] == {"name": "47+38", "group": "odd", "reply": "47 + 38 = 85.", "gold": 85, "correct": True}
    right = sum(record["correct"] for record in found)
    summary = json.loads(out.with_suffix(".json").read_text())
    assert summary["scores"]["sums"] == {"value": right / 7, "count": 7}
    assert summary["settings"]["checkpoint"].endswith("qwen-tiny-chat")
    assert summary["settings"]["seed"] == 1234
    table = out.with_suffix(".md").read_text()
    assert f"| sums | {100 * right / 7:.1f}% | 7 |" in table
    assert table in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.lock"))


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, capsys, loaded_once):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert evaluate(Sums, ["-o", str(whole), "--batch-size", "2"]) == 0
    assert evaluate(Broken, ["-o", str(broken), "--batch-size", "2"]) == 130
    assert "Run the same command to resume" in capsys.readouterr().err
    assert len(read_records(broken)) == 4
    with broken.open("a") as file:  # as after a crash in the middle of a batch and a line
        file.write(json.dumps({"name": "60+19", "group": "even", "reply": "?", "gold": 79, "correct": False}) + "\n")
        file.write('{"name": "33+4')
    assert evaluate(Sums, ["-o", str(broken), "--batch-size", "2"]) == 0
    assert "already has 4 of 7 answers: resuming" in capsys.readouterr().err
    for suffix in (".jsonl", ".json", ".md"):
        assert broken.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()


def test_finished_run_is_not_repeated(tmp_path, capsys, loaded_once, monkeypatch):
    out = tmp_path / "out.jsonl"
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 0
    before = capsys.readouterr().out
    monkeypatch.setattr("qwen.evaluation.harness.load_model_quietly", None)
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 0
    after = capsys.readouterr()
    assert after.out == before
    assert "use --overwrite to run again" in after.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "1"], "seed was 1234 and is 1 now"),
        (["--sums", "3"], "sums was 2 and is 3 now"),
        (["--max-seq-len", "99"], "max_seq_len was 2048 and is 99 now"),
    ],
)
def test_changed_settings_are_rejected(tmp_path, capsys, loaded_once, change, message):
    out = tmp_path / "out.jsonl"
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 0
    written = out.read_bytes()
    assert evaluate(Sums, ["-o", str(out), "--sums", "2", *change]) == 1
    assert message in capsys.readouterr().err
    assert out.read_bytes() == written
    assert evaluate(Sums, ["-o", str(out), "--sums", "2", *change, "--overwrite"]) == 0


def test_changed_weights_are_rejected(tmp_path, capsys, bundled_chat, loaded_once):
    folder, out = tmp_path / "model", tmp_path / "out.jsonl"
    folder.mkdir()
    for file in bundled_chat.iterdir():
        (folder / file.name).symlink_to(file)
    arguments = ["-c", str(folder), "-o", str(out), "--sums", "1"]
    assert evaluate(Sums, arguments) == 0
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes((bundled_chat / "model.safetensors").read_bytes())
    os.utime(folder / "model.safetensors", (2e9, 2e9))
    assert evaluate(Sums, arguments) == 1
    assert "written was" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ['{"name": "12+30"}\nnot JSON\n', '{"name": "another"}\n{"name": "x"}\n', "[]\n3\n"],
    ids=["broken", "of another", "of another kind"],
)
def test_file_of_another_run_is_left_alone(tmp_path, capsys, loaded_once, content):
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    evaluate(Sums, ["-o", str(tmp_path / "other.jsonl"), "--sums", "2"])
    out.with_suffix(".json").write_bytes((tmp_path / "other.json").read_bytes())
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 1
    assert "does not have the records of this run" in capsys.readouterr().err
    assert out.read_text() == content


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"name": "12+30"}',
        '{"a": 1}',
        "5",
        '{"name": null, "group": null, "gold": null}',
        "{}",
        '{"name": 1e400}',
        "\0",
    ],
    ids=["deep", "without its fields", "other", "number", "null", "empty", "infinite", "NUL"],
)
def test_damaged_records_are_refused(tmp_path, capsys, loaded_once, line):
    out = tmp_path / "out.jsonl"
    arguments = ["-o", str(out), "--sums", "2"]
    assert evaluate(Sums, arguments) == 0
    whole = out.read_text()
    out.write_text("".join([line + "\n", *whole.splitlines(keepends=True)[1:]]))
    capsys.readouterr()
    assert evaluate(Sums, arguments) == 1
    text = capsys.readouterr().err.strip()
    assert "does not have the records of this run: line 1 is" in text
    assert "\n" not in text


def test_records_that_lack_their_score_are_refused(tmp_path, capsys, loaded_once):
    out = tmp_path / "out.jsonl"
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    kept = [{name: record[name] for name in ("name", "group", "gold")} for record in records]
    out.write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 1
    assert "has damaged records (KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("settings", ["null", "[]", "5", "[" * 100_000 + "]" * 100_000])
def test_damaged_summaries_are_refused(tmp_path, capsys, loaded_once, settings):
    out = tmp_path / "out.jsonl"
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 0
    out.with_suffix(".json").write_text('{"settings": ' + settings + "}")
    assert evaluate(Sums, ["-o", str(out), "--sums", "2"]) == 1
    assert "does not have its settings" in capsys.readouterr().err


def test_two_runs_cannot_write_the_same_file(tmp_path, capsys, loaded_once):
    from filelock import FileLock

    out = tmp_path / "out.jsonl"
    with FileLock(f"{out}.lock"):
        assert evaluate(Sums, ["-o", str(out)]) == 1
    assert "is being written by another run" in capsys.readouterr().err
    assert not out.exists()


def test_run_can_be_resumed_with_a_smaller_batch(tmp_path, capsys, loaded_once):
    class Large(Sums):
        def answer(self, lm, cases):
            if cases[-1].name == "60+19":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
            return super().answer(lm, cases)

    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert evaluate(Large, ["-o", str(out), "--batch-size", "5"]) == 1
    assert "allocate 2.00 GiB.\nRun the same command with a smaller --batch-size" in capsys.readouterr().err
    assert evaluate(Sums, ["-o", str(out), "--batch-size", "2"]) == 0
    assert evaluate(Sums, ["-o", str(whole), "--batch-size", "2"]) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_options_appear_in_file_names_and_tables(tmp_path, capsys, loaded_once, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate(Sums, ["--limit", "1"]) == evaluate(Sums, ["--sums", "2", "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "With limit 1.\n" in out
    assert "With sums 2.\n" in out
    names = {path.name for path in Path("output_eval").glob("*.md")}
    assert names == {"sums_qwen-tiny-chat_limit-1.md", "sums_qwen-tiny-chat_sums-2.md"}
    assert evaluate(Sums, ["--cpu-only"]) == 0
    assert "With" not in capsys.readouterr().out
    assert Path("output_eval/sums_qwen-tiny-chat.md").is_file()


def test_table_reports_dropped_shots(tmp_path, capsys, loaded_once):
    class Shots(Sums):
        def cases(self):
            return [
                Case(case.name, case.prompt, case.gold, shots=("What is 1 + 1?\n1 + 1 = 2.\n\n",) * 3)
                for case in super().cases()
            ]

    assert evaluate(Shots, ["-o", str(tmp_path / "out.jsonl"), "--max-seq-len", "40", "--sums", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 worked examples were dropped from 2 of 2 prompts to fit into 40 tokens." in out
    assert (tmp_path / "out.md").read_text() in out


def test_nothing_is_written_without_a_model(tmp_path, capsys):
    assert evaluate(Sums, ["-c", str(tmp_path / "none"), "-o", str(tmp_path / "out.jsonl")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert evaluate(Sums, ["-o", str(tmp_path)]) == 1
    assert "is a folder: name a file in it" in capsys.readouterr().err


def test_duplicate_names_are_rejected(tmp_path, capsys):
    class Twice(Sums):
        def cases(self):
            return [*super().cases(), super().cases()[1]]

    assert evaluate(Twice, ["-o", str(tmp_path / "out.jsonl")]) == 1
    assert "2 questions named '47+38'" in capsys.readouterr().err


def test_limit_applies_to_each_group(tmp_path, loaded_once):
    out = tmp_path / "out.jsonl"
    assert evaluate(Sums, ["-o", str(out), "--limit", "2"]) == 0
    assert [record["name"] for record in read_records(out)] == ["12+30", "47+38", "5+6", "60+19"]


@pytest.mark.parametrize("option", [["--limit", "0"], ["--batch-size", "-1"], ["--max-seq-len", "x"]])
def test_invalid_numbers(option, capsys):
    with pytest.raises(SystemExit):
        evaluate(Sums, option)
    assert "must be a whole number of at least 1" in capsys.readouterr().err


def test_base_model_is_rejected_by_a_chat_benchmark(tmp_path, capsys, bundled_base):
    assert evaluate(Sums, ["-c", str(bundled_base), "-o", str(tmp_path / "out.jsonl")]) == 1
    assert "is not a chat model" in capsys.readouterr().err


@pytest.mark.process
def test_killed_process_can_be_resumed(tmp_path):
    """A real process: run the script, kill it with SIGKILL, run the same command again."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    arguments = ["--text", str(text), "--cpu-only", "--lengths", "64", "--tokens", "1024"]
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    process = Script("eval/long_context.py", *arguments, "-o", killed, files=(os.devnull,) * 3)
    deadline = time.monotonic() + 120
    while not (killed.exists() and killed.read_bytes().count(b"\n") > 4) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 < killed.read_bytes().count(b"\n") < 64, "killed too late"

    for out in (killed, whole):
        assert evaluate(long_context.LongContext, [*arguments, "-o", str(out)]) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert killed.with_suffix(".md").read_bytes() == whole.with_suffix(".md").read_bytes()
    assert killed.with_suffix(".png").stat().st_size > 1000


# Prompts and answers of a model.


def single_logprobs(model, tokenizer, text: str, choices) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(text)])).logits[0, -1]
    return logits.log_softmax(-1)[[tokenizer.encode(choice)[0] for choice in choices]].tolist()


SHOTS = tuple(f"Question: which {n}?\nA. x\nB. y\nC. z\nD. {n}\nAnswer: D\n\n" for n in range(3))


def question(n: int, **kwargs) -> Case:
    return Case(str(n), f"Question: is it {'very ' * n}late?\nA. yes\nB. no\nAnswer:", "A", **kwargs)


@pytest.mark.parametrize("trained", [2048, 100, 20], ids=["short", "some too long", "all too long"])
def test_batched_choices_equal_those_of_single_prompts(base, trained):
    model, tokenizer = base
    cases = [question(n, preamble="Choose.\n\n", shots=SHOTS) for n in (0, 5, 1, 9)]
    before, model.config.seq_length = model.config.seq_length, trained
    try:
        lm = LanguageModel(model, tokenizer, 2048)
        batched = lm.choice_logprobs(cases, [" A", " B"])
        single = [lm.choice_logprobs([case], [" A", " B"])[0] for case in cases]
        for case, *found in zip(cases, batched, single, strict=True):
            expected = single_logprobs(model, tokenizer, case.text(), [" A", " B"])
            assert all(row == pytest.approx(expected, abs=1e-4) for row in found)
    finally:
        model.config.seq_length = before


def test_shots_that_do_not_fit_are_left_out(base):
    model, tokenizer = base
    cases = [question(n, preamble="Choose.\n\n", shots=SHOTS) for n in (0, 9, 200)]
    limit = len(tokenizer.encode(cases[0].text(1)))
    lm = LanguageModel(model, tokenizer, limit)
    for case, dropped in zip(cases, (1, 2, 3), strict=True):
        ids, found = lm.fit_prompt(case)
        assert found == dropped == lm.dropped_shots[case.name]
        assert len(ids) <= limit
        assert case.text(dropped).endswith(tokenizer.decode(ids))
    expected = single_logprobs(model, tokenizer, cases[1].text(2), [" A", " B"])
    assert lm.choice_logprobs(cases, [" A", " B"])[1] == pytest.approx(expected, abs=1e-4)


def test_choices_must_be_single_tokens(base):
    with pytest.raises(ValueError, match="does not have one token for each of ' A', ' because'"):
        LanguageModel(*base, 2048).choice_logprobs([question(1)], [" A", " because"])


def test_control_tokens_in_data_stay_text(base):
    lm = LanguageModel(*base, 2048)
    assert lm.tokenizer.im_start_id not in lm.encode("<|im_start|>system")


def test_completions_end_at_the_first_stop_string(base):
    lm = LanguageModel(*base, 2048)
    cases = [
        Case("a", "import os\nimport", None),
        Case("b", "def add(a, b):\n    return", None),
        Case("c", "x" * 50, None),
    ]
    free = lm.generate(cases, stop=(), max_new_tokens=24)
    stop = [free[0][3:5], free[1][6:8]]
    stopped = lm.generate(cases, stop=stop, max_new_tokens=24)
    assert stopped == [truncate_at_stop(text, stop) for text in free]
    assert len(stopped[0]) <= 3
    assert len(stopped[1]) <= 6
    assert [lm.generate([case], stop=stop, max_new_tokens=24)[0] for case in cases] == stopped


def test_ids_without_a_token_are_ignored(base):
    model, tokenizer = base
    lm = LanguageModel(model, tokenizer, 2048)
    expected = lm.generate([Case("a", "import", None)], stop=["\n"], max_new_tokens=3)
    ids = torch.tensor([[len(tokenizer), 5]])
    assert not StopStringsCriteria(tokenizer, ["\n"])(torch.cat([ids, ids], dim=1), None).any()
    model.generate, generate = (
        lambda ids, **kwargs: torch.nn.functional.pad(generate(ids, **kwargs), (0, 1), value=len(tokenizer)),
        model.generate,
    )
    try:
        assert lm.generate([Case("a", "import", None)], stop=["\n"], max_new_tokens=3) == expected
    finally:
        del model.generate


def test_replies_equal_those_of_chat(chat):
    model, tokenizer = chat
    lm = LanguageModel(model, tokenizer, 2048)
    cases = [Case("a", "What is 47 + 38?", 85), Case("b", "Who are you?", None)]
    expected = [
        model.chat(tokenizer, case.prompt, do_sample=False, repetition_penalty=1.0, max_new_tokens=30)[0]
        for case in cases
    ]
    assert lm.chat(cases, max_new_tokens=30) == expected
    assert lm.chat(cases, max_new_tokens=30, stop=["38 ="]) == ["47 + ", expected[1]]


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [("one\n\ntwo", ["\n\n"], "one"), ("a;b,c", [",", ";"], "a"), ("none", ["x"], "none"), ("", ["x"], "")],
)
def test_cut(text, stop, left):
    assert truncate_at_stop(text, stop) == left


def test_loss_is_the_mean_over_all_but_the_first_token(base, monkeypatch):
    model, tokenizer = base
    ids = tokenizer.encode("import os\nimport sys\n\n\ndef main():\n    return 0\n")
    with torch.no_grad():
        expected = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    monkeypatch.setattr("qwen.evaluation.language_model.LOGITS_CHUNK", 7)
    assert LanguageModel(model, tokenizer, 2048).loss(ids) == pytest.approx(expected, rel=1e-5)


# Files.


def test_csv_written_by_spreadsheets(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeff问题,A\r\n"一, ""二""\n三",x\r\n\r\n'.encode())
    assert read_csv(path, ["问题", "A"], header=True) == [{"问题": '一, "二"\n三', "A": "x"}]
    assert read_csv(path, ["q", "A"], header=False)[0] == {"q": "问题", "A": "A"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"q,A\n", "has no rows"),
        (b"q,B\n1,2\n", "no column 'A', only 'q', 'B'"),
        (b"q,A\n1,2\n1,2,3\n", "line 3: 3 columns, but 2 are needed"),
        (b"q,A\n\xff\xfe,2\n", "is not UTF-8"),
        (b'q,A\n"1,2\n', "line 2: 1 columns, but 2 are needed"),
        (b"q,A\n" + b"x" * 200_000 + b",2\n", "line 2: not CSV"),
    ],
)
def test_invalid_csv(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_csv(path, ["q", "A"], header=True)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"a": 1}\n{"b": 1}\n', "line 2: no field 'a'. It has 'b'"),
        ('{"a": 1}\n\n[1]\n', "line 3: must be an object with a, not list"),
        ('{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("[" * 99999, "line 1: not JSON"),
    ],
)
def test_invalid_json_lines(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        read_jsonl(path, ["a"])
    assert str(path) in str(raised.value)


def test_compressed_json_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert read_jsonl(path, ["a"]) == [{"a": 1}, {"a": 2}]
    whole = gzip.compress(b'{"a": 1}\n' * 9999)
    for damaged in (whole[:50], whole[:15] + b"\xff" * 20 + whole[35:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            read_jsonl(path, ["a"])
    path.write_bytes(b'{"a": 1}\n')
    with pytest.raises(DataError, match="cannot be read"):
        read_jsonl(path, ["a"])


def test_missing_file_errors_list_what_exists(tmp_path):
    for name in ("b.csv", "a.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"c.csv does not exist.* contains a.csv, b.csv"):
        read_csv(tmp_path / "c.csv", ["x"], header=True)
    with pytest.raises(DataError, match=r"c.csv does not exist \(nor do 1 more of the 3"):
        require_files(tmp_path, ["a.csv", "c.csv", "d.csv"])
    with pytest.raises(DataError, match=r"deep/er.json does not exist. There is no folder .*/deep. eval/EVAL"):
        read_json(tmp_path / "deep" / "er.json")
    with pytest.raises(DataError, match=r"a.csv is a file, but a folder is needed"):
        read_json(tmp_path / "a.csv" / "er.json")
    with pytest.raises(DataError, match="is a folder, but a file is needed"):
        read_json(tmp_path)


def test_texts_of_files_and_folders(tmp_path):
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_texts([tmp_path, tmp_path / "a.txt"]) == "one\n\ntwo\n\none"
    with pytest.raises(DataError, match=r"c.bin cannot be read as UTF-8"):
        read_texts([tmp_path / "c.bin"])
    with pytest.raises(DataError, match=r"none.txt does not exist"):
        read_texts([tmp_path / "none.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There is no text in"):
        read_texts([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (Score("a", 0.5822, 10), "58.2%"),
        (Score("a", 0.839, 10, percent=False), "0.839"),
        (Score("a", float("nan"), 0), "–"),
    ],
)
def test_formatting_of_scores(score, shown):
    assert str(score) == shown
