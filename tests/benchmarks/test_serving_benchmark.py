"""benchmarks/serving.py: requests have the stated lengths, figures are consistent, and all servers are compared."""

import importlib.util
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen import QWenTokenizer
from qwen.checkpoint.loading import load_tokenizer
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import serving
from openai_client import REPEATED, Requests
from servers import Launcher, ServerError, with_whole_history

sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def tokenizer(bundled_chat: Path) -> QWenTokenizer:
    return load_tokenizer(bundled_chat)


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process and returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["serving.py", "--cpu-only", *arguments])
        code = serving.main()
        return code, *capfd.readouterr()

    monkeypatch.setattr(serving.signal, "signal", lambda *_: None)
    return run


def prompt_length(tokenizer: QWenTokenizer, request: dict) -> int:
    return len(tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, return_dict=False))


def test_turns_of_a_conversation_add_the_stated_number_of_tokens(tokenizer: QWenTokenizer):
    conversation = Requests(tokenizer, 128).conversation(10, 124)
    lengths = [prompt_length(tokenizer, request) for request in conversation]
    assert lengths == pytest.approx([124 * turn for turn in range(1, 11)], abs=20)
    assert lengths[7] <= 1024 < lengths[8]
    for request, following in itertools.pairwise(conversation):
        assert following["messages"][: len(request["messages"])] == request["messages"]


@pytest.mark.parametrize(("trained", "expected"), [(1024, (124, 10)), (2048, (200, 8)), (8192, (200, 8))])
def test_length_of_turns(trained: int, expected: tuple[int, int]):
    assert serving.turn_lengths(trained) == expected


def test_prompts_share_no_prefix(tokenizer: QWenTokenizer):
    requests = Requests(tokenizer, 128)
    prompts = [requests.repeated(6000, 4) for _ in range(3)]
    for prompt in prompts:
        assert prompt_length(tokenizer, prompt) == pytest.approx(6000, abs=50)
    assert len({prompt["messages"][0]["content"][:20] for prompt in prompts}) == 3


def test_repeated_word_is_one_token(tokenizer: QWenTokenizer):
    assert len(tokenizer.encode(REPEATED)) == 1


def test_ratios_are_of_the_same_round():
    """A machine that is half as fast in the second round changes both speeds, and not their ratio."""
    this, other = [{"speed": 30}, {"speed": 15}, {"speed": 30}], [{"speed": 20}, {"speed": 10}, {"speed": 60}]
    assert serving.median_ratio(this, "speed", other) == 1.5
    assert serving.median(this, "speed") == 30
    assert serving.median_ratio([{"a": 6, "b": 3}], "a", [{"a": 6, "b": 3}], "b") == 2


def test_replies_are_compared_with_those_of_requests_sent_alone():
    assert serving.same_answers([["a", "b", "a"], ["a", "x", "x"]], ["a", "b"]) == "4 of 6"


def test_servers_are_measured_in_turns():
    seen = []
    figures = serving.interleaved({"this": 1, "other": 2}, 2, lambda port: seen.append(port) or {"port": port})
    assert seen == [1, 2, 1, 2]
    assert figures == {"this": [{"port": 1}] * 2, "other": [{"port": 2}] * 2}


def test_copy_keeps_all_turns(bundled_chat: Path, tmp_path: Path):
    folder = with_whole_history(bundled_chat, tmp_path / "copy")
    assert '"max_window_size": 8192' in (folder / "generation_config.json").read_text()
    assert '"max_window_size": 768' in (bundled_chat / "generation_config.json").read_text()
    assert (folder / "model.safetensors").samefile(bundled_chat / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline", "docs"], ("--baseline docs", "openai_api.py")),
        (["-c", "docs"], ("-c docs", "generation_config.json")),
        (["--rounds", "0"], ("--rounds", "at least 1")),
    ],
)
def test_errors_are_actionable(arguments: list[str], words: tuple[str, ...], main: Callable, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(*arguments)
    err = capfd.readouterr().err
    assert all(word in err for word in words)


@pytest.mark.process
def test_server_that_does_not_start_is_quoted(bundled_chat: Path, tmp_path: Path):
    with (
        pytest.raises(ServerError, match="No module named 'vllm'"),
        Launcher(bundled_chat, tmp_path, 1, True).vllm(sys.executable, eager=True),
    ):
        pass


@pytest.mark.process
def test_tables_compare_all_servers(main: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "LONG_PROMPT", 1000)
    code, out, err = main("--rounds", "1", "--clients", "2", "--requests", "1", "--tokens", "4")
    assert (code, err) == (0, "")
    servers = ["this", *(["llama.cpp"] if importlib.util.find_spec("xllamacpp") else [])]
    tables = [part.splitlines() for part in out.strip().split("\n\n") if part.startswith("|")]
    assert len(tables) == 3
    for number, (head, _, *rows) in enumerate(tables):
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        assert [row[number == 0] for row in cells] == servers
        assert {len(row) for row in cells} == {head.count("|") - 1}
    throughput, conversation, _ = tables
    assert all(row.endswith("| 2 of 2 |") for row in throughput[2:])
    lengths = {turn: int(length) for length, turn in re.findall(r"(\d+) in turn (\d+)", out)}
    assert list(lengths) == ["1", "8", "9", "10"]
    assert lengths["8"] <= 1024 < lengths["9"]
    assert len(conversation[0].split("|")) == 13
