"""Chat with a first-generation Qwen model in the terminal.

Revolves around one `Session`: the conversation so far and what the person may change about it. It reads lines, hands
questions to `model.chat_stream` and prints what is new of each partial reply; how a prompt is built, what a token is
and where the model runs, it does not know.

Replies and what commands show go to standard output, everything else (banner, notes, complaints) to standard error:
after `echo "hi" | python cli_demo.py > reply.txt` the file holds the reply alone.
"""

import argparse
import ast
import contextlib
import copy
import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

try:  # line editing and history; absent on Windows
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

# torch, transformers and qwen are imported in main(): they take seconds, and --help and the banner need not wait.

HELP = '''\
Type a question and press Enter. A pasted text of several lines is one question; to type one, put """ before and after.
Ctrl-C stops an answer (what has been said stays in the conversation); at the prompt it leaves.

  :help, :h                 this text
  :exit, :quit, :q          leave (so do Ctrl-D and Ctrl-C at the prompt)
  :clear, :cl               clear the screen
  :clear-his, :clh          forget the conversation
  :history, :his            show the conversation
  :seed                     show the random seed
  :seed N                   set it; the same seed and conversation give the same answer
  :conf                     show the generation settings
  :conf KEY=VALUE ...       change some, for example  :conf top_p=0.9 do_sample=true;  null unsets one
  :reset-conf               back to the settings of the checkpoint
'''

BUNDLED_NOTE = (
    "This is the small bundled toy model. Real ones: -c Qwen/Qwen-1_8B-Chat, Qwen/Qwen-7B-Chat, Qwen/Qwen-14B-Chat, "
    "Qwen/Qwen-72B-Chat, or a folder."
)

Range = tuple[str, Callable[[Any], bool]]


def _whole(least: int) -> Range:
    return f"a whole number from {least} on", lambda v: type(v) is int and v >= least


def _number(text: str, inside: Callable[[float], bool]) -> Range:
    return text, lambda v: type(v) in (int, float) and inside(v)


SWITCH: Range = ("true or false", lambda v: type(v) is bool)
SHARE: Range = _number("a number above 0 and up to 1", lambda v: 0 < v <= 1)

# What transformers checks only while it generates, if at all; a wrong value should be refused where it is typed.
RANGES: dict[str, Range] = {
    "do_sample": SWITCH,
    "use_cache": SWITCH,
    "temperature": _number(
        "a number above 0 (for greedy decoding set do_sample=false)", lambda v: 0 < v < float("inf")
    ),
    "top_k": _whole(0),
    "top_p": SHARE,
    "typical_p": SHARE,
    "min_p": _number("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "repetition_penalty": _number("a number above 0", lambda v: 0 < v < float("inf")),
    "no_repeat_ngram_size": _whole(0),
    "max_new_tokens": _whole(1),
    "min_new_tokens": _whole(0),
    "max_length": _whole(1),
    "min_length": _whole(0),
    "max_time": _number("a number of seconds above 0", lambda v: v > 0),
    "max_window_size": _whole(1),
    "num_beams": ("1: beam search ends before it knows its first word, so it cannot stream", lambda v: v == 1),
    "num_return_sequences": ("1", lambda v: v == 1),
    "eos_token_id": ("a token id or a list of them", lambda v: _is_ids(v) or _is_ids([v])),
    "pad_token_id": _whole(0),
    "stop_words_ids": (
        "a list of lists of token ids, such as [[198]]",
        lambda v: isinstance(v, list) and all(_is_ids(x) for x in v),
    ),
    "chat_format": ("chatml", lambda v: v == "chatml"),
}
QWEN_KEYS = {"chat_format", "max_window_size", "stop_words_ids"}
# Fields of GenerationConfig that hold objects, or change what generate() returns: nothing that a line of text can set.
NOT_SETTABLE = {"compile_config", "watermarking_config", "transformers_version", "return_dict_in_generate"}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int and x >= 0 for x in value)


