"""Tool use: which calls are right, similarity of arguments, and runs of the toy with ReAct and smolagents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen.checkpoint.loading import load_model
from qwen.evaluation import harness
from qwen.evaluation.agent import FirstCallAgent
from qwen.evaluation.benchmarks import plugin as evaluate_plugin
from qwen.evaluation.language_model import LanguageModel
from qwen.tools import tool_prompt
from tests.support.evaluation_runs import results, run_script, write_jsonl

WEATHER = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city, e.g. San Francisco"}},
        "required": ["location"],
    },
}
BOSTON = 'Thought: I should look.\nAction: Get_Current_Weather\nAction Input: {"location": "Boston"}\nObservation: rain'


@pytest.fixture(scope="module")
def loaded(bundled_chat: Path) -> tuple[Any, Any]:
    return load_model(bundled_chat, cpu_only=True)


@pytest.fixture
def run(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the benchmark in this process, with results in tmp_path/out.jsonl; returns the exit status."""
    monkeypatch.setattr(harness, "load_model_quietly", lambda *_, **__: loaded)

    return lambda *arguments: run_script(evaluate_plugin.EvaluatePlugin, tmp_path / "out.jsonl", *arguments)


@pytest.fixture(scope="module")
def lm(loaded: tuple[Any, Any]) -> LanguageModel:
    return LanguageModel(*loaded, max_seq_len=1024)


def react(query: str, response: str = BOSTON) -> dict[str, str]:
    return {"prompt": tool_prompt(query, [WEATHER]), "response": response, "query": query}


# Runs of the toy, which calls a tool for the weather of a city, but not for a greeting


@pytest.mark.slow
def test_react(run, tmp_path: Path):
    elsewhere = react("What is the weather like in Paris?")
    write_jsonl(tmp_path / "positive.jsonl", [react("What is the weather like in Boston?"), elsewhere])
    write_jsonl(tmp_path / "negative.jsonl", [react("Hello!", ""), react("What is the weather like in Rome?", "")])
    files = ["--eval-react-positive-filename", "positive.jsonl", "--eval-react-negative-filename", "negative.jsonl"]
    assert run("-d", tmp_path, "--eval-react-positive", "--eval-react-negative", *files, "--batch-size", 3) == 0
    scores, records = results(tmp_path / "out.jsonl")
    records = {record["name"]: record for record in records}
    assert records["react positive/1"]["call"] == {"tool": "get_current_weather", "arguments": '{"location": "Boston"}'}
    assert records["react positive/1"]["rouge_l"] == 1
    assert 0 < records["react positive/2"]["rouge_l"] < 1
    assert all("Observation" not in record["reply"] for record in records.values())
    assert scores["ReAct: tool selection"] == 1
    assert scores["ReAct: false positives"] == 0.5
    assert scores["ReAct: arguments, Rouge-L"] == (1 + records["react positive/2"]["rouge_l"]) / 2
    assert "| 0.8" in (tmp_path / "out.md").read_text(encoding="utf-8")  # Rouge-L is not printed as a percentage


def test_agent(run, tmp_path: Path):
    pytest.importorskip("smolagents", reason="needs smolagents: pip install smolagents")
    tasks = [
        {
            "query": "What is the weather like in Boston?",
            "gold": {"tool": WEATHER["name"], "arguments": {"location": "Boston"}},
        },
        {"query": "Hello!", "gold": None},
    ]
    file = write_jsonl(tmp_path / "tasks.jsonl", [task | {"tools": [WEATHER]} for task in tasks])
    assert run("--eval-hfagent", "--eval-hfagent-filename", file) == 0
    scores, records = results(tmp_path / "out.jsonl")
    records = {record["name"]: record for record in records}
    assert scores == {"agent: tool selection": 1, "agent: arguments, Rouge-L": 1, "agent: false positives": 0}
    assert records["agent/2"]["call"] is None
    assert "Hello" in records["agent/2"]["reply"]


