"""The command `qwen`: `qwen COMMAND [arguments]`, also as `python -m qwen_cli`."""

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .console import print_message

# Command name: (module in this package, description).
COMMANDS = {
    "chat": ("chat", "chat with a model in the terminal"),
    "web": ("web", "chat with a model in the browser"),
    "serve": ("serve", "serve a model over HTTP with an OpenAI-compatible API"),
    "finetune": ("finetune", "fine-tune a model on conversations: all weights, LoRA or Q-LoRA"),
    "quantize": ("quantize", "quantize a model to 4 or 8 bits (GPTQ)"),
    "merge": ("merge", "merge a LoRA adapter into its base model"),
    "export": ("export", "export a model for other inference engines"),
    "adopt": ("adopt", "make a downloaded model load in programs without this package"),
    "eval": ("evaluate", "evaluate a model on a benchmark"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"qwen {version()}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean `qwen {near[0]}`?" if near else "`qwen --help` lists all."
        print_message(f"Unknown {'option' if name.startswith('-') else 'command'} {name}. {hint}")
        return 2
    try:
        return importlib.import_module(f"qwen_cli.{COMMANDS[name][0]}").main(rest, prog=f"qwen {name}")
    except KeyboardInterrupt:  # before the command installed its own handler
        return 130


def usage() -> str:
    """Return the text of `qwen --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qwen COMMAND [arguments]",
            "",
            "First-generation Qwen language models on transformers 5.",
            "",
            *lines,
            "",
            "`qwen COMMAND --help` lists the arguments of a command. `qwen --version` prints the version.",
        ]
    )


def version() -> str:
    """Read the version from qwen/_version.py, without importing `qwen`, which takes seconds."""
    text = Path(__file__).resolve().parents[1].joinpath("qwen", "_version.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'__version__ = "(.+)"', text)
    return found


if __name__ == "__main__":
    sys.exit(main())
