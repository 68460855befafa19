"""cli_demo.py in a process of its own, on a real terminal (pty) or behind a pipe."""

import io
import os
import re
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest
from pexpect.fdpexpect import fdspawn
from pexpect.spawnbase import SpawnBase
from transformers import GenerationConfig

from qwen_cli import chat as cli_demo
from qwen_cli.chat.settings import parse_settings, updated_config
from tests.support import ROOT
from tests.support.processes import Script, run_script

pytestmark = pytest.mark.process

PROMPT = "User> "
STARTED = "Ask something, or type :help."
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PASTE = "\x1b[200~{}\x1b[201~"
BRACKETED_PASTE = re.compile(r"\x1b\[\?2004[hl]\r?")  # readline switches it on and off
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def environment(state: Path, **changes: str) -> dict[str, str]:
    """Environment variables that differ from those of this process; an empty one counts as unset."""
    # One thread: with a model this small, more threads only wait for each other.
    variables = {"TERM": "xterm", "XDG_STATE_HOME": str(state), "OMP_NUM_THREADS": "1", "NO_COLOR": "", "INPUTRC": ""}
    return variables | changes


class ForkedTerminal(fdspawn):
    """pexpect.spawn for a forked script."""

    def __init__(self, words: list[str], env: dict[str, str], dimensions: tuple[int, int], **options: object):
        master, self.slave = os.openpty()
        termios.tcsetwinsize(self.slave, dimensions)
        self.process = Script(*words, files=(os.ttyname(self.slave),) * 3, **env)
        super().__init__(master, **options)

    def close_slave(self) -> None:
        """Close our copy of the terminal that the process has opened, so that it ends with the process."""
        os.close(self.slave)

    def close(self, force: bool = False) -> None:
        if force:
            self.process.kill()
        super().close()
        self.exitstatus = self.process.wait(self.timeout)


def start(checkpoint: Path | None, state: Path, python: bool = False, **variables: str) -> SpawnBase:
    """Start cli_demo.py on its own pty and wait for the first prompt."""
    words = ["cli_demo.py", "--cpu-only", *([] if checkpoint is None else ["-c", str(checkpoint)])]
    settings = {
        "env": environment(state, **({"NO_COLOR": "1"} | variables)),
        "encoding": "utf-8",
        "timeout": 120,
        "dimensions": (50, 1000),  # wide, so that no line is wrapped
    }
    if python:
        settings["env"] = os.environ | settings["env"]
        child = pexpect.spawn(sys.executable, words, cwd=str(ROOT), **settings)
        child.delaybeforesend = 0
    else:
        child = ForkedTerminal(words, **settings)
    child.logfile_read = io.StringIO()
    child.expect_exact(STARTED)
    child.expect_exact(PROMPT)
    if not python:
        child.close_slave()
    return child


@pytest.fixture
def chat(tiny_chat_checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., SpawnBase]]:
    """Start conversations that end with the test."""
    children = []

    def begin(checkpoint: Path | None = tiny_chat_checkpoint, **settings: bool | str) -> SpawnBase:
        children.append(start(checkpoint, tmp_path, **settings))
        return children[-1]

    yield begin
    for child in children:
        child.close(force=True)


@pytest.fixture(scope="module")
def running(tiny_chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list]:
    """A process shared by the tests below, in a list so that it can be replaced."""
    children = [start(tiny_chat_checkpoint, tmp_path_factory.mktemp("state"))]
    yield children
    children[0].close(force=True)


@pytest.fixture
def child(running: list, tiny_chat_checkpoint: Path, tmp_path: Path) -> SpawnBase:
    """A new conversation in the shared process: empty history, initial seed and settings."""
    try:
        for line in (":clear-his", ":seed 1234", ":reset-conf"):
            ask(running[0], line)
    except (pexpect.EOF, pexpect.TIMEOUT):  # the previous test left it broken
        running[0].close(force=True)
        running[0] = start(tiny_chat_checkpoint, tmp_path)
    return running[0]


def ask(child: SpawnBase, line: str) -> str:
    """Type a line, wait for the next prompt and return the output in between."""
    child.sendline(line)
    child.expect_exact(PROMPT)
    return BRACKETED_PASTE.sub("", child.before)


