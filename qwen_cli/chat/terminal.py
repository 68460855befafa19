"""Terminal input and output: prompt, colours, line editing with history, multi-line questions."""

import contextlib
import os
import select
import sys
from pathlib import Path

from ..console import open_closed_streams, print_message

try:  # line editing and history; absent on Windows
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]  # not on Windows


class Terminal:
    """Reads questions and prints messages."""

    def __init__(self) -> None:
        open_closed_streams()
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.colour = sys.stdout.isatty() and not dumb and not os.environ.get("NO_COLOR")
        for stream in (sys.stdin, sys.stdout, sys.stderr):  # do not crash on characters that the locale lacks
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a text file
        self.history_file: Path | None = None
        self.bracketed_paste = False
        if self.interactive and readline is not None:
            gnu = "libedit" not in (readline.__doc__ or "")
            if gnu and not dumb:
                # Off by default in Python. With it, a pasted block arrives as one line that contains newlines.
                readline.parse_and_bind("set enable-bracketed-paste on")
                self.bracketed_paste = getattr(readline, "_READLINE_RUNTIME_VERSION", 0) >= 0x0700
            self._load_history()

    def paint(self, text: str, style: str, *, in_prompt: bool = False) -> str:
        """Wrap text in an ANSI style like "1;32" if colour is on; `in_prompt` adds the markers that readline needs."""
        if not self.colour:
            return text
        start, end = f"\x1b[{style}m", "\x1b[0m"
        if in_prompt and readline is not None:
            start, end = f"\x01{start}\x02", f"\x01{end}\x02"
        return start + text + end

    def print_note(self, text: str) -> None:
        """Print a message about the program to standard error."""
        sys.stdout.flush()
        print_message(self.paint(text, "2") if sys.stderr.isatty() else text)

    def print_error(self, text: str) -> None:
        """Print an error message to standard error."""
        sys.stdout.flush()
        print_message(self.paint(text, "31") if sys.stderr.isatty() else text)

    def clear(self) -> None:
        """Clear the screen if standard output is a terminal."""
        if sys.stdout.isatty():
            print("\x1b[2J\x1b[3J\x1b[H", end="", flush=True)

    def read(self) -> str:
        """Read one question or command, which may have several lines. Raises EOFError at the end of the input."""
        text = self._line(self.paint("User> ", "1;32", in_prompt=True))
        if text.strip().startswith('"""'):
            return self._quoted(text.strip()[3:])
        if self.interactive and not self.bracketed_paste and not text.startswith(":"):
            # Lines that arrive faster than anyone can type were pasted together.
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
        except EOFError:  # the end of the input also ends the block
            pass
        except KeyboardInterrupt:
            self.print_note("\n[unfinished block discarded]")
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
        """Save the typed lines for the next session, readable only by their owner; ignores write errors."""
        if self.history_file is not None:
            with contextlib.suppress(OSError):
                self.history_file.parent.mkdir(parents=True, exist_ok=True)
                self.history_file.touch(mode=0o600)
                readline.write_history_file(self.history_file)
