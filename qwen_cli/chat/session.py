"""A conversation in the terminal, and its commands.

Replies and the output of commands go to standard output, everything else (banner, notes, errors) to standard error:
after `echo "hi" | qwen chat > reply.txt` the file contains only the reply.
"""

import argparse
import contextlib
import copy
import difflib
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING, cast

from ..arguments import random_seed
from .settings import parse_settings, settings_beyond_engine, updated_config
from .terminal import Terminal

if TYPE_CHECKING:  # takes seconds to import
    from qwen.serving.engine import Engine

HELP = '''\
Type a question and press Enter. A pasted text of several lines is one question; to type one, put """ before and after.
Ctrl-C stops a reply (the part already printed stays in the conversation); at the prompt it leaves.

  :help, :h                 this text
  :exit, :quit, :q          leave (so do Ctrl-D and Ctrl-C at the prompt)
  :clear, :cl               clear the screen
  :clear-his, :clh          forget the conversation
  :history, :his            show the conversation
  :seed                     show the random seed
  :seed N                   set it; the same seed and conversation give the same reply
  :conf                     show the generation settings
  :conf KEY=VALUE ...       change some, for example  :conf top_p=0.9 do_sample=true;  null unsets one
  :reset-conf               restore the settings of the checkpoint
'''


