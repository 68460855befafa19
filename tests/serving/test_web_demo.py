"""Tests of web_demo.py as a process, with a browser.

Three servers are used: of the bundled model, which chats; of one that generates endlessly, for events during a reply;
and one that repeats the question, for the rendering of content. No page may fetch from other hosts in any test.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import pytest
import torch
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request, expect, sync_playwright

from qwen.checkpoint.loading import load_model
from qwen.model.qwen_generation_utils import DEFAULT_SYSTEM
from qwen.serving.engine import Engine
from qwen.serving.web.page import Page as WebPage
from qwen.serving.web.page import build_message, message_text
from qwen.serving.web.texts import TEXTS
from tests.support import ROOT
from tests.support.processes import Script, run_script
from tests.support.recording_server import RecordingServer, recording_server

pytestmark = pytest.mark.browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT = 60  # seconds, for any wait

PACED = "tests/support/paced_web_demo.py"
ECHO = "tests/support/echo_web_demo.py"
ENDLESS = 8000  # tokens: more than a reply gets before the test stops it
MARKDOWN = """\
Greetings:

| language | hello |
|---|---|
| English | hello |
| 中文 | 你好 |

```python
def greet(name: str) -> str:
    return f"Hello, {name}!"
```"""
FORMULAS = r"""一元二次方程 $ax^2+bx+c=0$ 的解是

$$x=\frac{-b\pm\sqrt{b^2-4ac}}{2a}$$

其中 \(a\ne0\)。另有

\[\sum_{k=1}^n k=\frac{n(n+1)}2\]"""
ATTACK = """\
<script>window.hacked = 1</script> <img src="x" onerror="window.hacked = 2"> <a href="javascript:hacked = 3">a</a>

