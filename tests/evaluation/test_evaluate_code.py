"""Benchmarks of programs, mathematics and reasoning: prompts, scores of given completions, runs of the toys."""

import gzip
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen.checkpoint.loading import load_model
from qwen.evaluation import harness
from qwen.evaluation.benchmarks import bbh as evaluate_bbh
from qwen.evaluation.benchmarks import chat_humaneval as evaluate_chat_humaneval
from qwen.evaluation.benchmarks import code_interpreter as evaluate_code_interpreter
from qwen.evaluation.benchmarks import humaneval as evaluate_humaneval
from qwen.evaluation.benchmarks import math as evaluate_math
from qwen.evaluation.benchmarks import mbpp as evaluate_mbpp
from qwen.evaluation.data_files import DataError
from qwen.evaluation.language_model import LanguageModel
from qwen.sandbox import SandboxUnavailable
from tests.support.evaluation_runs import evaluate, results

TASKS = {
    "humaneval": evaluate_humaneval.EvaluateHumanEval,
    "chat_humaneval": evaluate_chat_humaneval.EvaluateChatHumanEval,
    "mbpp": evaluate_mbpp.EvaluateMBPP,
    "math": evaluate_math.EvaluateMATH,
    "bbh": evaluate_bbh.EvaluateBBH,
    "code_interpreter": evaluate_code_interpreter.EvaluateCodeInterpreter,
}
FOLDERS = {"math", "bbh"}


@pytest.fixture(scope="module")
def toys(bundled_base: Path, bundled_chat: Path) -> dict[bool, tuple[Any, Any]]:
    """The base model (False) and the chat model (True)."""
    return {chat: load_model(path, cpu_only=True) for chat, path in ((False, bundled_base), (True, bundled_chat))}


@pytest.fixture
def run(toys: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict, list[dict]]]:
    """Run a benchmark in this process; returns the values of the summary, and the records."""
    monkeypatch.setattr(harness, "load_model_quietly", lambda *_, chat, **__: toys[chat])

    def run(name: str, *arguments: str) -> tuple[dict, list[dict]]:
        data = ["-d" if name in FOLDERS else "-f", str(write(name, tmp_path / "data"))]
        sandbox = [] if name in FOLDERS else ["--allow-weaker-sandbox", "--seconds", "20"]
        out = tmp_path / "out.jsonl"
        assert evaluate(TASKS[name], [*data, *sandbox, "-o", str(out), "--cpu-only", *arguments]) == 0
        return results(out)

    return run


def set_answers(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    """Let the model give these answers, by the name of the case."""
    for method in ("generate", "chat"):
        monkeypatch.setattr(LanguageModel, method, lambda _, cases, **__: [answers[case.name] for case in cases])


# Small data, laid out as published

DOUBLE = 'from typing import List\n\n\ndef double(x: int, *, of: List[int] = []) -> int:\n    """ Twice x.\n    """\n'
PROBLEMS = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": DOUBLE,
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "META = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    }
    for number in range(4)
]
SENTENCES = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "test_list": [f"assert add({x}) == {x + number}" for x in range(3)],
        "test_setup_code": "",
    }
    for number in (2, 3, 4, 10, 11, 12, 510, 511)
]
PROBLEM = {
    "problem": "What is $1+1$?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": r"It is $\boxed{\frac{4}{2}}$.",
}
MINERVA = (
    ("algebra", r"Find the domain of the expression  $\frac{\sqrt{x-2}}{\sqrt{5-x}}$."),
    ("precalculus", r"If $\det \mathbf{A} = 2$ and $\det \mathbf{B} = 12,$ then find it."),
    ("prealgebra", "Terrell usually lifts two 20-pound weights 12 times. How?"),
    ("algebra", "If the system of equations\n\n\\begin{align*}\n6x-4y&=a,\\\\\n6y"),
)
QUESTIONS = [
    {"query": "What is 1234 * 56?", "tags": ["math"], "expected": "69,104"},
    {"query": "执行print(3 + 4)", "tags": ["general", "code"]},
    {"query": "Hello!", "tags": ["visualization", "visualization-easy"], "input_file_path": ["data.csv"]},
]


