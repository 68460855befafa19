"""The page of the web demo: a conversation in the browser, answered by an `Engine`.

Revolves around the conversation as the page holds it. The server keeps none: every event brings the messages and the
settings along and sends the new messages back, so there is nothing that two people could share; all that is known of a
page is which reply is being written for it, so that it can be stopped. Knows Gradio, the prompt and the engine's way
in; where the model comes from and how it is run, it does not.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import gradio as gr

from ...model.qwen_generation_utils import DEFAULT_SYSTEM, History, make_context
from ..engine import Engine, PromptTooLong, QueueFull, SchedulerClosed, TextStream
from .texts import TEXTS

Messages = list[dict[str, Any]]  # as the chat component has them
Update = tuple[Any, Any]  # of the box and the conversation

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_UPDATES = 0.05  # the page renders the whole reply each time; nobody reads faster than this

TEXT = gr.I18n(**TEXTS)
COMPLAINTS = {PromptTooLong: "too_long", QueueFull: "queue_full", SchedulerClosed: "closed"}  # else "failed"

LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]

FOCUS = "() => document.querySelector('#box textarea').focus()"
# Components change before what was kept is back in them, and that must not be kept.
RESTORED = "() => { window.conversationRestored = true; }"
SAVE = """(saved, ...values) =>
    window.conversationRestored ? Object.fromEntries(NAMES.map((name, i) => [name, values[i]])) : saved"""


def text_for(request: gr.Request, key: str) -> str:
    """A text for a notice, which Gradio does not translate on the page as it does all else."""
    language = "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"
    return TEXTS[language][key]


def text_message(role: str, text: str) -> dict[str, Any]:
    """A message as the chat component takes it; a bare string would lose the indentation of code there."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: dict[str, Any]) -> str:
    """The text of a message as the chat component gives it."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def question_and_history(messages: Sequence[dict[str, Any]]) -> tuple[str, History]:
    """Messages that end in a question → its text, and the answered questions before it."""
    history, question = [], ""
    for message in messages[:-1]:
        if message["role"] == "user":
            question = text_of(message)
        elif question and (answer := text_of(message)):
            history.append((question, answer))
            question = ""
    return text_of(messages[-1]), history


async def growing_text(stream: TextStream) -> AsyncGenerator[str, None]:
    """The whole reply so far, not more often than it can be shown; nothing where it is cancelled before it begins.

    Leaving early ends the computation.
    """
    text, shown_at = "", 0.0
    try:
        async for piece in stream:
            text += piece.text
            if text and time.monotonic() - shown_at >= SECONDS_BETWEEN_UPDATES:
                shown_at = time.monotonic()
                yield text
        if text or stream.finish_reason != "cancelled":
            yield text
    finally:
        stream.cancel()


class Run:
    """A reply that is being written, as its page can stop it. Used from the event loop only."""

    def __init__(self):
        self.stream: TextStream | None = None  # once the engine has taken the question
        self.stopped = self.cleared = False

    def stop(self) -> None:
        """End the reply; what has been said stays."""
        self.stopped = True
        if self.stream is not None:
            self.stream.cancel()

    def started(self, stream: TextStream) -> None:
        """The engine has taken the question."""
        self.stream = stream
        if self.stopped:
            stream.cancel()


class Page:
    """The components of the page, and what happens between them.

    Args:
        engine: answers.
        name: of the model, for the title; each model has a conversation of its own in the browser.
    """

    def __init__(self, engine: Engine, name: str):
        self.engine = engine
        self.runs: dict[str | None, Run] = {}  # by Gradio's random name of the page
        with gr.Blocks(
            title=f"{name} · Qwen", fill_width=True, fill_height=True, analytics_enabled=False
        ) as self.blocks:
            with gr.Sidebar(label=TEXT("settings"), position="right", open=False):
                self.settings = self._settings()
                reset = gr.Button(TEXT("reset"), size="sm", elem_id="reset")
            with gr.Column(elem_id="page"):
                gr.Markdown(f"### {name}", elem_id="title")
                self.chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    scale=1,
                    layout="bubble",
                    editable="user",
                    buttons=["copy", "copy_all"],
                    latex_delimiters=LATEX_DELIMITERS,
                    sanitize_html=True,
                    allow_tags=True,  # what is no HTML, such as <stdio.h>, is shown as it is written
                    group_consecutive_messages=False,
                    placeholder=TEXT("greeting"),
                )
                self.box = gr.Textbox(
                    elem_id="box",
                    show_label=False,
                    placeholder=TEXT("ask"),
                    max_lines=10,
                    autofocus=True,
                    submit_btn=True,
                )
            # The key is sent to every page and keeps no secret; a fixed one lets conversations outlive the server.
            self.saved = gr.BrowserState(storage_key=f"qwen-web-demo {name}", secret="qwen-web-demo")
            self._connect(reset)

    def _settings(self) -> dict[str, gr.components.Component]:
        """The system prompt, and a control for each sampling setting, by its name in SamplingParams."""
        own = self.engine.params()

        def slider(name: str, least: float, most: float, step: float) -> gr.Slider:
            value = getattr(own, name)
            return gr.Slider(
                min(least, value),
                max(most, value),
                value,
                step=step,
                precision=0 if step == 1 else None,
                **labels(name),
            )

        def labels(name: str) -> dict[str, Any]:
            return {"label": TEXT(name), "info": TEXT(f"{name}_info"), "elem_id": name}

        return {
            "system": gr.Textbox(DEFAULT_SYSTEM, lines=3, max_lines=12, **labels("system")),
            "temperature": slider("temperature", 0, 2, 0.01),
            "top_p": slider("top_p", 0.01, 1, 0.01),
            "top_k": slider("top_k", 0, 200, 1),
            "repetition_penalty": slider("repetition_penalty", 1, 2, 0.01),
            "max_tokens": slider("max_tokens", 1, self.engine.context_length, 1),
            "seed": gr.Number(None, precision=0, placeholder="—", **labels("seed")),
        }

    def _connect(self, reset: gr.Button) -> None:
        settings = list(self.settings.values())
        # Not limited here: the engine knows how many it can serve and who has to wait.
        streaming: dict[str, Any] = {
            "outputs": [self.box, self.chat],
            "concurrency_limit": None,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

        replies = [
            self.box.submit(self.send, [self.box, self.chat, *settings], **streaming),
            self.chat.retry(self.retry, [self.chat, *settings], **streaming),
            self.chat.edit(self.edit, [self.chat, *settings], **streaming),
        ]
        for reply in replies:
            reply.then(idle, None, self.box, **at_once).then(None, js=FOCUS, **at_once)
        # Not through Gradio's `cancels`: the page takes the broken-off event for an error now and then.
        self.box.stop(self.stop, None, None, **at_once)
        self.chat.clear(self.clear, None, None, **at_once)
        self.chat.undo(self.undo, self.chat, [self.chat, self.box], **at_once)
        reset.click(self.own_settings, None, settings, **at_once)

        kept = [self.chat, *settings]
        names = json.dumps(["messages", *self.settings])
        self.blocks.load(self.restore, self.saved, [self.box, *kept], **at_once).then(None, js=RESTORED, **at_once)
        gr.on(
            [component.change for component in kept],
            None,
            [self.saved, *kept],
            self.saved,
            js=SAVE.replace("NAMES", names),
            **at_once,
        )

    async def send(self, request: gr.Request, text: str, messages: Messages, *settings: Any) -> AsyncIterator[Update]:
        """A new question."""
        if not text.strip():
            yield gr.skip(), gr.skip()  # a generator without a first value would empty both
            return
        question = text_message("user", text)
        asked = [*messages, question]
        async for update in self._reply(request, asked, settings, draft="", otherwise=(text, messages)):
            yield update

    async def retry(self, request: gr.Request, messages: Messages, *settings: Any) -> AsyncIterator[Update]:
        """Another reply to the last question."""
        asked = list(messages)
        while asked and asked[-1]["role"] != "user":
            asked.pop()
        async for update in self._reply(request, asked, settings, otherwise=(None, messages)):
            yield update

    async def edit(
        self, request: gr.Request, change: gr.EditData, messages: Messages, *settings: Any
    ) -> AsyncIterator[Update]:
        """An earlier question in other words, and a reply to it; what came after it is gone."""
        earlier, later = messages[: change.index], messages[change.index + 1 :]
        before = [*earlier, text_message("user", change.previous_value), *later]
        if not change.value.strip():
            yield gr.skip(), before
            return
        question = text_message("user", change.value)
        asked = [*earlier, question]
        async for update in self._reply(request, asked, settings, otherwise=(change.value, before)):
            yield update

    async def _reply(
        self,
        request: gr.Request,
        asked: Messages,
        settings: Sequence[Any],
        otherwise: tuple[str | None, Messages],
        draft: str | None = None,
    ) -> AsyncIterator[Update]:
        """Updates of the box and the conversation while a question is answered.

        Args:
            request: says which language the browser prefers.
            asked: messages that end in the question.
            settings: the values of `self.settings`.
            otherwise: text of the box and messages where no reply begins, so that nothing is lost.
            draft: text of the box in the meantime; None leaves it.
        """
        page, run = request.session_hash, Run()
        self.runs[page] = run
        busy = gr.update(interactive=False, submit_btn=False, stop_btn=True)
        reply = None
        try:
            yield busy if draft is None else busy | {"value": draft}, asked
            stream = await self._start(asked, *settings)
            run.started(stream)
            async with contextlib.aclosing(growing_text(stream)) as texts:
                async for reply in texts:
                    yield gr.skip(), [*asked, text_message("assistant", reply)]
            if stream.finish_reason == "length":
                gr.Info(text_for(request, "cut"))
        except Exception as error:  # all of them: the page would wait for a reply for ever
            complaint = COMPLAINTS.get(type(error), "failed")
            if complaint == "failed":
                logger.exception("A reply failed")
            gr.Warning(text_for(request, complaint))
        finally:
            if self.runs.get(page) is run:
                del self.runs[page]
        if run.cleared:  # the last updates may have come after
            yield gr.skip(), []
        elif reply is None:
            text, before = otherwise
            yield gr.skip() if text is None else gr.update(value=text), before

    async def _start(self, asked: Messages, system: str, *sampling: Any) -> TextStream:
        """Have the question answered that the messages end in.

        Raises:
            PromptTooLong, QueueFull, SchedulerClosed: as `Engine.start`.
        """
        engine = self.engine
        names = [name for name in self.settings if name != "system"]
        params = engine.params(**dict(zip(names, sampling, strict=True)))
        question, history = question_and_history(asked)
        window = getattr(engine.model.generation_config, "max_window_size", None)
        window = {} if window is None else {"max_window_size": window}
        # In a thread, as a pasted book takes seconds, in which the others' replies should go on.
        _, ids = await asyncio.to_thread(make_context, engine.tokenizer, question, history, system, **window)
        return engine.start(ids, params, lstrip=True, rstrip=True)

    async def stop(self, request: gr.Request) -> None:
        """End the reply that is being written for this page."""
        if (run := self.runs.get(request.session_hash)) is not None:
            run.stop()

    async def clear(self, request: gr.Request) -> None:
        """Forget the conversation, also the reply that is being written."""
        if (run := self.runs.get(request.session_hash)) is not None:
            run.cleared = True
            run.stop()

    def undo(self, last: gr.UndoData, messages: Messages) -> tuple[Messages, str]:
        """Take the last question back into the box."""
        return messages[: last.index], text_of(messages[last.index])

    def own_settings(self) -> list[Any]:
        """The settings as they are at first: the checkpoint's own."""
        return [component.value for component in self.settings.values()]

    def restore(self, saved: Any) -> list[Any]:
        """What the browser kept: text of the box, messages and settings; what is not as it should be is left out.

        A question whose page went away before its reply began goes back into the box.
        """
        saved = saved if isinstance(saved, dict) else {}
        try:
            messages = [text_message(message["role"], text_of(message)) for message in saved["messages"]]
        except (TypeError, KeyError):
            messages = []
        draft = text_of(messages.pop()) if messages and messages[-1]["role"] == "user" else ""
        settings = [
            saved[name] if name in saved and fits(component, saved[name]) else component.value
            for name, component in self.settings.items()
        ]
        return [draft or gr.skip(), messages, *settings]


def fits(component: gr.components.Component, value: Any) -> bool:
    """Whether a control can have this value."""
    if isinstance(component, gr.Slider):
        return type(value) in (int, float) and component.minimum <= value <= component.maximum
    if isinstance(component, gr.Number):
        return value is None or type(value) is int
    return isinstance(value, str)


def idle() -> dict[str, Any]:
    """The box when no reply is being written."""
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)
