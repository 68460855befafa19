"""Prompts and replies as token ids: ChatML, stop words, decoding.

Users import this file on its own from a checkpoint folder on the path (`from qwen_generation_utils import
make_context`), so it must not import siblings. `chat_qwen.py`, with the `chat` methods of the model, imports it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

Turn = tuple[str, str]
"""A role, "system", "user" or "assistant", and the text of a message."""
PastTurn = tuple[str | None, str | None]
"""A query and its response. None: a message that was not sent, such as the query before a greeting."""
Message = Mapping[str, object]
"""`{"role": …, "content": …}`, as in `apply_chat_template` and OpenAI's API."""
History = list[tuple[str, str]]
DEFAULT_SYSTEM = "You are a helpful assistant."
MAX_WINDOW_SIZE = 6144  # tokens, where the checkpoint sets none
RAW_STOP_WORD = "Human:"
MOVED = {
    "Abandoned": "CancellationCriteria",
    "ChatMixin": "ChatMixin",
    "TokenQueue": "TokenQueue",
    "check_stop_words": "check_stop_words",
    "mask_of_left_padding": "left_padding_mask",
    "reply_so_far": "detokenize_stream",
}
"""Names that moved to `chat_qwen.py`, and what they are called there."""


def __getattr__(name: str) -> Any:
    """Resolve moved names for old imports. Without a package there is no sibling to import them from."""
    if name in MOVED and __package__:
        new = MOVED[name]
        if new != name:
            warnings.warn(
                f"{__name__}.{name} is now {new} in chat_qwen. The next release removes the old name.",
                DeprecationWarning,
                stacklevel=2,
            )
        return getattr(importlib.import_module(f"{__package__}.chat_qwen"), new)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_context(
    tokenizer: PreTrainedTokenizerBase,
    query: str | Sequence[Message],
    history: Sequence[PastTurn] | Sequence[Message] | None = None,
    system: str = "",
    max_window_size: int | None = MAX_WINDOW_SIZE,
    chat_format: str = "chatml",
    reply_start: str = "",
) -> tuple[str, list[int]]:
    """Build the prompt of a chat as text and as token ids.

    Args:
        query: the user's message, or messages as `chat_turns` takes them.
        history: earlier turns, see `chat_turns`.
        system: system message.
        max_window_size: see `encode_turns`.
        chat_format: "chatml", or "raw" for the unchanged query.
        reply_start: beginning of the assistant's reply, which the model continues.

    Raises:
        ValueError: unknown chat format, a message that is not text, or a history of the wrong shape.
    """
    if chat_format == "raw":
        if not isinstance(query, str):
            raise ValueError(f'With chat_format "raw" the query must be text, not {type(query).__name__}.')
        return query + reply_start, tokenizer.encode(query + reply_start)
    if chat_format != "chatml":
        raise unknown_format(chat_format)
    turns, last_message = chat_turns(query, history, system)
    return encode_turns(tokenizer, turns, max_window_size, last_message + reply_start)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    max_window_size: int | None = MAX_WINDOW_SIZE,
    reply_start: str | None = "",
) -> tuple[str, list[int]]:
    """Encode a conversation in ChatML, up to the start of the assistant's reply.

    Each turn is a message of its own, where it stands. Control tokens inside a message are encoded as plain text, so
    that a message cannot end its own turn.

    The oldest exchanges are dropped if the conversation is too long: the newest ones are kept while they and the system
    messages are shorter than `max_window_size` tokens. An exchange is a user message with what follows it; the last one
    is always kept and does not count, and neither are system messages dropped.

    Args:
        turns: (role, text) pairs; the roles are "system", "user" and "assistant".
        max_window_size: tokens; None, as in a checkpoint without this setting, for the default.
        reply_start: beginning of the reply; None for a prompt without a message to reply with.

    Returns:
        The prompt as text and as token ids.
    """

    if max_window_size is None:
        max_window_size = MAX_WINDOW_SIZE

    def plain_ids(text: str) -> list[int]:
        return tokenizer.encode(text, allowed_special=set(), disallowed_special=())

    newline = plain_ids("\n")

    def turn_ids(index: int) -> list[int]:
        role, content = turns[index]
        if not isinstance(content, str):
            raise ValueError(f"The {role} message must be text, not {type(content).__name__}.")
        return [tokenizer.im_start_id, *plain_ids(role), *newline, *plain_ids(content), tokenizer.im_end_id]

    exchanges: list[list[int]] = []
    for index, (role, _) in enumerate(turns):
        if role == "user" or (role != "system" and not exchanges):
            exchanges.append([])
        if role != "system":
            exchanges[-1].append(index)
    kept = {index: turn_ids(index) for index, (role, _) in enumerate(turns) if role == "system"}
    length = sum(len(newline) + len(ids) for ids in kept.values()) - len(newline)
    for exchange in reversed(exchanges[:-1]):  # from the newest, so that dropped ones need not be encoded
        encoded = {index: turn_ids(index) for index in exchange}
        length += sum(len(newline) + len(ids) for ids in encoded.values())
        if length >= max_window_size:
            break
        kept |= encoded
    kept |= {index: turn_ids(index) for exchange in exchanges[-1:] for index in exchange}

    text = "".join(f"<|im_start|>{turns[index][0]}\n{turns[index][1]}<|im_end|>\n" for index in sorted(kept))
    ids = [token for index in sorted(kept) for token in (*kept[index], *newline)]
    if reply_start is None:
        return text, ids
    start_ids = [tokenizer.im_start_id, *plain_ids("assistant"), *newline, *plain_ids(reply_start)]
    return f"{text}<|im_start|>assistant\n{reply_start}", ids + start_ids


