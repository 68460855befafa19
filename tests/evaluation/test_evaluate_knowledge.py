"""Base-model benchmarks (MMLU, C-Eval, CMMLU, GSM8K): files, prompts, averages, and the answers of the model.

tests/evaluation/test_against_lm_eval.py compares them with another implementation.
"""

import importlib.util
import json
import random
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen.checkpoint.loading import load_model
from qwen.evaluation import harness
from qwen.evaluation.benchmarks import ceval as evaluate_ceval
from qwen.evaluation.benchmarks import cmmlu as evaluate_cmmlu
from qwen.evaluation.benchmarks import gsm8k as evaluate_gsm8k
from qwen.evaluation.benchmarks import mmlu as evaluate_mmlu
from qwen.evaluation.data_files import DataError
from qwen.evaluation.subjects import CEVAL, CMMLU, LETTERS, MMLU, SubjectSet, average_scores, read_subjects
from tests.support.evaluation_runs import read_records, read_scores, run_script, write_csv

TASKS = {
    "mmlu": evaluate_mmlu.EvaluateMMLU,
    "ceval": evaluate_ceval.EvaluateCEval,
    "cmmlu": evaluate_cmmlu.EvaluateCMMLU,
    "gsm8k": evaluate_gsm8k.EvaluateGSM8K,
}
CHOICE = {"mmlu": ("test", ["anatomy", "virology"]), "ceval": ("val", ["law", "logic"]), "cmmlu": ("test", ["arts"])}
HEADERS = {
    "mmlu": None,
    "ceval": ["id", "question", *LETTERS, "answer", "explanation"],
    "cmmlu": ["", "Question", *LETTERS, "Answer"],
}
AWKWARD = ('Which is "right",\n1, 2 or 3?', "1,5", '"two"', "三", "")


@pytest.fixture(scope="module")
def loaded(bundled_base: Path) -> tuple[Any, Any]:
    return load_model(bundled_base, cpu_only=True)


