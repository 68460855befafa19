"""A local ModelScope hub for tests, which answers the modelscope client like the real one.

Serves folders by id (case-insensitive) and revision. It can break off a file halfway, once, and records the files sent,
so that tests can check what was downloaded.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

MODEL = re.compile(r"/api/v1/models/([^/]+/[^/]+)(/.*)?")


class Hub:
    """A running server.

    Args:
        models: id → revision → folder; "master", the default revision, must be first.
    """

    def __init__(self, models: dict[str, dict[str, Path]]):
        self.models = {name.lower(): revisions for name, revisions in models.items()}
        self.sent: list[tuple[str, str, int]] = []  # id as requested, file, first byte
        self.breaking: set[str] = set()  # files to break off halfway, once
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> set[str]:
        """Return the names of the files sent since the last call."""
        names, self.sent = {file for _, file, _ in self.sent}, []
        return names


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        found = MODEL.fullmatch(url.path)
        revisions = self.hub.models.get(found[1].lower()) if found else None
        if revisions is None:
            return self._answer(404, {"Code": 10010205001, "Message": "The model does not exist.", "Success": False})
        if found[2] == "/revisions":
            named = [{"Revision": name} for name in revisions]
            return self._answer(200, {"RevisionMap": {"Branches": named[:1], "Tags": named[1:]}})
        if found[2] is None:
            return self._answer(200, {"Path": found[1].split("/")[0], "Name": found[1].split("/")[1]})
        folder = revisions.get(query.get("Revision", "master"))
        if folder is None:
            return self._answer(404, {"Code": 10010205002, "Message": "no such revision", "Success": False})
        if found[2] == "/repo/files":
            return self._answer(200, {"Files": [_entry(path, folder) for path in sorted(folder.rglob("*"))]})
        path = folder / query.get("FilePath", "")
        if found[2] != "/repo" or not path.is_file():
            return self._answer(404, {"Code": 10010205003, "Message": "no such file", "Success": False})
        return self._send(found[1], path)

    def _answer(self, status: int, data: dict) -> None:
        body = json.dumps(data if status != 200 else {"Code": 200, "Data": data, "Success": True}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, name: str, path: Path) -> None:
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        end = int(asked[2]) + 1 if asked and asked[2] else len(content)
        self.hub.sent.append((name, path.name, start))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if path.name in self.hub.breaking:
            self.hub.breaking.discard(path.name)
            self.wfile.write(content[start : (start + end) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[start:end])


def _entry(path: Path, folder: Path) -> dict:
    entry = {"Path": path.relative_to(folder).as_posix(), "Name": path.name, "Type": "tree", "Size": 0}
    if path.is_file():
        content = path.read_bytes()
        entry |= {"Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
    return entry
