"""A web server that gives every request the same answer and records the requests."""

import contextlib
import http.server
import threading
from collections.abc import Iterator


class RecordingServer:
    """A running server; `requests` has the request lines, such as "GET /path HTTP/1.1"."""

    def __init__(self, server: http.server.HTTPServer, requests: list[str]):
        self.url = f"http://127.0.0.1:{server.server_port}"
        self.requests = requests


@contextlib.contextmanager
def recording_server(status: int, page: str = "") -> Iterator[RecordingServer]:
    """Run a server that answers every request with a status and an HTML page, which pages of all origins may read."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(self.requestline)
            body = page.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_CONNECT = answer

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield RecordingServer(server, requests)
        finally:
            server.shutdown()
