"""web_demo.py with an engine that repeats the question, whatever it contains, instead of a model.

"wait" is never answered. Each question that is computed writes a line to the log.

    python tests/support/echo_web_demo.py     # same arguments as web_demo.py
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace

import qwen.serving.engine
import qwen_cli.web
from qwen.serving.web.page import Messages, Page, message_text

PIECES = 4


class Echo:
    """A reply like a TextStream."""

    def __init__(self, text: str):
        self.text, self.finish_reason, self.cancelled = text, None, asyncio.Event()

    def cancel(self) -> None:
        if self.finish_reason is None:
            print("cancelled", file=sys.stderr, flush=True)
            self.finish_reason = "cancelled"
        self.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[SimpleNamespace]:
        if self.text == "wait":
            await self.cancelled.wait()
        length = len(self.text) // PIECES + 1
        for start in range(0, len(self.text), length):
            if self.cancelled.is_set():
                return
            yield SimpleNamespace(text=self.text[start : start + length])
            await asyncio.sleep(0.01)
        self.finish_reason = "stop"


class EchoEngine:
    """What the page needs of an engine."""

    context_length, max_queue = 2048, 8

    def __init__(self, model: None, tokenizer: None, max_batch_size: int):
        self.max_batch_size = max_batch_size

    def params(self, **settings: object) -> SimpleNamespace:
        defaults = {"temperature": 1.0, "top_p": 0.5, "top_k": 0, "repetition_penalty": 1.0, "max_tokens": 2048}
        return SimpleNamespace(**(defaults | settings))

    def close(self, timeout: float) -> None:
        """Nothing runs."""


async def start(page: Page, conversation: Messages, settings: object) -> Echo:
    """Repeat the question."""
    print("computed", file=sys.stderr, flush=True)
    return Echo(message_text(conversation[-1]))


Page._start = start
qwen.serving.engine.Engine = EchoEngine
qwen_cli.web.load_from_arguments = lambda *_, **__: (None, None)
sys.exit(qwen_cli.web.main())
