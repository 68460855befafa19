"""Chat with a first-generation Qwen model in the browser."""

import argparse
import importlib
import os
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    BUNDLED_NOTE,
    add_address_arguments,
    add_batch_argument,
    add_model_arguments,
    make_parser,
    user_and_password,
)
from .background_output import output_in_background
from .console import explain_errors, how_to_install, load_from_arguments, print_message

if TYPE_CHECKING:  # takes seconds to import
    from qwen.model.modeling_qwen import QWenLMHeadModel
    from qwen.model.tokenization_qwen import QWenTokenizer

BUNDLED = "qwen-tiny-chat"


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, prog)
    add_model_arguments(parser)
    add_address_arguments(parser)
    parser.add_argument("--inbrowser", action="store_true", help="open the page in the browser on this machine")
    parser.add_argument(
        "--share",
        action="store_true",
        help="also make the page public for a week, through a tunnel of gradio.live; anyone with the link can use it",
    )
    parser.add_argument(
        "--auth", metavar="USER:PASS", type=user_and_password, help="require this user name and password"
    )
    add_batch_argument(parser)
    return parser.parse_args(argv)


def check_address(host: str, port: int) -> None:
    """Check that the page can be served on this address, before loading the model, which can take minutes.

    Raises:
        OSError: the port is in use, or the address does not exist on this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise OSError(
            f"Cannot serve on {host}, port {port}: {reason}. Choose another with --server-port or --server-name."
        ) from error


def check_proxy() -> None:
    """Check that the tunnel of --share can use the proxy of the environment, before loading the model.

    Raises:
        ValueError: it cannot.
    """
    import httpx

    from qwen.library_errors import UNUSABLE_PROXY_ADVICE, is_unusable_proxy

    try:
        httpx.Client().close()
    except (ImportError, ValueError) as error:
        if not is_unusable_proxy(error):
            raise
        raise ValueError(f"Cannot open the tunnel of --share. {UNUSABLE_PROXY_ADVICE}") from error


def serve(model: "QWenLMHeadModel", tokenizer: "QWenTokenizer", arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    from qwen.serving.engine import Engine
    from qwen.serving.hosts import ANY_HOST, hosts_to_allow
    from qwen.serving.web import launch as web

    allowed_hosts = hosts_to_allow(
        arguments.allowed_host,
        server_name=arguments.server_name,
        address=arguments.server_name,
        has_credentials=arguments.auth is not None,
    )
    if arguments.share and not arguments.allowed_host:
        allowed_hosts = (ANY_HOST,)  # the tunnel's name is not known yet, and the page is public
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
            allowed_hosts=allowed_hosts,
        )
        print_message(f"Open {page.local_url} in a browser. Ctrl-C stops.")
        threading.Event().wait()
    finally:
        engine.close(timeout=0)
        if page is not None:
            web.close(page)


def raise_keyboard_interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt, and ignore further signals so that they do not interrupt the cleanup."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Serve the page. Returns the exit status: 0 after serving, 1 if it could not start, 130 if stopped before."""
    arguments = parse_arguments(argv, prog)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM from service managers and `docker stop`
        signal.signal(number, raise_keyboard_interrupt)
    with output_in_background():
        return run(arguments, prog)


def run(arguments: argparse.Namespace, prog: str | None) -> int:
    """Load the model and serve the page. Returns the exit status."""
    print_message(f"Loading {arguments.checkpoint_path} ..." if arguments.checkpoint_path else BUNDLED_NOTE)
    # By default, waiting torch threads spin and take processor time from the threads that serve the page.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with explain_errors(
        install_hint=how_to_install("web", "web"), interrupt_message="Stopped while loading.", prog=prog
    ) as result:
        check_address(arguments.server_name, arguments.server_port)
        importlib.import_module("qwen.serving.web")  # report a missing library before loading gigabytes
        if arguments.share:
            check_proxy()

        model, tokenizer = load_from_arguments(arguments, chat=True)
        try:
            serve(model, tokenizer, arguments)
        except KeyboardInterrupt:
            print_message("Stopped.")
    return result.status