def reply(child: SpawnBase, line: str) -> str:
    """Type a question, wait for the next prompt and return the reply of the model."""
    return ask(child, line).partition("Qwen> ")[2].strip()


def leave(child: SpawnBase, keys: str = ":exit\r") -> int:
    child.send(keys)
    child.expect(pexpect.EOF)
    child.close()
    assert "Traceback" not in child.before
    return child.exitstatus


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run cli_demo.py behind a pipe, but in this process. Returns exit code, standard output and standard error."""

    def call(*arguments: object, text: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cli_demo.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))
        return (cli_demo.main(), *capfd.readouterr())

    return call


# Conversation


def test_two_turns_and_the_history(child: SpawnBase) -> None:
    first, second = reply(child, "hello"), reply(child, "and then?")
    assert first
    assert second
    shown = ask(child, ":history")
    assert shown.index("hello") < shown.index(first) < shown.index("and then?") < shown.index(second)
    assert "Forgot 2 turns" in ask(child, ":clh")
    assert "Nothing has been said" in ask(child, ":his")


def test_same_seed_same_answer(child: SpawnBase) -> None:
    def answer() -> str:
        ask(child, ":clear-his")
        return reply(child, "hello")

    assert "seed = 1234" in ask(child, ":seed")
    first = answer()
    assert answer() == first
    assert "seed = 8" in ask(child, ":seed 8")
    assert answer() != first
    ask(child, ":seed 1234")
    assert answer() == first


def test_a_pasted_block_is_one_question(child: SpawnBase) -> None:
    assert reply(child, PASTE.format("def f():\r    return 1\r:exit"))
    assert "User: def f():\r\n    return 1\r\n:exit\r\n[1] Qwen: " in ask(child, ":history")


def test_pasted_block_without_bracketed_paste(chat: Callable) -> None:
    child = chat(TERM="dumb")
    child.send("first\rsecond\rthird\r")
    child.expect_exact("Qwen> ")
    child.expect_exact(PROMPT)
    assert "User: first\r\nsecond\r\nthird\r\n[1] Qwen: " in ask(child, ":history")
    assert not COLOUR.search(ask(child, "hello"))
    leave(child)


def test_lines_between_triple_quotes_are_one_question(child: SpawnBase) -> None:
    child.sendline('"""one')
    child.expect_exact("... ")
    child.sendline("two")
    child.expect_exact("... ")
    assert reply(child, 'three"""')
    assert "User: one\r\ntwo\r\nthree\r\n[1] Qwen: " in ask(child, ":history")
    child.sendline('"""dropped')
    child.expect_exact("... ")
    child.send(CTRL_C)
    child.expect_exact(PROMPT)
    assert "dropped" not in ask(child, ":history")


def test_line_editing_and_history_file(chat: Callable, tmp_path: Path) -> None:
    child = chat(NO_COLOR="")
    assert COLOUR.search(ask(child, "helloo\x7f there"))
    assert "hello there" in COLOUR.sub("", ask(child, ":history"))
    assert leave(child, ":q\r") == 0
    assert (tmp_path / "qwen" / "cli_history").stat().st_mode & 0o077 == 0
    child = chat()
    assert reply(child, UP * 3)
    assert "User: hello there" in ask(child, ":history")
    assert leave(child, CTRL_D) == 0


