"""Whether the server of this container answers: exit status 0 or 1, and a line that says which.

Revolves around what runs here: a container without a server (the terminal demo, a training run) is healthy as long as
it exists. What the server serves it does not know, and needs no credentials to ask.

    python docker/health.py [FOLDER]     # of processes; /proc without it
"""

import argparse
import sys
from http.client import HTTPConnection, HTTPException
from pathlib import Path

SERVERS = ("openai_api.py", "web_demo.py")
SECONDS = 8


def server_port(processes: Path) -> int | None:
    """The port of the server that runs, None where none does.

    Args:
        processes: a folder as /proc is one.
    """
    for file in sorted(processes.glob("[0-9]*/cmdline")):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if any(Path(word).name in SERVERS for word in words):
            parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            parser.add_argument("--server-port", type=int, default=8000)
            return parser.parse_known_args(words)[0].server_port
    return None


def complaint(port: int) -> str | None:
    """What is wrong with the server on a port, None if nothing is."""
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)  # unlike urllib, it asks no proxy
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return f"The server does not answer on port {port}: {error}."
    finally:
        connection.close()
    # The browser demo has no such page, and answers that: it is alive as well.
    return f"The server answers with status {status}." if status >= 500 else None


def main() -> int:
    """Returns the exit status."""
    port = server_port(Path(sys.argv[1] if len(sys.argv) > 1 else "/proc"))
    if port is None:
        print("There is no server in this container.")
        return 0
    wrong = complaint(port)
    print(wrong or f"The server answers on port {port}.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
