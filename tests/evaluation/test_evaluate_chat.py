"""Chat benchmarks (MMLU, C-Eval, GSM8K, L-Eval): prompts, scores of replies, averages."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen.checkpoint.loading import load_model
from qwen.evaluation import harness
from qwen.evaluation.benchmarks import chat_ceval as evaluate_chat_ceval
from qwen.evaluation.benchmarks import chat_gsm8k as evaluate_chat_gsm8k
from qwen.evaluation.benchmarks import chat_mmlu as evaluate_chat_mmlu
from qwen.evaluation.benchmarks import leval as evaluate_leval
from qwen.evaluation.language_model import LanguageModel
from qwen.evaluation.task import Case
from qwen_cli.evaluate import add_arguments
from tests.support.evaluation_runs import results, run_script, write_csv, write_jsonl

TASKS = {
    "chat_mmlu": evaluate_chat_mmlu.EvaluateChatMMLU,
    "chat_ceval": evaluate_chat_ceval.EvaluateChatCEval,
    "chat_gsm8k": evaluate_chat_gsm8k.EvaluateChatGSM8K,
    "leval": evaluate_leval.EvaluateLEval,
}
SUMS = {"What is 47 + 38?": 85, "What is 12 + 30?": 42, "What is 2 + 2?": 5}  # the last one is wrong on purpose


@pytest.fixture(scope="module")
def loaded(bundled_chat: Path) -> tuple[Any, Any]:
    return load_model(bundled_chat, cpu_only=True)


@pytest.fixture
def run(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a benchmark in this process, with results in tmp_path/out.jsonl; returns the exit status."""
    monkeypatch.setattr(harness, "load_model_quietly", lambda *_, **__: loaded)

    return lambda name, *arguments: run_script(TASKS[name], tmp_path / "out.jsonl", *arguments)


def choice(folder: Path, name: str) -> list[str]:
    """Write two subjects with 3 and 1 sums that the model can do; returns the arguments for them."""
    subjects = {"chat_mmlu": ("anatomy", "virology"), "chat_ceval": ("college_physics", "law")}[name]
    for subject, count in zip(subjects, (3, 1), strict=True):
        for split in ("dev", "test" if name == "chat_mmlu" else "val"):
            rows = [[question, 0, gold, 1, 99, "B"] for question, gold in SUMS.items()]
            rows = (rows * 2)[: 5 if split == "dev" else count]
            if name == "chat_ceval":
                rows = [["id", "question", *"ABCD", "answer"], *([number, *row] for number, row in enumerate(rows))]
            write_csv(folder / split / f"{subject}_{split}.csv", rows)
    return ["-d", str(folder), "--subjects", ",".join(subjects)]


def make_cases(name: str, *arguments: str) -> list[Case]:
    """Return the cases of a benchmark."""
    parser = argparse.ArgumentParser()
    add_arguments(parser, TASKS[name])
    return TASKS[name](parser.parse_args(arguments)).cases()


# Multiple choice


def test_mmlu_prompt(tmp_path: Path):
    first, *_, last = make_cases("chat_mmlu", *choice(tmp_path, "chat_mmlu"))
    assert first.text() == (
        "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
        "answer to this question.\n\nWhat is 47 + 38?\nA. 0\nB. 85\nC. 1\nD. 99\n"
    )
    assert (first.name, first.gold, last.group) == ("anatomy/0", "B", "virology")


def test_ceval_prompt(tmp_path: Path):
    first, *_ = make_cases("chat_ceval", *choice(tmp_path, "chat_ceval"))
    assert first.text() == "What is 47 + 38?\n\nA. 0\nB. 85\nC. 1\nD. 99"
    few, *_ = make_cases("chat_ceval", *choice(tmp_path, "chat_ceval"), "--use-fewshot")
    assert len(few.shots) == 5
    assert few.text().startswith(f"{first.text()}\n答案：B\n\nWhat is 12 + 30?")
    assert few.text().endswith(f"\n\n{first.text()}")


