"""Chat with a first-generation Qwen model in the browser."""

import argparse
import importlib
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import (
    BUNDLED_NOTE,
    add_address_arguments,
    add_batch_argument,
    add_model_arguments,
    make_parser,
    user_and_password,
)
from .console import explain_errors, how_to_install, load, say

BUNDLED = "qwen-tiny-chat"


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, prog)
    add_model_arguments(parser)
    add_address_arguments(parser)
    parser.add_argument("--inbrowser", action="store_true", help="open the page in the browser of this machine")
    parser.add_argument(
        "--share",
        action="store_true",
        help="also make the page public for a week, through a tunnel of gradio.live; whoever has the link can use it",
    )
    parser.add_argument(
        "--auth", metavar="USER:PASS", type=user_and_password, help="ask for this user name and password"
    )
    add_batch_argument(parser)
    return parser.parse_args(argv)


def check_address(host: str, port: int) -> None:
    """Find out before the model is loaded, which can take minutes, whether the page can be served here.

    Raises:
        OSError: the port is taken, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise OSError(
            f"Nothing can be served on {host}, port {port}: {reason}. Name another with --server-port or --server-name."
        ) from error


def serve(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    from qwen.serving.engine import Engine
    from qwen.serving.web import launch as web

    engine = Engine(model, tokenizer, max_batch_size=arguments.max_batch_size)
    page = None
    try:
        page = web.launch(
            engine,
            name=Path(arguments.checkpoint_path or BUNDLED).name,
            server_name=arguments.server_name,
            server_port=arguments.server_port,
            inbrowser=arguments.inbrowser,
            share=arguments.share,
            auth=arguments.auth,
        )
        say(f"Open {page.local_url} in a browser. Ctrl-C ends.")
        threading.Event().wait()
    finally:
        engine.close(timeout=0)
        if page is not None:
            web.close(page)


def stop(*_: Any) -> None:
    """Ends like Ctrl-C, and only once: more signals must not interrupt the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status: 0 after serving, 1 where that could not begin, 130 when stopped before it began."""
    arguments = parse_arguments(argv, prog)
    for number in (signal.SIGINT, signal.SIGTERM):  # the latter from service managers and `docker stop`
        signal.signal(number, stop)
    say(f"Loading {arguments.checkpoint_path} ..." if arguments.checkpoint_path else BUNDLED_NOTE)
    # Threads of torch that wait for each other spin by default, and take the processor from those that serve the page.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with explain_errors(install=how_to_install("web", "web"), stopped="Stopped while loading.", prog=prog) as ending:
        check_address(arguments.server_name, arguments.server_port)
        importlib.import_module("gradio")  # a missing library should be known before gigabytes are loaded

        model, tokenizer = load(arguments, chat=True)
        try:
            serve(model, tokenizer, arguments)
        except KeyboardInterrupt:
            say("Stopped.")
    return ending.status
