"""The terminal: prompt, colours, line editing with a history, questions of several lines."""

import contextlib
import os
import select
import sys
from pathlib import Path

try:  # line editing and history; absent on Windows
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]


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
