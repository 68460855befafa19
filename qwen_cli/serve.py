"""Serve a first-generation Qwen model over HTTP with an OpenAI-compatible API.

Output goes to standard error, except uvicorn's access log, which goes to standard output.
"""

import argparse
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .arguments import (
    BUNDLED_NOTE,
    add_address_arguments,
    add_batch_argument,
    add_model_arguments,
    duration,
    int_in_range,
    make_parser,
)
from .background_output import output_in_background
from .console import explain_errors, how_to_install, load_from_arguments, print_message

if TYPE_CHECKING:  # takes seconds to import
    from qwen.model.modeling_qwen import QWenLMHeadModel
    from qwen.model.tokenization_qwen import QWenTokenizer

AUTH_VARIABLE, KEY_VARIABLE = "QWEN_API_AUTH", "QWEN_API_KEY"
GRACEFUL_SHUTDOWN_TIMEOUT = 5  # seconds for slow clients to read the end of their replies


def origin(text: str) -> str:
    """Argument type for the origin of web pages, also those in browser extensions and desktop programs."""
    if text == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        return text
    raise argparse.ArgumentTypeError(f"must be an origin like http://localhost:3000, or *, not {text!r}")


def network(text: str) -> str:
    """Argument type for an IP address or a network of them."""
    try:
        ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be an IP address like 127.0.0.1 or a network like 10.0.0.0/8, not {text!r}"
        ) from error
    return text


def parse_arguments(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """Parse the command line, with credentials from the environment as defaults."""
    parser = make_parser(
        "Serve a first-generation Qwen model over HTTP with an OpenAI-compatible API.",
        prog,
        epilog="All users of the machine can read a command line. To keep credentials private, set the environment\n"
        f"variables {AUTH_VARIABLE} and {KEY_VARIABLE} instead of --api-auth and --api-key.",
    )
    add_model_arguments(parser)
    add_address_arguments(parser, min_port=0)
    parser.add_argument("--api-auth", metavar="USER:PASS", help="require this user and password (HTTP Basic)")
    parser.add_argument("--api-key", metavar="KEY", help="require this key (Bearer, as OpenAI clients send it)")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        type=origin,
        metavar="ORIGIN",
        help="origin of web pages that may send requests, like http://localhost:3000, or * for all; may be repeated",
    )
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        type=network,
        metavar="ADDRESS",
        help="address or network (10.0.0.0/8) of a proxy whose X-Forwarded-For and X-Forwarded-Proto are believed; may "
        "be repeated (default: none)",
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="model id in the API (default: the checkpoint's)")
    add_batch_argument(parser)
    parser.add_argument(
        "--max-queue",
        type=int_in_range(0),
        default=128,
        metavar="N",
        help="maximum number of replies that wait; further requests are rejected (default: %(default)s)",
    )
    parser.add_argument(
        "--max-request-bytes",
        type=int_in_range(1),
        default=4 * 2**20,
        metavar="N",
        help="maximum size of a request body in bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--max-messages",
        type=int_in_range(1),
        default=1024,
        metavar="N",
        help="maximum number of messages in a conversation (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=duration,
        default=30.0,
        metavar="S",
        help="seconds for running replies to finish when the server stops (default: %(default)s)",
    )
    parser.add_argument(
        "--response-store",
        type=int_in_range(0),
        default=256,
        metavar="N",
        help="maximum number of responses (Responses API) kept in memory, 64 MiB in all; 0 keeps none "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--disable-gc",
        action="store_true",
        help="accepted for old scripts; no effect, because no garbage is collected after a request",
    )
    arguments = parser.parse_args(argv)
    arguments.api_auth = _from_environment(arguments.api_auth, AUTH_VARIABLE)
    arguments.api_key = _from_environment(arguments.api_key, KEY_VARIABLE)
    if arguments.api_auth is not None and not all(arguments.api_auth.partition(":")):
        parser.error("--api-auth must be USER:PASS, a user and a password separated by a colon")
    if (key := arguments.api_key) is not None and not (key and key.isprintable() and key == key.strip()):
        parser.error("--api-key must consist of printable characters, without blanks around it, in UTF-8")
    return arguments


