"""Chat with a first-generation Qwen model in the browser.

Arguments, the way from a name to a served page, and what the person at the terminal sees. The page itself is
qwen/serving/web/launch.py.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

# torch, transformers, gradio and qwen are imported when they are needed: they take seconds, and --help need not wait.

BUNDLED_NOTE = (
    "This is the small bundled toy model. Real ones: -c Qwen/Qwen-1_8B-Chat, Qwen/Qwen-7B-Chat, Qwen/Qwen-14B-Chat, "
    "Qwen/Qwen-72B-Chat, or a folder."
)
BUNDLED = "qwen-tiny-chat"


def port_number(text: str) -> int:
    """A TCP port."""
    if text.isascii() and text.isdecimal() and 0 < int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"A port is a whole number from 1 to 65535, not {text!r}.")


def batch_size(text: str) -> int:
    """A number of replies."""
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"A batch size is a whole number from 1 on, not {text!r}.")


def user_and_password(text: str) -> tuple[str, str]:
    """USER:PASS; the password may hold further colons."""
    user, _, password = text.partition(":")
    if user and password:
        return user, password
    raise argparse.ArgumentTypeError("It is written USER:PASS, and neither may be empty.")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Chat with a first-generation Qwen model in the browser.")
    parser.add_argument(
        "-c",
        "--checkpoint-path",
        metavar="NAME",
        help="a folder, or a hub id such as Qwen/Qwen-7B-Chat (default: the small bundled model)",
    )
    parser.add_argument(
        "--hub", choices=("huggingface", "modelscope"), help="where ids come from (default: QWEN_HUB, or huggingface)"
    )
    parser.add_argument("--cpu-only", action="store_true", help="run on the CPU even if there is a GPU")
    parser.add_argument("--int8-cache", action="store_true", help="keep the key/value cache in 8 bits, half the memory")
    parser.add_argument(
        "--server-port", metavar="PORT", type=port_number, default=8000, help="port to serve on (default: %(default)s)"
    )
    parser.add_argument(
        "--server-name",
        metavar="HOST",
        default="127.0.0.1",
        help="address to serve on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument("--inbrowser", action="store_true", help="open the page in the browser of this machine")
    parser.add_argument(
        "--share",
        action="store_true",
        help="also make the page public for a week, through a tunnel of gradio.live; whoever has the link can use it",
    )
    parser.add_argument(
        "--auth", metavar="USER:PASS", type=user_and_password, help="ask for this user name and password"
    )
    parser.add_argument(
        "--max-batch-size",
        metavar="N",
        type=batch_size,
        default=16,
        help="replies that are written at once; further ones wait (default: %(default)s)",
    )
    return parser.parse_args()


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


def say(text: str) -> None:
    """Print something about the program."""
    print(text, file=sys.stderr, flush=True)


def stop(*_: Any) -> None:
    """Ends like Ctrl-C, and only once: more signals must not interrupt the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Returns the exit status: 0 after serving, 1 where that could not begin, 130 when stopped before it began."""
    arguments = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # the latter from service managers and `docker stop`
        signal.signal(number, stop)
    say(f"Loading {arguments.checkpoint_path} ..." if arguments.checkpoint_path else BUNDLED_NOTE)
    # Threads of torch that wait for each other spin by default, and take the processor from those that serve the page.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    loaded = False
    try:
        check_address(arguments.server_name, arguments.server_port)
        import gradio  # noqa: F401  # a missing library should be known before gigabytes are loaded

        from qwen.checkpoint.loading import load_model_quietly

        model, tokenizer = load_model_quietly(
            arguments.checkpoint_path,
            hub=arguments.hub,
            chat=True,
            cpu_only=arguments.cpu_only,
            int8_cache=arguments.int8_cache,
        )
        loaded = True
        serve(model, tokenizer, arguments)
    except KeyboardInterrupt:
        say("Stopped." if loaded else "Stopped while loading.")
        return 0 if loaded else 130
    except ImportError as error:
        say(f"{error}. Install the requirements: pip install -r requirements.txt -r requirements_web_demo.txt")
        return 1
    except (OSError, ValueError) as error:
        say(str(error))
        return 1
    return 0