![pixel](http://example.com/pixel.png) and #include <stdio.h>"""


# Servers


class Server:
    """web_demo.py on a free port; `url` waits until it is ready.

    Args:
        script: script to start instead.
    """

    def __init__(self, log: Path, *arguments: str, script: str = "web_demo.py"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        log.touch()
        words = [script, "--cpu-only", "--server-port", self.port, *arguments]
        self.process = Script(*words, files=(os.devnull, log, log))

    @property
    def url(self) -> str:
        deadline = time.monotonic() + 2 * TIMEOUT
        while "Open http" not in (text := self.log.read_text()):
            assert self.process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
        return f"http://127.0.0.1:{self.port}/"

    def replies(self) -> int:
        """Return the number of running replies of a paced server."""
        port = re.search(r"Load at port (\d+)", self.log.read_text())[1]
        with socket.create_connection(("127.0.0.1", int(port))) as connection:
            return int(connection.recv(9))

    def becomes_idle(self) -> bool:
        """Return whether a paced server becomes idle, long before an endless reply would finish."""
        deadline = time.monotonic() + TIMEOUT
        while self.replies():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def interrupt(self) -> None:
        """Send SIGINT, like Ctrl-C."""
        assert self.url  # wait until it has started
        self.process.send_signal(signal.SIGINT)

    def check_ended(self) -> None:
        """Check that the server ended without errors."""
        try:
            assert self.process.wait(TIMEOUT) == 0
        finally:
            self.process.kill()
        assert "Traceback" not in self.log.read_text()


@pytest.fixture(scope="module")
def servers(tiny_chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """The three servers, started concurrently."""
    logs = tmp_path_factory.mktemp("logs")
    servers = {
        "bundled": Server(logs / "bundled"),
        "endless": Server(logs / "endless", "-c", str(tiny_chat_checkpoint), "--max-batch-size", "2", script=PACED),
        "echo": Server(logs / "echo", script=ECHO),
    }
    yield servers
    with contextlib.ExitStack() as stack:
        for step in (Server.check_ended, Server.interrupt):  # last in, first out
            for server in servers.values():
                stack.callback(step, server)


@pytest.fixture(scope="module")
def endless(servers: dict[str, Server]) -> Server:
    """A server for two concurrent replies, which never end by themselves."""
    return servers["endless"]


@pytest.fixture(scope="module")
def echo(servers: dict[str, Server]) -> Server:
    """A server whose replies are the questions."""
    return servers["echo"]


# Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or Google Chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_FLAGS)
        yield browser
        browser.close()


class Chat:
    """The user's actions on one page of the web demo."""

    def __init__(self, page: Page, url: str):
        self.page = page
        self.box = page.locator("#box textarea")
        self.user = page.get_by_test_id("user")
        self.bot = page.get_by_test_id("bot")
        self.stop_button = page.locator("#box .stop-button")
        self.submit_button = page.locator("#box .submit-button")
        self.notice = page.get_by_test_id("toast-body")
        page.goto(url)
        expect(self.box).to_be_visible()
        page.wait_for_function("window.conversationRestored")

    def button(self, name: str) -> Locator:
        return self.page.locator(f"#chat button[aria-label='{name}']")

    def send(self, text: str) -> None:
        """Send a question and wait until it appears."""
        questions = self.user.count()
        self.box.fill(text)
        self.box.press("Enter")
        expect(self.user).to_have_count(questions + 1)

    def ask(self, text: str) -> str:
        """Send a question and return the whole reply."""
        self.send(text)
        self.wait()
        return self.reply()

    def wait(self) -> None:
        """Wait for the end of the reply."""
        expect(self.submit_button).to_be_visible()
        expect(self.bot).to_have_count(self.user.count())

    def reply(self) -> str:
        return self.bot.last.inner_text()

    def watch(self) -> list[str]:
        """Return four states of a running reply."""
        seen = [""]
        while len(seen) < 5:
            expect(self.bot.last).not_to_have_text(seen[-1])
            seen.append(self.reply())
        return seen[1:]

    def messages(self) -> list[str]:
        return self.page.locator("#chat .message-content").all_inner_texts()

    def settings(self, **values: str | float) -> "Chat":
        """Change settings, by their names in SamplingParams."""
        self.page.locator(".toggle-button").click()
        for name, value in values.items():
            field = self.page.locator(f"#{name} textarea, #{name} input[type=number]")
            field.fill(str(value))
            field.press("Tab")
        self.page.locator(".toggle-button").click()
        return self

    def setting(self, name: str) -> str:
        return self.page.locator(f"#{name} textarea, #{name} input[type=number]").input_value()

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_function("window.conversationRestored")


class Users:
    """Browser contexts, one for each user of a test. The next test gets them without what the users stored, but with
    the scripts of the pages in their caches, which take a second to load and compile."""

    def __init__(self, browser: Browser):
        self._browser = browser
        self._free: dict[str, list[BrowserContext]] = {}
        self._used: list[tuple[str, BrowserContext]] = []

    def context(self, language: str) -> BrowserContext:
        """Return the context of a user who has not visited any page."""
        free = self._free.setdefault(language, [])
        context = free.pop() if free else self._browser.new_context(locale=language)
        context.set_default_timeout(TIMEOUT * 1000)
        self._used.append((language, context))
        return context

    def leave(self) -> None:
        """Close all pages and delete what they stored."""
        while self._used:
            language, context = self._used.pop()
            for page in context.pages:
                page.close()
            context.set_storage_state({"cookies": [], "origins": []})
            self._free[language].append(context)


@pytest.fixture(scope="module")
def users(browser: Browser) -> Users:
    return Users(browser)


@pytest.fixture
def visit(users: Users) -> Iterator[Callable[..., Chat]]:
    """Opens each page as a different user; checks that pages fetch nothing from other hosts."""
    fetched, blocked, errors = set(), set(), []

    def failed(request: Request) -> None:
        if request.failure == "csp":
            blocked.add(request.url)

    def open_page(server: Server, language: str = "en-US") -> Chat:
        page = users.context(language).new_page()
        page.on("request", lambda request: fetched.add(request.url))
        page.on("requestfailed", failed)
        page.on("pageerror", lambda error: errors.append(error))
        return Chat(page, server.url)

    expect.set_options(timeout=TIMEOUT * 1000)
    yield open_page
    users.leave()
    assert not errors
    other_hosts = {url for url in fetched - blocked if urlsplit(url).hostname not in ("127.0.0.1", None, "")}
    assert not other_hosts


# A conversation, with the bundled model


@pytest.fixture
def bundled(servers: dict[str, Server]) -> Server:
    return servers["bundled"]


def test_conversation(visit: Callable, bundled: Server) -> None:
    chat = visit(bundled).settings(temperature=0)
    assert chat.ask("My name is Alice.") == "Nice to meet you, Alice!"
    assert chat.ask("What is my name?") == "Your name is Alice."
    expect(chat.box).to_be_focused()

    # Edit the first question and continue from there.
    chat.button("Edit").first.click()
    chat.page.locator("#chat textarea").fill("My name is Bob.")
    chat.button("Submit").click()
    expect(chat.bot.last).to_have_text("Nice to meet you, Bob!")
    chat.wait()
    assert chat.messages() == ["My name is Bob.", "Nice to meet you, Bob!"]
    assert chat.ask("What is my name?") == "Your name is Bob."

    chat.button("Undo").click()
    expect(chat.user).to_have_count(1)
    expect(chat.box).to_have_value("What is my name?")
    chat.box.press("Enter")
    expect(chat.user).to_have_count(2)
    chat.wait()

    chat.button("Clear").click()
    expect(chat.user).to_have_count(0)
    assert "Bob" not in chat.ask("What is my name?")


def test_conversation_survives_a_reload_and_another_user(visit: Callable, bundled: Server) -> None:
    alice, bob = visit(bundled).settings(temperature=0, system="You are a pirate."), visit(bundled)
    alice.ask("My name is Alice.")
    said = alice.messages()
    bob.ask("What is 47 + 38?")
    alice.reload()
    expect(alice.bot).to_have_count(1)
    assert alice.messages() == said
    assert (alice.setting("system"), alice.setting("temperature")) == ("You are a pirate.", "0")
    assert "Alice" in alice.ask("What is my name?")
    bob.reload()
    assert bob.messages() == ["What is 47 + 38?", "47 + 38 = 85."]
    assert "Alice" not in bob.ask("What is my name?")

    alice.button("Clear").click()
    expect(alice.user).to_have_count(0)
    alice.reload()
    expect(alice.user).to_have_count(0)


def test_system_prompt_and_reset(visit: Callable, bundled: Server) -> None:
    chat = visit(bundled).settings(temperature=0)
    assert chat.ask("Hello") == "Hello! How can I help you today?"
    chat.button("Clear").click()
    expect(chat.user).to_have_count(0)
    assert chat.settings(system="You are a pirate.").ask("Hello").startswith("Arr, matey!")
    chat.page.locator(".toggle-button").click()
    chat.page.locator("#reset").click()
    expect(chat.page.locator("#system textarea")).to_have_value("You are a helpful assistant.")
    assert chat.setting("temperature") == "1"
    assert chat.setting("top_p") == "0.5"
    assert chat.setting("seed") == ""


@pytest.mark.parametrize(("locale", "language"), [("en-US", "en"), ("de-DE", "en"), ("zh-CN", "zh"), ("zh-TW", "zh")])
def test_page_uses_the_language_of_the_browser(visit: Callable, bundled: Server, locale: str, language: str) -> None:
    chat = visit(bundled, locale)
    texts = TEXTS[language]
    expect(chat.box).to_have_attribute("placeholder", texts["ask"])
    expect(chat.page.locator("#chat .placeholder")).to_have_text(texts["greeting"])
    expect(chat.page.locator("#reset")).to_have_text(texts["reset"])
    expect(chat.page.locator("#temperature")).to_contain_text(texts["temperature_info"])


def test_too_long_text_is_rejected_but_not_lost(visit: Callable, bundled: Server) -> None:
    chat = visit(bundled, "zh-CN").settings(temperature=0)
    chat.ask("My name is Alice.")
    book = "the end. " * 4000
    chat.box.fill(book)
    chat.box.press("Enter")
    expect(chat.notice).to_contain_text(TEXTS["zh"]["too_long"])
    chat.page.get_by_test_id("toast-close").click()
    expect(chat.notice).to_have_count(0)
    expect(chat.box).to_have_value(book)
    expect(chat.user).to_have_count(1)

    chat.button("编辑").first.click()
    chat.page.locator("#chat textarea").fill(book)
    chat.button("发送").click()
    expect(chat.notice).to_contain_text(TEXTS["zh"]["too_long"])
    # The page shows the edited text until the server responds.
    expect(chat.page.locator("#chat .message-content")).to_have_text(["My name is Alice.", "Nice to meet you, Alice!"])
    chat.box.fill("")
    assert chat.ask("What is my name?") == "Your name is Alice."


def test_empty_text_is_not_sent(visit: Callable, bundled: Server) -> None:
    chat = visit(bundled).settings(temperature=0)
    chat.box.fill(" \n ")
    with chat.page.expect_response("**/run/predict"):  # the last event
        chat.box.press("Enter")
    assert chat.ask("What is 47 + 38?") == "47 + 38 = 85."
    with chat.page.expect_response("**/run/predict"):
        chat.box.press("Enter")
    assert chat.ask("Hello")
    assert len(chat.messages()) == 4
    chat.button("Edit").first.click()
    chat.page.locator("#chat textarea").fill(" ")
    chat.button("Submit").click()
    expect(chat.user.first).to_have_text("What is 47 + 38?")
    assert len(chat.messages()) == 4


# During a reply, with the endless model


def test_reply_streams_and_stops(visit: Callable, endless: Server) -> None:
    chat = visit(endless).settings(max_tokens=ENDLESS, seed=1)
    chat.send("hello")
    lengths = list(map(len, chat.watch()))
    assert lengths == sorted(lengths)
    assert endless.replies() == 1
    chat.stop_button.click()
    chat.wait()
    said = chat.reply()
    assert lengths[-1] <= len(said) < ENDLESS / 2
    assert endless.becomes_idle()
    assert chat.reply() == said
    assert len(chat.settings(max_tokens=5).ask("go on")) < 50
    assert chat.bot.first.inner_text() == said


def test_regenerating_and_seeds(visit: Callable, endless: Server) -> None:
    chat = visit(endless)
    first = chat.ask("hello")
    chat.button("Retry").click()
    expect(chat.bot.last).not_to_have_text(first)
    chat.wait()
    assert len(chat.messages()) == 2
    replies = []
    for _ in range(2):
        chat.button("Clear").click()
        expect(chat.user).to_have_count(0)
        replies.append(chat.settings(seed=-7).ask("hello"))
    assert replies[0] == replies[1] != first


def test_replies_are_concurrent_and_the_next_one_waits(visit: Callable, endless: Server) -> None:
    first, second, third = (visit(endless).settings(max_tokens=tokens) for tokens in (ENDLESS, ENDLESS, 5))
    first.send("hello")
    second.send("hello")
    before = len(first.watch()[0]), len(second.watch()[0])
    third.send("hello")
    assert len(first.watch()[-1]) > before[0]
    assert len(second.watch()[-1]) > before[1]
    expect(third.bot).to_have_count(0)

    third.stop_button.click()  # before the reply begins
    expect(third.submit_button).to_be_visible()
    expect(third.user).to_have_count(0)
    expect(third.box).to_have_value("hello")

    third.send("hello")
    first.stop_button.click()  # frees a place
    third.wait()
    expect(second.stop_button).to_be_visible()
    second.page.close()
    assert endless.becomes_idle()


def test_clearing_stops_the_reply(visit: Callable, endless: Server) -> None:
    chat = visit(endless).settings(max_tokens=ENDLESS)
    chat.send("hello")
    chat.watch()
    chat.button("Clear").click()
    assert endless.becomes_idle()
    expect(chat.submit_button).to_be_visible()
    expect(chat.user).to_have_count(0)


def test_reloading_keeps_the_text_and_stops_the_reply(visit: Callable, endless: Server) -> None:
    chat = visit(endless).settings(max_tokens=ENDLESS)
    chat.send("hello")
    said = chat.watch()[0]
    chat.reload()
    expect(chat.bot).to_have_count(1)
    assert chat.reply().startswith(said[:3])
    assert len(chat.reply()) >= len(said)
    assert endless.becomes_idle()


# Content of replies, with the server that repeats questions


def test_markdown_and_code(visit: Callable, echo: Server) -> None:
    chat = visit(echo)
    chat.ask(MARKDOWN)
    expect(chat.bot.locator("td")).to_have_text(["English", "hello", "中文", "你好"])
    code = chat.bot.locator("pre code.language-python")
    assert code.inner_text().strip() == MARKDOWN.partition("python\n")[2].removesuffix("\n```")
    expect(code.locator(".token.keyword")).to_have_text(["def", "return"])
    expect(chat.bot.locator("button[title=copy]")).to_be_visible()


def test_formulas(visit: Callable, echo: Server) -> None:
    chat = visit(echo, "zh-CN")
    chat.ask(FORMULAS)
    expect(chat.bot.locator(".katex")).to_have_count(4)
    expect(chat.bot.locator(".katex-display")).to_have_count(2)
    expect(chat.bot.locator(".katex-error")).to_have_count(0)
    assert "$" not in chat.reply()
    assert "\\(" not in chat.reply()


def test_html_is_not_executed(visit: Callable, echo: Server) -> None:
    chat = visit(echo)
    for text in (chat.ask(ATTACK), chat.user.last.inner_text()):
        assert "#include <stdio.h>" in text
    expect(chat.bot.first.locator("img[alt=pixel]")).to_be_attached()  # the policy blocks fetching it
    for link in chat.page.locator("#chat a").all():
        assert not (link.get_attribute("href") or "").startswith("javascript")
    assert chat.page.evaluate("window.hacked") is None


@pytest.fixture
def other_origin(bundled: Server) -> Iterator[RecordingServer]:
    """A server at another port, whose page embeds the demo."""
    with recording_server(200, f"<iframe src='{bundled.url}'></iframe>") as server:
        yield server


# Each kind of request that content of a reply could make, and the directive that must refuse it.
REQUESTS = {
    "connect-src": "fetch(url).catch(() => {})",
    "frame-src": "document.body.append(Object.assign(document.createElement('iframe'), {src: url}))",
    "form-action": """const form = Object.assign(document.createElement("form"), {action: url, method: "POST"});
        document.body.append(form); form.submit()""",
    "img-src": "new Image().src = url",
    "media-src": "new Audio(url).load()",
    "script-src-elem": "document.head.append(Object.assign(document.createElement('script'), {src: url}))",
    "style-src-elem": """document.head.append(
        Object.assign(document.createElement("link"), {rel: "stylesheet", href: url}))""",
    "font-src": "new FontFace('other', `url(${url})`).load().catch(() => {})",
    "object-src": "document.body.append(Object.assign(document.createElement('object'), {data: url}))",
    "base-uri": "document.head.prepend(Object.assign(document.createElement('base'), {href: url}))",
}
WATCH = """([action, url]) => new Promise((resolve) => {
    document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective), {once: true});
    setTimeout(() => resolve("nothing was refused"), 10000);
    new Function("url", action)(url);
})"""


def test_page_cannot_contact_other_origins(visit: Callable, bundled: Server, other_origin: RecordingServer) -> None:
    page = visit(bundled).page
    refused = {name: page.evaluate(WATCH, [code, f"{other_origin.url}/{name}"]) for name, code in REQUESTS.items()}
    assert refused == {name: name for name in REQUESTS}
    assert not other_origin.requests


def test_other_pages_cannot_embed_the_page(visit: Callable, bundled: Server, other_origin: RecordingServer) -> None:
    page = visit(bundled).page
    page.goto(other_origin.url)
    expect(page.locator("iframe")).to_be_attached()
    assert [frame.url for frame in page.frames if frame.parent_frame] == ["chrome-error://chromewebdata/"]


def test_code_in_a_question_keeps_its_whitespace(visit: Callable, endless: Server) -> None:
    chat = visit(endless)
    code = "def f():\n    if x < 1:\n        return [1, 2]"
    chat.ask(code)
    assert chat.user.inner_text().replace("\xa0", " ").strip() == code
    chat.button("Undo").click()
    expect(chat.box).to_have_value(code)


# Rejected requests, without a browser


async def last_update(updates) -> tuple:
    return [update async for update in updates][-1]


def fail(hidden: torch.Tensor) -> torch.Tensor:
    """A layer whose device has failed."""
    raise RuntimeError("the device is gone")


def run(coroutine) -> tuple:
    """Run in another thread, because Playwright has an event loop in this one."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(asyncio.run, coroutine).result()


@pytest.mark.parametrize(("language", "notices"), [("zh-CN,zh;q=0.9", "zh"), ("en", "en")])
def test_rejected_requests_change_nothing(tiny_chat_checkpoint: Path, language: str, notices: str) -> None:
    model, tokenizer = load_model(tiny_chat_checkpoint, cpu_only=True)
    engine = Engine(model, tokenizer, max_batch_size=1, max_queue=0)
    page = WebPage(engine, "tiny")
    settings = page.default_settings()
    request = gr.Request(session_hash="page", headers={"accept-language": language})
    messages = [build_message("user", "hello"), build_message("assistant", "world")]
    busy = engine.start([1, 2, 3], engine.params(max_tokens=ENDLESS))
    while engine.load().running == 0:
        time.sleep(0.01)
    with pytest.warns(UserWarning, match=re.escape(TEXTS[notices]["queue_full"])):
        box, chat = run(last_update(page.send(request, "more", messages, *settings)))
    assert box["value"] == "more"
    assert chat == messages
    with pytest.warns(UserWarning, match=re.escape(TEXTS[notices]["queue_full"])):
        box, chat = run(last_update(page.retry(request, messages, *settings)))
    assert "value" not in box
    assert chat == messages
    busy.cancel()
    while engine.load().running:
        time.sleep(0.01)

    model.lm_head.forward = fail
    with pytest.warns(UserWarning, match=re.escape(TEXTS[notices]["failed"])):
        box, chat = run(last_update(page.send(request, "more", messages, *settings)))
    assert box["value"] == "more"
    assert chat == messages
    engine.close()
    with pytest.warns(UserWarning, match=re.escape(TEXTS[notices]["closed"])):
        box, chat = run(last_update(page.send(request, "more", messages, *settings)))
    assert box["value"] == "more"
    assert chat == messages
    assert not page.running


@pytest.mark.parametrize(
    "kept",
    [
        None,
        "text",
        [],
        {"messages": 7},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "text"}]},
        {"temperature": "hot", "top_p": 7, "top_k": None, "seed": "?", "max_tokens": 10**9, "system": 3},
    ],
)
def test_invalid_browser_storage_is_ignored(web_page: WebPage, kept: object) -> None:
    assert web_page.restore(kept) == [gr.skip(), [], *web_page.default_settings()]


def test_question_without_a_reply_returns_to_the_box(web_page: WebPage) -> None:
    messages = [build_message("user", "hello"), build_message("assistant", "world"), build_message("user", "more")]
    draft, restored, *settings = web_page.restore({"messages": messages, "seed": 3})
    assert (draft, restored, settings[-1]) == ("more", messages[:2], 3)


def test_messages_in_any_order_are_answered(bundled_chat: Path) -> None:
    """As a conversation has them whose reply was removed, or which begins with a greeting."""
    model, tokenizer = load_model(bundled_chat, cpu_only=True)
    engine = Engine(model, tokenizer)
    page = WebPage(engine, "toy")
    settings = [
        {"system": DEFAULT_SYSTEM, "temperature": 0, "max_tokens": 20}.get(name, component.value)
        for name, component in page.settings.items()
    ]
    request = gr.Request(session_hash="page", headers={})
    try:
        for earlier in ([("user", "Hello")], [("assistant", "Hello! How can I help?")]):
            messages = [build_message(*message) for message in earlier]
            _, chat = run(last_update(page.send(request, "What is 47 + 38?", messages, *settings)))
            sent = [{"role": message["role"], "content": message_text(message)} for message in chat[:-1]]
            assert message_text(chat[-1]) == model.chat(tokenizer, sent, do_sample=False, max_new_tokens=20)[0]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def web_page(tiny_chat_checkpoint: Path) -> Iterator[WebPage]:
    engine = Engine(*load_model(tiny_chat_checkpoint, cpu_only=True))
    yield WebPage(engine, "tiny")
    engine.close()


# Start


def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Start without the installed libraries."""
    command = [sys.executable, "-S", "web_demo.py", *arguments]  # -S: no site-packages
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * TIMEOUT, check=False)


def test_help_needs_no_libraries() -> None:
    result = start("--help")
    assert result.returncode == 0
    for flag in (
        "--checkpoint-path",
        "--cpu-only",
        "--share",
        "--inbrowser",
        "--server-port",
        "--server-name",
        "--auth",
    ):
        assert flag in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--server-port", "many"], ["--server-port", "0"], ["--max-batch-size", "0"], ["--auth", "nobody"], ["--nothing"]],
)
def test_bad_arguments(arguments: list[str]) -> None:
    result = start(*arguments)
    assert result.returncode == 2
    assert "usage:" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_libraries_are_named() -> None:
    result = start()
    assert result.returncode == 1
    assert "pip install -e '.[web]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_port_in_use_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = start("--server-port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert "--server-port" in result.stderr
    assert "Traceback" not in result.stderr


def test_base_model_is_rejected(bundled_base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = run_script("web_demo.py", "-c", bundled_base, "--cpu-only", "--server-port", port)
    assert result.returncode == 1
    _, message = result.stderr.strip().splitlines()
    assert "not a chat model" in message