def _from_environment(argument: str | None, variable: str) -> str | None:
    return os.environ.get(variable) if argument is None else argument


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket without listening, to detect an unusable address before the model is loaded.

    Raises:
        OSError: the address does not exist on this machine, or is in use.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows it would allow two servers on one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def serve(
    model: "QWenLMHeadModel", tokenizer: "QWenTokenizer", arguments: argparse.Namespace, sock: socket.socket
) -> int:
    """Serve requests until a signal arrives. Returns the exit status."""
    import logging

    import uvicorn

    from qwen.serving.api.app import Settings, create_app
    from qwen.serving.api.server import DrainingServer, log_config
    from qwen.serving.engine import Engine
    from qwen.serving.hosts import hosts_to_allow, is_loopback

    host, port = sock.getsockname()[:2]
    has_credentials = arguments.api_auth is not None or arguments.api_key is not None
    settings = Settings(
        model_name=arguments.served_model_name,
        basic_auth=arguments.api_auth,
        api_key=arguments.api_key,
        cors_origins=tuple(arguments.cors_origin),
        allowed_hosts=hosts_to_allow(
            arguments.allowed_host, server_name=arguments.server_name, address=host, has_credentials=has_credentials
        ),
        max_request_bytes=arguments.max_request_bytes,
        max_messages=arguments.max_messages,
        drain_seconds=arguments.drain_seconds,
        response_store=arguments.response_store,
    )
    engine = Engine(model, tokenizer, max_batch_size=arguments.max_batch_size, max_queue=arguments.max_queue)
    service = (app := create_app(engine, settings)).state.service
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def ready() -> None:
        print_message(f"{service.model['id']} answers at {address}/v1 (documentation: {address}/docs). Ctrl-C stops.")
        if not (is_loopback(host) or has_credentials):
            print_message("Anyone who can reach this address can use the server. Require a key with --api-key KEY.")

    def draining() -> None:
        if not sum(engine.load()):
            print_message("Stopping.")
            return
        print_message(
            f"Stopping: running replies have {settings.drain_seconds:g} s to finish. A second Ctrl-C stops at once."
        )

    config = uvicorn.Config(
        app,
        log_config=log_config(),
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_TIMEOUT,
        proxy_headers=bool(arguments.trusted_proxy),  # uvicorn would believe those of all programs of this machine
        forwarded_allow_ips=arguments.trusted_proxy,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # ready() prints the same in one line
    server = DrainingServer(config, service.drain, settings.drain_seconds, ready, draining)
    try:
        server.run(sockets=[sock])
    finally:
        engine.close(0)  # exiting the interpreter while the thread runs would abort
    return 0 if server.signals == 1 else 1


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Serve a model. Returns the exit status: 0 after a signal, 1 if it could not start or got a second signal."""
    arguments = parse_arguments(argv, prog)
    with output_in_background():
        return run(arguments, prog)


def run(arguments: argparse.Namespace, prog: str | None) -> int:
    """Bind the address, load the model and serve it. Returns the exit status."""
    try:
        sock = bind(arguments.server_name, arguments.server_port)
    except (OSError, UnicodeError) as error:
        where = f"{arguments.server_name}:{arguments.server_port}"
        print_message(
            f"Cannot listen at {where} ({error}). Choose another address with --server-name and --server-port."
        )
        return 1
    print_message(BUNDLED_NOTE if arguments.checkpoint_path is None else f"Loading {arguments.checkpoint_path} ...")
    # By default, waiting torch threads spin and take processor time from the threads that answer requests.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with (
        sock,
        explain_errors(
            install_hint=how_to_install("serve", "serve"), interrupt_message="Stopped while loading.", prog=prog
        ) as result,
    ):
        model, tokenizer = load_from_arguments(arguments)
        result.status = serve(model, tokenizer, arguments, sock)
    return result.status
