"""Runs the example scripts and the code blocks of the pages, with a real server and the toy model."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import code_interpreter
import function_call_examples
import pytest
import react_demo

from qwen.checkpoint.loading import load_model
from qwen.tools.code_interpreter import extract_code
from tests.support import ROOT
from tests.support.markdown import Block, Document
from tests.support.processes import run_script
from tests.support.server_process import ServerProcess

EXAMPLES = ROOT / "examples"
SERVER = "http://localhost:8000"  # as written on the pages


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in the repository, with this Python first in the path."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def function_calls(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run(sys.executable, "examples/function_call_examples.py", *arguments)


# The pages


END = "\x1e"


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, except those marked as downloads after their language."""
    found = Document(f"examples/{page}").blocks
    assert all(block.closed for block in found), "a fence is not closed"
    return [block for block in found if block.language in ("python", "sh")]


def printed_by_python(page: str, url: str, folder: Path) -> list[str]:
    """Run all Python blocks of a page in one process and return what each prints."""
    separator = f"\nprint({END!r}, end='', flush=True)\n"
    script = folder / "page.py"  # a file, because smolagents reads the source of its tools
    code = "".join(block.code + separator for block in blocks(page) if block.language == "python")
    script.write_text(code.replace(SERVER, url), encoding="utf-8")
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(END)[:-1]


@pytest.mark.parametrize("page", ["react_prompt.md", "system_prompt.md", "transformers_agent.md"])
def test_python_blocks_print_what_the_page_shows(page: str, server: ServerProcess, tmp_path: Path) -> None:
    if page == "transformers_agent.md":
        pytest.importorskip("smolagents", reason="this page is about smolagents: pip install smolagents")
    expected = [block.prints for block in blocks(page) if block.language == "python"]
    printed = printed_by_python(page, server.url, tmp_path)
    assert [text or None for text in printed] == expected


@pytest.mark.parametrize("block", [block for block in blocks("system_prompt.md") if block.language == "sh"])
def test_shell_blocks_print_what_the_page_shows(block: Block, server: ServerProcess) -> None:
    if "curl" in block.code and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = run("bash", "-c", block.code.replace(SERVER, server.url))
    assert done.returncode == 0
    assert done.stdout == block.prints


def test_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = {link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("../docs/")}
    existing = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".md", ".ipynb")} - {"README.md"}
    assert listed == existing | {"../qwen/sandbox/__init__.py"}


# function_call_examples.py


def test_function_calls(server: ServerProcess) -> None:
    done = function_calls("--base-url", f"{server.url}/v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "plain:",
        "  Nice to meet you, Alice!",
        "  Your name is Alice.",
        "functions:",
        '  get_current_weather({"location": "Boston"}) -> {"temperature": 22, "condition": "sunny"}',
        "  Weather in Boston: temperature 22, condition sunny.",
        "tools:",
        '  calculator({"expression": "1234 * 56"}) -> 69104',
        "  Result of 1234 * 56: 69104.",
        "streaming:",
        '  get_current_weather({"location": "北京"}) -> {"temperature": 31, "condition": "sunny"}',
        "  北京的天气：temperature 31, condition sunny。",
        "langchain:",
        '  calculator({"expression": "7812 / 12"}) -> 651',
        "  Result of 7812 / 12: 651.",
    ]


def test_function_calls_with_a_key_and_selected_examples(start_server: Callable[..., ServerProcess]) -> None:
    address = ("--base-url", f"{start_server('--api-key', 'hunter2').url}/v1")
    refused = function_calls(*address)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "--api-key" in refused.stderr
    done = function_calls("streaming", "langchain", *address, "--api-key", "hunter2")
    assert done.stdout.startswith("streaming:\n")
    assert "Result of 7812 / 12: 651." in done.stdout
    assert "plain" not in done.stdout


@pytest.mark.process
@pytest.mark.parametrize("address", ["http://127.0.0.1:1/v1", "no-address"])
def test_function_calls_without_a_server(address: str) -> None:
    done = function_calls("--base-url", address)
    assert done.returncode == 1
    assert not done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert address in done.stderr
    assert "openai_api.py" in done.stderr


@pytest.mark.process
def test_function_calls_with_an_unknown_example() -> None:
    done = function_calls("plian")
    assert done.returncode == 2
    assert "'plian'" in done.stderr
    assert "streaming" in done.stderr


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1234 * 56", "69104"),
        ("7812 / 12", "651"),
        ("-(2 + 3) ** 2 // 7", "-4"),
        ("10 % 4 + 0.5", "2.5"),
        ("12 × 3 ÷ 4", "9"),
        ("1e308 * 10", "inf"),
    ],
)
def test_calculator(expression: str, value: str) -> None:
    assert function_call_examples.calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("1 / 0", "9 ** 9 ** 9", "(-8) ** 0.5", "0 ** -1", "(1", "", "\0", "1" * 201, 7, None, ["1"]),
        *("__import__('os').getpid()", "abs(1)", "'a' * 3", "True + 1", "x", "[1][0]", "1 if 1 else 2", "lambda: 1"),
    ],
)
def test_calculator_rejects_other_expressions(expression: object) -> None:
    assert function_call_examples.calculator(expression).startswith("error: ")


