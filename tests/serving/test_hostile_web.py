"""Attacks on the web demo: its routes and messages over HTTP, and what a reply can do to the page in a browser.

The server answers each question with the question, so that replies have any content.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, expect, sync_playwright
from starlette.datastructures import Headers

from qwen.serving.web import guard
from qwen.serving.web.guard import LoginThrottle
from qwen.serving.web.rendering import MAX_COST, rendering_cost
from qwen.serving.web.request_types import MAX_BODY, Event, parse_request
from qwen.serving.web.sessions import NobodyListens, Sessions, TooManyQuestions, network_of
from tests.serving.test_web_demo import BROWSER, BROWSER_FLAGS, ECHO, TIMEOUT, Chat, Server, Users, run

JOIN, PREDICT, STREAM = "gradio_api/queue/join", "gradio_api/run/predict", "gradio_api/queue/data"
SETTINGS = ["You are a helpful assistant.", 1, 0.5, 0, 1, 100, None]
SEND, RESTORE = 0, 13  # numbers of events of the page
BIG = "big.bin"  # in the folder that a component was copied from


def text_message(text: object, role: str = "user") -> dict[str, object]:
    return {"role": role, "metadata": None, "options": None, "content": [{"type": "text", "text": text}]}


def question(text: object, session: str = "session", messages: object = (), **fields: object) -> dict[str, object]:
    """The request with which the page asks a question."""
    data = [text, list(messages) if isinstance(messages, tuple) else messages, *SETTINGS]
    return {"fn_index": SEND, "session_hash": session, "trigger_id": 1, "event_data": None, "data": data} | fields


# Without a server

FILE = {"path": BIG, "orig_name": "a", "meta": {"_type": "gradio.FileData"}}
HOSTILE_PARTS = [
    *(
        {"type": "component", "component": name, "value": value, "constructor_args": {}, "props": {}}
        for name in ("file", "video", "model3d", "image", "html", "textbox", "fileexplorer")
        for value in (FILE, [FILE], "http://127.0.0.1:1/x", None)
    ),
    {"type": "file", "file": FILE, "alt_text": None},
    {"type": "file", "file": FILE | {"url": "http://127.0.0.1:1/x", "is_stream": True}},
    {"type": "text", "text": FILE},
    {"type": "text"},
    FILE,
    [FILE],
    "text",
    None,
]


@pytest.mark.parametrize(
    "hostile",
    [
        *(question("hi", messages=[{"role": "user", "content": [part]}]) for part in HOSTILE_PARTS),
        question("hi", messages=[{"role": "user", "content": "text"}]),
        question("hi", messages=[{"role": "system", "content": []}]),
        *(question(text) for text in ([FILE], [[]], True, float("nan"))),
        question("hi", messages=[text_message("x")] * 3000),
        question("hi", session="../x"),
        question("hi", session="x\n"),
        question("hi", fn_index=-1),
        question("hi", event_data={"index": [0, 1], "value": "x"}),
        question("hi", data=[None] * 100),
        question("hi", data={}),
        [],
    ],
    ids=str,
)
def test_requests_have_text_only(hostile: object) -> None:
    with pytest.raises(ValueError, match=r"^This is not a request of the page: .*\. Reload the page\.$") as caught:
        parse_request(json.dumps(hostile).encode(), EVENTS)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("body", [b"", b"[", b"\xff", b"[" * 10**6, b'{"data": [' + b"9" * 5000, b'"\\ud800"'])
def test_broken_json_is_rejected(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"^This is not a request of the page: "):
        parse_request(body, EVENTS)


SEND_TAKES = ("text", "messages", "text", *["slider"] * 5, "number")
EVENTS = {SEND: Event(SEND_TAKES, "submit", limits={3: (0, 2)}), 2: Event(("messages",), "undo")}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"fn_index": 99}, "fn_index: the page has no such event"),
        ({"data": []}, "data: 9 values are needed, not 0"),
        ({"data": ["hi", "hi", *SETTINGS]}, "data.1: this should be messages"),
        ({"data": ["hi", [], *SETTINGS[:-1], "x"]}, "data.8: this should be number"),
        ({"data": ["hi", [], "", None, *SETTINGS[2:]]}, "data.3: this should be slider"),
        ({"data": ["hi", [], "", -1, *SETTINGS[2:]]}, "data.3: this should be from 0 to 2"),
        ({"fn_index": 2, "data": [[]], "event_data": {"index": 0}}, "event_data.index: this should be the .* message"),
        ({"fn_index": 2, "data": [[]]}, "event_data.index: this should be the index of a message"),
    ],
    ids=str,
)
def test_events_are_those_of_the_page(fields: dict[str, object], reason: str) -> None:
    parse_request(json.dumps(question("hi")).encode(), EVENTS)
    with pytest.raises(ValueError, match=f"^This is not a request of the page: {reason}. Reload the page.$"):
        parse_request(json.dumps(question("hi", **fields)).encode(), EVENTS)


def test_nothing_else_is_passed_on() -> None:
    """What the page does not send, and what another version of it has saved, is dropped."""
    saved = {"messages": [text_message("x")], "system": FILE, "top_p": 1, "path": BIG, "meta": FILE["meta"]}
    asked = question("hi", data=["hi", [text_message("a") | {"metadata": {"title": "t"}}], saved], simple_format=True)
    events = {SEND: Event(("text", "messages", "saved"), "submit"), RESTORE: Event(("saved",), "load")}
    passed = json.loads(parse_request(json.dumps(asked).encode(), events).model_dump_json())
    assert set(passed) == {"fn_index", "session_hash", "trigger_id", "data", "event_data"}
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert passed["data"][:2] == ["hi", [message]]
    kept = {name: value for name, value in passed["data"][2].items() if value is not None}
    assert kept == {"messages": [message | {"content": [{"type": "text", "text": "x"}]}], "top_p": 1}
    restored = question("hi", fn_index=RESTORE, data=[{"messages": [FILE]}])
    invalid = parse_request(json.dumps(restored).encode(), events)
    assert invalid.data[0].messages is None


def test_a_body_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.01)
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return await asyncio.get_running_loop().create_future()

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    async def ask() -> None:
        with pytest.raises(guard.BodyRejected) as rejected:
            await guard._read_body(Headers(), receive, 10)
        await rejected.value.response({"type": "http"}, receive, send)

    run(ask())
    assert sent[0]["status"] == 408


def test_logins_wait_longer_after_each_failure() -> None:
    now = [0.0]
    throttle = LoginThrottle(clock=lambda: now[0])
    assert [throttle.begin("a") for _ in range(5)] == [0] * 5
    waits = []
    for _ in range(8):
        waits.append(throttle.begin("a"))
        now[0] += waits[-1]
        assert throttle.begin("a") == 0
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert throttle.begin("b") == 0
    throttle.succeeded("a")
    assert throttle.begin("a") == 0
    now[0] += throttle.FORGIVEN_AFTER
    for number in range(3 * throttle.MAX_ADDRESSES):
        throttle.begin(str(number))
    assert len(throttle._attempts) == throttle.MAX_ADDRESSES


def test_an_address_gets_half_of_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen.serving.web.sessions.GRACE_SECONDS", 0.01)

    async def ask() -> None:
        sessions, silent = Sessions(places=4), []
        sessions.on_silence = silent.append
        with pytest.raises(NobodyListens):
            async with sessions.asking("unheard", "flood"):
                pytest.fail("nobody listens")
        with ExitStack() as streams:
            for name in "abc":
                streams.enter_context(sessions.listening(name))
            async with sessions.asking("a", "flood"), sessions.asking("b", "flood"):
                with pytest.raises(TooManyQuestions):
                    await sessions.asking("c", "flood").__aenter__()
                async with sessions.asking("c", "person"):
                    pass
            async with sessions.asking("c", "flood"):
                pass
        while len(silent) < 3:
            await asyncio.sleep(0.001)
        assert not any((sessions._listeners, sessions._questions, sessions._unheard))

    run(ask())


def test_unheard_questions_of_an_address_are_few() -> None:
    async def ask() -> None:
        sessions = Sessions(places=1000)
        waiting = [asyncio.ensure_future(sessions.asking(str(i), "flood").__aenter__()) for i in range(20)]
        while sum(task.done() for task in waiting) < 4:  # the oldest ones have given way
            await asyncio.sleep(0)
        assert all(isinstance(task.exception(), NobodyListens) for task in waiting[:4])
        with sessions.listening("19"):  # a page that opens its stream after its question
            await waiting[19]
        assert sum(task.done() for task in waiting) == 5
        for task in waiting:
            task.cancel()

    run(ask())


def test_addresses_of_one_client_are_one() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff") != network_of("2001:db8:1::1")
    assert network_of("10.0.0.1") != network_of("10.0.0.2")


# Each froze the page for seconds up to minutes.
FREEZING = {
    "emphasis": "*a" * 20_000,
    "code": "`a" * 20_000,
    "images": "![](" * 10_000,
    "nested list": "".join("  " * depth + "- a\n" for depth in range(400)),
    "formulas": "$a" * 10_000,
    "links": "[a](b" * 10_000,
}
FREEZING_TOO = {
    "bold": "**a " * 10_000,
    "tags": "<a " * 13_000,
    "elements": "".join(f"<b id={number}>\n\n" for number in range(3000)),
    "quotes": ">" * 10_000,
    "cells": "|a" * 1000 + "|\n" + "|-" * 1000 + "|\n" + "a\n" * 1000,
    "brackets": "\\(a" * 10_000,
    "matrix": "$$\\begin{matrix}" + "a&" * 5000 + "\\end{matrix}$$",
    "long formula": "$$" + "a+" * 16_000 + "$$",
    "short formulas": "$x$\n\n" * 8000,
    "references": "[a]: b\n" * 3000 + "[a]" * 3000,
    "lines": "a\n" * 20_000,
    "paragraphs": "a\n\n" * 13_000,
    "addresses": "a@b." * 10_000,
    "long": "word " * 100_000,
}
HONEST = (
    """\