def chat_turns(
    query: str | Sequence[Message],
    history: Sequence[PastTurn] | Sequence[Message] | None = None,
    system: str = DEFAULT_SYSTEM,
) -> tuple[list[Turn], str]:
    """Convert the arguments of `chat` to the turns of `encode_turns`.

    Messages are dicts with a role ("system", "developer", "user" or "assistant") and a content: a text, None for an
    empty one, or a list of `{"type": "text", "text": …}`, which are joined by newlines. "developer" is another name of
    "system". Messages may have any order.

    Args:
        query: the user's message, or a list of messages.
        history: earlier turns: (query, response) pairs, where None stands for a message that was not sent, or messages.
        system: the system message. Omitted if it is empty or the default and the messages start with one of their own.

    Returns:
        The turns, and the start of the reply: the last message if that is the assistant's, which the model continues.

    Raises:
        ValueError: an empty list, an unknown role, content that is not text, or a history of the wrong shape.
    """
    turns = _history_turns(history)
    if isinstance(query, str):
        turns.append(("user", query))
    elif isinstance(query, list | tuple) and query:
        turns += _message_turns(query, "messages")
    else:
        raise ValueError(f"The query must be text or a list of messages, at least one, not {query!r:.200}.")
    if turns[0][0] != "system" or system not in ("", DEFAULT_SYSTEM):
        turns.insert(0, ("system", system))
    reply_start = "" if turns[-1][0] != "assistant" else turns.pop()[1]
    return turns, reply_start


def extend_history(
    history: Sequence[PastTurn] | Sequence[Message] | None, query: str | Sequence[Message], response: str
) -> list[PastTurn] | list[Message]:
    """Return a history that ends with this turn: pairs if the query is text and the history has pairs, else messages.

    A response that continues an assistant's message is appended to that message.
    """
    if isinstance(query, str) and not _has_messages(history):
        return [*((asked, answered) for asked, answered in cast(Sequence[PastTurn], history or ())), (query, response)]
    turns = [*_history_turns(history), *([("user", query)] if isinstance(query, str) else _message_turns(query))]
    if turns[-1][0] == "assistant":
        response = turns.pop()[1] + response
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    return [*messages, {"role": "assistant", "content": response}]


def strips_reply(reply_start: str) -> bool:
    """Return whether a reply is stripped at its beginning. One that continues a message keeps its leading space."""
    return not reply_start or reply_start[-1].isspace()


def _has_messages(history: object) -> bool:
    return isinstance(history, list | tuple) and bool(history) and isinstance(history[0], dict)


def _history_turns(history: Sequence[PastTurn] | Sequence[Message] | None) -> list[Turn]:
    if _has_messages(history):
        return _message_turns(cast(Sequence[Message], history), "history")
    pairs = cast(Sequence[PastTurn], check_history(history))
    turns = [turn for query, response in pairs for turn in (("user", query), ("assistant", response))]
    return [(role, content) for role, content in turns if content is not None]


def _message_turns(messages: Sequence[Message], name: str = "messages") -> list[Turn]:
    turns = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("tool", "function") or (role and (message.get("tool_calls") or message.get("function_call"))):
            raise ValueError(
                f"{name}[{index}] is a tool call or its result: qwen.tools converts such conversations to prompts "
                "(qwen.tools.parse_turns), and the server takes them."
            )
        if role not in ("system", "developer", "user", "assistant"):
            raise ValueError(f"{name}[{index}] needs a role: system, developer, user or assistant, not {role!r:.200}.")
        content = content_text(message.get("content"), f"{name}[{index}].content")
        turns.append(("system" if role == "developer" else str(role), content))
    return turns