def parse_settings(text: str) -> dict[str, Any]:
    """Read "top_p=0.9 do_sample=true" into a dict: values are Python or JSON literals, else strings. No code is run.

    Raises:
        ValueError: something in the text is not KEY=VALUE.
    """
    before, *pairs = re.split(r"(?:^|\s)([A-Za-z_]\w*)\s*=\s*", text.strip())
    if before or not pairs:
        raise ValueError(f"{before or text!r} is not KEY=VALUE. Write it like  :conf top_p=0.9 do_sample=true")
    settings = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not value.strip():
            raise ValueError(f"{key} needs a value after the =; to unset it write {key}=null.")
        settings[key] = _literal(value.strip())
    return settings


def _literal(text: str) -> Any:
    named = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def changed_settings(config: Any, settings: dict[str, Any]) -> Any:
    """A copy of a GenerationConfig with some fields changed; the original stays as it is.

    Raises:
        ValueError: an unknown field or a value that it cannot take, said in a sentence.
    """
    known = {key for key in config.to_dict() if not key.startswith("_")} | QWEN_KEYS
    known -= NOT_SETTABLE | {key for key in known if key.startswith("output_")}
    config = copy.deepcopy(config)
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"There is no setting {key!r}. " + (f"Did you mean {near[0]}?" if near else "See :conf."))
        allowed, inside = RANGES.get(key, ("", lambda v: True))
        if value is not None and not inside(value):
            raise ValueError(f"{key} must be {allowed}, not {value!r}.")
        setattr(config, key, value)
    try:
        config.validate()
    except (ValueError, TypeError, AttributeError) as error:  # the last two: comparing a number with a string
        raise ValueError(f"transformers refuses this setting: {error}") from error
    return config


class Terminal:
    """What the person sees and types: prompt, colours, line editing, questions of several lines."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.colour = sys.stdout.isatty() and not dumb and not os.environ.get("NO_COLOR")
        for stream in (sys.stdin, sys.stdout, sys.stderr):  # a character that the locale lacks is no reason to crash
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        self.history_file: Path | None = None
        self.pastes_are_marked = False
        if self.interactive and readline is not None:
            gnu = "libedit" not in (readline.__doc__ or "")
            if gnu and not dumb:
                # Off by default in Python. With it a pasted block arrives as one line with newlines inside.
                readline.parse_and_bind("set enable-bracketed-paste on")
                self.pastes_are_marked = getattr(readline, "_READLINE_RUNTIME_VERSION", 0) >= 0x0700
            self._load_history()

    def paint(self, text: str, style: str, *, in_prompt: bool = False) -> str:
        """Wrap text in an ANSI style such as "1;32" where colour is on; in_prompt: as readline wants it."""
        if not self.colour:
            return text
        start, end = f"\x1b[{style}m", "\x1b[0m"
        if in_prompt and readline is not None:
            start, end = f"\x01{start}\x02", f"\x01{end}\x02"
        return start + text + end

    def note(self, text: str) -> None:
        """Print something about the program, beside the conversation."""
        sys.stdout.flush()
        print(self.paint(text, "2") if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def complain(self, text: str) -> None:
        """Print what went wrong, in one sentence or two."""
        sys.stdout.flush()
        print(self.paint(text, "31") if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Clear the screen, where there is one."""
        if sys.stdout.isatty():
            print("\x1b[2J\x1b[3J\x1b[H", end="", flush=True)

    def read(self) -> str:
        """One question or command, perhaps of several lines. EOFError at the end of the input."""
        text = self._line(self.paint("User> ", "1;32", in_prompt=True))
        if text.strip().startswith('"""'):
            return self._quoted(text.strip()[3:])
        if self.interactive and not self.pastes_are_marked and not text.startswith(":"):
            # Lines that arrive faster than anyone types were pasted together.
            with contextlib.suppress(OSError, EOFError):
                while select.select([sys.stdin], [], [], 0.03)[0]:
                    text += "\n" + self._line("")
        return text

    def _quoted(self, first: str) -> str:
        lines = [first]
        try:
            while not lines[-1].rstrip().endswith('"""'):
                lines.append(self._line("... "))
            lines[-1] = lines[-1].rstrip()[:-3]
        except EOFError:  # the end of the input ends the block as well
            pass
        except KeyboardInterrupt:
            self.note("\n[the started block was dropped]")
            return ""
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        return input(prompt if self.interactive else "")

    def _load_history(self) -> None:
        state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        self.history_file = Path(state) / "qwen" / "cli_history"
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            readline.read_history_file(self.history_file)

    def save_history(self) -> None:
        """Keep the typed lines for the next session, readable by their owner only; without a place for it, don't."""
        if self.history_file is not None:
            with contextlib.suppress(OSError):
                self.history_file.parent.mkdir(parents=True, exist_ok=True)
                self.history_file.touch(mode=0o600)
                readline.write_history_file(self.history_file)


