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

from ...model.qwen_generation_utils import DEFAULT_SYSTEM, encode_turns
from ..engine import Engine, EngineClosed, PromptTooLong, QueueFull, TextStream
from .rendering import HTML_TAGS, MAX_COST, rendering_cost
from .request_types import MAX_TEXT
from .sessions import NobodyListens, Sessions, TooManyQuestions, network_of
from .texts import TEXTS

Control = gr.Textbox | gr.Slider | gr.Number
SettingValue = str | float | None  # value of a control
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

UPDATE_INTERVAL = 0.05  # seconds; nobody reads faster than this
LENGTH_PER_SECOND = 50_000  # characters; each update renders the whole reply, so those of long ones are rarer

I18N = gr.I18n(**TEXTS)
ERROR_NOTICES = {  # else "failed"
    PromptTooLong: "too_long",
    QueueFull: "queue_full",
    TooManyQuestions: "queue_full",
    EngineClosed: "closed",
}

LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]

# Properties of the chat component: how it shows the messages.
# `allow_tags=True` shows text like <stdio.h>, which is not HTML, as written; a list names tags to show as written.
AS_MARKDOWN: dict[str, Any] = {"render_markdown": True, "latex_delimiters": LATEX_DELIMITERS, "allow_tags": True}
AS_TEXT: dict[str, Any] = {"render_markdown": False, "latex_delimiters": [], "allow_tags": HTML_TAGS}

FOCUS_JS = "() => document.querySelector('#box textarea').focus()"
# Components also change before the saved state is restored; do not save those changes.
MARK_RESTORED_JS = "() => { window.conversationRestored = true; }"
SAVE_JS = """(saved, ...values) =>
    window.conversationRestored ? Object.fromEntries(NAMES.map((name, i) => [name, values[i]])) : saved"""


def notice_text(request: gr.Request, key: str) -> str:
    """Return the text of a notice, which Gradio does not translate on the page, unlike all other texts."""
    language = "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"
    return TEXTS[language][key]


def build_message(role: str, text: str) -> Message:
    """Return a message for the chat component. A plain string would lose the indentation of code."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def message_text(message: Message) -> str:
    """Return the text of a message of the chat component."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def show(messages: Messages, is_markdown: bool) -> dict[str, object]:
    """Return the update that shows a conversation as Markdown, or as plain text."""
    return gr.update(value=messages, **(AS_MARKDOWN if is_markdown else AS_TEXT))


async def accumulate_text(stream: TextStream) -> AsyncGenerator[str, None]:
    """Yield the whole reply so far, at a limited rate; nothing if it is cancelled before it begins.

    Closing the generator early cancels the reply.
    """
    text, updated_at = "", 0.0
    try:
        async for piece in stream:
            text += piece.text
            if text and time.monotonic() - updated_at >= UPDATE_INTERVAL + len(text) / LENGTH_PER_SECOND:
                updated_at = time.monotonic()
                yield text
        if text or stream.finish_reason != "cancelled":
            yield text
    finally:
        stream.cancel()


class RunningReply:
    """A running reply that its page can stop. Used from the event loop only."""

    def __init__(self):
        self.stream: TextStream | None = None  # set when the engine accepts the question
        self.stopped = self.cleared = False

    def stop(self) -> None:
        """Stop the reply and keep its text so far."""
        self.stopped = True
        if self.stream is not None:
            self.stream.cancel()

    def attach(self, stream: TextStream) -> None:
        """Set the stream once the engine has accepted the question."""
        self.stream = stream
        if self.stopped:
            stream.cancel()


