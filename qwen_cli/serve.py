"""Serve a first-generation Qwen model over HTTP, in the dialect of OpenAI's API.

Arguments, a model, an engine, an app, a web server; each of them lives in `qwen`. docs/openai_api.md tells what the
server understands.

Everything that is printed goes to standard error, but for uvicorn's line a request, which goes to standard output.
"""

import argparse
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

# torch, transformers and qwen are imported in main(): they take seconds, and --help need not wait.

BUNDLED_NOTE = "This is the small bundled toy model. Real ones: -c Qwen/Qwen-1_8B-Chat, Qwen/Qwen-7B-Chat, or a folder."
AUTH_VARIABLE, KEY_VARIABLE = "QWEN_API_AUTH", "QWEN_API_KEY"
LAST_BYTES_SECONDS = 5  # for clients that are slow to read the end of their replies


def note(text: str) -> None:
    """Print something for the person who started the server."""
    print(text, file=sys.stderr, flush=True)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and least <= int(text) <= (int(text) if most is None else most):
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


def origin(text: str) -> str:
    """The type of an argument that names where web pages come from."""
    if text == "*" or re.fullmatch(r"https?://[^/\s]+", text):
        return text
    raise argparse.ArgumentTypeError(f"an origin such as http://localhost:3000, or *, is needed, not {text!r}")


def parse_arguments() -> argparse.Namespace:
    """The command line, and what the environment says in its place."""
    parser = argparse.ArgumentParser(
        description="Serve a first-generation Qwen model over HTTP, in the dialect of OpenAI's API.",
        epilog=f"Everybody on the machine can read a command line; {AUTH_VARIABLE} and {KEY_VARIABLE} in the "
        "environment say the same as --api-auth and --api-key in private.",
    )
    parser.add_argument(
        "-c",
        "--checkpoint-path",
        metavar="NAME",
        help="a folder, or a hub id such as Qwen/Qwen-7B-Chat (default: the small bundled model)",
    )
    parser.add_argument("--cpu-only", action="store_true", help="run on the CPU even if there is a GPU")
    parser.add_argument("--int8-cache", action="store_true", help="keep the key/value cache in 8 bits, half the memory")
    parser.add_argument(
        "--hub", choices=("huggingface", "modelscope"), help="where ids come from (default: QWEN_HUB, or huggingface)"
    )
    parser.add_argument("--server-name", default="127.0.0.1", metavar="HOST", help="address (default: %(default)s)")
    parser.add_argument(
        "--server-port", type=whole(0, 65535), default=8000, metavar="PORT", help="0 for any (default: %(default)s)"
    )
    parser.add_argument("--api-auth", metavar="USER:PASS", help="ask for this user and password (HTTP Basic)")
    parser.add_argument("--api-key", metavar="KEY", help="ask for this key (Bearer, as OpenAI's clients send it)")
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        type=origin,
        metavar="ORIGIN",
        help="let web pages from there ask, such as http://localhost:3000, or * for all; may be repeated",
    )
    parser.add_argument("--served-model-name", metavar="NAME", help="the model's id (default: as the checkpoint)")
    parser.add_argument(
        "--max-batch-size", type=whole(1), default=16, metavar="N", help="replies at once (default: %(default)s)"
    )
    parser.add_argument(
        "--max-queue", type=whole(0), default=128, metavar="N", help="replies that may wait (default: %(default)s)"
    )
    parser.add_argument(
        "--max-request-bytes", type=whole(1), default=4 * 2**20, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--max-messages", type=whole(1), default=1024, metavar="N", help="in a conversation (default: %(default)s)"
    )
    parser.add_argument(
        "--drain-seconds",
        type=seconds,
        default=30.0,
        metavar="S",
        help="when stopped, let replies that are being written take so long (default: %(default)s)",
    )
    parser.add_argument(
        "--disable-gc",
        action="store_true",
        help="accepted for old scripts; without effect, as nothing is collected after a request",
    )
    arguments = parser.parse_args()
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
        note(f"{service.model['id']} answers at {address}/v1 (documentation: {address}/docs). Ctrl-C stops.")
        if not (host.startswith("127.") or host == "::1" or arguments.api_auth or arguments.api_key):
            note("Anybody who reaches this address can use it: --api-key KEY asks for a key.")

    def draining() -> None:
        if not sum(engine.load()):
            note("Stopping.")
            return
        note(f"Stopping: replies get {settings.drain_seconds:g} s to come to their end. A second Ctrl-C stops at once.")

    config = uvicorn.Config(app, timeout_graceful_shutdown=LAST_BYTES_SECONDS)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # ready() says the same in one line
    server = DrainingServer(config, service.drain, settings.drain_seconds, ready, draining)
    try:
        server.run(sockets=[bound])
    finally:
        engine.close(0)  # an interpreter that exits under a working thread aborts
    return 0 if server.signals == 1 else 1


def main() -> int:
    """Returns the exit status: 0 after a signal, 1 where the server could not start or a second signal cut it short."""
    arguments = parse_arguments()
    try:
        bound = bind(arguments.server_name, arguments.server_port)
    except (OSError, UnicodeError) as error:
        where = f"{arguments.server_name}:{arguments.server_port}"
        note(f"The server cannot listen at {where} ({error}). Choose with --server-name and --server-port.")
        return 1
    note(BUNDLED_NOTE if arguments.checkpoint_path is None else f"Loading {arguments.checkpoint_path} ...")
    # Threads of torch that wait for each other spin by default, and take the processor from those that answer requests.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from qwen.checkpoint.loading import load_model_quietly

        model, tokenizer = load_model_quietly(
            arguments.checkpoint_path,
            hub=arguments.hub,
            cpu_only=arguments.cpu_only,
            int8_cache=arguments.int8_cache,
        )
        return serve(model, tokenizer, arguments, bound)
    except KeyboardInterrupt:
        note("Stopped while loading.")
        return 130
    except ImportError as error:
        note(f"{error}. Install the requirements: pip install -r requirements.txt -r requirements_openai_api.txt")
        return 1
    except (OSError, ValueError) as error:
        note(str(error))
        return 1
    finally:
        bound.close()
