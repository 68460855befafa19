"""The Gradio page of the web demo: a conversation in the browser, answered by an `Engine`.

The browser holds the conversation: every event sends the messages and settings and receives the new messages, so that
users cannot see each other's. The server only keeps the running reply of each page, to be able to stop it.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypedDict, cast

import gradio as gr
from gradio.i18n import I18nData

from ...model.qwen_generation_utils import DEFAULT_SYSTEM, History, make_context
from ..engine import Engine, PromptTooLong, QueueFull, SchedulerClosed, TextStream
from .texts import TEXTS

Control = gr.Textbox | gr.Slider | gr.Number
Setting = str | float | None  # value of a control
Update = tuple[object, object]  # of the text box and the conversation


class TextPart(TypedDict):
    """A part of a message of the chat component. The page makes no others than text."""

    type: str
    text: str


class Message(TypedDict):
    """A message in the format of the chat component."""

    role: str
    content: list[TextPart]


Messages = list[Message]


class Labels(TypedDict):
    """Arguments common to all controls."""

    label: I18nData
    info: I18nData
    elem_id: str


logger = logging.getLogger(__name__)

SECONDS_BETWEEN_UPDATES = 0.05  # each update renders the whole reply; nobody reads faster than this

TEXT = gr.I18n(**TEXTS)
COMPLAINTS = {PromptTooLong: "too_long", QueueFull: "queue_full", SchedulerClosed: "closed"}  # else "failed"

LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]

FOCUS = "() => document.querySelector('#box textarea').focus()"
# Components also change before the saved state is restored; do not save those changes.
RESTORED = "() => { window.conversationRestored = true; }"
SAVE = """(saved, ...values) =>
    window.conversationRestored ? Object.fromEntries(NAMES.map((name, i) => [name, values[i]])) : saved"""


def text_for(request: gr.Request, key: str) -> str:
    """Return the text of a notice, which Gradio does not translate on the page, unlike all other texts."""
    language = "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"
    return TEXTS[language][key]


def text_message(role: str, text: str) -> Message:
    """Return a message for the chat component. A plain string would lose the indentation of code."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: Message) -> str:
    """Return the text of a message of the chat component."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def question_and_history(messages: Sequence[Message]) -> tuple[str, History]:
    """Split messages that end in a question into its text and the answered questions before it."""
    history, question = [], ""
    for message in messages[:-1]:
        if message["role"] == "user":
            question = text_of(message)
        elif question and (answer := text_of(message)):
            history.append((question, answer))
            question = ""
    return text_of(messages[-1]), history


async def growing_text(stream: TextStream) -> AsyncGenerator[str, None]:
    """Yield the whole reply so far, at a limited rate; nothing if it is cancelled before it begins.

    Closing the generator early cancels the reply.
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
    """A running reply that its page can stop. Used from the event loop only."""

    def __init__(self):
        self.stream: TextStream | None = None  # set when the engine accepts the question
        self.stopped = self.cleared = False

    def stop(self) -> None:
        """Stop the reply and keep its text so far."""
        self.stopped = True
        if self.stream is not None:
            self.stream.cancel()

    def started(self, stream: TextStream) -> None:
        """Set the stream once the engine has accepted the question."""
        self.stream = stream
        if self.stopped:
            stream.cancel()