@pytest.mark.parametrize("tools", [function_call_examples, react_demo])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("no_such_tool", "{}"),
        ("__class__", "{}"),
        *(
            (name, text)
            for name in ("calculator", "get_current_time")
            for text in ("{", "[]", "null", "3", '{"x": 1}', "")
        ),
        ("random_number", '{"max": "many"}'),
        ("random_number", '{"max": 0}'),
        ("random_number", '{"max": [1]}'),
        ("random_number", '{"max": Infinity}'),
        ("get_current_weather", '{"location": ["Atlantis"]}'),
        ("get_current_time", '{"city": "Atlantis"}'),
        ("get_current_time", '{"city": "../../etc/passwd"}'),
    ],
)
def test_wrong_calls_return_an_error_to_the_model(tools: ModuleType, name: str, arguments: str) -> None:
    assert tools.run_tool(name, arguments).startswith("error: ")


# react_demo.py


@pytest.fixture(scope="module")
def toy(bundled_chat: Path) -> tuple:
    return load_model(bundled_chat, cpu_only=True)


@pytest.mark.process
def test_react_demo() -> None:
    done = run_script(
        "examples/react_demo.py", "--cpu-only", "What time is it in Tokyo?", "Roll a die with 6 sides.", "Hello!"
    )
    assert done.returncode == 0, done.stderr
    time, number, hello = done.stdout.rstrip().split("\n\n")
    found = re.fullmatch(
        "Question: What time is it in Tokyo\\?\nThought: .*\nAction: get_current_time\n"
        'Action Input: {"city": "Tokyo"}\nObservation: {"time": "(..:..)"}\nThought: .*\nFinal Answer: (.*)\n=> (.*)',
        time,
    )
    assert found
    assert found[1] in found[2] == found[3]
    rolled = re.search('Action: random_number\nAction Input: {"max": 6}\nObservation: {"number": ([1-6])}', number)
    assert rolled
    assert f": {rolled[1]}." in number.splitlines()[-1]
    assert "Action" not in hello
    assert hello.endswith("=> Hello! How can I help you today?")


def test_react_loop_continues_after_an_unknown_tool(toy: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(react_demo, "TOOLS", {})  # the prompt still offers the clock, but it does not exist
    shown: list[str] = []
    react_demo.answer(*toy, "What time is it in Tokyo?", react_demo.DESCRIPTIONS, shown.append)
    assert "Observation: error: there is no tool get_current_time" in "".join(shown)
    assert "Final Answer:" in shown[-1]


def test_react_loop_stops_after_max_steps(toy: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(react_demo, "MAX_STEPS", 1)
    shown: list[str] = []
    final = react_demo.answer(*toy, "What time is it in Tokyo?", react_demo.DESCRIPTIONS, shown.append)
    assert "no answer after 1" in final
    assert shown[-1].endswith("\nThought:")


def test_react_loop_rejects_too_long_questions(toy: tuple) -> None:
    with pytest.raises(ValueError, match="tokens"):
        react_demo.answer(*toy, "time " * 10000, react_demo.DESCRIPTIONS, print)


@pytest.mark.parametrize(("script", "arguments"), [(react_demo, []), (code_interpreter, ["--allow-weaker-sandbox"])])
def test_missing_checkpoint_is_reported(
    script: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["example.py", *arguments, "-c", "no/such/folder", "Hello!"])
    assert script.main() == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert "no/such/folder" in captured.err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_invalid_seconds_are_rejected(
    seconds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["code_interpreter.py", "--seconds", seconds])
    with pytest.raises(SystemExit, match="2"):
        code_interpreter.main()
    assert f"invalid number of seconds {seconds!r}" in capsys.readouterr().err


# code_interpreter.py (tests/sandbox tests the sandbox itself)


INTERPRETER = ("examples/code_interpreter.py", "--cpu-only", "--allow-weaker-sandbox")


@pytest.mark.process
def test_code_interpreter(tmp_path: Path) -> None:
    done = run_script(*INTERPRETER, "--folder", str(tmp_path), "What is 1234 * 56?", "执行print(3 + 4)", "Hello!")
    assert done.returncode == 0, done.stderr
    assert "    1234 * 56\n\n    69104\n\nResult of 1234 * 56: 69104.\n" in done.stdout
    assert "    print(3 + 4)\n\n    7\n\nprint(3 + 4)的输出：7。\n" in done.stdout
    assert done.stdout.endswith("Hello! How can I help you today?\n\n")


@pytest.mark.process
def test_code_interpreter_reads_questions_and_shows_errors() -> None:
    done = run_script(*INTERPRETER, text="\nCalculate 1234 / 0.\nHello!\n")
    assert done.returncode == 0, done.stderr
    assert "ZeroDivisionError: division by zero" in done.stdout
    assert "Hello!" in done.stdout.splitlines()[-2]


@pytest.mark.parametrize(
    "action_input",
    [
        "print(1)\nx = {'a': 2}",
        "```py\nprint(1)\nx = {'a': 2}\n```",
        "```python\nprint(1)\nx = {'a': 2}\n```\nThat is it.",
        "```\nprint(1)\nx = {'a': 2}",
        json.dumps({"code": "print(1)\nx = {'a': 2}"}),
        '{"code": "print(1)\nx = {\'a\': 2}"}',  # a newline that is invalid in JSON
        json.dumps({"code": "```py\nprint(1)\nx = {'a': 2}\n```"}),
    ],
)
def test_code_of_an_action_input(action_input: str) -> None:
    assert extract_code(action_input) == "print(1)\nx = {'a': 2}"


@pytest.mark.parametrize("code", ["", "5", "[1, 2]", '{"a": 1}', '{"code": 5}', "print('你好')", "  x"])
def test_plain_code_is_not_changed(code: str) -> None:
    assert extract_code(code) == code


def test_only_the_worker_executes_text() -> None:
    for path in [*EXAMPLES.glob("*.py"), *(ROOT / "qwen").rglob("*.py")]:
        called = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert path.name == "worker.py" or not called & {"eval", "exec", "compile"}
