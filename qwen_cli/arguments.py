"""Command-line arguments shared by several commands, and their value types."""

import argparse
import re
import threading
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

from .unknown_options import unknown_options_message

BUNDLED_NOTE = (
    "This is the small bundled toy model. Real ones: -c Qwen/Qwen-1_8B-Chat, Qwen/Qwen-7B-Chat, Qwen/Qwen-14B-Chat, "
    "Qwen/Qwen-72B-Chat, or a folder."
)
HUBS = ("huggingface", "modelscope")
# Scripts that run the same code as the commands. Messages name the script when it was started from a clone.
SCRIPTS = {
    "chat": "cli_demo.py",
    "web": "web_demo.py",
    "serve": "openai_api.py",
    "finetune": "finetune.py",
    "quantize": "run_gptq.py",
    "merge": "finetune/merge_lora.py",
    "export": "export.py",
    "adopt": "adopt.py",
}


class ParserSettings(TypedDict, total=False):
    """Further arguments of ArgumentParser that commands use."""

    usage: str
    epilog: str
    add_help: bool
    allow_abbrev: bool


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose error for an unknown option says what to use instead."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            message = unknown_options_message(unknown, self._option_string_actions)
            self.error(with_script_names(message, self.prog if self.prog.startswith("qwen ") else None))
        return parsed


def make_parser(description: str, prog: str | None, **settings: Unpack[ParserSettings]) -> argparse.ArgumentParser:
    """Create a parser that keeps the line breaks of its description.

    Args:
        description: names commands as `qwen COMMAND`; for a script they are replaced with `python SCRIPT`.
        prog: "qwen export" for the command; None for a script.
        settings: further arguments of ArgumentParser.
    """
    return CommandParser(
        prog=prog,
        description=with_script_names(description, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )


def with_script_names(text: str, prog: str | None) -> str:
    """Replace `qwen export` with `python export.py`, and so on, if `prog` is None (the user runs a script)."""
    if prog is not None:
        return text
    text = re.sub(r"\bqwen eval (needle|long_context)\b", r"python eval/\1.py", text)
    text = re.sub(r"\bqwen eval (\w+)", r"python eval/evaluate_\1.py", text)
    return re.sub(rf"\bqwen ({'|'.join(SCRIPTS)})\b", lambda found: f"python {SCRIPTS[found[1]]}", text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `-c`, `--hub`, `--cpu-only` and `--int8-cache`."""
    add_checkpoint_argument(parser)
    add_hub_argument(parser)
    add_cpu_only_argument(parser)
    parser.add_argument(
        "--int8-cache", action="store_true", help="keep the key/value cache in 8 bits, which halves its memory"
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser, default: str = "the small bundled model") -> None:
    """Add `-c/--checkpoint-path`; the help names `default` as the default."""
    parser.add_argument(
        "-c",
        "--checkpoint-path",
        metavar="NAME",
        help=f"a folder or a hub id, for example Qwen/Qwen-7B-Chat (default: {default})",
    )


def add_hub_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--hub`."""
    parser.add_argument("--hub", choices=HUBS, help="hub to download from (default: $QWEN_HUB or huggingface)")


def add_cpu_only_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--cpu-only`."""
    parser.add_argument("--cpu-only", action="store_true", help="run on the CPU even if there is a GPU")


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    """Add `-s/--seed`."""
    parser.add_argument("-s", "--seed", type=random_seed, default=1234, help="random seed (default: %(default)s)")


def add_address_arguments(parser: argparse.ArgumentParser, min_port: int = 1) -> None:
    """Add `--server-name` and `--server-port`; `min_port=0` allows port 0, where the system chooses a free port."""
    parser.add_argument(
        "--server-name",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument(
        "--server-port",
        type=int_in_range(min_port, 65535),
        default=8000,
        metavar="PORT",
        help=f"port to listen on{'' if min_port else ', 0 for any free port'} (default: %(default)s)",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        type=host_pattern,
        metavar="NAME",
        help="answer requests to this name (the Host header) beside localhost, *.example.com for all below, or * for "
        "any; may be repeated (default: any, but on this machine only and without credentials none)",
    )


def add_batch_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--max-batch-size` of the serving engine."""
    parser.add_argument(
        "--max-batch-size",
        type=int_in_range(1),
        default=256,
        metavar="N",
        help="maximum number of replies that are generated concurrently; others wait (default: %(default)s)",
    )


def add_overwrite_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite` for commands that write a model."""
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model in OUT")


def int_in_range(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return an argument type for whole numbers from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdecimal() and minimum <= int(text) <= (int(text) if maximum is None else maximum):
            return int(text)
        allowed = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, not {text!r}")

    return parse


def host_pattern(text: str) -> str:
    """Argument type for a name in the Host header: without a port; `*.example.com`; `*`."""
    if re.fullmatch(r"\*|(?:\*\.)?[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?", text) and not re.search(r"^[^:]+:\d*$", text):
        return text
    raise argparse.ArgumentTypeError(f"must be a name or an address without a port, *.example.com or *, not {text!r}")


def duration(text: str) -> float:
    """Argument type for a duration in seconds."""
    try:
        if 0 <= (value := float(text)) < float("inf"):
            return min(value, threading.TIMEOUT_MAX)  # the longest possible wait
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a non-negative number of seconds, not {text!r}")


def random_seed(text: str) -> int:
    """Argument type for a random seed, in the range of torch.manual_seed."""
    try:
        if 0 <= (value := int(text)) < 2**64:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"The seed must be a whole number from 0 to 2**64 - 1, not {text!r}.")


def user_and_password(text: str) -> tuple[str, str]:
    """Argument type for USER:PASS; the password may contain further colons."""
    user, _, password = text.partition(":")
    if user and password and text.isprintable():
        return user, password
    raise argparse.ArgumentTypeError("must be USER:PASS in printable characters, and neither part may be empty")


def file_size(text: str) -> str:
    """Argument type for a file size in the syntax of transformers: a number and a unit."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", text.strip(), re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"invalid size {text!r}: write a number and KB, MB, GB or TB, for example 2GB")
    return text.strip()
