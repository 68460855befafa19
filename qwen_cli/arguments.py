"""Arguments that several commands share, and the types of their values."""

import argparse
import re
import threading
from collections.abc import Callable
from typing import Any

BUNDLED_NOTE = (
    "This is the small bundled toy model. Real ones: -c Qwen/Qwen-1_8B-Chat, Qwen/Qwen-7B-Chat, Qwen/Qwen-14B-Chat, "
    "Qwen/Qwen-72B-Chat, or a folder."
)
HUBS = ("huggingface", "modelscope")
# The scripts that do what the commands do. People who run them in a clone read their names in messages.
SCRIPTS = {
    "chat": "cli_demo.py",
    "web": "web_demo.py",
    "serve": "openai_api.py",
    "finetune": "finetune.py",
    "quantize": "run_gptq.py",
    "merge": "finetune/merge_lora.py",
    "export": "export.py",
}


def make_parser(description: str, prog: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser that keeps the line breaks of its description.

    Args:
        description: with commands as `qwen` has them; a script shows them as its own users type them.
        prog: "qwen export" in the command; None in a script.
        settings: of ArgumentParser.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=as_typed(description, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **settings,
    )


def as_typed(text: str, prog: str | None) -> str:
    """A text whose commands are written as the person types them: `qwen export` or `python export.py`."""
    if prog is not None:
        return text
    text = re.sub(r"\bqwen eval (needle|long_context)\b", r"python eval/\1.py", text)
    text = re.sub(r"\bqwen eval (\w+)", r"python eval/evaluate_\1.py", text)
    return re.sub(rf"\bqwen ({'|'.join(SCRIPTS)})\b", lambda found: f"python {SCRIPTS[found[1]]}", text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`-c`, `--hub`, `--cpu-only` and `--int8-cache`: which model runs, and how."""
    add_checkpoint_argument(parser)
    add_hub_argument(parser)
    add_cpu_only_argument(parser)
    parser.add_argument(
        "--int8-cache", action="store_true", help="keep the key/value cache in 8 bits, which halves its memory"
    )


def add_checkpoint_argument(parser: argparse.ArgumentParser, default: str = "the small bundled model") -> None:
    """`-c/--checkpoint-path`; `default` says what is taken without it."""
    parser.add_argument(
        "-c",
        "--checkpoint-path",
        metavar="NAME",
        help=f"a folder, or a hub id such as Qwen/Qwen-7B-Chat (default: {default})",
    )


def add_hub_argument(parser: argparse.ArgumentParser) -> None:
    """`--hub`."""
    parser.add_argument("--hub", choices=HUBS, help="hub to download from (default: $QWEN_HUB or huggingface)")


def add_cpu_only_argument(parser: argparse.ArgumentParser) -> None:
    """`--cpu-only`."""
    parser.add_argument("--cpu-only", action="store_true", help="run on the CPU even if there is a GPU")


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    """`-s/--seed`."""
    parser.add_argument("-s", "--seed", type=seed, default=1234, help="random seed (default: %(default)s)")


def add_address_arguments(parser: argparse.ArgumentParser, least_port: int = 1) -> None:
    """`--server-name` and `--server-port`; with `least_port` 0 the system may choose the port."""
    parser.add_argument(
        "--server-name",
        default="127.0.0.1",
        metavar="HOST",
        help="address to serve on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument(
        "--server-port",
        type=whole(least_port, 65535),
        default=8000,
        metavar="PORT",
        help=f"port to serve on{'' if least_port else ', 0 for any'} (default: %(default)s)",
    )


def add_batch_argument(parser: argparse.ArgumentParser) -> None:
    """`--max-batch-size`, of the engine."""
    parser.add_argument(
        "--max-batch-size",
        type=whole(1),
        default=16,
        metavar="N",
        help="maximum number of replies that are generated at once; further ones wait (default: %(default)s)",
    )


def add_overwrite_argument(parser: argparse.ArgumentParser) -> None:
    """`--overwrite`, of commands that write a model."""
    parser.add_argument("--overwrite", action="store_true", help="replace the model that OUT holds already")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdecimal() and least <= int(text) <= (int(text) if most is None else most):
            return int(text)
        upper = "on" if most is None else f"to {most}"
        raise argparse.ArgumentTypeError(f"a whole number from {least} {upper} is needed, not {text!r}")

    return parse


def seconds(text: str) -> float:
    """The type of an argument that is a duration."""
    try:
        if 0 <= (value := float(text)) < float("inf"):
            return min(value, threading.TIMEOUT_MAX)  # nothing waits longer
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a number of seconds from 0 on is needed, not {text!r}")


def seed(text: str) -> int:
    """The type of an argument that is a seed, as torch.manual_seed takes it."""
    try:
        if 0 <= (value := int(text)) < 2**64:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"A seed is a whole number from 0 to 2**64 - 1, not {text!r}.")


def user_and_password(text: str) -> tuple[str, str]:
    """The type of an argument that is USER:PASS; the password may contain further colons."""
    user, _, password = text.partition(":")
    if user and password:
        return user, password
    raise argparse.ArgumentTypeError("It is written USER:PASS, and neither may be empty.")


def file_size(text: str) -> str:
    """The type of an argument that is a size as transformers reads it: a number and a unit."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", text.strip(), re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a number and KB, MB, GB or TB, such as 2GB")
    return text.strip()