def write(name: str, folder: Path) -> Path:
    """Write the data of a benchmark; returns the path to pass to it."""
    folder.mkdir(exist_ok=True)
    if name == "math":
        for subject in evaluate_math.SUBJECTS:
            for split in ("train", "test"):
                write_json(folder / split / subject / "10.json", PROBLEM)
                write_json(folder / split / subject / "9.json", PROBLEM | {"level": "Level 5"})
        return folder
    if name == "bbh":
        for task in evaluate_bbh.TASKS:
            write_json(
                folder / "bbh" / f"{task}.json", {"canary": "", "examples": [{"input": "2 is", "target": "even"}]}
            )
            examples = "".join(f"\n\nQ: {n} is\nA: Let's think step by step.\nSo the answer is odd." for n in (1, 3, 5))
            (folder / "cot-prompts").mkdir(exist_ok=True)
            (folder / "cot-prompts" / f"{task}.txt").write_text(f"CANARY\n-----\nSay {task}.{examples}\n")
        return folder
    if name == "code_interpreter":
        (folder / "upload_file_clean").mkdir(exist_ok=True)
        (folder / "upload_file_clean" / "data.csv").write_text("x\n1\n")
    lines = {"mbpp": SENTENCES, "code_interpreter": QUESTIONS}.get(name, PROBLEMS)
    path = folder / f"{name}.jsonl{'.gz' * (name == 'humaneval')}"
    with (gzip.open if name == "humaneval" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_task(name: str, path: Path) -> Any:
    place = {"eval_data_path" if name in FOLDERS else "sample_input_file": path}
    return TASKS[name](Namespace(seed=1234, seconds=5.0, allow_weaker_sandbox=True, gsm8k=None, **place))


# Runs of the toys


@pytest.mark.parametrize("name", ["humaneval", "chat_humaneval", "mbpp", "math", "bbh"])
def test_benchmark_runs_with_the_toy(name: str, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[TASKS[name].__module__], "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(evaluate_bbh, "TASKS", evaluate_bbh.TASKS[:2])
    monkeypatch.setattr(evaluate_math, "SUBJECTS", evaluate_math.SUBJECTS[:2])
    scores, records = run(name, "--limit", "1", "--batch-size", "2")
    assert all(0 <= value <= 1 for value in scores.values())
    assert len(records) == (2 if name in FOLDERS else 1)
    assert any(r.get("reply", r["completion"]) for r in records)


@pytest.mark.slow
def test_toy_uses_the_code_interpreter(run: Callable) -> None:
    scores, (product, printed, hello) = run("code_interpreter")
    assert product["correct"]
    assert product["runs"] == [{"code": "1234 * 56", "output": "69104", "status": "ok"}]
    assert printed["executable"]
    assert not hello["executable"]
    assert hello["reply"]
    assert scores["math: right"] == scores["general: executable"] == 1
    assert scores["visualization-easy: a picture was made"] == 0
    assert scores["all: executable"] == pytest.approx(2 / 3)


# Given completions


def test_humaneval(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bodies = ["    return 2 * x\n\n\nprint(double(2))", "    return x", "    2 * x", "    return x + x\ndef g(): pass"]
    set_answers(monkeypatch, {f"HumanEval/{number}": body for number, body in enumerate(bodies)})
    scores, records = run("humaneval", "--batch-size", "3")
    assert scores == {"humaneval": 0.5}
    assert [(record["task_id"], record["completion"]) for record in records] == [
        ("HumanEval/0", "    return 2 * x"),
        ("HumanEval/1", "    return x"),
        ("HumanEval/2", "    2 * x"),
        ("HumanEval/3", "    return x + x\n"),
    ]
    assert [record["verdict"] for record in records] == ["passed", "failed", "failed", "passed"]


def test_chat_humaneval(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    anew = "Sure!\n```python\nimport math\n\ndef double(x: int) -> int:\n    return math.prod([2, x])\n```\nIt works."
    replies = [anew, "```\nreturn 2 * x\n```", "I do not know.", "def double(x):\n    return x\n\nDone."]
    set_answers(monkeypatch, {f"HumanEval/{number}": reply for number, reply in enumerate(replies)})
    scores, records = run("chat_humaneval")
    assert [record["verdict"] for record in records] == ["passed", "passed", "failed", "failed"]
    assert scores == {"chat_humaneval": 0.5}
    assert [record["reply"] for record in records] == replies


def test_mbpp(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = "def add(x):\r\n  return x + {}\n"
    set_answers(monkeypatch, {"MBPP/11": right.format(11), "MBPP/12": right.format(11), "MBPP/510": right.format(510)})
    scores, records = run("mbpp")
    assert [record["verdict"] for record in records] == ["passed", "failed", "passed"]
    assert scores == {"mbpp": pytest.approx(2 / 3)}


def test_math(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = {f"test/{subject}/{number}": "It is 2." for subject in evaluate_math.SUBJECTS for number in (9, 10)}
    answers["test/algebra/10"] = r" It is $\boxed{2.0}$."
    answers["test/geometry/9"] = "\nFinal Answer: The final answer is $4/2$. "
    answers["test/geometry/10"] = r"\boxed{-2}"
    set_answers(monkeypatch, answers)
    scores, records = run("math")
    assert {record["name"] for record in records if record["correct"]} == {"test/algebra/10", "test/geometry/9"}
    assert scores["math"] == pytest.approx(2 / 14)
    assert scores["geometry"] == 0.5
    assert scores["precalculus"] == 0
    assert scores["Level 1"] == scores["Level 5"] == pytest.approx(1 / 7)


def test_bbh(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {f"{task}/0": "2 is even." for task in evaluate_bbh.TASKS}
    answers["snarks/0"] = "2 is two. So the answer is even.\nSo the answer is odd."
    answers["navigate/0"] = "So the answer is even"
    answers["hyperbaton/0"] = "So the answer is Even."
    set_answers(monkeypatch, answers)
    scores, records = run("bbh")
    assert {record["group"] for record in records if record["correct"]} == {"snarks", "navigate"}
    assert scores["average of the tasks"] == pytest.approx(2 / 27)
    assert scores["snarks"] == 1


def test_code_interpreter(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def act(code: str) -> str:
        return f"Thought: Run it.\nAction: code_interpreter\nAction Input: ```py\n{code}\n```\n"

    steps = iter(
        [
            *(act("1 / 0"), act("1234 * 56"), "Thought: I know.\nFinal Answer: It is 69,104.0 exactly."),
            *(act("open('data.csv')"), "Final Answer: No such file."),
            *(act("rows = open('data.csv').read()\nopen('plot.png', 'w').write(rows)"), "Final Answer: Done."),
            *("Final Answer: It is 8.", "Final Answer: I am not sure."),
        ]
    )
    queries = []

    def next_step(model: Any, tokenizer: Any, messages: list[dict]) -> tuple[str, bool]:
        queries.append(messages[0]["content"])
        return next(steps), messages[-1]["role"] == "function"

    monkeypatch.setattr("qwen.tools.code_interpreter.next_step", next_step)
    gsm8k = tmp_path / "test.jsonl"
    gsm8k.write_text('{"question": "4 + 4?", "answer": "#### 8"}\n{"question": "4 + 5?", "answer": "#### 9"}\n')
    scores, records = run("code_interpreter", "--gsm8k", str(gsm8k))
    assert [record["correct"] for record in records] == [True, False, True, True, False]
    assert [record["executable"] for record in records] == [False, False, True, False, False]
    assert records[2]["pictures"] == ["plot.png"]
    assert "Files: data.csv\nHello!" in queries
    assert scores == {
        "math: right": pytest.approx(2 / 3),
        "visualization-easy: a picture was made": 1.0,
        "general: executable": 0.0,
        "all: executable": 0.2,
    }


# Prompts


def test_prompt_of_chat_humaneval(tmp_path: Path) -> None:
    case = make_task("chat_humaneval", write("chat_humaneval", tmp_path)).cases()[0]
    signature = "double(x: int, *, of: List[int] = []) -> int"
    assert case.text() == (f"Write a Python function `{signature}` to solve the following problem:\nTwice x.\n{DOUBLE}")


def test_prompt_of_mbpp(tmp_path: Path) -> None:
    cases = make_task("mbpp", write("mbpp", tmp_path)).cases()
    assert [case.name for case in cases] == ["MBPP/11", "MBPP/12", "MBPP/510"]
    parts = [
        f"You are an expert Python programmer, and here is your task: Write a function to add {n}. "
        f"Your code should pass these tests:\n\nassert add(0) == {n}\nassert add(1) == {n + 1}\n"
        f"assert add(2) == {n + 2}\n[BEGIN]\n" + (f"def add(x):\r\n  return x + {n}\n[DONE]" if n < 5 else "")
        for n in (2, 3, 4, 11)
    ]
    assert cases[0].text() == "\n\n".join(parts)


def test_prompt_of_math(tmp_path: Path) -> None:
    folder = write("math", tmp_path)
    drawn = make_task("math", folder)
    case = drawn.cases()[0]
    worked = (
        "Problem:\nWhat is $1+1$?\n\nSolution: It is $\\boxed{\\frac{4}{2}}$.\n"
        "Final Answer: The final answer is $\\frac{4}{2}$. I hope it is correct.\n\n"
    )
    assert case.text() == 4 * worked + "Problem:\nWhat is $1+1$?\n\nSolution:"
    assert case.name == "test/algebra/9"
    assert len(set(drawn.shot_names)) == 4
    for number, (subject, problem) in enumerate(MINERVA):
        write_json(folder / "train" / subject / f"{number + 20}.json", PROBLEM | {"problem": problem})
    task = make_task("math", folder)
    text = task.cases()[0].text()
    assert task.shot_names == ["train/algebra/20", "train/precalculus/21", "train/prealgebra/22", "train/algebra/23"]
    assert [text.index(problem) for _, problem in MINERVA] == sorted(text.index(problem) for _, problem in MINERVA)


def test_prompt_of_bbh(tmp_path: Path) -> None:
    case = make_task("bbh", write("bbh", tmp_path)).cases()[1]
    assert case.text() == (tmp_path / "cot-prompts" / "causal_judgement.txt").read_text().split("-----\n")[
        1
    ].strip() + ("\n\nQ: 2 is\nA: Let's think step by step.\n")
    assert len(case.shots) == 3
    assert case.preamble == "Say causal_judgement.\n\n"


# Invalid data


@pytest.mark.parametrize("name", TASKS)
def test_missing_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.* does not exist"):
        make_task(name, tmp_path / "nowhere").cases()


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("humaneval", "", "is empty"),
        ("humaneval", '{"task_id": "HumanEval/0", "prompt": ""}', "line 1: no field 'entry_point', 'test'"),
        (
            "chat_humaneval",
            json.dumps(PROBLEMS[0] | {"entry_point": "other"}),
            "HumanEval/0: the prompt has no function other",
        ),
        ("chat_humaneval", json.dumps(PROBLEMS[0] | {"prompt": "def f(:"}), "HumanEval/0: the prompt is not Python"),
        ("humaneval", json.dumps(PROBLEMS[0] | {"prompt": None}), "line 1: 'prompt' must be text"),
        ("mbpp", json.dumps(SENTENCES[0]), "has no problem 3"),
        ("mbpp", json.dumps(SENTENCES[0] | {"task_id": "2"}), "line 1: 'task_id' must be a whole number"),
        ("mbpp", json.dumps(SENTENCES[0] | {"test_list": [1]}), 'problem 2: "test_list" and'),
        ("mbpp", "\n".join(map(json.dumps, SENTENCES[:4])), "none of the problems 11 to 510"),
        ("code_interpreter", '{"query": "", "tags": ["art"]}', "question 0: none of its tags"),
        ("code_interpreter", '{"query": "", "tags": null}', "line 1: 'tags' must be a list"),
        (
            "code_interpreter",
            '{"query": "", "tags": ["general"], "input_file_path": "x.csv"}',
            "must be a list of names, not 'x.csv'",
        ),
        ("code_interpreter", '{"query": "", "tags": ["math"], "expected": "a lot"}', "question 0: no number"),
        (
            "code_interpreter",
            '{"query": "", "tags": ["general"], "input_file_path": ["x.csv"]}',
            "x.csv does not exist",
        ),
    ],
)
def test_invalid_lines(name: str, line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(f"{line}\n")
    with pytest.raises(DataError, match=message) as raised:
        make_task(name, tmp_path / "data.jsonl").cases()
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("math", "test/geometry/9.json", '{"problem": ""}', "no field 'level', 'solution'"),
        ("math", "test/geometry/9.json", json.dumps(PROBLEM | {"solution": "It is 2."}), "has no answer"),
        ("math", "test/geometry/9.json", json.dumps(PROBLEM | {"level": 5}), "'level' must be text"),
        ("bbh", "bbh/snarks.json", '{"examples": []}', "list of questions"),
        ("bbh", "bbh/snarks.json", '{"examples": [{"input": "", "target": 5}]}', "'target' must be text"),
        ("bbh", "bbh/snarks.json", '{"examples": [{"input": ""}]}', "example 0: no field 'target'"),
        ("bbh", "cot-prompts/snarks.txt", "Q: 1", "five dashes"),
        ("bbh", "cot-prompts/snarks.txt", None, "does not exist"),
    ],
)
def test_invalid_files(name: str, file: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = write(name, tmp_path) / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        make_task(name, tmp_path).cases()
    assert str(path) in str(raised.value)


def test_no_model_is_loaded_without_a_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def start(_: Any) -> None:
        raise SandboxUnavailable("This machine cannot confine the code.")

    monkeypatch.setattr("qwen.sandbox.Sandbox.start", start)
    monkeypatch.setattr(harness, "load_model_quietly", None)
    assert evaluate(TASKS["humaneval"], ["-f", str(write("humaneval", tmp_path))]) == 1
    assert "cannot confine the code. (--allow-weaker-sandbox)" in capsys.readouterr().err