@contextlib.contextmanager
def interrupt_once() -> Iterator[None]:
    """Raise KeyboardInterrupt on the first Ctrl-C and ignore further ones, so that cleanup can finish."""

    def first(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Session:
    """A conversation with one model."""

    def __init__(self, engine: "Engine", terminal: Terminal, system: str, seed: int) -> None:
        self.engine = engine
        self.model = engine.model
        self.tokenizer = engine.tokenizer
        self.terminal = terminal
        self.system = system
        self.seed = seed
        self.history: list[tuple[str, str]] = []
        self.checkpoint_config = copy.deepcopy(self.model.generation_config)
        self._explained: set[str] = set()  # settings that the user knows the engine lacks

    def run(self) -> None:
        """Read and answer until the user leaves."""
        while True:
            try:
                text = self.terminal.read().rstrip("\r\n")
            except (EOFError, KeyboardInterrupt):
                break
            if text.startswith(":") and "\n" not in text:
                if not self.command(text):
                    return
            elif text.strip():
                self.answer(text)
        if self.terminal.interactive:
            print()  # put the shell's prompt on a new line

    def answer(self, query: str) -> None:
        """Stream the reply and add the turn to the history, also if Ctrl-C stops the reply."""
        reply, stopped = "", False
        with interrupt_once():
            try:
                with contextlib.closing(self._pieces(query)) as pieces:  # closing it stops the computation
                    if self.terminal.interactive:
                        print(self.terminal.paint("Qwen> ", "1;36"), end="", flush=True)
                    for piece in pieces:
                        reply += piece
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:
                stopped = True
            except BrokenPipeError:
                raise
            except Exception as error:
                if self.terminal.interactive or reply:
                    print()
                self.terminal.print_error(describe_error(error))
                if not reply:
                    return
                stopped = True
            print(flush=True)
            if reply or not stopped:
                self.history = [*self.history, (query, reply)]
        if stopped and reply:
            self.terminal.print_note("[stopped; the partial reply stays in the conversation]")
        elif stopped:
            self.terminal.print_note("[stopped before the first word; the conversation is unchanged]")

    def _pieces(self, query: str) -> Generator[str]:
        """Return the reply piece by piece: from the engine, which encodes only what is new in the conversation."""
        beyond = settings_beyond_engine(self.model.generation_config, self.checkpoint_config)
        if new := [name for name in beyond if name not in self._explained]:
            self._explained.update(new)
            self.terminal.print_note(
                f"[{', '.join(new)}: only transformers' generate has this setting; with it every turn encodes the "
                "whole conversation again]"
            )
        return self._pieces_from_generate(query) if beyond else self._pieces_from_engine(query)

    def _pieces_from_engine(self, query: str) -> Generator[str]:
        from qwen.model.qwen_generation_utils import chat_turns, encode_turns

        turns, _ = chat_turns(query, self.history, self.system)
        window = getattr(self.model.generation_config, "max_window_size", None)
        _, ids = encode_turns(self.tokenizer, turns, window)
        for piece in self.engine.start(ids, self.engine.params(seed=self.seed), lstrip=True, rstrip=True):
            yield piece.text

    def _pieces_from_generate(self, query: str) -> Generator[str]:
        import torch

        torch.manual_seed(self.seed)
        shown = 0
        replies = self.model.chat_stream(self.tokenizer, query, history=self.history, system=self.system)
        with contextlib.closing(cast("Generator[str]", replies)):
            for reply in replies:
                yield reply[shown:]
                shown = len(reply)

    def command(self, line: str) -> bool:
        """Run a command line that starts with a colon. Returns False if the session should end."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        commands: dict[str, Callable[[str], None]] = {
            **dict.fromkeys(("help", "h"), self.show_help),
            **dict.fromkeys(("clear", "cl"), lambda _: self.terminal.clear()),
            **dict.fromkeys(("clear-his", "clh"), self.clear_history),
            **dict.fromkeys(("history", "his"), self.show_history),
            "seed": self.set_seed,
            "conf": self.configure,
            "reset-conf": self.reset_settings,
        }
        leaving = ("exit", "quit", "q")
        if name in leaving:
            return False
        if name in commands:
            if argument and name not in ("seed", "conf"):
                self.terminal.print_note(f":{name} takes no argument; {argument!r} is ignored.")
            commands[name](argument)
            return True
        near = difflib.get_close_matches(name, [*commands, *leaving], n=1)
        self.terminal.print_error(
            f"Unknown command :{name}. "
            + (f"Did you mean :{near[0]}? " if near else "")
            + ":help lists all commands. To ask a question that starts with a colon, type a space before it."
        )
        return True

    def show_help(self, _: str) -> None:
        """`:help`"""
        print(HELP, flush=True)

    def clear_history(self, _: str) -> None:
        """`:clear-his`"""
        self.terminal.print_note(f"Forgot {len(self.history)} turn{'' if len(self.history) == 1 else 's'}.")
        self.history = []

    def show_history(self, _: str) -> None:
        """`:history`"""
        if not self.history:
            self.terminal.print_note("Nothing has been said yet.")
        for number, (query, reply) in enumerate(self.history, 1):
            print(self.terminal.paint(f"[{number}] User: ", "1;32") + query)
            print(self.terminal.paint(f"[{number}] Qwen: ", "1;36") + reply, flush=True)

    def set_seed(self, argument: str) -> None:
        """`:seed` and `:seed N`"""
        if argument:
            try:
                self.seed = random_seed(argument)
            except argparse.ArgumentTypeError as error:
                self.terminal.print_error(f"{error} The seed is still {self.seed}.")
                return
        print(f"seed = {self.seed}", flush=True)

    def configure(self, argument: str) -> None:
        """`:conf` and `:conf key=value …`; makes all changes, or none if one is invalid."""
        if argument:
            try:
                self.model.generation_config = updated_config(self.model.generation_config, parse_settings(argument))
            except ValueError as error:
                self.terminal.print_error(f"{error} Nothing was changed.")
                return
        settings = self.model.generation_config.to_diff_dict()
        for key in sorted(settings):
            if key != "transformers_version" and not key.startswith("_"):
                print(f"{key} = {settings[key]!r}")
        sys.stdout.flush()

    def reset_settings(self, _: str) -> None:
        """`:reset-conf`"""
        self.model.generation_config = copy.deepcopy(self.checkpoint_config)
        self.configure("")


def describe_error(error: Exception) -> str:
    """Describe an error for the user; unexpected errors are reported with their type."""
    from qwen.library_errors import is_memory_full
    from qwen.serving.engine import EngineClosed, EngineError

    if isinstance(error, EngineError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    if is_memory_full(error):
        return (
            "Out of memory. Shorten the conversation (:clear-his), or lower max_new_tokens (:conf max_new_tokens=256)."
        )
    if isinstance(error, EngineClosed):
        return "The model cannot continue after an earlier error. Leave with :exit and start again."
    return f"The model failed ({type(error).__name__}: {error}). If a setting caused this, undo it with :reset-conf."
