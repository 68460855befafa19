"""Chat with a first-generation Qwen model in the terminal."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..arguments import BUNDLED_NOTE, add_model_arguments, add_seed_argument, make_parser
from ..console import explain_errors, how_to_install, load_from_arguments
from .session import Session
from .terminal import Terminal

if TYPE_CHECKING:  # takes seconds to import
    from qwen.serving.engine import Engine


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, prog)
    add_model_arguments(parser)
    add_seed_argument(parser)
    parser.add_argument(
        "--system", metavar="TEXT", default="You are a helpful assistant.", help="system prompt (default: %(default)r)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Chat. Returns the exit status: 0 after a conversation, 1 if it could not start, 130 if stopped before."""
    arguments = parse_arguments(argv, prog)
    terminal = Terminal()
    if arguments.checkpoint_path is None:
        terminal.print_note(BUNDLED_NOTE)
    else:
        terminal.print_note(f"Loading {arguments.checkpoint_path} ...")
    with explain_errors(
        install_hint=how_to_install(None, "chat"),
        interrupt_message="Stopped while loading.",
        print_error=terminal.print_error,
        print_note=terminal.print_note,
        prog=prog,
    ) as result:
        from qwen.serving.engine import Engine

        # The session reports errors. Without a handler, Python prints what the engine logs about them: tracebacks.
        logging.getLogger("qwen.serving").addHandler(logging.NullHandler())
        model, tokenizer = load_from_arguments(arguments, chat=True)
        # One reply at a time: the cache then has room for two full contexts at most, or for what fits into the memory.
        engine = Engine(model, tokenizer, max_batch_size=1)
    if result.status:
        return result.status
    return converse(Session(engine, terminal, arguments.system, arguments.seed))


def close(engine: "Engine") -> None:
    """Stop an engine, and ignore Ctrl-C until it has finished its last step."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        engine.close(timeout=0)
    finally:
        signal.signal(signal.SIGINT, before)


def converse(session: Session) -> int:
    """Run the conversation and return the exit status."""
    if session.terminal.interactive:
        session.terminal.print_note("Ask something, or type :help.")
    try:
        session.run()
        sys.stdout.flush()
    except KeyboardInterrupt:  # between the prompt and a reply
        return 0
    except BrokenPipeError:  # the reader closed the pipe; keep Python from flushing to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a terminal that has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        session.terminal.print_error(f"Cannot write the reply to standard output: {error.strerror or error}.")
        return 1
    finally:
        session.terminal.save_history()
        close(session.engine)
    return 0