def content_text(content: object, path: str) -> str:
    """Return the text of a message's content: "" for None, and the parts of a list joined by newlines.

    Args:
        path: where the content is, for the message of the error.

    Raises:
        ValueError: the content is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(f"{path} must be a string or a list of text parts, not {type(content).__name__}.")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(
                f"{path}[{index}] has type {kind!r:.200}: the model takes text only; send "
                '{"type": "text", "text": …}.'
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{path}[{index}].text must be a string, not {type(part.get('text')).__name__}.")
        texts.append(part["text"])
    return "\n".join(texts)


def get_stop_words_ids(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token sequences that end a reply: ChatML control tokens, or "Human:" and end of text for "raw".

    Raises:
        ValueError: unknown chat format.
    """
    if chat_format == "chatml":
        return [[tokenizer.im_end_id], [tokenizer.im_start_id]]
    if chat_format == "raw":
        return [tokenizer.encode(RAW_STOP_WORD), [tokenizer.eod_id]]
    raise unknown_format(chat_format)


def decode_tokens(
    tokens: torch.Tensor | Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    raw_text_len: int = 0,
    context_length: int = 0,
    chat_format: str = "chatml",
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
    lstrip: bool = True,
) -> str | tuple[str, str]:
    """Decode the reply in a generated row: without the prompt, up to the token that ended it, stripped.

    Args:
        tokens: prompt and reply, (S).
        raw_text_len: unused; accepted for existing callers. The prompt is cut off by tokens, which is exact.
        context_length: number of prompt tokens.
        verbose: print the unstripped reply and why it ended.
        lstrip: strip at the beginning too; False for a reply that continues a message.
        return_end_reason: also return why it ended: "Gen '<|im_end|>'", or "Gen length N" with N tokens in the row.

    Raises:
        ValueError: unknown chat format.
    """
    tokens = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
    stop_token_ids = {tokenizer.eod_id}
    if chat_format == "chatml":
        stop_token_ids |= {tokenizer.im_start_id, tokenizer.im_end_id}
    elif chat_format != "raw":
        raise unknown_format(chat_format)
    reply, end_reason = tokens[context_length:], f"Gen length {len(tokens)}"
    for position, token in enumerate(reply):
        if token in stop_token_ids:
            reply, end_reason = reply[:position], f"Gen {tokenizer.decode([token])!r}"
            break
    text = cast(str, tokenizer.decode(reply, errors=errors))
    if verbose:
        print(f"\nRaw reply: {text}\nEnd reason: {end_reason}")
    if chat_format == "raw" and RAW_STOP_WORD in text:
        text, end_reason = text.split(RAW_STOP_WORD)[0], f"Gen {RAW_STOP_WORD!r}"
    text = text.strip() if lstrip else text.rstrip()
    return (text, end_reason) if return_end_reason else text


def check_history(history: object) -> Sequence[Sequence[str | None]]:
    """Return the history, [] for None, after checking its shape.

    Raises:
        ValueError: it is not a list of pairs of texts.
    """
    if history is None:
        return []
    if not isinstance(history, list | tuple) or not all(isinstance(t, list | tuple) and len(t) == 2 for t in history):
        raise ValueError(
            "history must be a list of (query, response) pairs, such as the one that chat returns, a list of "
            f"messages, or None, not {str(history)[:200]!r}."
        )
    for turn in history:
        if not all(isinstance(text, str | None) for text in turn):
            raise ValueError(f"A turn of the history must be two texts, (query, response), not {turn!r}.")
    return history


def unknown_format(chat_format: str) -> ValueError:
    return ValueError(f'chat_format must be "chatml" for chat models or "raw" for base models, not {chat_format!r}.')


class StopWordsLogitsProcessor(LogitsProcessor):
    """Forces the next token of a row to be eos once the row ends with one of the sequences."""

    def __init__(self, stop_words_ids: Sequence[Sequence[int]], eos_token_id: int):
        self.stop_words_ids = [torch.tensor(words) for words in stop_words_ids]
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids: (B, S), scores: (B, vocab_size) → scores."""
        stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        # A copy to a GPU waits for it, so this is one per generation instead of one per token.
        self.stop_words_ids = [words.to(input_ids.device) for words in self.stop_words_ids]
        for words in self.stop_words_ids:
            if len(words) <= input_ids.shape[1]:
                stopped |= (input_ids[:, -len(words) :] == words).all(-1)
        only_eos = torch.full_like(scores[:1], -float("inf"))
        only_eos[:, self.eos_token_id] = 0
        return cast(torch.FloatTensor, torch.where(stopped[:, None], only_eos, scores))
