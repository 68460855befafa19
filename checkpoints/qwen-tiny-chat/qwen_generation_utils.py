"""Prompts and replies as token ids: ChatML, stop words, decoding.

Users import this file on its own from a checkpoint folder on the path (`from qwen_generation_utils import
make_context`), so it must not import siblings. `chat_qwen.py`, with the `chat` methods of the model, imports it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

History = list[tuple[str, str]]
DEFAULT_SYSTEM = "You are a helpful assistant."
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
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
    reply_start: str = "",
) -> tuple[str, list[int]]:
    """Build the prompt of a chat as text and as token ids.

    The newest turns of the history are kept while the system message and the kept turns are shorter than
    `max_window_size` tokens; the query does not count. Control tokens inside a message are encoded as plain text, so
    that a message cannot end its own turn. With chat_format "raw" the prompt is the unchanged query.

    Args:
        reply_start: beginning of the assistant's reply, which the model continues.

    Raises:
        ValueError: unknown chat format, a message that is not text, or a history of the wrong shape.
    """
    if chat_format == "raw":
        return query + reply_start, tokenizer.encode(query + reply_start)
    if chat_format != "chatml":
        raise unknown_format(chat_format)

    newline = tokenizer.encode("\n", allowed_special=set(), disallowed_special=())

    def message(role: str, content: str) -> tuple[str, list[int]]:
        if not isinstance(content, str):
            raise ValueError(f"The {role} message must be text, not {type(content).__name__}.")
        ids = [tokenizer.encode(part, allowed_special=set(), disallowed_special=()) for part in (role, content)]
        ids = [tokenizer.im_start_id, *ids[0], *newline, *ids[1], tokenizer.im_end_id]
        return f"<|im_start|>{role}\n{content}<|im_end|>", ids

    system_text, system_ids = message("system", system)
    kept_text = ""
    kept_ids: list[int] = []
    for past_query, past_response in reversed(check_history(history)):
        user_text, user_ids = message("user", past_query)
        assistant_text, assistant_ids = message("assistant", past_response)
        turn_ids = [*newline, *user_ids, *newline, *assistant_ids]
        if len(system_ids) + len(turn_ids) + len(kept_ids) >= max_window_size:
            break
        kept_text, kept_ids = f"\n{user_text}\n{assistant_text}{kept_text}", turn_ids + kept_ids
    query_text, query_ids = message("user", query)
    role_ids = tokenizer.encode("assistant", allowed_special=set(), disallowed_special=())
    start_ids = tokenizer.encode(reply_start, allowed_special=set(), disallowed_special=())
    text = f"{system_text}{kept_text}\n{query_text}\n<|im_start|>assistant\n{reply_start}"
    ids = [*system_ids, *kept_ids, *newline, *query_ids, *newline, tokenizer.im_start_id, *role_ids, *newline]
    return text, ids + start_ids


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
) -> str | tuple[str, str]:
    """Decode the reply in a generated row: without the prompt, up to the token that ended it, stripped.

    Args:
        tokens: prompt and reply, (S).
        raw_text_len: unused; accepted for existing callers. The prompt is cut off by tokens, which is exact.
        context_length: number of prompt tokens.
        verbose: print the unstripped reply and why it ended.
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
    # The embedding has more rows than the tokenizer has tokens, and sampling may choose one of them.
    known = [token for token in reply if token < len(tokenizer)]
    text = cast(str, tokenizer.decode(known, errors=errors))
    if verbose:
        print(f"\nRaw reply: {text}\nEnd reason: {end_reason}")
    if chat_format == "raw" and RAW_STOP_WORD in text:
        text, end_reason = text.split(RAW_STOP_WORD)[0], f"Gen {RAW_STOP_WORD!r}"
    text = text.strip()
    return (text, end_reason) if return_end_reason else text


def check_history(history: object) -> Sequence[Sequence[str]]:
    """Return the history, [] for None, after checking its shape.

    Raises:
        ValueError: it is not a list of pairs of texts.
    """
    if history is None:
        return []
    if not isinstance(history, list | tuple) or not all(isinstance(t, list | tuple) and len(t) == 2 for t in history):
        raise ValueError(
            "history must be a list of (query, response) pairs, such as the one that chat returns, or None, "
            f"not {str(history)[:200]!r}."
        )
    for turn in history:
        if not all(isinstance(text, str) for text in turn):
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
        for words in self.stop_words_ids:
            if len(words) <= input_ids.shape[1]:
                stopped |= (input_ids[:, -len(words) :] == words.to(input_ids.device)).all(-1)
        only_eos = torch.full_like(scores[:1], -float("inf"))
        only_eos[:, self.eos_token_id] = 0
        return cast(torch.FloatTensor, torch.where(stopped[:, None], only_eos, scores))
