"""Sends generated requests to a server and checks what must hold for every one of them.

An answer has one of a few statuses and the form that the OpenAPI document gives it. An error is one short line in the
format of its API. The log has no traceback, the request costs seconds of processor time at most, and a plain request
that is sent at the same time gets the same reply as alone.
"""

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psutil
import requests
import schemathesis
from hypothesis.strategies import SearchStrategy
from schemathesis import Case
from schemathesis.checks import CheckContext, not_a_server_error
from schemathesis.core import NOT_SET
from schemathesis.core.failures import FailureGroup
from schemathesis.core.transport import Response
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from qwen.serving.api.errors import MAX_ECHO, MAX_MESSAGE
from tests.fuzzing.strategies import BODIES, EVENTS_OF_PAGE
from tests.support.server_process import ServerProcess

STATUSES = {200, 400, 404, 405, 413, 415}
MAX_ERROR = MAX_MESSAGE + MAX_ECHO + 2  # characters of an error, which begins with its field in the Messages API
MAX_SECONDS = 5.0  # of processor time; a reply of few tokens takes a tenth of a second
TIMEOUT = 600  # seconds until an answer, on a machine with other work
EVENTS = "/gradio_api/queue/join"
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
PLAIN = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
LINE_BREAKS = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]"
# Ways to say that a whole request is at fault, not a field.
BODY_ERRORS = re.compile(r"The request body|The prompt|Too many ")


def is_one_of_few_statuses(ctx: CheckContext, response: Response, case: Case) -> None:
    assert response.status_code in STATUSES, f"unexpected status {response.status_code}"


def error_is_one_line_about_a_field(ctx: CheckContext, response: Response, case: Case) -> None:
    if response.status_code < 400:
        return
    error = response.json()["error"]
    message = error["message"]
    assert message.strip(), "an error without a message"
    assert len(message) <= MAX_ERROR, f"an error of {len(message)} characters"
    assert not re.search(LINE_BREAKS, message), "an error with line breaks or control characters"
    assert not re.search(r"Traceback|\.py\b|0x[0-9a-f]{6}", message), "an error with an implementation detail"
    if response.status_code == 400 and "param" in error and error["code"] != "invalid_json":
        assert error["param"] or BODY_ERRORS.match(message), "an error that names no field"


def stream_has_no_server_error(ctx: CheckContext, response: Response, case: Case) -> None:
    if "text/event-stream" in response.headers.get("content-type", [""])[0]:
        text = response.content.decode()
        assert not re.search(r'"(?:server_error|api_error)"|"status": ?"failed"', text), "a server error in a stream"


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    is_one_of_few_statuses,
    error_is_one_line_about_a_field,
    stream_has_no_server_error,
]