## Sorting

Some **bold** text with `code`, a [link](https://example.com) and a formula $a^2+b^2$ for `n` items.

- one **item** of a list
- two *items* of a list

```python
def lookup(names: dict[str, int], keys: list[str]) -> list[int]:
    return [names[key] * 2 for key in keys if key in names]  # a comment
```

| language | hello |
|---|---|
| English | hello |

"""
    * 80
)  # about 8,000 tokens


@pytest.mark.parametrize(("name", "text"), (FREEZING | FREEZING_TOO).items())
def test_freezing_texts_are_recognized(name: str, text: str) -> None:
    started = time.process_time()
    assert rendering_cost([text]) > MAX_COST, name
    assert time.process_time() - started < 2


def test_honest_texts_stay_markdown() -> None:
    documents = [path.read_text(encoding="utf-8") for path in Path("docs").glob("*.md")]
    for text in (
        HONEST,
        *documents,
        *(f"```python\n{path.read_text()}```" for path in Path("qwen/serving").rglob("*.py")),
    ):
        assert rendering_cost([text]) < MAX_COST, text[:80]


# Over HTTP


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """A server without and one with a login, started concurrently; `files` is where Gradio would store files."""
    folder = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "files"))
        servers = {
            "open": Server(folder / "open", script=ECHO),
            "login": Server(folder / "login", "--auth", "alice:secret", script=ECHO),
        }
    yield servers
    with ExitStack() as stack:
        for step in (Server.check_ended, Server.interrupt):  # last in, first out
            for server in servers.values():
                stack.callback(step, server)


@pytest.fixture
def server(servers: dict[str, Server]) -> Server:
    return servers["open"]


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT, trust_env=False) as client:
        yield client


def computed(server: Server) -> int:
    return server.log.read_text().count("computed")


def ask(client: httpx.Client, text: str, session: str) -> str:
    """Ask like a page and return the reply."""
    assert client.post(JOIN, json=question(text, session)).status_code == 200
    final = None
    with client.stream("GET", STREAM, params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            if line and (message := json.loads(line.removeprefix("data: "))).get("output", {}).get("data"):
                final = final or message["output"]["data"]
            if "process_completed" in line:
                assert message["success"], line
                break
    return json.dumps(final)


@pytest.mark.browser
def test_components_and_files_of_strangers_are_refused(client: httpx.Client, server: Server) -> None:
    log = server.log.read_text()
    for part in HOSTILE_PARTS:
        for path in (JOIN, PREDICT):
            response = client.post(path, json=question("hi", messages=[{"role": "user", "content": [part]}]))
            assert response.status_code == 422, response.text
            assert response.json()["detail"].startswith("This is not a request of the page: data.1.")
    assert server.log.read_text() == log  # nothing was computed, and nothing failed
    assert not [path for path in (server.log.parent / "files").rglob("*") if path.is_file()]


@pytest.mark.browser
def test_only_the_routes_of_the_page_exist(client: httpx.Client) -> None:
    for path in (
        *("openapi.json", "docs", "redoc", "config", "monitoring", "monitoring/summary", "runs", "pwa_icon", "/x//y"),
        *(
            f"gradio_api/{name}"
            for name in ("deep_link", "info", "openapi.json", "token", "user", "login_check", "mcp")
        ),
        *(f"gradio_api/{name}" for name in ("file=README.md", "proxy=http://127.0.0.1:1/", "heartbeat/x", "vibe-code")),
        *("gradio_api/dev/reload", "gradio_api/upload_progress", "gradio_api/call/send/x", "svelte/x", "/file=x"),
        *("gradio_api/startup-events/", "gradio_api/queue/data/", "gradio_api/queue/status", "custom_component/x"),
    ):
        assert client.get(path).status_code == 404, path
    for name in ("upload", "process_recording", "reset", "cancel", "call/send", "api/send", "run/send", "stream/x"):
        for path in (f"gradio_api/{name}", f"gradio_api/{name}/", name):
            assert client.post(path, json={}).status_code == 404, path
    for method, path in (("GET", JOIN), ("PUT", PREDICT), ("POST", STREAM), ("DELETE", ""), ("OPTIONS", "")):
        assert client.request(method, path).status_code == 405, path
    assert client.post(JOIN, data={"data": "x"}).status_code == 415
    assert client.get("").status_code == client.head("").status_code == 200


@pytest.mark.browser
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_other_origin_is_allowed(client: httpx.Client, server: Server, host: str) -> None:
    headers = {"Host": f"{host}:{server.port}"}
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost:1",
        f"http://evil.example:{server.port}",
        "file://",
        "http://[evil",
        f"http://{host}:{server.port}@evil.example",
    ):
        for method, path in (("GET", ""), ("POST", JOIN), ("POST", "login"), ("OPTIONS", JOIN)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            response = client.request(method, path, headers=headers | asked)
            assert response.status_code == 403, (origin, path)
            assert not [name for name in response.headers if name.startswith("access-control")]
    same = client.get("", headers=headers | {"Origin": f"http://{host}:{server.port}"})
    assert same.status_code == 200
    assert not [name for name in same.headers if name.startswith("access-control")]
    policy = same.headers["content-security-policy"]
    assert "form-action 'self'" in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.browser
def test_names_of_other_hosts_are_refused(client: httpx.Client, server: Server) -> None:
    """As of a page that reaches this machine by DNS rebinding."""
    for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", ""):
        host = f"{name}:{server.port}"
        response = client.get("", headers={"Host": host, "Origin": f"http://{host}"})
        assert response.status_code == 403, name


@pytest.mark.browser
def test_large_requests_are_refused_before_they_are_parsed(client: httpx.Client, server: Server) -> None:
    process = psutil.Process(server.process.pid)
    client.get("")
    before = process.memory_info().rss
    large = b'{"data": ["' + b"x" * 60_000_000
    chunks = (large[start : start + 2**20] for start in range(0, len(large), 2**20))  # without a Content-Length
    for path, body in ((JOIN, large), (PREDICT, chunks), (JOIN, b"[" * (MAX_BODY + 1)), ("login", b"x" * 2**20)):
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 413, path
        assert "clear the conversation" in response.json()["detail"]
    assert process.memory_info().rss - before < 30e6


@pytest.mark.browser
def test_a_page_without_events_has_no_stream(client: httpx.Client, server: Server) -> None:
    for session in ("", "stranger", "a&session_hash=b"):
        assert '"unexpected_error"' in client.get(f"{STREAM}?session_hash={session}").text
    assert "Traceback" not in server.log.read_text()


@pytest.mark.browser
def test_questions_that_nobody_listens_to_are_not_computed(client: httpx.Client, server: Server) -> None:
    before = computed(server)
    for number in range(100):
        assert client.post(JOIN, json=question("hello", f"nobody{number}")).status_code == 200
    assert "a person" in ask(client, "a person", "person1")  # has a turn at once
    assert computed(server) == before + 1


@pytest.mark.browser
def test_a_page_asks_one_question_at_a_time(client: httpx.Client, server: Server) -> None:
    before = computed(server)
    for _ in range(20):
        client.post(JOIN, json=question("wait", "greedy"))
    with client.stream("GET", STREAM, params={"session_hash": "greedy"}) as stream:
        completed = sum("process_completed" in line for line in itertools.islice(stream.iter_lines(), 60))
        assert completed <= 19
        assert computed(server) == before + 1


@pytest.mark.browser
def test_everything_needs_the_login(servers: dict[str, Server]) -> None:
    with httpx.Client(base_url=servers["login"].url, timeout=TIMEOUT, trust_env=False) as client:
        for path in (JOIN, PREDICT):
            assert client.post(path, json=question("hi")).status_code == 401
        for path in (STREAM, "gradio_api/app_id", "gradio_api/startup-events"):
            assert client.get(path).status_code == 401
        for path in ("gradio_api/reset", "gradio_api/cancel", "openapi.json"):
            assert client.get(path).status_code == 404
        credentials = {"username": "alice", "password": "secret"}
        assert client.post("login", data=credentials).status_code == 200
        assert client.get("gradio_api/app_id").status_code == 200

        # An image, a frame or a link of another page does not log out; the user does.
        for headers in (
            {"Sec-Fetch-Dest": "image", "Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Dest": "iframe", "Sec-Fetch-Site": "same-origin", "Accept": "text/html"},
            {"Sec-Fetch-Dest": "document", "Sec-Fetch-Site": "cross-site", "Accept": "text/html"},
            {"Accept": "image/avif,image/webp,*/*;q=0.8"},
        ):
            assert client.get("logout", headers=headers).status_code == 403
            assert client.get("gradio_api/app_id").status_code == 200
        visit = {"Sec-Fetch-Dest": "document", "Sec-Fetch-Site": "none"}
        assert client.get("logout", headers=visit).status_code == 302
        assert client.get("gradio_api/app_id").status_code == 401

        guesses = ["", "secret\0", "SECRET", "x", "y"] * 3  # on a slow machine, the first waits may be over
        answers = [client.post("login", data={"username": "alice", "password": guess}) for guess in guesses]
        assert {answer.status_code for answer in answers[:5]} <= {400, 422}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) > 0


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or Google Chrome")
    expect.set_options(timeout=TIMEOUT * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def users(browser: Browser) -> Users:
    return Users(browser)


@pytest.fixture
def visit(users: Users) -> Iterator[Callable[[Server], Chat]]:
    yield lambda server: Chat(users.context("en-US").new_page(), server.url)
    users.leave()


LOGIN_FORM = (
    "<form action='http://elsewhere.example/steal'><input name=user><input type=password><button>Log in</button></form>"
)
COVER = "inset:0;top:0;left:0;width:100vw;height:100vh;z-index:99999;background:red"
OVERLAYS = [
    f'<div style="position:fixed;{COVER}" id=overlay>{LOGIN_FORM}</div>',
    f'<div style="position:fixed !important;{COVER}">{LOGIN_FORM}</div>',
    f'<div style="position:absolute;{COVER}">X</div>',
    f'<div style="position:sticky;{COVER}">X</div>',
    '<div style="margin:-2000px;width:5000px;height:5000px;position:relative;z-index:9999;background:red">X</div>',
    '<div style="transform:translate(-500px,-500px) scale(50);background:red">X</div>',
    f'<div class="md" style="position:fixed;{COVER}">X</div>',
    '<div class="fixed inset-0 absolute z-50 modal toast-wrap sidebar overlay">X</div>',
    "<style>#page{display:none} body::before{content:'x';position:fixed;inset:0;background:red}</style>",
    '<dialog open style="position:fixed;inset:0">X</dialog>',
    "<div id=p popover>X</div><button popovertarget=p>Go</button><button commandfor=p command=show-modal>Go</button>",
    f"<details open><summary>S</summary>{LOGIN_FORM}</details>",
    f'<svg style="position:fixed;inset:0" width=9999 height=9999><foreignObject>{LOGIN_FORM}</foreignObject></svg>',
    '<math style="position:fixed;inset:0" href="https://evil.example"><mi style="position:fixed">x</mi></math>',
    '<marquee style="position:fixed;inset:0">X</marquee>',
    '<div style="animation:waiting 1s infinite;position:fixed;inset:0">X</div>',
    r"$\href{https://evil.example}{x}$ $\htmlStyle{position:fixed}{y}$ $\rule{999em}{999em}$ $\raisebox{500em}{z}$",
    f'<span class="katex"><span class="fixed" style="position:fixed;{COVER}">X</span></span>',
    "```mermaid\ngraph TD\n A-->B\n click A 'https://evil.example'\n```",
    '<div class="mermaid">graph TD; A-->B</div>',
    '<img src="/logout"> ![x](/logout) <picture><source srcset="/logout"></picture>',
    '<a href="https://e.example" target=_self>a</a> [b](/logout) [c](javascript:x) <map><area href="/logout"></map>',
    "<button formaction='https://evil.example'>B</button><input form=f type=submit formaction='//evil.example'>",
    "<select><option>1</select><textarea>t</textarea><label for=box>l</label><fieldset><legend>x</legend></fieldset>",
    '<a id=box name=box>z</a><div id="chat"><div class="md">x</div></div><p id="page">x</p>',
    '<div class="code_wrap"><button class="copy_code_button" style="position:fixed" popovertarget=x>Go</button></div>',
    '<iframe src="/"></iframe><object data="/"></object><embed src="/"><video src="/logout" controls></video>',
]
# Returns what is wrong with the messages.
INSPECT = """() => {
    const wrong = [];
    for (const element of document.querySelectorAll("#chat .md *")) {
        const say = (what) => wrong.push(`${what}: ${element.outerHTML.slice(0, 200)}`);
        const style = getComputedStyle(element);
        if (["fixed", "sticky"].includes(style.position)) say(style.position);
        if (style.position === "absolute" && !element.closest(".katex, .code_wrap")) say("absolute");
        const inputs = "form, input, textarea, select, option, label, fieldset, dialog, iframe, object, embed, style, "
            + "video, audio, area, button:not(.copy_code_button), [popover], [popovertarget], [formaction]";
        if (element.id || element.hasAttribute("name")) say("named");
        if (element.matches(inputs)) say("input");
        if (element.localName === "a" && element.hasAttribute("href")) {
            if (element.target !== "_blank" || !element.rel.includes("noopener")) say("opens here");
            if (!/^https?:/.test(element.href) || new URL(element.href).origin === location.origin) say("link");
        }
        if (element.localName === "img" && element.getAttribute("src")?.startsWith("/")) say("own image");
    }
    const {x, y, width, height} = document.querySelector("#box textarea").getBoundingClientRect();
    for (const point of [[x + width / 2, y + height / 2], [5, 5], [innerWidth - 5, 5], [5, innerHeight - 5]]) {
        const found = document.elementFromPoint(...point);
        if (found?.closest("#chat .md")) wrong.push(`drawn outside: ${found.outerHTML.slice(0, 200)}`);
    }
    return wrong;
}"""


@pytest.mark.browser
def test_messages_cannot_draw_over_the_page_or_ask_for_input(visit: Callable, server: Server) -> None:
    chat = visit(server)
    assert chat.page.evaluate("getComputedStyle(document.body).position") == "static"
    text = "\n\n".join(OVERLAYS)
    chat.ask(text)
    assert chat.page.evaluate(INSPECT) == []
    expect(chat.page.locator("#chat .md")).to_have_count(2)
    chat.reload()
    expect(chat.bot).to_have_count(1)
    assert chat.page.evaluate(INSPECT) == []

    # The model still gets the text as it was written.
    with chat.page.expect_request(f"**/{JOIN}*") as request:
        chat.button("Retry").click()
    assert request.value.post_data_json["data"][0][0]["content"][0]["text"] == text
    chat.wait()


@pytest.mark.browser
def test_a_formula_of_many_levels_does_not_crash_the_page(visit: Callable, server: Server) -> None:
    chat = visit(server)
    text = "a^{" * 300 + "}" * 300
    chat.ask(f"$${text}$$ and $b^2$")
    expect(chat.bot).to_contain_text(text)
    expect(chat.bot.locator(".katex")).to_have_count(1)


@pytest.mark.browser
def test_ordinary_content_stays(visit: Callable, server: Server) -> None:
    chat = visit(server)
    chat.ask(
        "```html\n<form action='x'><input></form>\n```\n`<div style='position:fixed'>` <stdio.h> a < b\n\n"
        "- [x] done\n\n| a |\n|---|\n| b |\n\n$\\frac{a}{b}$ [link](https://example.com/)"
    )
    code = chat.bot.locator("pre code")
    expect(code).to_have_text("<form action='x'><input></form>")
    expect(code.locator(".token.tag").first).to_be_visible()
    expect(chat.bot.locator("button[title=copy]")).to_be_visible()
    expect(chat.bot.locator("p code")).to_have_text("<div style='position:fixed'>")
    expect(chat.bot).to_contain_text("<stdio.h> a < b")
    expect(chat.bot.locator("li")).to_contain_text("☑ done")
    expect(chat.bot.locator("td")).to_have_text("b")
    expect(chat.bot.locator(".katex .mfrac")).to_be_visible()
    expect(chat.bot.locator("a")).to_have_attribute("href", "https://example.com/")


@pytest.mark.browser
def test_no_text_freezes_the_page(visit: Callable, server: Server) -> None:
    chat = visit(server)
    devtools = chat.page.context.new_cdp_session(chat.page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy_seconds() -> float:
        """Processor time that the page has taken."""
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    taken = {}
    for name, text in FREEZING.items():
        before = busy_seconds()
        chat.ask(text)
        chat.page.locator(".toggle-button").click()
        chat.page.locator(".toggle-button").click()
        taken[name] = busy_seconds() - before
        assert len(chat.bot.last.inner_text()) > 0.9 * len(text.strip())
    assert max(taken.values()) < 6, taken  # less than 1 on a quiet machine, for two messages
    chat.reload()
    expect(chat.bot).to_have_count(len(FREEZING))
    chat.button("Clear").click()
    expect(chat.user).to_have_count(0)

    chat.ask(HONEST[: len(HONEST) // 8])
    expect(chat.bot.locator("td").first).to_have_text("English")
    expect(chat.bot.locator(".katex").first).to_be_visible()