class Page:
    """The components of the page and their event handlers.

    Args:
        engine: generates the replies.
        name: model name, for the title; the browser keeps a separate conversation for each model.
    """

    def __init__(self, engine: Engine, name: str):
        self.engine = engine
        self.runs: dict[str | None, Run] = {}  # by Gradio's session id of the page
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
                    allow_tags=True,  # show text like <stdio.h>, which is not HTML, as written
                    group_consecutive_messages=False,
                    placeholder=cast("str", TEXT("greeting")),  # translated on the page like those of other components
                )
                self.box = gr.Textbox(
                    elem_id="box",
                    show_label=False,
                    placeholder=TEXT("ask"),
                    max_lines=10,
                    autofocus=True,
                    submit_btn=True,
                )
            # Every page gets the key, so it protects nothing; a fixed one lets conversations survive a server restart.
            self.saved = gr.BrowserState(storage_key=f"qwen-web-demo {name}", secret="qwen-web-demo")
            self._connect(reset)

    def _settings(self) -> dict[str, Control]:
        """Create the system prompt and a control for each sampling setting, by its name in SamplingParams."""
        defaults = self.engine.params()

        def slider(name: str, minimum: float, maximum: float, step: float) -> gr.Slider:
            value = getattr(defaults, name)
            return gr.Slider(
                min(minimum, value),
                max(maximum, value),
                value,
                step=step,
                precision=0 if step == 1 else None,
                **labels(name),
            )

        def labels(name: str) -> Labels:
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
        # No limit here: the engine limits concurrency and has its own queue.
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
        # Gradio's `cancels` is not used: the page sometimes shows the cancelled event as an error.
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

    async def send(
        self, request: gr.Request, text: str, messages: Messages, *settings: Setting
    ) -> AsyncIterator[Update]:
        """Answer a new question."""
        if not text.strip():
            yield gr.skip(), gr.skip()  # without a first value Gradio would clear both outputs
            return
        question = text_message("user", text)
        asked = [*messages, question]
        async for update in self._reply(request, asked, settings, draft="", fallback=(text, messages)):
            yield update

    async def retry(self, request: gr.Request, messages: Messages, *settings: Setting) -> AsyncIterator[Update]:
        """Generate another reply to the last question."""
        asked = list(messages)
        while asked and asked[-1]["role"] != "user":
            asked.pop()
        async for update in self._reply(request, asked, settings, fallback=(None, messages)):
            yield update

    async def edit(
        self, request: gr.Request, change: gr.EditData, messages: Messages, *settings: Setting
    ) -> AsyncIterator[Update]:
        """Replace an earlier question, drop what came after it, and reply."""
        index = cast("int", change.index)  # of a message
        earlier, later = messages[:index], messages[index + 1 :]
        before = [*earlier, text_message("user", change.previous_value), *later]
        if not change.value.strip():
            yield gr.skip(), before
            return
        question = text_message("user", change.value)
        asked = [*earlier, question]
        async for update in self._reply(request, asked, settings, fallback=(change.value, before)):
            yield update

    async def _reply(
        self,
        request: gr.Request,
        asked: Messages,
        settings: Sequence[Setting],
        fallback: tuple[str | None, Messages],
        draft: str | None = None,
    ) -> AsyncIterator[Update]:
        """Yield updates of the text box and the conversation while a question is answered.

        Args:
            request: has the session and the language of the browser.
            asked: messages that end in the question.
            settings: values of `self.settings`.
            fallback: text and messages to restore if no reply begins.
            draft: text of the box in the meantime; None leaves it.
        """
        page, run = request.session_hash, Run()
        self.runs[page] = run
        busy = gr.update(interactive=False, submit_btn=False, stop_btn=True)
        reply = None
        try:
            yield busy if draft is None else busy | {"value": draft}, asked
            stream = await self._start(asked, settings)
            run.started(stream)
            async with contextlib.aclosing(growing_text(stream)) as texts:
                async for reply in texts:
                    yield gr.skip(), [*asked, text_message("assistant", reply)]
            if stream.finish_reason == "length":
                gr.Info(text_for(request, "cut"))
        except Exception as error:  # of any kind, or the page would wait forever
            notice = COMPLAINTS.get(type(error), "failed")
            if notice == "failed":
                logger.exception("A reply failed")
            gr.Warning(text_for(request, notice))
        finally:
            if self.runs.get(page) is run:
                del self.runs[page]
        if run.cleared:  # updates may have arrived after clearing
            yield gr.skip(), []
        elif reply is None:
            text, messages = fallback
            yield gr.skip() if text is None else gr.update(value=text), messages

    async def _start(self, asked: Messages, settings: Sequence[Setting]) -> TextStream:
        """Start a reply to the question that the messages end in.

        Raises:
            PromptTooLong, QueueFull, SchedulerClosed: see `Engine.start`.
        """
        engine = self.engine
        values = dict(zip(self.settings, settings, strict=True))
        system = cast("str", values.pop("system"))
        params = engine.params(**values)
        question, history = question_and_history(asked)
        window = getattr(engine.model.generation_config, "max_window_size", None)
        window = {} if window is None else {"max_window_size": window}
        # In a thread: a pasted book takes seconds to encode, which must not block other replies.
        _, ids = await asyncio.to_thread(make_context, engine.tokenizer, question, history, system, **window)
        return engine.start(ids, params, lstrip=True, rstrip=True)

    async def stop(self, request: gr.Request) -> None:
        """Stop the running reply of this page."""
        if (run := self.runs.get(request.session_hash)) is not None:
            run.stop()

    async def clear(self, request: gr.Request) -> None:
        """Clear the conversation and stop the running reply."""
        if (run := self.runs.get(request.session_hash)) is not None:
            run.cleared = True
            run.stop()

    def undo(self, last: gr.UndoData, messages: Messages) -> tuple[Messages, str]:
        """Move the last question back into the text box."""
        index = cast("int", last.index)  # of a message
        return messages[:index], text_of(messages[index])

    def own_settings(self) -> list[Setting]:
        """Return the initial settings, those of the checkpoint."""
        return [component.value for component in self.settings.values()]

    def restore(self, saved: object) -> list[object]:
        """Return text, messages and settings saved by the browser; invalid values are ignored.

        A question whose page was closed before its reply began goes back into the text box.
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


def fits(component: Control, value: object) -> bool:
    """Return whether a value is valid for a control."""
    if isinstance(component, gr.Slider):
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return component.minimum <= value <= component.maximum
    if isinstance(component, gr.Number):
        return value is None or type(value) is int
    return isinstance(value, str)


def idle() -> dict[str, object]:
    """Return the update that resets the text box after a reply."""
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)
