"""What all commands share at the terminal: messages, errors as sentences, quiet libraries."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .arguments import as_typed

NOTHING_WRITTEN = "\nStopped. Nothing was written."


def say(text: str) -> None:
    """Print something for the person at the terminal, beside the results on standard output."""
    print(text, file=sys.stderr, flush=True)


def say_starting() -> None:
    """Tell a person that something happens while the libraries are imported, which takes seconds."""
    if sys.stderr.isatty():
        say("Starting ...")


@dataclass
class Ending:
    """How a command ended."""

    status: int = 0  # the exit status


@contextlib.contextmanager
def explain_errors(
    *,
    install: str = "",
    stopped: str = "Stopped.",
    complain: Callable[[str], None] = say,
    note: Callable[[str], None] = say,
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
    prog: str | None = None,
) -> Iterator[Ending]:
    """Inside, errors that a person can act on become sentences and exit status 1, and Ctrl-C exit status 130.

    What needs the library is imported inside, so that Ctrl-C and missing packages are handled then as well.

    Args:
        install: what to do where a package is missing, see `how_to_install`.
        stopped: said after Ctrl-C.
        complain: prints an error.
        note: prints `stopped`.
        errors: whose texts are sentences for people; the library's own are among them, such as CheckpointError.
        prog: "qwen export" in the command; None in a script, whose users read other names in the texts.
    """
    quiet_imports()
    ending = Ending()
    try:
        yield ending
    except KeyboardInterrupt:
        ending.status = 130
        note(stopped)
    except errors as error:
        ending.status = 1
        complain(as_typed(str(error), prog))
    except ImportError as error:
        ending.status = 1
        complain(f"{error}. {install}")
    except MemoryError as error:
        ending.status = 1
        complain(str(error) or "The main memory is full.")


def how_to_install(extra: str | None, make: str | None = None) -> str:
    """How to install what a command needs.

    Args:
        extra: of pyproject.toml; None where the plain package is enough.
        make: the target that installs it and runs the command, if there is one.
    """
    what = f"'.[{extra}]'" if extra else "."
    advice = f"In the folder of the repository: pip install -e {what} -c constraints.txt"
    return f"{advice}." if make is None else f"{advice}, or start with `make {make}`."


def quiet_imports() -> None:
    """Keep back what is said when transformers is imported. To be called before that.

    Where GPTQModel is installed, transformers imports torchao at once, which complains that it has no libraries for
    this GPU, and makes torch warn of its own calls.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load(arguments: argparse.Namespace, *, chat: bool = False) -> tuple[Any, Any]:
    """The model and the tokenizer that `add_model_arguments` let a person choose, loaded quietly.

    Args:
        chat: refuse a base model before its weights are loaded.

    Raises:
        OSError: the checkpoint is missing, incomplete or of another architecture.
        ValueError: the options contradict one another.
    """
    from qwen.checkpoint.loading import load_model_quietly

    return load_model_quietly(
        arguments.checkpoint_path,
        hub=arguments.hub,
        chat=chat,
        cpu_only=arguments.cpu_only,
        int8_cache=arguments.int8_cache,
    )
