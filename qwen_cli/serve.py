"""Serve a first-generation Qwen model over HTTP, in the dialect of OpenAI's API.

Everything that is printed goes to standard error, except uvicorn's line for each request, which goes to standard
output.
"""

import argparse
import os
import re
import socket
from collections.abc import Sequence
from typing import Any

from .arguments import (
    BUNDLED_NOTE,
    add_address_arguments,
    add_batch_argument,
    add_model_arguments,
    make_parser,
    seconds,
    whole,
)
from .console import explain_errors, how_to_install, load, say

AUTH_VARIABLE, KEY_VARIABLE = "QWEN_API_AUTH", "QWEN_API_KEY"
LAST_BYTES_SECONDS = 5  # for clients that are slow to read the end of their replies


def origin(text: str) -> str:
    """The type of an argument that names where web pages come from."""
    if text == "*" or re.fullmatch(r"https?://[^/\s]+", text):
        return text
    raise argparse.ArgumentTypeError(f"an origin such as http://localhost:3000, or *, is needed, not {text!r}")


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """The command line, and what the environment says in its place."""
    parser = make_parser(
        "Serve a first-generation Qwen model over HTTP, in the dialect of OpenAI's API.",
        prog,
        epilog=f"Everybody on the machine can read a command line; {AUTH_VARIABLE} and {KEY_VARIABLE} in the\n"
        "environment say the same as --api-auth and --api-key in private.",
    )
    add_model_arguments(parser)
    add_address_arguments(parser, least_port=0)
    parser.add_argument("--api-auth", metavar="USER:PASS", help="ask for this user and password (HTTP Basic)")
    parser.add_argument("--api-key", metavar="KEY", help="ask for this key (Bearer, as OpenAI's clients send it)")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        type=origin,
        metavar="ORIGIN",
        help="let web pages from there send requests, such as http://localhost:3000, or * for all; may be repeated",
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="the model's id (default: as the checkpoint)")
    add_batch_argument(parser)
    parser.add_argument(
        "--max-queue",
        type=whole(0),
        default=128,
        metavar="N",
        help="maximum number of replies that wait; further requests are refused (default: %(default)s)",
    )
    parser.add_argument(
        "--max-request-bytes",
        type=whole(1),
        default=4 * 2**20,
        metavar="N",
        help="maximum size of a request (default: %(default)s)",
    )
    parser.add_argument(
        "--max-messages",
        type=whole(1),
        default=1024,
        metavar="N",
        help="maximum number of messages in a conversation (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=seconds,
        default=30.0,
        metavar="S",
        help="time for replies to finish after the server is told to stop (default: %(default)s)",
    )
    parser.add_argument(
        "--disable-gc",
        action="store_true",
        help="accepted for old scripts; without effect, as nothing is collected after a request",
    )
    arguments = parser.parse_args(argv)
    arguments.api_auth = _secret(arguments.api_auth, AUTH_VARIABLE)
    arguments.api_key = _secret(arguments.api_key, KEY_VARIABLE)
    if arguments.api_auth is not None and not all(arguments.api_auth.partition(":")):
        parser.error("--api-auth is USER:PASS, a user and a password with a colon between them")
    if (key := arguments.api_key) is not None and not (key and key.isprintable() and key == key.strip()):
        parser.error("--api-key is a text of printable characters, with no blanks around it")
    return arguments


def _secret(argument: str | None, variable: str) -> str | None:
    return os.environ.get(variable) if argument is None else argument


def bind(host: str, port: int) -> socket.socket:
    """A socket on which nobody listens yet: an address that is taken is known before the model is loaded.

    Raises:
        OSError: there is no such address here, or it is taken.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would allow two servers on one port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def serve(model: Any, tokenizer: Any, arguments: argparse.Namespace, bound: socket.socket) -> int:
    """Answer requests until a signal comes; returns the exit status."""
    import logging

    import uvicorn

    from qwen.serving.api.app import Settings, create_app
    from qwen.serving.api.server import DrainingServer
    from qwen.serving.engine import Engine

    settings = Settings(
        model_name=arguments.served_model_name,
        basic_auth=arguments.api_auth,
        api_key=arguments.api_key,
        cors_origins=tuple(arguments.cors_origin),
        max_request_bytes=arguments.max_request_bytes,
        max_messages=arguments.max_messages,
        drain_seconds=arguments.drain_seconds,
    )
    engine = Engine(model, tokenizer, max_batch_size=arguments.max_batch_size, max_queue=arguments.max_queue)
    service = (app := create_app(engine, settings)).state.service
    host, port = bound.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def ready() -> None:
        say(f"{service.model['id']} answers at {address}/v1 (documentation: {address}/docs). Ctrl-C stops.")
        if not (host.startswith("127.") or host == "::1" or arguments.api_auth or arguments.api_key):
            say("Anybody who reaches this address can use it: --api-key KEY asks for a key.")

    def draining() -> None:
        if not sum(engine.load()):
            say("Stopping.")
            return
        say(f"Stopping: replies get {settings.drain_seconds:g} s to come to their end. A second Ctrl-C stops at once.")

    config = uvicorn.Config(app, timeout_graceful_shutdown=LAST_BYTES_SECONDS)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # ready() says the same in one line
    server = DrainingServer(config, service.drain, settings.drain_seconds, ready, draining)
    try:
        server.run(sockets=[bound])
    finally:
        engine.close(0)  # an interpreter that exits under a working thread aborts
    return 0 if server.signals == 1 else 1


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Returns the exit status: 0 after a signal, 1 where the server could not start or a second signal cut it short."""
    arguments = parse_arguments(argv, prog)
    try:
        bound = bind(arguments.server_name, arguments.server_port)
    except (OSError, UnicodeError) as error:
        where = f"{arguments.server_name}:{arguments.server_port}"
        say(f"The server cannot listen at {where} ({error}). Choose with --server-name and --server-port.")
        return 1
    say(BUNDLED_NOTE if arguments.checkpoint_path is None else f"Loading {arguments.checkpoint_path} ...")
    # Threads of torch that wait for each other spin by default, and take the processor from those that answer requests.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with (
        bound,
        explain_errors(install=how_to_install("serve", "serve"), stopped="Stopped while loading.", prog=prog) as ending,
    ):
        model, tokenizer = load(arguments)
        ending.status = serve(model, tokenizer, arguments, bound)
    return ending.status