@pytest.fixture
def run(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a benchmark in this process, with results in tmp_path/out.jsonl; returns the exit status."""
    monkeypatch.setattr(harness, "load_model_quietly", lambda *_, **__: loaded)

    return lambda name, *arguments: run_script(TASKS[name], tmp_path / "out.jsonl", *arguments)


def file_of(folder: Path, benchmark: str, split: str, subject: str) -> Path:
    return folder / TASKS[benchmark].subject_set.files.format(split=split, subject=subject)


def write_subject(folder: Path, benchmark: str, split: str, subject: str, count: int) -> None:
    rng = random.Random(f"{subject} {split}")
    rows = []
    for number in range(count):
        row = [f"{subject} {number}?", *(f"{rng.randint(10, 99)}" for _ in LETTERS), rng.choice(LETTERS)]
        rows.append(row if benchmark == "mmlu" else [str(number), *row])
    if header := HEADERS[benchmark]:
        rows = [header, *([*row, ""] if "explanation" in header else row for row in rows)]
    write_csv(file_of(folder, benchmark, split, subject), rows)


def write_folder(folder: Path, benchmark: str, counts: dict[str, int]) -> list[str]:
    """Write subjects with the given numbers of questions; returns the arguments for them."""
    for subject, count in counts.items():
        write_subject(folder, benchmark, "dev", subject, 5)
        write_subject(folder, benchmark, CHOICE[benchmark][0], subject, count)
    return ["-d", str(folder), "--subjects", ",".join(counts)]


def write_gsm8k(folder: Path, count: int = 12, **splits: list[dict]) -> Path:
    samples = [
        {"question": f"Add {n} and 1.", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\nSo it is.\n#### {n + 1}"}
        for n in range(count)
    ]
    for split, members in ({"train": samples[3:], "test": samples[:3]} | splits).items():
        lines = [json.dumps(sample) for sample in members]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "test.jsonl"


# Subjects


@pytest.mark.parametrize(
    ("benchmark", "name", "sizes"),
    [
        (MMLU, "mmlu/default", (18, 13, 12, 14)),
        (CEVAL, "ceval", (20, 10, 11, 11, 8)),
        (CMMLU, "cmmlu", (17, 13, 22, 15, 15)),
    ],
    ids=lambda value: getattr(value, "title", None),
)
def test_subjects_match_lm_eval_and_groups_have_the_published_sizes(
    benchmark: SubjectSet, name: str, sizes: tuple[int, ...]
) -> None:
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks" / name
    prefix = {MMLU.title: "mmlu_", CEVAL.title: "ceval-valid_", CMMLU.title: "cmmlu_"}[benchmark.title]
    theirs = sorted(file.stem.removeprefix(prefix) for file in folder.glob(f"{prefix}*.yaml"))
    assert benchmark.subjects == theirs
    assert tuple(map(len, benchmark.groups.values())) == sizes
    ordinary = [subject for group in list(benchmark.groups.values())[:4] for subject in group]
    assert len(ordinary) == len({*ordinary}) == len(benchmark.subjects)
    assert all(list(group) == sorted({*group}) for group in benchmark.groups.values())


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [
        # 4 of 7 questions; the subjects 1/4, 1, 1
        (MMLU, {"MMLU": 4 / 7, "STEM": 2 / 5, "humanities": 1.0}),
        (CEVAL, {"C-Eval": 9 / 12, "STEM": 5 / 8, "humanities": 1.0, "hard": 5 / 8}),
        (CMMLU, {"CMMLU": 9 / 12, "humanities": 1.0, "social sciences": 5 / 8, "China specific": 5 / 8}),
    ],
    ids=["MMLU", "C-Eval", "CMMLU"],
)
def test_average_scores(benchmark: SubjectSet, expected: dict[str, float]) -> None:
    subjects = {
        "MMLU": ("college_physics", "machine_learning", "philosophy"),
        "C-Eval": ("college_physics", "college_chemistry", "logic"),
        "CMMLU": ("modern_chinese", "ethnology", "philosophy"),
    }[benchmark.title]
    right = {subjects[0]: [True, False, False, False], subjects[1]: [True], subjects[2]: [True, True]}
    records = [{"group": subject, "correct": one} for subject, all_of_it in right.items() for one in all_of_it]
    scores = {score.name: score for score in average_scores(records, benchmark)}
    assert {name: scores[name].value for name in scores if name not in subjects} == pytest.approx(expected)
    assert scores[benchmark.title].count == 7
    assert scores[subjects[0]].value == 1 / 4


# Files


@pytest.mark.parametrize("benchmark", ["mmlu", "ceval", "cmmlu"])
def test_awkward_csv(benchmark: str, tmp_path: Path) -> None:
    subjects = TASKS[benchmark].subject_set
    header = HEADERS[benchmark]
    row = [*AWKWARD, "D"] if header is None else ["7", *AWKWARD, "D", *header[7:]]
    subject = subjects.subjects[0]
    write_csv(file_of(tmp_path, benchmark, "dev", subject), [*([header] if header else []), row], "utf-8-sig")
    (question,) = read_subjects(tmp_path, "dev", subjects, [subject])[subject]
    identity = {"id": "7"} if benchmark == "ceval" else {}
    assert question == dict(zip(("question", *LETTERS), AWKWARD, strict=True)) | {"answer": "D"} | identity


def test_prompts(tmp_path: Path) -> None:
    def only_case(name: str, subject: str, row: list[str], header: list[str] | None) -> tuple[str, Any]:
        for split in ("dev", CHOICE[name][0]):
            rows = [row] * (5 if split == "dev" else 1)
            write_csv(file_of(tmp_path / name, name, split, subject), [*([header] if header else []), *rows])
        arguments = Namespace(eval_data_path=tmp_path / name, subjects=[subject], split="val")
        (case,) = TASKS[name](arguments).cases()
        return case.text(dropped=3), case.gold

    question = "Question: Why?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    about = "The following are multiple choice questions (with answers) about high school us history.\n\n"
    assert only_case("mmlu", "high_school_us_history", ["Why?", *"abcd", "B"], None) == (
        about + f"{question} B\n\n" * 2 + question,
        "B",
    )
    question = "问题：为什么？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案："
    row = ["0", "为什么？", *"甲乙丙丁", "C"]
    assert only_case("ceval", "logic", [*row, "因为"], HEADERS["ceval"]) == (f"{question}C\n\n" * 2 + question, "C")
    assert only_case("cmmlu", "arts", row, HEADERS["cmmlu"]) == (f"{question}C\n\n" * 2 + question, "C")


def test_prompt_of_word_problems(tmp_path: Path) -> None:
    arguments = Namespace(sample_input_file=write_gsm8k(tmp_path), seed=1234)
    task = TASKS["gsm8k"](arguments)
    case = task.cases()[2]
    numbers = [index + 3 for index in task.shot_indices]
    assert len({*numbers}) == 8
    assert {*numbers} <= {*range(3, 12)}
    assert case.text() == "".join(
        f"Question: Add {n} and 1.\nLet's think step by step\n{n} + 1 = {n + 1}\nSo it is.\nThe answer is {n + 1}\n\n"
        for n in numbers
    ) + ("Question: Add 2 and 1.\nLet's think step by step\n")
    assert case.gold == "3"
    again, other = (TASKS["gsm8k"](Namespace(sample_input_file=tmp_path, seed=seed)) for seed in (1234, 5))
    assert again.cases()[2] == case
    assert other.cases()[2].shots != case.shots


def test_word_problems_saved_by_datasets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    file = write_gsm8k(tmp_path)
    cases = TASKS["gsm8k"](Namespace(sample_input_file=file, seed=1)).cases()
    splits = {
        split: Dataset.from_list([json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()])
        for split in ("train", "test")
    }
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert TASKS["gsm8k"](Namespace(sample_input_file=tmp_path / "saved", seed=1)).cases() == cases
    with pytest.raises(DataError, match=r"saved/test is one split .* dataset_dict\.json"):
        TASKS["gsm8k"](Namespace(sample_input_file=tmp_path / "saved" / "test", seed=1)).cases()
    DatasetDict({"test": splits["test"]}).save_to_disk(tmp_path / "half")
    with pytest.raises(DataError, match=r"half has no split 'train', only 'test'"):
        TASKS["gsm8k"](Namespace(sample_input_file=tmp_path / "half", seed=1)).cases()


@pytest.mark.parametrize(
    ("completion", "number", "correct"),
    [
        ("12 + 6 = 18.\nThe answer is 1,018.0", "1018", True),
        ("The answer is 1018 or 17", "17", False),
        ("I do not know.", None, False),
    ],
)
def test_scores_of_word_problems(completion: str, number: str | None, correct: bool) -> None:
    task = TASKS["gsm8k"](Namespace())
    case = Namespace(gold="1018")
    assert task.score(case, {"completion": completion}) == {"number": number, "correct": correct}


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("mmlu", lambda file: file.unlink(), r"anatomy_test\.csv does not exist"),
        ("mmlu", lambda file: file.write_text(""), r"anatomy_test\.csv has no rows"),
        (
            "mmlu",
            lambda file: file.write_text("Why?,a,b,c,d,B\nWhy?,a,b,c,d\n"),
            r"anatomy_test\.csv, line 2: 5 columns",
        ),
        (
            "mmlu",
            lambda file: file.write_text('"Why\n?",a,b,c,d,B\nWhy?,a,b,c,d,E\n'),
            r"line 3: answer is 'E'.*A, B, C, D",
        ),
        ("mmlu", lambda file: file.write_bytes(b"\xff\xfe\x00"), r"anatomy_test\.csv is not UTF-8"),
        (
            "ceval",
            lambda file: file.write_text("id,question,A,B,C,D\n0,Why?,a,b,c,d\n"),
            r"law_val\.csv.*no column 'answer'",
        ),
        ("cmmlu", lambda file: file.write_text(",Question,A,B,C,D,Answer\n"), r"arts\.csv has no rows"),
    ],
)
def test_broken_file(
    name: str, damage: Callable, message: str, tmp_path: Path, run: Callable, capsys: pytest.CaptureFixture
) -> None:
    split, subjects = CHOICE[name]
    arguments = write_folder(tmp_path / "data", name, dict.fromkeys(subjects, 2))
    damage(file_of(tmp_path / "data", name, split, subjects[0]))
    assert run(name, *arguments) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_and_unknown_subjects(tmp_path: Path, run: Callable, capsys: pytest.CaptureFixture) -> None:
    write_folder(tmp_path / "data", "mmlu", {"anatomy": 2, "virology": 2})
    write_subject(tmp_path / "data", "mmlu", "dev", "anatomy", 4)
    assert run("mmlu", "-d", tmp_path / "data") == 1
    assert "abstract_algebra_dev.csv does not exist (nor do 54 more of the 57" in capsys.readouterr().err
    assert run("mmlu", "-d", tmp_path / "data", "--subjects", "anatomy") == 1
    assert "anatomy_dev.csv has 4 questions: 5 worked examples are needed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("mmlu", "-d", tmp_path / "data", "--subjects", "virology,anatomie")
    assert "MMLU has no subject 'anatomie'; did you mean anatomy?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": [{"question": "Why?"}]}, "test.jsonl, line 1: no field 'answer'"),
        ({"test": [{"question": "Why?", "answer": "7"}]}, "test.jsonl, sample 0 of test: The answer does not end in"),
        ({"test": []}, "test.jsonl is empty"),
        ({"train": [{"question": "Why?", "answer": "#### 7"}] * 7}, "has 7 samples: 8 are needed"),
    ],
)
def test_broken_word_problems(
    splits: dict, message: str, tmp_path: Path, run: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert run("gsm8k", "-f", write_gsm8k(tmp_path, **splits)) == 1
    assert message in capsys.readouterr().err
    assert run("gsm8k", "-f", write_gsm8k(tmp_path).with_name("train.jsonl")) == 1
    assert "train.jsonl is the train split: pass the file of the test split" in capsys.readouterr().err
    assert run("gsm8k", "-f", tmp_path / "missing.jsonl") == 1
    assert "missing.jsonl does not exist" in capsys.readouterr().err


# The model


@pytest.mark.parametrize("name", ["mmlu", "cmmlu"])
def test_answer_is_the_most_probable_letter(name: str, loaded: tuple[Any, Any], tmp_path: Path, run: Callable) -> None:
    """Compared with one whole forward pass per question."""
    model, tokenizer = loaded
    _, subjects = CHOICE[name]
    counts = dict(zip(subjects, (7, 3), strict=False))
    arguments = write_folder(tmp_path / "data", name, counts)
    assert run(name, *arguments, "--batch-size", 3) == 0
    scores, records = read_scores(tmp_path / "out.jsonl"), read_records(tmp_path / "out.jsonl")
    task = TASKS[name](Namespace(eval_data_path=tmp_path / "data", subjects=subjects))
    tokens = [tokenizer.encode(choice)[0] for choice in (LETTERS if name == "cmmlu" else (" A", " B", " C", " D"))]
    assert len(records) == sum(counts.values())
    for case, record in zip(task.cases(), records, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer.encode(case.text())])).logits[0, -1]
        expected = logits.log_softmax(-1)[tokens]
        assert list(record["logprobs"].values()) == pytest.approx(expected.tolist(), abs=1e-4)
        assert record["letter"] == LETTERS[expected.argmax()]
        assert record["gold"] == case.gold
        assert record["correct"] == (record["letter"] == case.gold)
    for subject in counts:
        right = [record["correct"] for record in records if record["group"] == subject]
        assert scores[subject] == {"value": sum(right) / len(right), "count": counts[subject]}


def test_stopped_run_can_be_resumed(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*write_folder(tmp_path / "data", "mmlu", {"anatomy": 4, "virology": 4}), "--batch-size", "3"]
    assert run("mmlu", *arguments) == 0
    whole = (tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.md").read_bytes()

    answer, calls = TASKS["mmlu"].answer, []

    def stopped(task: Any, lm: Any, cases: Any) -> list[dict]:
        calls.append([case.name for case in cases])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(task, lm, cases)

    monkeypatch.setattr(TASKS["mmlu"], "answer", stopped)
    assert run("mmlu", *arguments, "--overwrite") == 130
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 4
    assert run("mmlu", *arguments) == 0
    assert calls[2:] == [["virology/0", "virology/1", "virology/2"]] * 2 + [["virology/3"]]
    assert ((tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.md").read_bytes()) == whole


def test_ceval_test_split_writes_a_submission(tmp_path: Path, run: Callable, capsys: pytest.CaptureFixture) -> None:
    arguments = write_folder(tmp_path / "data", "ceval", {"law": 1, "logic": 1})
    for subject in ("law", "logic"):
        rows = [["id", "question", *LETTERS], *([str(number), "为什么？", *"甲乙丙丁"] for number in (3, 4))]
        write_csv(file_of(tmp_path / "data", "ceval", "test", subject), rows)
    assert run("ceval", *arguments, "--split", "test") == 0
    scores, records = read_scores(tmp_path / "out.jsonl"), read_records(tmp_path / "out.jsonl")
    assert scores == {"C-Eval test, not scored here": {"value": None, "count": 4}}
    submission = tmp_path / "out_submission.json"
    assert str(submission) in capsys.readouterr().err
    letters = json.loads(submission.read_text(encoding="utf-8"))
    assert letters == {
        subject: {record["name"].split("/")[1]: record["letter"] for record in records if record["group"] == subject}
        for subject in ("law", "logic")
    }
    assert {*letters["law"]} == {"3", "4"}
    assert {*letters["law"].values()} <= {*LETTERS}


def test_batched_word_problems_equal_single_ones(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_gsm8k, "MAX_NEW_TOKENS", 12)
    file = write_gsm8k(tmp_path)
    outcomes = []
    for size in (1, 3):
        assert run("gsm8k", "-f", file, "--batch-size", size, "--overwrite") == 0
        outcomes.append((read_scores(tmp_path / "out.jsonl"), read_records(tmp_path / "out.jsonl")))
    assert outcomes[0] == outcomes[1]
    scores, records = outcomes[0]
    assert [record["name"] for record in records] == ["test/0", "test/1", "test/2"]
    assert all(len({*record["shots"]}) == 8 and record["completion"] for record in records)
    assert scores["gsm8k"]["count"] == 3