@contextlib.contextmanager
def interrupted_once() -> Iterator[None]:
    """Inside, the first Ctrl-C raises KeyboardInterrupt and more of them do nothing, so that cleaning up can finish."""

    def first(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Session:
    """A conversation with one model, and the commands that steer it."""

    def __init__(self, model: Any, tokenizer: Any, terminal: Terminal, system: str, seed: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.terminal = terminal
        self.system = system
        self.seed = seed
        self.history: list[tuple[str, str]] = []
        self.checkpoint_config = copy.deepcopy(model.generation_config)

    def run(self) -> None:
        """Read and answer until the person leaves."""
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
            print()  # the shell's prompt should not follow ours on the line

    def answer(self, query: str) -> None:
        """Print the reply while it comes and add the turn to the history, also when Ctrl-C cuts the reply short."""
        import torch

        reply, shown, stopped = "", 0, False
        with interrupted_once():
            try:
                torch.manual_seed(self.seed)
                if self.terminal.interactive:
                    print(self.terminal.paint("Qwen> ", "1;36"), end="", flush=True)
                replies = self.model.chat_stream(self.tokenizer, query, history=self.history, system=self.system)
                with contextlib.closing(replies):  # closing it stops the computation
                    for reply in replies:
                        print(reply[shown:], end="", flush=True)
                        shown = len(reply)
            except KeyboardInterrupt:
                stopped = True
            except BrokenPipeError:
                raise
            except Exception as error:
                if self.terminal.interactive or reply:
                    print()
                self.terminal.complain(_explain(error))
                if not reply:
                    return
                stopped = True
            # Where it was stopped, what `shown` does not count may be on the screen already.
            print("" if stopped else reply[shown:], flush=True)
            if reply or not stopped:
                self.history = [*self.history, (query, reply)]
        if stopped and reply:
            self.terminal.note("[stopped; the conversation keeps what was said]")
        elif stopped:
            self.terminal.note("[stopped before the first word; the conversation is as it was]")

    def command(self, line: str) -> bool:
        """Carry out a line that starts with a colon; False means to leave."""
        name, _, argument = line[1:].strip().partition(" ")
        argument = argument.strip()
        commands: dict[str, Callable[[str], None]] = {
            **dict.fromkeys(("help", "h"), self.show_help),
            **dict.fromkeys(("clear", "cl"), lambda _: self.terminal.clear()),
            **dict.fromkeys(("clear-his", "clh"), self.forget),
            **dict.fromkeys(("history", "his"), self.show_history),
            "seed": self.set_seed,
            "conf": self.configure,
            "reset-conf": self.reset,
        }
        leaving = ("exit", "quit", "q")
        if name in leaving:
            return False
        if name in commands:
            if argument and name not in ("seed", "conf"):
                self.terminal.note(f":{name} takes no argument; {argument!r} is ignored.")
            commands[name](argument)
            return True
        near = difflib.get_close_matches(name, [*commands, *leaving], n=1)
        self.terminal.complain(
            f"There is no command :{name}. "
            + (f"Did you mean :{near[0]}? " if near else "")
            + ":help lists them all; for a question that starts with a colon, type a space before it."
        )
        return True

    def show_help(self, _: str) -> None:
        """`:help`"""
        print(HELP, flush=True)

    def forget(self, _: str) -> None:
        """`:clear-his`"""
        self.terminal.note(f"Forgot {len(self.history)} turn{'' if len(self.history) == 1 else 's'}.")
        self.history = []

    def show_history(self, _: str) -> None:
        """`:history`"""
        if not self.history:
            self.terminal.note("Nothing has been said yet.")
        for number, (query, reply) in enumerate(self.history, 1):
            print(self.terminal.paint(f"[{number}] User: ", "1;32") + query)
            print(self.terminal.paint(f"[{number}] Qwen: ", "1;36") + reply, flush=True)

    def set_seed(self, argument: str) -> None:
        """`:seed` and `:seed N`"""
        if argument:
            try:
                self.seed = seed_number(argument)
            except argparse.ArgumentTypeError as error:
                self.terminal.complain(f"{error} The seed stays {self.seed}.")
                return
        print(f"seed = {self.seed}", flush=True)

    def configure(self, argument: str) -> None:
        """`:conf` and `:conf key=value …`; all of the changes are made or, when one is refused, none."""
        if argument:
            try:
                self.model.generation_config = changed_settings(self.model.generation_config, parse_settings(argument))
            except ValueError as error:
                self.terminal.complain(f"{error} Nothing was changed.")
                return
        settings = self.model.generation_config.to_diff_dict()
        for key in sorted(settings):
            if key != "transformers_version" and not key.startswith("_"):
                print(f"{key} = {settings[key]!r}")
        sys.stdout.flush()

    def reset(self, _: str) -> None:
        """`:reset-conf`"""
        self.model.generation_config = copy.deepcopy(self.checkpoint_config)
        self.configure("")


def _explain(error: Exception) -> str:
    """A sentence for an error of the library; those that are not meant for people are named as such."""
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    if "out of memory" in str(error).lower():
        return (
            "Out of memory. Shorten the conversation (:clear-his), or lower max_new_tokens (:conf max_new_tokens=256)."
        )
    return f"The model failed ({type(error).__name__}: {error}). If a setting is to blame, :reset-conf undoes it."


def seed_number(text: str) -> int:
    """A seed as torch.manual_seed takes it."""
    with contextlib.suppress(ValueError):
        if 0 <= (seed := int(text)) < 2**64:
            return seed
    raise argparse.ArgumentTypeError(f"A seed is a whole number from 0 to 2**64 - 1, not {text!r}.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Chat with a first-generation Qwen model in the terminal.")
    parser.add_argument(
        "-c",
        "--checkpoint-path",
        metavar="NAME",
        help="a folder, or a hub id such as Qwen/Qwen-7B-Chat (default: the small bundled model)",
    )
    parser.add_argument("-s", "--seed", type=seed_number, default=1234, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--hub", choices=("huggingface", "modelscope"), help="where ids come from (default: QWEN_HUB, or huggingface)"
    )
    parser.add_argument("--cpu-only", action="store_true", help="run on the CPU even if there is a GPU")
    parser.add_argument("--int8-cache", action="store_true", help="keep the key/value cache in 8 bits, half the memory")
    parser.add_argument(
        "--system", metavar="TEXT", default="You are a helpful assistant.", help="system prompt (default: %(default)r)"
    )
    return parser.parse_args()


def main() -> int:
    """Returns the exit status: 0 after a conversation, 1 where none could begin, 130 when stopped before it began."""
    arguments = parse_arguments()
    terminal = Terminal()
    if arguments.checkpoint_path is None:
        terminal.note(BUNDLED_NOTE)
    else:
        terminal.note(f"Loading {arguments.checkpoint_path} ...")
    try:
        from qwen.checkpoint.loading import load_model_quietly

        model, tokenizer = load_model_quietly(
            arguments.checkpoint_path,
            chat=True,
            cpu_only=arguments.cpu_only,
            int8_cache=arguments.int8_cache,
            hub=arguments.hub,
        )
    except KeyboardInterrupt:
        terminal.note("Stopped while loading.")
        return 130
    except ImportError as error:
        terminal.complain(
            f"{error}. Install the requirements (pip install -r requirements.txt), or start with `make chat`."
        )
        return 1
    except (OSError, ValueError) as error:
        terminal.complain(str(error))
        return 1
    if terminal.interactive:
        terminal.note("Ask something, or type :help.")
    try:
        Session(model, tokenizer, terminal, arguments.system, arguments.seed).run()
        sys.stdout.flush()
    except KeyboardInterrupt:  # between the prompt and an answer
        return 0
    except BrokenPipeError:  # whoever read our output has gone; keep Python from flushing into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        terminal.save_history()
    return 0