def test_unwritable_state_folder_is_ignored(chat: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    child = chat(XDG_STATE_HOME=str(tmp_path / "file"))
    assert reply(child, "hello")
    assert leave(child, CTRL_C) == 0


def test_ctrl_c_stops_the_answer_and_keeps_it(child: SpawnBase) -> None:
    ask(child, ":conf max_new_tokens=6000")
    child.sendline("hello")
    child.expect(r"Qwen> (.{5})")
    beginning = child.match.group(1)
    child.send(CTRL_C * 3)  # an impatient person
    child.expect_exact("[stopped")
    partial_reply = beginning + child.before.rstrip("\r\n").replace("^C", "")
    assert len(partial_reply) < 5000
    child.expect_exact(PROMPT)
    assert f"Qwen: {partial_reply}" in ask(child, ":history").replace("^C", "")  # the model may generate that, too
    ask(child, ":reset-conf")
    assert reply(child, "next question")
    history = ask(child, ":history")
    assert history.index("[1] User: hello") < history.index("[2] User: next question")


# Commands


def test_help(child: SpawnBase) -> None:
    shown = ask(child, ":help")
    assert ask(child, ":h").split()[1:] == shown.split()[1:]
    for name in [
        ":help",
        ":h",
        ":exit",
        ":quit",
        ":q",
        ":clear",
        ":cl",
        ":clear-his",
        ":clh",
        ":history",
        ":his",
        ":seed",
        ":conf",
        ":reset-conf",
    ]:
        assert re.search(rf"{name}\b", shown)


def test_clear(child: SpawnBase) -> None:
    assert "\x1b[H" in ask(child, ":clear")
    assert "\x1b[H" in ask(child, ":cl")


def test_settings(child: SpawnBase) -> None:
    assert "top_p = 0.8" in ask(child, ":conf")
    shown = ask(child, ":conf top_p=0.5 do_sample=false max_new_tokens=3")
    assert "top_p = 0.5" in shown
    assert "do_sample = False" in shown
    assert "max_new_tokens = 3" in shown
    assert 0 < len(reply(child, "hello")) <= 3 * len("hello")
    shown = ask(child, ":reset-conf")
    assert "top_p = 0.8" in shown
    assert "do_sample = True" in shown
    assert "max_new_tokens = 24" in shown


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (":histroy", "Did you mean :history?"),
        (":", "Unknown command"),
        (":zzzzz", ":help lists all commands"),
        (":conf top_p=abc", "top_p must be a number above 0 and up to 1, not 'abc'"),
        (":conf top_p=1.5", "top_p must be"),
        (":conf tpo_p=0.5", "Did you mean top_p?"),
        (":conf top_p=0.5 top_k=x", "Nothing was changed"),
        (":conf top_p", "is not KEY=VALUE"),
        (":conf top_p=", "needs a value"),
        (":conf max_new_tokens=__import__('os').getpid()", "must be a whole number"),
        (":seed soon", "whole number"),
        (":seed -1", "whole number"),
        (":help me", "takes no argument"),
    ],
)
def test_bad_commands_explain_themselves(child: SpawnBase, line: str, expected: str) -> None:
    shown = ask(child, line)
    assert expected in shown
    assert "Traceback" not in shown
    assert "top_p = 0.8" in ask(child, ":conf")
    assert "seed = 1234" in ask(child, ":seed")


def test_model_error_ends_the_reply_not_the_session(child: SpawnBase) -> None:
    shown = ask(child, PASTE.format("the end. " * 4000))
    assert "8192" in shown
    assert "Traceback" not in shown
    assert "Nothing has been said" in ask(child, ":history")
    assert reply(child, "hello")


# Settings, without a terminal


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("top_p=0.5", {"top_p": 0.5}),
        ("do_sample=True use_cache=false", {"do_sample": True, "use_cache": False}),
        ("top_k=null top_p=None", {"top_k": None, "top_p": None}),
        ("stop_words_ids=[[1, 2], [3]] top_k = 4", {"stop_words_ids": [[1, 2], [3]], "top_k": 4}),
        ("cache_implementation=static", {"cache_implementation": "static"}),
        ("top_p=1e-1000000000000(", {"top_p": "1e-1000000000000("}),
    ],
)
def test_parse_settings(text: str, expected: dict) -> None:
    assert parse_settings(text) == expected


@pytest.mark.parametrize(
    "setting",
    [
        {"top_p": "abc"},
        {"top_p": 0},
        {"top_p": True},
        {"top_p": float("nan")},
        {"temperature": 0},
        {"top_k": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"max_new_tokens": 10.0},
        {"repetition_penalty": -1},
        {"do_sample": 1},
        {"num_beams": 4},
        {"eos_token_id": "end"},
        {"stop_words_ids": [1, 2]},
        {"cache_implementation": "magic"},
        {"early_stopping": "maybe"},
        {"output_scores": True},
        {"compile_config": {}},
        {"transformers_version": "4.32.0"},
        {"no_such_thing": 1},
    ],
)
def test_invalid_settings_are_rejected(setting: dict) -> None:
    config = GenerationConfig(top_p=0.8, max_new_tokens=24)
    before = config.to_dict()
    with pytest.raises(ValueError, match=next(iter(setting))):
        updated_config(config, setting)
    assert config.to_dict() == before