class CheckedServer:
    """The HTTP server, whose answers are checked.

    Args:
        server: the process; nobody else sends requests to it.

    Attributes:
        inputs: number of requests that were sent, without the plain ones.
        statuses: statuses of their answers.
        last: the last answer.
    """

    checks: ClassVar = CHECKS

    def __init__(self, server: ServerProcess):
        self.server = server
        self.schema = self.document()
        self.schema.config.output.sanitization.update(enabled=False)  # of max_tokens
        self.inputs = 0
        self.statuses: set[int] = set()
        self.last: Response | None = None
        self._session = requests.Session()
        self._neighbour = ThreadPoolExecutor(1)
        self._process = psutil.Process(server.process.pid)
        self._read = 0  # bytes of the log
        self._alone = self._ask()
        self.new_log()

    def document(self) -> BaseSchema:
        """Return what the requests are."""
        return schemathesis.openapi.from_url(f"{self.server.url}/openapi.json")

    def new_log(self) -> str:
        """Return what the server has logged since the last call."""
        with Path(self.server.log.name).open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        return text.decode(errors="replace")

    def processor_seconds(self) -> float:
        """Return the processor time that the server and its child processes have used."""
        total = 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def kinds(self) -> dict[str, SearchStrategy[Case]]:
        """Return strategies of all kinds of requests."""
        return self.hostile() | self.documented()

    def documented(self) -> dict[str, SearchStrategy[Case]]:
        """Return strategies of valid and invalid requests to each endpoint, by its OpenAPI document."""
        strategies = {}
        for operation in (found.ok() for found in self.schema.get_all_operations()):
            for mode in schemathesis.GenerationMode:
                if mode.is_positive or operation.method == "post":
                    strategies[f"{mode.value} {operation.label}"] = operation.as_strategy(generation_mode=mode)
        return strategies

    def hostile(self) -> dict[str, SearchStrategy[Case]]:
        """Return strategies of requests with mostly valid bodies, by what is in them."""

        def requests_of(path: str, bodies: SearchStrategy[Any]) -> SearchStrategy[Case]:
            operation = self.schema[path]["POST"]
            return bodies.map(lambda body: operation.Case(body=body, media_type="application/json"))

        return {name: requests_of(*found) for name, found in BODIES.items()}

    def check(self, case: Case) -> None:
        """Send a request, beside a plain one, and check the answers.

        Raises:
            AssertionError: something does not hold.
        """
        before, self.inputs = self.processor_seconds(), self.inputs + 1
        limit_tokens(case)
        neighbour = self._neighbour.submit(self._ask)
        self.last = None
        try:
            self.last = case.call(self.server.url, session=self._session, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise AssertionError(f"no answer: {error}") from error
        finally:
            reply = neighbour.result()
        seconds, log = self.processor_seconds() - before, self.new_log()
        self.statuses.add(self.last.status_code)
        assert "Traceback" not in log, f"a traceback in the log:\n{log[-5000:]}"
        try:
            case.validate_response(self.last, checks=self.checks)
        except FailureGroup as group:
            problem = "; ".join(f"{failure.title}: {failure.message}" for failure in group.exceptions)
            raise AssertionError(f"{problem}\n{self.last.status_code} {self.last.text[:2000]}") from None
        assert reply == self._alone, f"the plain request beside it got {reply} instead of {self._alone}"
        assert seconds <= MAX_SECONDS, f"it took {seconds:.1f} seconds of processor time"

    def _ask(self) -> tuple[int, Any]:
        """Return the status and the reply of a plain request."""
        try:
            answer = requests.post(f"{self.server.url}/v1/chat/completions", json=PLAIN, timeout=TIMEOUT)
        except requests.RequestException as error:
            return 0, str(error)
        return answer.status_code, answer.json().get("choices", answer.text)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self.server.process.poll() is None

    def accepts(self, fields: dict[str, Any]) -> bool:
        """Return whether a file describes a request to this server."""
        return fields.get("path") in {*self.schema}

    def fields(self, case: Case) -> dict[str, Any]:
        """Return a request as JSON."""
        return fields_of(case)

    def place(self, case: Case) -> str:
        """Return where a request goes, to tell failures apart."""
        return case.path

    def answer(self) -> dict[str, Any]:
        """Return the last answer as JSON."""
        return {} if self.last is None else {"status": self.last.status_code, "answer": self.last.text[:2000]}

    def status(self) -> str:
        """Return more that progress shows."""
        return ""

    def close(self) -> None:
        """Close the connections."""
        self._session.close()
        self._neighbour.shutdown()

    def read(self, fields: dict[str, Any]) -> Case:
        """Return the request that `fields_of` wrote."""
        given = {name: fields[name] for name in ("path_parameters", "query", "headers", "media_type") if name in fields}
        if "base64" in fields:
            given["body"] = base64.b64decode(fields["base64"])
        elif "body" in fields:
            given["body"] = fields["body"]
        return self.schema[fields["path"]][fields["method"]].Case(**given)


class PageProcess(ServerProcess):
    """The web demo in a process."""

    script = "web_demo.py"
    ready = re.compile(r"Open (http://\S+?)/? ")


class CheckedPage(CheckedServer):
    """The web demo, whose queue gets what is like a request of its page; who opens the page meanwhile sees it."""

    checks: ClassVar = [not_a_server_error]

    def document(self) -> BaseSchema:
        paths = {EVENTS: {"post": {"responses": {}, "requestBody": {"content": {"application/json": {"schema": {}}}}}}}
        return schemathesis.openapi.from_dict(
            {"openapi": "3.1.0", "info": {"title": "", "version": ""}, "paths": paths}
        )

    def kinds(self) -> dict[str, SearchStrategy[Case]]:
        operation = self.schema[EVENTS]["POST"]
        return {"page": EVENTS_OF_PAGE.map(lambda body: operation.Case(body=body, media_type="application/json"))}

    def _ask(self) -> tuple[int, Any]:
        return requests.get(self.server.url, timeout=TIMEOUT).status_code, None


def fields_of(case: Case) -> dict[str, Any]:
    """Return a request as JSON: its method, path and parameters, with its `body`, or as `base64` if that is bytes."""
    fields = {"method": case.method, "path": case.path, "media_type": case.media_type}
    fields |= {name: dict(getattr(case, name) or {}) for name in ("path_parameters", "query", "headers")}
    if isinstance(case.body, bytes):
        fields["base64"] = base64.b64encode(case.body).decode()
    elif case.body is not NOT_SET:
        fields["body"] = case.body
    return {name: value for name, value in fields.items() if value not in (None, {}) or name == "body"}


def limit_tokens(case: Case) -> None:
    """Let a request have a short reply."""
    if not isinstance(case.body, dict):
        return
    given = [name for name in TOKEN_LIMITS if type(case.body.get(name)) is int and case.body[name] > 5]
    if "/v1/" in case.path and not any(case.body.get(name) is not None for name in TOKEN_LIMITS):
        given += TOKEN_LIMITS
    for name in given:
        case.body[name] = 2