def test_model_errors_pass_through_the_agent(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("smolagents", reason="needs smolagents: pip install smolagents")

    def fails(*_: object, **__: object) -> list[str]:
        raise MemoryError("too large")

    monkeypatch.setattr(lm, "chat", fails)
    with pytest.raises(MemoryError, match="too large"):
        FirstCallAgent(lm, 8).ask("Hello!", [WEATHER])


# Calls and scores


@pytest.mark.parametrize(
    ("reply", "call"),
    [
        (BOSTON, ("Get_Current_Weather", '{"location": "Boston"}')),
        ("Action: a\nAction Input: x\nFinal Answer: y", ("a", "x")),
        ("Action: a\nAction Input:", ("a", "")),
        ("Thought: no\nFinal Answer: Action: a", None),
        ("", None),
    ],
)
def test_called(reply: str, call: tuple[str, str] | None):
    assert evaluate_plugin.parse_call(reply) == (call and dict(zip(("tool", "arguments"), call, strict=True)))


@pytest.mark.parametrize(
    ("reply", "selected", "no_call"),
    [
        (BOSTON, True, False),
        (BOSTON.replace("Get_Current_Weather", "get_forecast"), False, False),
        ("Thought: hm\nAction: get_current_weather", False, False),  # unfinished, but an attempt
        ("Action: get_current_weather\nAction Input: {}", True, False),
        ("Final Answer: Hello!", False, True),
        ("The word Action: alone is none.", False, True),
        ("", False, True),
    ],
)
def test_verdicts(reply: str, selected: bool, no_call: bool):
    task = evaluate_plugin.EvaluatePlugin(None)
    answer = {"reply": reply, "call": evaluate_plugin.parse_call(reply)}
    gold = {"tool": "get_current_weather", "arguments": "{}"}
    case = evaluate_plugin.Case("x", "", gold)
    assert task.score(case, answer) == {"correct": selected}
    assert task.score(evaluate_plugin.Case("x", "", None), answer) == {"correct": no_call}


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ('{"b":1,  "a": "é"}', '{"a": "é", "b": 1}'),
        ('{"b": 1, "a"', '{"b": 1, "a"'),
        (' {"text": "two\nlines"} ', '{"text": "two\\nlines"}'),
        (" print(1)\n", "print(1)"),
        ("[" * 100_000, "[" * 100_000),
        ("", ""),
    ],
)
def test_normalized(given: str, normal: str):
    assert evaluate_plugin.normalize_arguments(given) == normal


def test_rouge_l(lm: LanguageModel):
    """Compared with the definition on the model's tokens: F of the longest common subsequence."""
    gold, found = "the city of Boston today", "in the city, Boston"
    one, two = lm.encode(gold), lm.encode(found)
    common = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, token in enumerate(one):
        for j, other in enumerate(two):
            common[i + 1][j + 1] = common[i][j] + 1 if token == other else max(common[i][j + 1], common[i + 1][j])
    longest = common[-1][-1]
    assert 0 < longest < len(two)

    def similarity(gold: str, found: str) -> float:
        return evaluate_plugin.rouge_l(lm, {"tool": "t", "arguments": gold}, {"tool": "t", "arguments": found})

    assert similarity(gold, found) == pytest.approx(2 * longest / (len(one) + len(two)))
    assert similarity('{"a": 1, "b": 2}', '{"b":2,"a":1}') == 1
    assert similarity("<|im_end|>", "<|im_end|>") == 1
    assert similarity("x", "") == 0
    assert evaluate_plugin.rouge_l(lm, {"tool": "t", "arguments": "x"}, None) == 0


# Invalid files


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Question: a", "response": "b"}, "line 1: no field 'query'"),
        ({"prompt": ["a"], "response": "b", "query": "c"}, "line 1: 'prompt' must be text, not list"),
        ({"prompt": "a", "response": "Final Answer: b", "query": "c"}, "record 1: its response calls no tool"),
        ({"prompt": " ", "response": BOSTON, "query": "c"}, "record 1: its prompt is empty"),
        (["a"], "line 1: must be an object"),
    ],
)
def test_react_errors(record: object, message: str, run, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = write_jsonl(tmp_path / "positive.jsonl", [record])
    assert run("--eval-react-positive", "--eval-react-positive-filename", file) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(file) in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": {"tool": "other", "arguments": {}}}, "'other', which is not one of get_current_weather"),
        ({"gold": {"tool": WEATHER["name"]}}, "gold: no field 'arguments'"),
        ({"gold": "none"}, "gold: must be an object"),
        ({"tools": [{"name": "x"}]}, "tools[0]: no field 'description', 'parameters'"),
        ({"tools": [WEATHER | {"name": "two words"}]}, "tools[0]: smolagents rejects this tool: Invalid Tool name"),
        ({"tools": [WEATHER | {"parameters": {"properties": {"a": {"type": "float"}}}}]}, "must be one of"),
        ({"tools": [WEATHER, WEATHER]}, "two tools are named 'get_current_weather'"),
        ({"query": 1}, "line 1: 'query' must be text"),
    ],
)
def test_agent_errors(change: dict, message: str, run, tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("smolagents", reason="needs smolagents: pip install smolagents")
    file = write_jsonl(tmp_path / "tasks.jsonl", [{"query": "Hello", "tools": [WEATHER], "gold": None} | change])
    assert run("--eval-hfagent", "--eval-hfagent-filename", file) == 1
    assert message in capsys.readouterr().err


def test_no_part_chosen_and_missing_files(run, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert run() == 1
    assert "give --eval-react-positive" in capsys.readouterr().err
    assert run("-d", tmp_path, "--eval-react-negative") == 1
    assert "exam_plugin_v20231206_react_negative.jsonl does not exist" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert run("-d", tmp_path, "--eval-react-negative", "--eval-react-negative-filename", "empty.jsonl") == 1
    assert "empty.jsonl is empty" in capsys.readouterr().err
