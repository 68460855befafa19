"""The conversation of cli_demo.py on the engine, in this process and without a terminal."""

import io
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from qwen.checkpoint.loading import load_model_quietly
from qwen.serving.engine import Engine
from qwen_cli.chat import converse
from qwen_cli.chat.session import Session
from qwen_cli.chat.settings import settings_beyond_engine
from qwen_cli.chat.terminal import Terminal
from tests.support import ROOT

BLOCK = 16  # tokens; the engine finds whole blocks again


class Conversation:
    """A session, what it prints, and the streams that its engine starts."""

    def __init__(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n"), "utf-8"))
        model, tokenizer = load_model_quietly(str(checkpoint), chat=True, cpu_only=True)
        self.engine = Engine(model, tokenizer, max_batch_size=1)
        self.session = Session(self.engine, Terminal(), "You are a helpful assistant.", seed=1234)
        self.streams = []
        self.errors = ""
        self._capfd, start = capfd, self.engine.start
        monkeypatch.setattr(
            self.engine, "start", lambda *a, **k: self.streams.append(start(*a, **k)) or self.streams[-1]
        )

    def say(self, line: str) -> str:
        """Enter a question or a command; return what is printed. What goes to standard error is in `errors`."""
        self._capfd.readouterr()
        if line.startswith(":"):
            self.session.command(line)
        else:
            self.session.answer(line)
        output, self.errors = self._capfd.readouterr()
        return output.removesuffix("\n")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Iterator[Callable[[Path], Conversation]]:
    """Begin conversations whose engines end with the test."""
    begun = []

    def begin(checkpoint: Path) -> Conversation:
        begun.append(Conversation(checkpoint, monkeypatch, capfd))
        return begun[-1]

    yield begin
    for conversation in begun:
        conversation.engine.close(timeout=0)


def test_a_turn_encodes_only_what_is_new(start: Callable, bundled_chat: Path) -> None:
    chat = start(bundled_chat)
    replies = [chat.say(line) for line in ("My name is Alice.", "What is 47 + 38?", "What is my name?")]
    assert replies == ["Nice to meet you, Alice!", "47 + 38 = 85.", "Your name is Alice."]
    assert [reply for _, reply in chat.session.history] == replies
    first, *later = chat.streams
    assert first.cached_tokens == 0
    for before, stream in zip(chat.streams, later, strict=False):
        assert stream.cached_tokens > before.prompt_tokens + before.completion_tokens - BLOCK


def test_the_engine_replies_as_chat_stream_does(start: Callable, bundled_chat: Path) -> None:
    chat, lines = start(bundled_chat), ("Hello!", "你好！", "What is 12 + 30?")
    chat.say(":conf do_sample=false repetition_penalty=1.1 max_new_tokens=20")
    replies = [chat.say(line) for line in lines]
    assert len(chat.streams) == len(lines)
    chat.say(":clear-his")
    chat.say(":conf use_cache=false")  # a setting that the engine lacks
    assert [chat.say(line) for line in lines] == replies
    assert len(chat.streams) == len(lines)


def test_settings_that_the_engine_lacks_are_followed_and_explained_once(
    start: Callable, tiny_chat_checkpoint: Path
) -> None:
    chat = start(tiny_chat_checkpoint)
    chat.say(":conf do_sample=false")
    greedy = chat.say("hello")
    chat.say(":clear-his")
    chat.say(":conf do_sample=true min_p=1")  # leaves the most likely token
    assert chat.say("hello") == greedy
    assert chat.errors.startswith("[min_p: only transformers' generate has this setting")
    chat.say("again")
    assert not chat.errors
    chat.say(":conf typical_p=0.9")
    chat.say("again")
    assert chat.errors.startswith("[typical_p: ")
    assert len(chat.streams) == 1
    chat.say(":reset-conf")
    chat.say("again")
    assert not chat.errors
    assert len(chat.streams) == 2
    assert len(chat.session.history) == 4


@pytest.mark.parametrize("settings", ["", "min_p=0.01"], ids=["engine", "generate"])
@pytest.mark.parametrize("seed", [1234, 0, 2**64 - 1])
def test_the_same_seed_gives_the_same_reply(
    start: Callable, tiny_chat_checkpoint: Path, settings: str, seed: int
) -> None:
    chat = start(tiny_chat_checkpoint)
    chat.say(f":conf {settings}")
    chat.say(f":seed {seed}")
    first = chat.say("hello")
    second = chat.say("and then?")
    chat.say(":clear-his")
    assert [chat.say("hello"), chat.say("and then?")] == [first, second]  # with the prompt in the cache
    chat.say(":clear-his")
    chat.say(":seed 5")
    assert chat.say("hello") != first


def test_ctrl_c_stops_the_engine(start: Callable, tiny_chat_checkpoint: Path) -> None:
    chat = start(tiny_chat_checkpoint)
    chat.say(":conf max_new_tokens=6000")
    passes = []

    def interrupt(*_: object) -> None:
        passes.append(1)
        if len(passes) == 20:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    hook = chat.engine.model.transformer.ln_f.register_forward_hook(interrupt)
    try:
        reply = chat.say("hello")
    finally:
        hook.remove()
    assert "[stopped; the partial reply" in chat.errors
    assert chat.session.history == [("hello", reply)]
    chat.say(":reset-conf")
    assert chat.say("hello")  # the engine takes one reply at a time, so the one before has ended
    assert chat.streams[0].finish_reason == "cancelled"


def test_a_model_error_ends_the_reply_not_the_session(start: Callable, tiny_chat_checkpoint: Path) -> None:
    chat = start(tiny_chat_checkpoint)

    def fail(*_: object) -> None:
        raise RuntimeError("the sizes differ")

    hook = chat.engine.model.transformer.ln_f.register_forward_hook(fail)
    chat.say("hello")
    assert chat.errors.startswith("The model failed (RuntimeError: the sizes differ).")
    hook.remove()
    hook = chat.engine.model.transformer.ln_f.register_forward_hook(lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    chat.say("hello")
    assert chat.errors.startswith("Out of memory. Shorten the conversation")
    hook.remove()
    assert chat.say("hello")
    assert len(chat.session.history) == 1
    chat.engine.close()
    chat.say("hello")
    assert "start again" in chat.errors


@pytest.mark.process
def test_a_model_error_shows_no_traceback(tiny_chat_checkpoint: Path) -> None:
    """In a process of its own, because pytest handles what is logged."""
    script = """if True:
        import sys
        from qwen_cli.chat import main
        from qwen_cli.console import quiet_imports
        quiet_imports()
        from torch.nn import Embedding
        Embedding.forward = lambda *args, **kwargs: {}["a fault"]
        sys.exit(main(sys.argv[1:]))
    """
    result = subprocess.run(
        [sys.executable, "-c", script, "-c", tiny_chat_checkpoint, "--cpu-only"],
        cwd=ROOT,
        input="hello\nhello\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    _, *errors = result.stderr.splitlines()
    assert result.returncode == 0
    assert len(errors) == 2, errors
    assert all(line.startswith("The model failed (KeyError: 'a fault').") for line in errors)


def test_the_engine_ends_with_the_conversation(start: Callable, tiny_chat_checkpoint: Path) -> None:
    chat, handler = start(tiny_chat_checkpoint), signal.getsignal(signal.SIGINT)
    assert converse(chat.session) == 0
    assert len(chat.session.history) == 1
    assert not chat.engine.thread.is_alive()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("settings", "beyond"),
    [
        ({"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "repetition_penalty": 1.2}, []),
        ({"max_new_tokens": 3, "max_window_size": 10, "pad_token_id": 1, "chat_format": "chatml"}, []),
        ({"num_beams": 1, "min_p": 0.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "use_cache": True}, []),
        ({"stop_words_ids": [], "min_p": None, "a_field_of_somebody": 1}, []),
        ({"min_p": 0.1, "num_beams": 2}, ["min_p", "num_beams"]),
        ({"stop_words_ids": [[1, 2]]}, ["stop_words_ids"]),
        ({"use_cache": False}, ["use_cache"]),
        ({"eos_token_id": 8}, ["eos_token_id"]),
        ({"max_time": 3}, ["max_time"]),
    ],
)
def test_settings_beyond_the_engine(settings: dict, beyond: list[str]) -> None:
    checkpoint = GenerationConfig(eos_token_id=7, pad_token_id=7, do_sample=True, top_p=0.8)
    config = GenerationConfig(**checkpoint.to_diff_dict() | settings)
    assert settings_beyond_engine(config, checkpoint) == beyond