class Page:
    """The components of the page and their event handlers.

    Args:
        engine: generates the replies.
        name: model name, for the title; the browser keeps a separate conversation for each model.
        sessions: decides which questions are computed; None computes all.
    """

    def __init__(self, engine: Engine, name: str, sessions: Sessions | None = None):
        self.engine, self.sessions = engine, sessions
        if sessions is not None:
            sessions.on_silence = self._stop_heard_reply
        self.running: dict[str | None, RunningReply] = {}  # by Gradio's session id of the page
        with gr.Blocks(
            title=f"{name} · Qwen", fill_width=True, fill_height=True, analytics_enabled=False
        ) as self.blocks:
            with gr.Sidebar(label=I18N("settings"), position="right", open=False):
                self.settings = self._settings()
                reset = gr.Button(I18N("reset"), size="sm", elem_id="reset")
            with gr.Column(elem_id="page"):
                gr.Markdown(f"### {name}", elem_id="title")
                self.chat = gr.Chatbot(
                    elem_id="chat",
                    show_label=False,
                    scale=1,
                    layout="bubble",
                    editable="user",
                    buttons=["copy", "copy_all"],
                    sanitize_html=True,
                    group_consecutive_messages=False,
                    placeholder=cast("str", I18N("greeting")),  # translated on the page like those of other components
                    **AS_MARKDOWN,
                )
                self.textbox = gr.Textbox(
                    elem_id="box",
                    show_label=False,
                    placeholder=I18N("ask"),
                    max_lines=10,
                    max_length=MAX_TEXT,
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
            return {"label": I18N(name), "info": I18N(f"{name}_info"), "elem_id": name}

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
            "outputs": [self.textbox, self.chat],
            "concurrency_limit": None,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        unqueued: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

        replies = [
            self.textbox.submit(self.send, [self.textbox, self.chat, *settings], **streaming),
            self.chat.retry(self.retry, [self.chat, *settings], **streaming),
            self.chat.edit(self.edit, [self.chat, *settings], **streaming),
        ]
        for reply in replies:
            reply.then(reset_textbox, None, self.textbox, **unqueued).then(None, js=FOCUS_JS, **unqueued)
        # Gradio's `cancels` is not used: the page sometimes shows the cancelled event as an error.
        self.textbox.stop(self.stop, None, None, **unqueued)
        self.chat.clear(self.clear, None, None, **unqueued)
        self.chat.undo(self.undo, self.chat, [self.chat, self.textbox], **unqueued)
        reset.click(self.default_settings, None, settings, **unqueued)

        saved_components = [self.chat, *settings]
        names = json.dumps(["messages", *self.settings])
        self.blocks.load(self.restore, self.saved, [self.textbox, *saved_components], **unqueued).then(
            None, js=MARK_RESTORED_JS, **unqueued
        )
        gr.on(
            [component.change for component in saved_components],
            None,
            [self.saved, *saved_components],
            self.saved,
            js=SAVE_JS.replace("NAMES", names),
            **unqueued,
        )

    async def send(
        self, request: gr.Request, text: str | None, messages: Messages, *settings: SettingValue
    ) -> AsyncIterator[Update]:
        """Answer a new question."""
        if not text or not text.strip():
            yield gr.skip(), gr.skip()  # without a first value Gradio would clear both outputs
            return
        question = build_message("user", text)
        conversation = [*messages, question]
        async for update in self._reply(request, conversation, settings, draft="", fallback=(text, messages)):
            yield update

    async def retry(self, request: gr.Request, messages: Messages, *settings: SettingValue) -> AsyncIterator[Update]:
        """Generate another reply to the last question."""
        conversation = list(messages)
        while conversation and conversation[-1]["role"] != "user":
            conversation.pop()
        async for update in self._reply(request, conversation, settings, fallback=(None, messages)):
            yield update

    async def edit(
        self, request: gr.Request, change: gr.EditData, messages: Messages, *settings: SettingValue
    ) -> AsyncIterator[Update]:
        """Replace an earlier question, drop what came after it, and reply."""
        index = cast("int", change.index)  # of a message
        earlier, later = messages[:index], messages[index + 1 :]
        before = [*earlier, build_message("user", change.previous_value), *later]
        if not change.value.strip():
            yield gr.skip(), before
            return
        question = build_message("user", change.value)
        conversation = [*earlier, question]
        async for update in self._reply(request, conversation, settings, fallback=(change.value, before)):
            yield update

    async def _reply(
        self,
        request: gr.Request,
        conversation: Messages,
        settings: Sequence[SettingValue],
        fallback: tuple[str | None, Messages],
        draft: str | None = None,
    ) -> AsyncIterator[Update]:
        """Yield updates of the text box and the conversation while a question is answered.

        Args:
            request: has the session and the language of the browser.
            conversation: messages that end in the question.
            settings: values of `self.settings`.
            fallback: text and messages to restore if no reply begins.
            draft: text of the text box in the meantime; None leaves it.
        """
        page, running_reply = request.session_hash, RunningReply()
        before = self.running.get(page)
        is_allowed = before is None or before.stopped  # a page asks one question at a time
        if is_allowed:
            self.running[page] = running_reply
        busy = gr.update(interactive=False, submit_btn=False, stop_btn=True)
        cost = rendering_cost(map(message_text, conversation))
        is_markdown = cost <= MAX_COST
        reply, is_shown = None, False
        try:
            if not is_allowed:
                raise TooManyQuestions
            async with self._asking(request):
                is_shown = True
                yield busy if draft is None else busy | {"value": draft}, show(conversation, is_markdown)
                stream = await self._start(conversation, settings)
                running_reply.attach(stream)
                async with contextlib.aclosing(accumulate_text(stream)) as texts:
                    async for reply in texts:
                        messages = [*conversation, build_message("assistant", reply)]
                        if is_markdown and cost + rendering_cost([reply]) > MAX_COST:
                            is_markdown = False
                            yield gr.skip(), show(messages, is_markdown)
                        else:
                            yield gr.skip(), messages
            if stream.finish_reason == "length":
                gr.Info(notice_text(request, "cut"))
        except NobodyListens:
            pass
        except Exception as error:  # of any kind, or the page would wait forever
            notice = ERROR_NOTICES.get(type(error), "failed")
            if notice == "failed":
                logger.exception("A reply failed")
            gr.Warning(notice_text(request, notice))
        finally:
            if self.running.get(page) is running_reply:
                del self.running[page]
        if running_reply.cleared:  # updates may have arrived after clearing
            yield gr.skip(), []
        elif not is_shown:  # Gradio would keep the conversation in memory for a page that may not exist
            yield gr.skip(), gr.skip()
        elif reply is None:
            text, messages = fallback
            yield gr.skip() if text is None else gr.update(value=text), messages

    def _asking(self, request: gr.Request) -> contextlib.AbstractAsyncContextManager[None]:
        """Return the context in which the question of a request may be computed, see `Sessions.asking`."""
        if self.sessions is None:
            return contextlib.nullcontext()
        host = request.client.host if request.client else ""
        return self.sessions.asking(request.session_hash or "", network_of(host))

    def _stop_reply(self, page: str | None) -> None:
        """Stop the running reply of a page."""
        if (running_reply := self.running.get(page)) is not None:
            running_reply.stop()

    def _stop_heard_reply(self, page: str) -> None:
        """Stop the running reply of a page that has gone; not a question that still waits for its page."""
        if (running_reply := self.running.get(page)) is not None and running_reply.stream is not None:
            running_reply.stop()

    async def _start(self, conversation: Messages, settings: Sequence[SettingValue]) -> TextStream:
        """Start a reply to the question that the messages end in.

        Raises:
            PromptTooLong, QueueFull, EngineClosed: see `Engine.start`.
        """
        engine = self.engine
        values = {
            name: value if is_valid_setting(control, value) else control.value
            for (name, control), value in zip(self.settings.items(), settings, strict=True)
        }
        system = cast("str", values.pop("system"))
        params = engine.params(**values)
        turns = [("system", system), *((message["role"], message_text(message)) for message in conversation)]
        window = getattr(engine.model.generation_config, "max_window_size", None)
        # In a thread: a pasted book takes seconds to encode, which must not block other replies.
        _, ids = await asyncio.to_thread(encode_turns, engine.tokenizer, turns, window)
        return engine.start(ids, params, lstrip=True, rstrip=True)

    async def stop(self, request: gr.Request) -> None:
        """Stop the running reply of this page."""
        self._stop_reply(request.session_hash)

    async def clear(self, request: gr.Request) -> None:
        """Clear the conversation and stop the running reply."""
        if (running_reply := self.running.get(request.session_hash)) is not None:
            running_reply.cleared = True
            running_reply.stop()

    def undo(self, last: gr.UndoData, messages: Messages) -> tuple[Messages, str]:
        """Move the last question back into the text box."""
        index = cast("int", last.index)  # of a message
        return messages[:index], message_text(messages[index])

    def default_settings(self) -> list[SettingValue]:
        """Return the initial settings, those of the checkpoint."""
        return [component.value for component in self.settings.values()]

    def restore(self, saved: object) -> list[object]:
        """Return text, messages and settings saved by the browser; invalid values are ignored.

        A question whose page was closed before its reply began goes back into the text box.
        """
        saved = saved if isinstance(saved, dict) else {}
        try:
            messages = [build_message(message["role"], message_text(message)) for message in saved["messages"]]
        except (TypeError, KeyError):
            messages = []
        draft = message_text(messages.pop()) if messages and messages[-1]["role"] == "user" else ""
        settings = [
            saved[name] if name in saved and is_valid_setting(component, saved[name]) else component.value
            for name, component in self.settings.items()
        ]
        is_markdown = rendering_cost(map(message_text, messages)) <= MAX_COST
        return [draft or gr.skip(), messages if is_markdown else show(messages, is_markdown), *settings]


def is_valid_setting(component: Control, value: object) -> bool:
    """Return whether a value is valid for a control."""
    if isinstance(component, gr.Slider):
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return component.minimum <= value <= component.maximum
    if isinstance(component, gr.Number):
        return value is None or type(value) is int
    return isinstance(value, str)


def reset_textbox() -> dict[str, object]:
    """Return the update that resets the text box after a reply."""
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)
