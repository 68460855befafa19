"""Health check of the container: exit status 0 if its server answers, otherwise 1, and a one-line message.

A container without a server (terminal demo, training run) is always healthy. No credentials are needed.

    python docker/health.py [FOLDER]     # folder with process information (default: /proc)
"""

import argparse
import sys
from http.client import HTTPConnection, HTTPException
from pathlib import Path

SERVERS = ("openai_api.py", "web_demo.py")
SECONDS = 8


def server_port(processes: Path) -> int | None:
    """Return the port of the running server, or None if no server runs.

    Args:
        processes: a folder with the layout of /proc.
    """
    for file in sorted(processes.glob("[0-9]*/cmdline")):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended meanwhile
            continue
        if any(Path(word).name in SERVERS for word in words):
            parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            parser.add_argument("--server-port", type=int, default=8000)
            return parser.parse_known_args(words)[0].server_port
    return None


def complaint(port: int) -> str | None:
    """Return what is wrong with the server on a port, or None."""
    connection = HTTPConnection("127.0.0.1", port, timeout=SECONDS)  # unlike urllib, ignores proxies
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return f"The server does not answer on port {port}: {error}."
    finally:
        connection.close()
    # The browser demo has no /health and answers 404, which also shows that it is alive.
    return f"The server answers with status {status}." if status >= 500 else None


def main() -> int:
    """Check the server and return the exit status."""
    port = server_port(Path(sys.argv[1] if len(sys.argv) > 1 else "/proc"))
    if port is None:
        print("No server runs in this container.")
        return 0
    wrong = complaint(port)
    print(wrong or f"The server answers on port {port}.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
