"""Terminal output shared by all commands: messages, error reporting, quiet libraries."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import with_script_names

if TYPE_CHECKING:  # takes seconds to import
    from qwen.model.modeling_qwen import QWenLMHeadModel
    from qwen.model.tokenization_qwen import QWenTokenizer


def print_message(text: str) -> None:
    """Print a message to standard error; standard output is for results.

    A message that cannot be written is lost: `2>&1 | head -n 2` does not end a server or a training.
    """
    if sys.stderr is not None:  # it is None if the descriptor is closed
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def open_closed_streams() -> None:
    """Open os.devnull in place of standard streams that are closed (`2>&-`).

    The next file or connection would get the free descriptor, and with it what libraries print.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, descriptor)  # inheritable, unlike `opened`
            if opened != descriptor:
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False))


def print_starting() -> None:
    """Print "Starting ..." on a terminal, because importing the libraries takes seconds."""
    if sys.stderr is not None and sys.stderr.isatty():
        print_message("Starting ...")


@dataclass
class CommandResult:
    """Result of a command, set when `explain_errors` exits."""

    status: int = 0  # the exit status


@contextlib.contextmanager
def explain_errors(
    *,
    install_hint: str = "",
    interrupt_message: str | Callable[[], str] = "Stopped.",
    print_error: Callable[[str], None] = print_message,
    print_note: Callable[[str], None] = print_message,
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
    prog: str | None = None,
) -> Iterator[CommandResult]:
    """Turn errors that users can act on into a message and exit status 1, and Ctrl-C into exit status 130.

    Import the library inside this context, so that Ctrl-C and missing packages during the import are handled, too.

    Args:
        install_hint: instructions for a missing package, see `how_to_install`.
        interrupt_message: message after Ctrl-C, or a function that returns it.
        print_error: prints an error.
        print_note: prints `interrupt_message`.
        errors: exceptions whose text is the message; the defaults cover those of the library, like CheckpointError.
        prog: "qwen export" for the command; None for a script, see `with_script_names`.
    """
    quiet_imports()
    result = CommandResult()
    try:
        yield result
    except KeyboardInterrupt:
        result.status = 130
        print_note(interrupt_message if isinstance(interrupt_message, str) else interrupt_message())
    except errors as error:
        result.status = 1
        print_error(with_script_names(str(error), prog))
    except ImportError as error:
        result.status = 1
        print_error(f"{error}. {install_hint}")
    except MemoryError as error:
        result.status = 1
        print_error(str(error) or "The main memory is full.")


def interrupt_message_for(result: Path) -> Callable[[], str]:
    """Return a function that returns the message after Ctrl-C: whether the result has been written since this call.

    Args:
        result: the file of the result that takes its place last. It appears whole or not at all.
    """

    def identify() -> tuple[int, int] | None:
        try:
            found = result.expanduser().stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    before = identify()
    return lambda: (
        "\nStopped. Nothing was written."
        if identify() in (before, None)
        else f"\nStopped, but too late: {result} and what belongs to it had been written."
    )


def how_to_install(extra: str | None, make: str | None = None) -> str:
    """Return instructions to install the packages that a command needs.

    Args:
        extra: an extra of pyproject.toml; None for the package without extras.
        make: the make target that installs the packages and runs the command, if any.
    """
    what = f"'.[{extra}]'" if extra else "."
    advice = f"In the repository folder, run: pip install -e {what} -c constraints.txt"
    return f"{advice}." if make is None else f"{advice}, or start with `make {make}`."


def quiet_imports() -> None:
    """Silence warnings that are logged while transformers is imported. Call it before that import.

    With GPTQModel installed, transformers imports torchao, which warns about missing libraries for this GPU and
    triggers deprecation warnings in torch.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_from_arguments(
    arguments: argparse.Namespace, *, chat: bool = False
) -> "tuple[QWenLMHeadModel, QWenTokenizer]":
    """Load the model and the tokenizer selected by the options of `add_model_arguments`, without log output.

    Args:
        chat: reject a base model before its weights are loaded.

    Raises:
        OSError: the checkpoint is missing, incomplete or of another architecture.
        ValueError: the options contradict each other.
    """
    from qwen.checkpoint.loading import load_model_quietly

    return load_model_quietly(
        arguments.checkpoint_path,
        hub=arguments.hub,
        chat=chat,
        cpu_only=arguments.cpu_only,
        int8_cache=arguments.int8_cache,
    )
