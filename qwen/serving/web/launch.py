"""Starts and stops the web demo, with its theme and content security policy.

The page loads nothing from the internet and reports nothing: it uses system fonts, Gradio's analytics and history are
switched off, and the policy keeps the browser from fetching other hosts' content that a model put into a reply.
"""

import contextlib
import hmac
import logging
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import gradio as gr
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Engine
from ..hosts import ANY_HOST, HostMiddleware
from .guard import PageGuard
from .page import I18N, Page
from .proxies import LOCAL_HOSTS, bypass_proxies
from .request_types import Event
from .sessions import Sessions

EXTRA_THREADS = 8  # so that the engine, not Gradio, rejects requests beyond its queue
CLOSE_DELAY = 0.5  # seconds, for replies that were just cut off to reach their pages

# System fonts, so that the page looks the same without a network; the later ones have Chinese.
FONTS = ["system-ui", "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
MONOSPACE = ["ui-monospace", "Consolas", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "monospace"]

CSS = """
#page { max-width: 900px; margin: 0 auto; }
#title { text-align: center; }
#chat .placeholder-content { height: 100%; display: flex; align-items: center; justify-content: center; }
#chat .user p, #chat .md:not(.prose) { white-space: pre-wrap; }
#chat .md { display: block; contain: paint; isolation: isolate; }
#chat .md .token { position: static; }
#chat .placeholder p { font-size: 1.4em; }
#page:has(.stop-button) .message-wrap:has(> .user-row + .message-buttons:last-child)::after {
    content: "\\25cf"; padding: 1em; animation: waiting 1s infinite alternate; }
@keyframes waiting { from { opacity: 0.8; } to { opacity: 0.1; } }
.toast-wrap.toast-wrap { top: auto; bottom: 6rem; }
.sidebar .toggle-button::before { content: "\\2699"; font-size: 1.3em; }
.sidebar .toggle-button .chevron { display: none; }
"""

# Content of a reply, for example an image in its Markdown, must not make the browser contact other hosts, and no
# page must embed this one. Gradio's own page needs inline scripts and styles.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
# Removes from messages what could draw over the page or ask for input.
SANITIZER = Path(__file__).with_name("sanitizer.js")


class ContentSecurityPolicy:
    """ASGI middleware that sends the policy with every response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", CONTENT_SECURITY_POLICY.encode()))
            await send(message)

        await self.app(scope, receive, send_with_policy)


class LaunchOptions(TypedDict, total=False):
    """Options of `gradio.Blocks.launch` that `launch` passes on."""

    server_name: str | None
    server_port: int | None
    share: bool


def launch(
    engine: Engine,
    name: str,
    *,
    inbrowser: bool = False,
    auth: tuple[str, str] | None = None,
    allowed_hosts: Sequence[str] = (ANY_HOST,),
    **options: Unpack[LaunchOptions],
) -> gr.Blocks:
    """Serve the page from a background thread until `close` is called with the returned blocks.

    Gradio checks with requests to itself that the page is reachable; they do not go through the user's proxy.

    Args:
        engine: generates the replies.
        name: model name.
        inbrowser: open the page in the browser of this machine.
        auth: user name and password that the page requires.
        allowed_hosts: names in the Host header that are answered, beside those of this machine: see `HostMiddleware`.
        options: options of `gradio.Blocks.launch`: server_name, server_port, share.

    Raises:
        OSError: the port is in use, or the address is not this machine's.
    """
    sessions = Sessions(places=engine.max_batch_size + engine.max_queue)
    blocks = Page(engine, name, sessions).blocks
    blocks.queue(api_open=False)

    @contextlib.asynccontextmanager
    async def lifespan(app: gr.routes.App) -> AsyncIterator[None]:
        """Put our middleware around Gradio's own. `app_kwargs` would put it inside, where CORS was decided already."""
        assert app.middleware_stack is not None  # built before the lifespan begins
        guard = PageGuard(
            app.middleware_stack,
            user=lambda request: find_user(app, request),
            needs_login=auth is not None,
            has_started=lambda: app.startup_events_triggered,
            sessions=sessions,
            events=events_of(blocks),
        )
        app.middleware_stack = ContentSecurityPolicy(HostMiddleware(guard, allowed_hosts))
        yield

    # A tunnel (share) needs the proxy.
    hosts: Sequence[str] = (*LOCAL_HOSTS, options.get("server_name") or "") if options.get("share") else ("*",)
    with bypass_proxies(hosts):
        blocks.launch(
            **options,
            auth=None if auth is None else password_check(*auth),
            prevent_thread_lock=True,
            quiet=True,
            i18n=I18N,
            theme=gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=MONOSPACE),
            css=CSS,
            head=f"<script>{SANITIZER.read_text(encoding='utf-8')}</script>",
            footer_links=[],
            run_history=False,  # Gradio would store every question and reply again, in the browser or on a hub
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=1,  # in bytes: the page has no uploads
            # A reply holds a Gradio worker even while it waits in the engine's queue.
            max_threads=engine.max_batch_size + engine.max_queue + EXTRA_THREADS,
            app_kwargs={"lifespan": lifespan},
        )
    if inbrowser:  # outside the context, since a browser inherits the environment
        webbrowser.open(blocks.share_url or blocks.local_url)
    return blocks


def events_of(blocks: gr.Blocks) -> dict[int, Event]:
    """Return the events that the server handles, by their index."""
    kinds: dict[type, str] = {
        gr.Textbox: "text",
        gr.Slider: "slider",
        gr.Number: "number",
        gr.Chatbot: "messages",
        gr.BrowserState: "saved",
    }
    return {
        index: Event(
            takes=tuple(kinds[type(component)] for component in function.inputs),
            name=function.targets[0][1],
            limits={
                position: (component.minimum, component.maximum)
                for position, component in enumerate(function.inputs)
                if isinstance(component, gr.Slider)
            },
        )
        for index, function in blocks.fns.items()
        if function.fn is not None
    }


def password_check(user: str, password: str) -> Callable[[str, str], bool]:
    """Return a function that compares a user name and a password with these, in a time that tells nothing of them."""
    expected = [text.encode() for text in (user, password)]

    def check(*given: str) -> bool:
        results = [hmac.compare_digest(*pair) for pair in zip(expected, map(str.encode, given), strict=True)]
        return all(results)

    return check


def find_user(app: gr.routes.App, request: Request) -> str | None:
    """Return the user whose login Gradio's cookies hold."""
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    tokens = (request.cookies.get(name) for name in names)
    return next((app.tokens[token] for token in tokens if token in app.tokens), None)


def close(blocks: gr.Blocks) -> None:
    """Stop the server of `launch`. Open pages keep connections that never end, so these are cut off."""
    time.sleep(CLOSE_DELAY)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would log each broken connection as an error
    blocks.server.force_exit = True
    blocks.close(verbose=False)