def test_unsetting_a_setting() -> None:
    config = updated_config(GenerationConfig(repetition_penalty=1.1), {"repetition_penalty": None})
    assert config.repetition_penalty is None


# Output


def test_piped_questions_print_only_replies(tiny_chat_checkpoint: Path, tmp_path: Path) -> None:
    words = ["cli_demo.py", "-c", tiny_chat_checkpoint, "--cpu-only"]
    result = run_script(*words, text="hello\n\n:conf max_new_tokens=5\nagain", **environment(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert PROMPT not in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stderr.strip() == f"Loading {tiny_chat_checkpoint} ..."
    assert not (tmp_path / "qwen").exists()  # lines that nobody typed are not saved


@pytest.mark.parametrize("text", [b"", b"\xff\xfe \xe4\n\xed\xa0\xbd\n\x00\x1b[31m\nhello"])
def test_odd_input(text: bytes, tiny_chat_checkpoint: Path, main: Callable) -> None:
    code, _, errors = main("-c", tiny_chat_checkpoint, "--cpu-only", text=text)
    assert code == 0
    assert "Traceback" not in errors


def test_closed_pipe_ends_quietly(tiny_chat_checkpoint: Path, tmp_path: Path) -> None:
    command = f"'{sys.executable}' cli_demo.py -c '{tiny_chat_checkpoint}' --cpu-only | head -c 1"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=os.environ | environment(tmp_path),
        input=b":conf max_new_tokens=500\nhello\nhello\n",
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert b"Error" not in result.stderr


# Start


def test_missing_folder_is_reported_in_one_line(main: Callable) -> None:
    code, output, errors = main("-c", "/no/such/folder")
    loading, message = errors.splitlines()
    assert (code, output, loading) == (1, "", "Loading /no/such/folder ...")
    assert "/no/such/folder" in message


def test_unreachable_hub_is_reported_in_one_line(main: Callable) -> None:
    name = "nobody/Qwen-7B-Chat"  # nobody has downloaded it
    code, output, errors = main("-c", name)
    loading, message = errors.splitlines()
    assert (code, output, loading) == (1, "", f"Loading {name} ...")
    assert name in message


@pytest.mark.parametrize("arguments", [["--seed", "soon"], ["--seed", "-1"], ["--no-such-flag"]])
def test_bad_arguments(arguments: list[str]) -> None:
    command = [sys.executable, "cli_demo.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert result.returncode == 2
    assert b"usage:" in result.stderr
    assert b"Traceback" not in result.stderr


def test_help_needs_no_libraries() -> None:
    command = [sys.executable, "-S", "cli_demo.py", "--help"]  # -S: no site-packages
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert b"--checkpoint-path" in result.stdout


def test_missing_libraries_are_named() -> None:
    command = [sys.executable, "-S", "cli_demo.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert result.returncode == 1
    assert b"make chat" in result.stderr
    assert b"Traceback" not in result.stderr


# The bundled model


def test_the_bundled_model_chats_and_says_that_it_is_a_toy(chat: Callable, bundled_chat: Path) -> None:
    child = chat(checkpoint=None, python=True)
    shown = child.logfile_read.getvalue()
    assert "toy" in shown
    assert "Qwen/Qwen-7B-Chat" in shown
    assert len(ask(child, "你好").split("Qwen> ")[1].strip()) > 1
    assert leave(child) == 0


def test_base_model_is_rejected(main: Callable, bundled_base: Path) -> None:
    code, output, errors = main("-c", bundled_base, "--cpu-only")
    assert (code, output) == (1, "")
    assert "not a chat model" in errors
    assert "Traceback" not in errors