@pytest.mark.parametrize("name", ["chat_mmlu", "chat_ceval"])
def test_choice_is_read_and_averaged(name: str, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def reply(self: LanguageModel, cases: list[Case], **_: object) -> list[str]:
        return ["The answer is B." if "47" in case.prompt else "答案是D" for case in cases]

    monkeypatch.setattr(LanguageModel, "chat", reply)
    assert run(name, *choice(tmp_path, name), "--batch-size", 2) == 0
    scores, records = results(tmp_path / "out.jsonl")
    assert [record["letter"] for record in records] == ["B", "D", "D", "B"]
    if name == "chat_mmlu":  # 2 of 4 questions
        assert scores["MMLU"] == 0.5
        assert scores["anatomy"] == pytest.approx(1 / 3)
        assert scores["virology"] == 1
    else:  # (1/3 + 1) / 2
        assert scores["C-Eval"] == pytest.approx(2 / 3)
        assert scores["hard"] == pytest.approx(1 / 3)


def test_choice_with_the_model(run, tmp_path: Path):
    """The toy was not trained on sums with four options; its reply is still recorded and scored."""
    assert run("chat_mmlu", *choice(tmp_path, "chat_mmlu"), "--limit", 1) == 0
    _, records = results(tmp_path / "out.jsonl")
    assert len(records) == 2
    assert all(record["reply"] for record in records)
    assert all(record["correct"] is (record["letter"] == record["gold"]) for record in records)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "test" / "virology_test.csv").unlink(), "virology_test.csv does not exist"),
        (lambda folder: write_csv(folder / "test" / "virology_test.csv", [["q", 1, 2, 3, 4, "E"]]), "line 1"),
        (lambda folder: write_csv(folder / "test" / "virology_test.csv", []), "virology_test.csv"),
        (lambda folder: write_csv(folder / "dev" / "virology_dev.csv", [["q", 1, 2, 3, 4, "A"]]), "5 worked examples"),
    ],
)
def test_choice_errors(spoil, message: str, run, tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = choice(tmp_path, "chat_mmlu")
    spoil(tmp_path)
    assert run("chat_mmlu", *arguments, "--use-fewshot") == 1
    assert message in capsys.readouterr().err


# GSM8K


def write_gsm8k(folder: Path) -> Path:
    train = [
        {"question": f"Add {n} and 1.", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(9)
    ]
    write_jsonl(folder / "train.jsonl", train)
    test = [{"question": question, "answer": f"One adds.\n#### {gold}"} for question, gold in SUMS.items()]
    return write_jsonl(folder / "test.jsonl", test)


def test_gsm8k_with_the_model(run, tmp_path: Path):
    assert run("chat_gsm8k", "-f", write_gsm8k(tmp_path), "--batch-size", 3) == 0
    scores, records = results(tmp_path / "out.jsonl")
    assert [record["number"] for record in records] == ["85", "42", "4"]
    assert scores["chat_gsm8k"] == pytest.approx(2 / 3)


def test_gsm8k_prompts(tmp_path: Path):
    path = str(write_gsm8k(tmp_path))
    assert [case.text() for case in make_cases("chat_gsm8k", "-f", path)] == list(SUMS)
    few = make_cases("chat_gsm8k", "-f", path, "--use-fewshot")[0]
    assert len({*few.shots}) == 8
    assert all("<<" not in shot for shot in few.shots)
    assert few.shots[0].startswith("Question: Add ")
    assert few.text().endswith("\n\nQuestion: What is 47 + 38?\nLet's think step by step\n")
    assert few.shots == make_cases("chat_gsm8k", "-f", path, "--use-fewshot")[1].shots
    assert few.shots != make_cases("chat_gsm8k", "-f", path, "--use-fewshot", "-s", "1")[0].shots


@pytest.mark.parametrize(
    ("reply", "gold", "correct"),
    [
        ("So it is 1,234.", "1234", True),
        ("It costs $0.33334.", "0.33333", True),
        ("0.334", "0.333", False),
        ("7 + 5 = 12, that is twelve.", "12", True),
        ("no number", "0", False),
        ("-5", "5", False),
    ],
)
def test_gsm8k_score(reply: str, gold: str, correct: bool):
    task = TASKS["chat_gsm8k"](argparse.Namespace())
    assert task.score(Case("x", "", gold), {"reply": reply})["correct"] is correct


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ([{"question": "?", "answer": "none"}], "####"),
        ([{"question": "?"}], "line 1: no field 'answer'"),
        (
            [{"question": "?", "answer": "#### 1"}, {"question": 3, "answer": "#### 1"}],
            "line 2: 'question' must be text",
        ),
        ([], "is empty"),
    ],
)
def test_gsm8k_errors(test: list[dict], message: str, run, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run("chat_gsm8k", "-f", write_jsonl(tmp_path / "test.jsonl", test)) == 1
    assert message in capsys.readouterr().err


# L-Eval

DOCUMENT = {
    "coursera": ("Which?\nA. one\nB. two\nC. three\nD. four", "ACD"),
    "gsm100": ("What is 47 + 38?", "85"),
    "quality": ("Who?\n(A) Ann\n(B) Bob\n(C) Cleo\n(D) Dan", "(B) Bob"),
    "tpo": ("Where?\nA. here\nB. there\nC. inside\nD. outside", "D"),
    "codeU": ("What does it print?", "[1, 2]"),
    "sci_fi": ("Is water dry, True or False?", "True [fact: False]"),
}


def write_leval(folder: Path, document: str = "A long story.") -> list[str]:
    for task, (instruction, output) in DOCUMENT.items():
        record = {
            "input": document,
            "instructions": [instruction] * 2,
            "outputs": [output] * 2,
            "source": "",
            "evaluation": "exam",
        }
        write_jsonl(folder / f"{task}.jsonl", [record])
    return ["-d", str(folder)]


@pytest.mark.parametrize(
    ("task", "reply", "score"),
    [
        ("coursera", "ACD", 1),
        ("coursera", "A, C and D", 1),
        ("coursera", "one, three", 0.25),
        ("coursera", "A", 0.25),
        ("coursera", "AB", 0),
        ("coursera", "ABCD", 0),
        ("coursera", "", 0),
        ("gsm100", "47 + 38 = 85.0", 1),
        ("gsm100", "85 - 1 = 84", 0),
        ("quality", "The answer is Bob.", 1),
        ("quality", "A", 0),
        ("tpo", "D. outside", 1),
        ("tpo", "", 0),
        ("codeU", "The output is: `[1,2]`.", 1),
        ("codeU", "We add them.\n[1, 2]", 1),
        ("codeU", "[1, 3]", 0),
        ("codeU", "", 0),
        ("sci_fi", "True [fact: False]", 1),
        ("sci_fi", "[fact: false] true", 1),
        ("sci_fi", "It is true.", 0.5),
        ("sci_fi", "False [fact: True]", 0),
    ],
)
def test_leval_score(task: str, reply: str, score: float):
    instruction, output = DOCUMENT[task]
    closed = evaluate_leval.TASKS[task]
    assert closed.score(instruction, closed.gold(output), reply)["correct"] == score


@pytest.mark.parametrize(("gold", "reply", "right"), [("3.0", "3", True), ("'ab'", "ab", True), ("12", "1 2", False)])
def test_leval_outputs(gold: str, reply: str, right: bool):
    assert evaluate_leval.score_output("", gold, reply)["correct"] is right


def test_leval_truth_without_a_fact():
    assert evaluate_leval.gold_truth("False") == ["false", None]
    assert evaluate_leval.score_truth("", ["false", None], "False.")["correct"] == 1


def test_leval_averages_its_tasks(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LanguageModel, "chat", lambda self, cases, **_: ["A" for _ in cases])
    assert run("leval", *write_leval(tmp_path)) == 0
    scores, records = results(tmp_path / "out.jsonl")
    assert len(records) == 12
    assert scores["coursera"] == 0.25
    assert scores["L-Eval"] == pytest.approx(0.25 / 6)
    assert scores["sci_fi: loyalty"] == 0


def test_leval_with_the_model(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a document the prompt is the sum alone; a document that is too long is cut in the middle."""
    arguments = [*write_leval(tmp_path, ""), "--tasks", "gsm100,tpo", "--limit", "1"]
    write_jsonl(
        tmp_path / "tpo.jsonl",
        [
            {
                "input": "Begin. " + "And so it went on. " * 400 + "End.",
                "instructions": ["What is 2 + 2?"],
                "outputs": ["A"],
            }
        ],
    )
    monkeypatch.setattr(evaluate_leval, "MAX_NEW_TOKENS", 20)
    assert run("leval", *arguments, "--max-seq-len", 1000) == 0
    scores, records = results(tmp_path / "out.jsonl")
    assert scores["gsm100"] == 1
    assert records[0]["cut_tokens"] == 0
    assert records[1]["cut_tokens"] > 1000


def test_leval_cuts_the_middle(loaded: tuple[Any, Any]):
    lm = LanguageModel(*loaded, max_seq_len=evaluate_leval.RESERVED_TOKENS + 60)
    case = Case("tpo/1/0", "Who?", "A", preamble="始" + "和然后" * 300 + "終\n\n")
    shorter, left_out = evaluate_leval.truncate_document(case, lm)
    assert shorter.text().startswith("始和")
    assert shorter.text().endswith("終\n\nWho?")
    assert "\ufffd" not in shorter.text()
    assert 50 < len(lm.encode(shorter.text())) <= 64
    assert left_out == len(lm.encode(case.preamble)) + len(lm.encode(case.prompt)) - 60
    same, none = evaluate_leval.truncate_document(Case("x", "Who?", "A", preamble="Short.\n\n"), lm)
    assert none == 0
    assert same.text() == "Short.\n\nWho?"
    only, _ = evaluate_leval.truncate_document(
        Case("x", "first " + "more " * 500 + "last?", "A", preamble="Document.\n\n"), lm
    )
    assert only.text().startswith("first")
    assert only.text().endswith("last?")
    assert len(lm.encode(only.text())) <= 64


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input": "x", "instructions": ["a", "b"], "outputs": ["A"]}, "record 1: 2 instructions and 1 outputs"),
        ({"input": "x", "instructions": ["a"], "outputs": ["none"]}, "output 0: must have one or more letters"),
        ({"input": ["x"], "instructions": [], "outputs": []}, "line 1: 'input' must be text"),
        ({"input": "x"}, "line 1: no field 'instructions'"),
        ({"input": "x", "instructions": [], "outputs": []}, "no questions"),
    ],
)
def test_leval_errors(record: dict, message: str, run, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_jsonl(tmp_path / "tpo.jsonl", [record])
    assert run("leval", "-d", tmp_path, "--tasks", "tpo") == 1
    assert message in capsys.readouterr().err


def test_leval_names_missing_files_and_invalid_options(run, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run("leval", "-d", tmp_path) == 1
    assert "coursera.jsonl does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("leval", "-d", tmp_path, "--tasks", "qualty")
    assert "invalid task 'qualty'" in capsys.readouterr().err
    write_leval(tmp_path)
    assert run("leval", "-d", tmp_path, "--max-seq-len", 100) == 1
    assert "--max-seq-len must be more than" in capsys.readouterr().err
