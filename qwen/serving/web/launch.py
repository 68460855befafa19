"""The web demo: the page of page.py, its looks, and what keeps it to itself.

Revolves around two calls, `launch` and `close`. The page needs nothing from the internet and the server tells nobody
about it: fonts are those of the reader's system, Gradio's statistics and records are switched off, and a policy forbids
the browser to fetch from elsewhere what a model wrote into a reply.
"""

import logging
import time
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Engine
from .page import TEXT, Page

SPARE_WORKERS = 8  # so that the engine, not Gradio, is the one to say that its queue is full
SECONDS_FOR_LAST_UPDATES = 0.5  # for replies that were broken off just now to reach their pages

# Fonts of the reader's system, so that the page looks the same without a network; the later ones have Chinese.
FONTS = ["system-ui", "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
MONOSPACE = ["ui-monospace", "Consolas", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "monospace"]

CSS = """
#page { max-width: 900px; margin: 0 auto; }
#title { text-align: center; }
#chat .placeholder-content { height: 100%; display: flex; align-items: center; justify-content: center; }
#chat .user p { white-space: pre-wrap; }
#chat .placeholder p { font-size: 1.4em; }
#page:has(.stop-button) .message-wrap:has(> .user-row + .message-buttons:last-child)::after {
    content: "\\25cf"; padding: 1em; animation: waiting 1s infinite alternate; }
@keyframes waiting { from { opacity: 0.8; } to { opacity: 0.1; } }
.toast-wrap.toast-wrap { top: auto; bottom: 6rem; }
.sidebar .toggle-button::before { content: "\\2699"; font-size: 1.3em; }
.sidebar .toggle-button .chevron { display: none; }
"""

# What a reply makes the browser do, an image in its Markdown for example, stays on this server. Gradio's own page has
# scripts and styles in it.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'"
)


class ContentSecurityPolicy:
    """ASGI middleware that sends the policy with every response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", CONTENT_SECURITY_POLICY.encode()))
            await send(message)

        await self.app(scope, receive, send_with_policy)


def launch(engine: Engine, name: str, **options: Any) -> gr.Blocks:
    """Serve the page from a thread of its own, until `close` is called with what is returned.

    Args:
        engine: answers.
        name: of the model.
        options: for `gradio.Blocks.launch`: server_name, server_port, share, auth, inbrowser.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    blocks = Page(engine, name).blocks
    blocks.launch(
        **options,
        prevent_thread_lock=True,
        quiet=True,
        i18n=TEXT,
        theme=gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=MONOSPACE),
        css=CSS,
        footer_links=[],
        run_history=False,  # of Gradio: every question and answer once more, in the browser or on a hub
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,  # nothing is uploaded here
        # A reply occupies one of Gradio's workers also while it waits in the engine's queue.
        max_threads=engine.max_batch_size + engine.max_queue + SPARE_WORKERS,
        app_kwargs={"middleware": [Middleware(ContentSecurityPolicy)]},
    )
    return blocks


def close(blocks: gr.Blocks) -> None:
    """End the server of `launch`, also while pages are open in browsers: each keeps a connection that never ends."""
    time.sleep(SECONDS_FOR_LAST_UPDATES)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would log each broken connection as an error
    blocks.server.force_exit = True
    blocks.close(verbose=False)
