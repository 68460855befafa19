"""Tokenizer: byte-level BPE by tiktoken with the tokenizer interface of transformers.

Encodes and decodes with a tiktoken Encoding, which is built from two tables: `mergeable_ranks` (bytes to id) and
`special_tokens` (control token to id). Regular tokens are `bytes`, since a token may end inside a character; control
tokens are `str`. The layout of a conversation is in `CHAT_TEMPLATE`.
"""

import bisect
import codecs
import functools
import inspect
import itertools
import logging
import os
import re
import unicodedata
from base64 import b64decode
from binascii import b2a_base64
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast, overload

import tiktoken
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.utils import to_py_obj

from .json_qwen import (
    MAX_VOCABULARY_BYTES,
    check_json_files,
    first_line,
    local_folder,
    read_json_object,
    read_small_file,
)

logger = logging.getLogger(__name__)

_SANITIZES = "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizer.apply_chat_template).parameters

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKEN_FILES = ("special_tokens_map.json", "added_tokens.json")
DOWNLOAD_OPTIONS = {
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    "trust_remote_code",
}

# from_pretrained finds or downloads these files and passes their paths to the constructor.
VOCAB_FILES_NAMES = {"vocab_file": "qwen.tiktoken", "generation_config_file": "generation_config.json"}

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ENDOFTEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
CONTROL_TOKENS = (ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))
CONTROL_PREFIX = "<|"  # of every control token; a text without it contains none

# A message becomes a turn where it stands, so that adding messages never changes the text before them. The blocks
# `generation` mark what the assistant says, for return_assistant_tokens_mask.
CHAT_TEMPLATE = """\
{%- if tools %}
{{- raise_exception('These models call tools in a text format, ReAct, which this template does not write: send the '
    ~ 'tools to the server, openai_api.py, or build the prompt with qwen.tools.parse_turns.') }}
{%- endif %}
{%- if not messages %}
{{- raise_exception('The conversation is empty: pass at least one message.') }}
{%- endif %}
{%- if messages[0].role not in ['system', 'developer'] %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- set place = 'messages[' ~ loop.index0 ~ ']' %}
{%- if message.role in ['tool', 'function'] or message.tool_calls or message.function_call %}
{{- raise_exception(place ~ ' is a tool call or its result. These models call tools in a text format, ReAct: write it '
    ~ 'as text (qwen.tools does), or send the messages to the server, openai_api.py.') }}
{%- elif message.role not in ['system', 'developer', 'user', 'assistant'] %}
{{- raise_exception(place ~ ' needs a role: system, developer, user or assistant'
    ~ (', not ' ~ message.role if message.role else '') ~ '.') }}
{%- endif %}
{%- set role = 'system' if message.role == 'developer' else message.role %}
{%- if message.content is string %}
{%- set text = message.content %}
{%- elif message.content is not defined or message.content is none %}
{%- set text = '' %}
{%- elif message.content is iterable %}
{%- for part in message.content %}
{%- if part.type != 'text' or part.text is not string %}
{{- raise_exception(place ~ '.content[' ~ loop.index0 ~ '] is not a text part, and these models read only text: '
    ~ 'replace it by {"type": "text", "text": "..."}.') }}
{%- endif %}
{%- endfor %}
{%- set text = message.content | map(attribute='text') | join('\\n') %}
{%- else %}
{{- raise_exception(place ~ '.content is neither a string nor a list of text parts: pass one of them.') }}
{%- endif %}
{{- '<|im_start|>' ~ role ~ '\\n' }}
{%- if role == 'assistant' %}
{%- generation %}
{{- text ~ '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- text ~ '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The pattern's `\s+(?!\S)` stores one backtracking step for each character of a whitespace run, and the regex engine
# gives up at about a million steps. Such runs end before a newline or at the last one, so the characters here are the
# pattern's \s without newlines (Python's \s also has \x1c-\x1f).
LONG_WHITESPACE = re.compile(r"[^\S\r\n\x1c-\x1f]{65536,}")

# Runs that may contain many combining marks, which are not word characters.
LONG_MARKS = re.compile(r"(?<!\W)\W{256,}")

CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # all bytes of a character in UTF-8 except the first


class QWenTokenizer(PreTrainedTokenizer):
    """Tokenizer of the first-generation Qwen models.

    Control tokens take the first free ids after the contiguous ranks of the vocabulary file (151643 to 151850 with the
    published one) and stay there when the file has further ranks after them. A text is NFC-normalised and then
    encoded; the written form of a control token in it becomes the control token unless `allowed_special` says
    otherwise. Surrogates, which UTF-8 cannot encode, become the character of their pair or U+FFFD.

    `apply_chat_template` renders ChatML to one text and then encodes that, so a control token written inside a message
    becomes a control token. For untrusted messages pass `sanitize_control_tokens=True`, or build the prompt with
    `make_context`, which encodes contents as plain text.

    The eos token is `<|im_end|>` for a chat checkpoint and `<|endoftext|>` otherwise, the pad token `<|endoftext|>`;
    encoding adds neither. An argument or a saved setting takes precedence, also None.

    Args:
        vocab_file: path of `qwen.tiktoken`, lines of `base64(token) rank`.
        generation_config_file: path of the checkpoint's `generation_config.json`, whose `chat_format` tells a chat
            model from a base model. `from_pretrained` passes it. Without it, or if it cannot be read: a base model.
        errors: how to decode bytes that are not UTF-8, as in `bytes.decode`.
        extra_vocab_file: path of a second file in the same format, whose tokens are added under their own ids. Tokens
            and ids that are already there are skipped with a warning.
        **kwargs: as in PreTrainedTokenizer. Special-token arguments (`pad_token=...`) take known control tokens only.

    Attributes:
        mergeable_ranks: `dict[bytes, int]`, the regular tokens.
        special_tokens: `dict[str, int]`, the control tokens.
        decoder: `dict[int, bytes | str]`, both by id.
        tokenizer: the tiktoken Encoding.
        eod_id, im_start_id, im_end_id: ids of `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`.

    Raises:
        ValueError: a vocabulary file is missing or broken, or a special-token argument is not a control token.
        LookupError: `errors` is not a registered error handler.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | os.PathLike | None,
        errors: str = "replace",
        extra_vocab_file: str | os.PathLike | None = None,
        generation_config_file: str | os.PathLike | None = None,
        **kwargs: object,
    ) -> None:
        if vocab_file is None:
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'The checkpoint'} has no {VOCAB_FILES_NAMES['vocab_file']}: "
                "download the file from the model's page into that folder."
            )
        codecs.lookup_error(errors)
        self.errors = errors

        self.mergeable_ranks = _load_ranks(vocab_file)
        _check_single_bytes(self.mergeable_ranks, vocab_file)
        used = set(self.mergeable_ranks.values())
        first = next(i for i in range(len(used) + 1) if i not in used)
        self.special_tokens = {token: i for i, token in enumerate(CONTROL_TOKENS, start=first)}
        if taken := used.intersection(self.special_tokens.values()):
            raise ValueError(
                f"{vocab_file}: rank {min(taken)} is in the range of the control tokens, {first} to "
                f"{first + len(CONTROL_TOKENS) - 1}, starting at the first free id. If ranks before it are missing, "
                "download the file again; added tokens need ranks above the control tokens."
            )
        if extra_vocab_file is not None:
            self._add_ranks(extra_vocab_file)

        self.decoder: dict[int, bytes | str] = {i: token for token, i in self.mergeable_ranks.items()}
        self.decoder.update({i: token for token, i in self.special_tokens.items()})
        self._encoding = tiktoken.Encoding(
            "Qwen",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=self.mergeable_ranks,
            special_tokens=self.special_tokens,
        )
        self.tokenizer = self._encoding  # GPTQModel's subclass puts another object there
        self.eod_id = self.special_tokens[ENDOFTEXT]
        self.im_start_id = self.special_tokens[IM_START]
        self.im_end_id = self.special_tokens[IM_END]

        self._check_saved_tokens(cast(dict[int, AddedToken], kwargs.pop("added_tokens_decoder", {})), vocab_file)
        self._added_tokens_decoder = {
            i: AddedToken(token, normalized=False, special=True) for token, i in self.special_tokens.items()
        }
        kwargs.pop("resume_download", None)  # a download option of old examples, not to be saved
        kwargs.setdefault("eos_token", IM_END if _chat_format(generation_config_file) == "chatml" else ENDOFTEXT)
        kwargs.setdefault("pad_token", ENDOFTEXT)
        super().__init__(errors=errors, **kwargs)
        self._check_control_tokens([*self.special_tokens_map.values(), *self.extra_special_tokens])
        if self.chat_template is None:
            self.chat_template = CHAT_TEMPLATE

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *init_inputs: object, **kwargs: Any
    ) -> Self:
        """Load the tokenizer of a checkpoint, as transformers does; `extra_vocab_file` is taken from the caller only.

        A tokenizer_config.json could name any file of this machine, and `save_pretrained` writes the tokens of the
        extra file into the vocabulary.

        Raises:
            ValueError: a file is damaged, or an argument is invalid; the message names it.
            OSError: files are missing.
        """
        folder = local_folder(pretrained_model_name_or_path, kwargs.get("subfolder"))
        if folder is not None:
            check_json_files(folder, TOKEN_FILES)
            if (folder / TOKENIZER_CONFIG).exists():
                _check_settings(read_json_object(folder / TOKENIZER_CONFIG), folder / TOKENIZER_CONFIG)
        by_caller = set(kwargs)
        kwargs.setdefault("extra_vocab_file", None)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
        except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
            names_file = isinstance(error, ValueError) and os.fspath(pretrained_model_name_or_path) in str(error)
            # Perhaps an error of the caller's, or it has all that is to be said.
            if init_inputs or not by_caller <= DOWNLOAD_OPTIONS or names_file:
                raise
            reason = (first_line(error) or type(error).__name__)[:300]
            files = ", ".join((TOKENIZER_CONFIG, *TOKEN_FILES))
            raise ValueError(
                f"The tokenizer files of {pretrained_model_name_or_path} ({files}) have an invalid value ({reason}). "
                "Fix it or download them again."
            ) from error

    def __repr__(self) -> str:
        control = [f"{token} ({index})" for token, index in self.special_tokens.items()]
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map}, "
            f"control_tokens={', '.join(control[:4])} to {control[-1]})"
        )

    # ---- vocabulary ----

    def __len__(self) -> int:
        return self._encoding.n_vocab

    @property
    def vocab_size(self) -> int:
        """The highest id plus one, including control tokens: the number of rows that an embedding needs."""
        return self._encoding.n_vocab

    def get_vocab(self) -> dict[bytes | str, int]:  # type: ignore[override]  # regular tokens are bytes
        """All tokens and their ids: regular tokens as bytes, control tokens as str."""
        return cast(dict[bytes | str, int], self.mergeable_ranks) | self.special_tokens

    @property
    def all_special_tokens(self) -> list[str]:
        """All control tokens, whether or not they are used as eos, pad etc."""
        return list(self.special_tokens)

    def _add_ranks(self, path: str | os.PathLike) -> None:
        used = {*self.mergeable_ranks.values(), *self.special_tokens.values()}
        for token, rank in _load_ranks(path).items():
            if token in self.mergeable_ranks:
                logger.warning("%s: token %r skipped, it has id %d already.", path, token, self.mergeable_ranks[token])
            elif rank in used:
                logger.warning("%s: token %r skipped, its id %d is taken.", path, token, rank)
            else:
                self.mergeable_ranks[token] = rank

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write all regular tokens, those of `extra_vocab_file` included, and return the path in a tuple."""
        name = (filename_prefix + "-" if filename_prefix else "") + VOCAB_FILES_NAMES["vocab_file"]
        path = os.path.join(save_directory, name)
        with open(path, "wb") as file:
            for token, rank in sorted(self.mergeable_ranks.items(), key=lambda item: item[1]):
                file.write(b"%s %d\n" % (b2a_base64(token, newline=False), rank))
        return (path,)

    # ---- control tokens ----

    def _check_control_tokens(self, tokens: Iterable[object]) -> None:
        for token in map(str, tokens):
            if token not in self.special_tokens:
                raise ValueError(
                    f"{token!r} is not a control token of this vocabulary. Special tokens can only be chosen among "
                    f"{ENDOFTEXT}, {IM_START}, {IM_END} and {CONTROL_TOKENS[3]} to {CONTROL_TOKENS[-1]}."
                )

    def _check_saved_tokens(self, saved: dict[int, AddedToken], vocab_file: str | os.PathLike) -> None:
        for index, token in saved.items():
            self._check_control_tokens([token])
            if self.special_tokens[str(token)] != index:
                raise ValueError(
                    f"tokenizer_config.json gives {token} the id {index}, but with {vocab_file} it has id "
                    f"{self.special_tokens[str(token)]}. The vocabulary is incomplete or belongs to another "
                    "checkpoint: download it again, or delete added_tokens_decoder from tokenizer_config.json if the "
                    "vocabulary was replaced on purpose."
                )

    def __setattr__(self, key: str, value: object) -> None:
        name = key.removesuffix("_id")
        if name in self.SPECIAL_TOKENS_ATTRIBUTES and value is not None:
            if name != key:
                key, value = name, self.convert_ids_to_tokens(cast(int, value))
            self._check_control_tokens([value])
        elif key == "extra_special_tokens":
            self._check_control_tokens(cast(Iterable[object], value or ()))
        super().__setattr__(key, value)

    def add_special_tokens(
        self,
        special_tokens_dict: dict[str, str | AddedToken | Sequence[str | AddedToken]],
        *args: object,
        **kwargs: object,
    ) -> int:
        """Give known control tokens a role (`{"pad_token": "<|extra_0|>"}`) and return 0, the number of new tokens.

        Raises:
            ValueError: a token is not a control token.
        """
        for value in special_tokens_dict.values():
            self._check_control_tokens(value if isinstance(value, (list, tuple)) else [value])
        return super().add_special_tokens(special_tokens_dict, *args, **kwargs)

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        if not special_tokens:
            raise ValueError(
                f"Cannot add {', '.join(repr(str(token)) for token in new_tokens)}: regular tokens need a place in the "
                "order of merges. Write them to a tiktoken file with examples/add_merges.py and load that with "
                "extra_vocab_file=..."
            )
        self._check_control_tokens(new_tokens)
        return 0

    # ---- text to ids ----

    def tokenize(  # type: ignore[override]  # regular tokens are bytes
        self,
        text: str,
        *,
        allowed_special: str | Collection[str] = "all",
        disallowed_special: str | Collection[str] = (),
        split_special_tokens: bool | None = None,
        **kwargs: object,
    ) -> list[bytes | str]:
        """Split a text into tokens: bytes for regular ones, str for control tokens.

        `__call__` and `encode` take `allowed_special` and `disallowed_special` as well.

        Args:
            text: the text to split.
            allowed_special: the control tokens whose written form becomes the token, "all" or a set. The others are
                split as plain text.
            disallowed_special: texts that must not occur; "all" stands for every control token that is not allowed.
            split_special_tokens: allow no control token.

        Raises:
            ValueError: the text contains a disallowed one.
        """
        ids = self._encode_text(text, allowed_special, disallowed_special, split_special_tokens)
        return [self.decoder[i] for i in ids]

    def encode(self, text: str | list[str] | list[int], *args: Any, **kwargs: Any) -> list[int]:
        """The ids of a text, as in PreTrainedTokenizer; `allowed_special` and `disallowed_special` as in `tokenize`."""
        kwargs.setdefault("return_attention_mask", False)  # it would be built and thrown away
        return super().encode(text, *args, **kwargs)

    def apply_chat_template(
        self, *args: Any, **kwargs: Any
    ) -> str | list[int] | list[str] | list[list[int]] | BatchEncoding:
        # Before 5.20, transformers passes the argument to the template, which ignores it.
        if kwargs.get("sanitize_control_tokens") and not _SANITIZES:
            raise ValueError(
                "sanitize_control_tokens=True needs transformers 5.20 or newer: install that, or build the prompt with "
                "make_context, which encodes messages as plain text."
            )
        tokenizer_kwargs = kwargs.get("tokenizer_kwargs") or {}
        if not kwargs.get("return_assistant_tokens_mask") or tokenizer_kwargs.get("return_offsets_mapping"):
            return super().apply_chat_template(*args, **kwargs)
        # transformers looks for the assistant's tokens by their offsets
        kwargs["tokenizer_kwargs"] = {**tokenizer_kwargs, "return_offsets_mapping": True}
        output = cast(BatchEncoding, super().apply_chat_template(*args, **kwargs))
        del output["offset_mapping"]
        return output

    # As a decorator, `functools.wraps`, it would give the method another type than that of the base class.
    functools.update_wrapper(apply_chat_template, PreTrainedTokenizer.apply_chat_template)

    def _encode_plus(  # type: ignore[override]  # called with keyword arguments only
        self,
        text: str | list[str] | list[int],
        text_pair: str | list[str] | list[int] | None = None,
        return_offsets_mapping: bool = False,
        **kwargs: Any,
    ) -> BatchEncoding:
        if kwargs.get("return_overflowing_tokens") and kwargs.get("return_tensors"):
            raise ValueError(
                "return_overflowing_tokens=True returns lists of different lengths: leave out return_tensors."
            )
        as_usual = kwargs.get("is_split_into_words") or kwargs.get("sanitize_control_tokens")
        if return_offsets_mapping and (text_pair is not None or as_usual):
            raise ValueError(
                "return_offsets_mapping=True supports texts one by one or in a batch, but no pairs, no words and no "
                "sanitize_control_tokens: encode each text by itself."
            )
        if isinstance(text, str) and isinstance(text_pair, (list, tuple)) and not as_usual:
            raise ValueError("The text to encode is a str but text_pair is a list: pass a str as text_pair.")
        if not isinstance(text, str) or text_pair is not None or as_usual:
            # calls this method for each text
            output = super()._encode_plus(text, text_pair, return_offsets_mapping=return_offsets_mapping, **kwargs)
            if return_offsets_mapping and "offset_mapping" not in output:
                raise ValueError("return_offsets_mapping=True needs a text, not token ids: pass the text.")
        else:
            output = self._encode_single(text, return_offsets_mapping, **kwargs)
        if not return_offsets_mapping:
            return output
        rows = output["offset_mapping"]
        if kwargs.get("return_tensors"):
            rows = rows.tolist()
        elif isinstance(text, str):
            rows = [rows]
        return BatchEncoding(output.data, encoding=[TokenSpans(row) for row in rows])  # type: ignore[misc]  # duck-typed

    def _encode_single(self, text: str, return_offsets_mapping: bool, **kwargs: Any) -> BatchEncoding:
        # Straight from text to ids: the base class would go through a list of tokens.
        ids = self._encode_text(
            text,
            kwargs.pop("allowed_special", "all"),
            kwargs.pop("disallowed_special", ()),
            kwargs.pop("split_special_tokens", None),
        )
        padding, truncation = kwargs.pop("padding_strategy", False), kwargs.pop("truncation_strategy", False)
        if not return_offsets_mapping:
            return self.prepare_for_model(
                ids, padding=padding, truncation=truncation, prepend_batch_axis=True, **kwargs
            )
        tensors, length = kwargs.pop("return_tensors", None), kwargs.pop("return_length", False)
        output = self.prepare_for_model(ids, truncation=truncation, **kwargs)
        kept = len(output["input_ids"])
        offsets = self._offsets(text, ids)
        output["offset_mapping"] = offsets[len(ids) - kept :] if self.truncation_side == "left" else offsets[:kept]
        output = self.pad(
            output,
            padding,
            max_length=kwargs.get("max_length"),
            pad_to_multiple_of=kwargs.get("pad_to_multiple_of"),
            padding_side=kwargs.get("padding_side"),
            return_attention_mask=kwargs.get("return_attention_mask"),
        )
        if length:
            output["length"] = len(output["input_ids"])
        return BatchEncoding(output.data, tensor_type=tensors, prepend_batch_axis=True)

    def _offsets(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The characters of a text that each token comes from, as (start, end).

        A character that several tokens share belongs to each of them. Characters that NFC changes together, and pairs
        of surrogates, count as one.
        """
        offsets = []
        count = 0  # characters of the normalised text so far
        for token in (self.decoder[index] for index in ids):
            encoded = token.encode() if isinstance(token, str) else token
            start = count - (encoded[0] in CONTINUATION_BYTES)
            count += len(encoded.translate(None, CONTINUATION_BYTES))
            offsets.append((start, count))
        if _normalize(text) == text:
            return offsets
        spans = _spans(text)
        return [(spans[start][0], spans[end - 1][1]) for start, end in offsets]

    def prepare_for_model(self, ids: list[int], *args: Any, **kwargs: Any) -> BatchEncoding:
        output = super().prepare_for_model(ids, *args, **kwargs)
        if kwargs.get("return_overflowing_tokens"):
            # The base class leaves these out of texts that are short enough, and then cannot batch them with others.
            output.setdefault("overflowing_tokens", [])
            output.setdefault("num_truncated_tokens", 0)
        return output

    functools.update_wrapper(prepare_for_model, PreTrainedTokenizer.prepare_for_model)

    def _pad(self, encoded_inputs: dict | BatchEncoding, *args: Any, **kwargs: Any) -> dict:
        """Pad as the base class does, and offsets, which it leaves out, with (0, 0)."""
        length = len(encoded_inputs["input_ids"])
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        if "offset_mapping" in padded:
            added = [(0, 0)] * (len(padded["input_ids"]) - length)
            offsets = padded["offset_mapping"]
            left = (kwargs.get("padding_side") or self.padding_side) == "left"
            padded["offset_mapping"] = [*added, *offsets] if left else [*offsets, *added]
        return padded

    def _encode_text(
        self,
        text: str,
        allowed_special: str | Collection[str],
        disallowed_special: str | Collection[str],
        split_special_tokens: bool | None,
    ) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"The text to encode must be a str, not {type(text).__name__}: {text!r:.80}")
        text = _normalize(text)
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        allowed = set()
        if not split_special_tokens and CONTROL_PREFIX in text:  # most texts skip the cost of handling the set
            allowed = self.special_tokens.keys() & _token_set(allowed_special, self.special_tokens)
        for token in _token_set(disallowed_special, [token for token in self.special_tokens if token not in allowed]):
            if token in text:
                raise ValueError(
                    f"The text contains {token!r}, which disallowed_special forbids. Remove it from the text, or take "
                    "it out of disallowed_special and either put it in allowed_special (to encode it as a control "
                    "token) or leave it out there (to encode it as plain text)."
                )
        try:
            # not encode_ordinary, which panics where encode raises
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())
        except ValueError:  # the regex engine gave up, see LONG_WHITESPACE
            return self._encode_long_whitespace(text, allowed)

    def _encode_long_whitespace(self, text: str, allowed: Collection[str]) -> list[int]:
        """Encode as usual, but cut out long whitespace runs before applying the split pattern."""
        whitespace = tiktoken.Encoding(
            "whitespace", pat_str=r"\s+", mergeable_ranks=self.mergeable_ranks, special_tokens={}
        )
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, allowed))})", text) if allowed else [text]:
            if part in allowed:
                ids.append(self.special_tokens[part])
                continue
            start = 0
            for run in LONG_WHITESPACE.finditer(part):
                following = part[run.end() : run.end() + 1]
                if following in ("\r", "\n"):  # the run belongs to the newline's token
                    continue
                end = run.end() - 1 if following else run.end()  # the last blank goes with the next word
                ids += self._encoding.encode(part[start : run.start()], disallowed_special=())
                ids += whitespace.encode(part[run.start() : end])
                start = end
            ids += self._encoding.encode(part[start:], disallowed_special=())
        return ids

    def _get_padding_truncation_strategies(self, padding: object = False, *args: object, **kwargs: object) -> tuple:
        # the base class suggests adding a token, which this vocabulary does not support
        if padding not in (False, "do_not_pad") and self.pad_token is None:
            raise ValueError(
                "Cannot pad: the padding token was set to None. Load the tokenizer without pad_token=None, or set "
                f"tokenizer.pad_token = '{ENDOFTEXT}'."
            )
        return super()._get_padding_truncation_strategies(padding, *args, **kwargs)

    # ---- tokens and ids ----

    def convert_tokens_to_ids(  # type: ignore[override]  # regular tokens are bytes
        self, tokens: bytes | str | Iterable[bytes | str]
    ) -> int | list[int | None] | None:
        """The id of one token or the ids of several; for an unknown token that of `unk_token`, or None without one."""
        if isinstance(tokens, (bytes, str)):
            return self._token_to_id(tokens)
        return [self._token_to_id(token) for token in tokens]

    def _token_to_id(self, token: bytes | str) -> int | None:
        index = self.special_tokens.get(token) if isinstance(token, str) else self.mergeable_ranks.get(token)
        return self.unk_token_id if index is None else index

    @overload  # type: ignore[override]  # regular tokens are bytes
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> bytes | str | None: ...

    @overload
    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = False
    ) -> list[bytes | str | None]: ...

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> bytes | str | list[bytes | str | None] | None:
        """The token of one id or the tokens of several: bytes for regular ones, str for control tokens, None for ids
        without a token, such as those of padding rows of the embedding.

        Raises:
            ValueError: an id is negative.
        """
        ids = to_py_obj(ids)
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        tokens = [self._convert_id_to_token(i) for i in ids]
        return [token for token in tokens if not isinstance(token, str)] if skip_special_tokens else tokens

    def _convert_id_to_token(self, index: int) -> bytes | str | None:  # type: ignore[override]  # also called by others
        if index < 0:
            raise ValueError(f"The id {index} is negative. Ids of tokens go from 0 to {len(self) - 1}.")
        return self.decoder.get(index)

    # ---- ids to text ----

    if TYPE_CHECKING:  # transformers has no overloads, so the type would be str | list[str]

        @overload
        def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = ..., **kwargs: object) -> str: ...

        @overload
        def decode(
            self, token_ids: Sequence[Sequence[int]], skip_special_tokens: bool = ..., **kwargs: object
        ) -> list[str]: ...

        @overload
        def decode(self, token_ids: object, skip_special_tokens: bool = ..., **kwargs: object) -> str | list[str]: ...

        def decode(self, token_ids: object, skip_special_tokens: bool = False, **kwargs: object) -> str | list[str]: ...

    def convert_tokens_to_string(self, tokens: Iterable[bytes | str | None]) -> str:
        """The text of a list of tokens, control tokens in their written form; None, as for unknown ids, has none."""
        joined = b"".join(token.encode() if isinstance(token, str) else token or b"" for token in tokens)
        return joined.decode("utf-8", errors=self.errors)

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: object,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            control = self._added_tokens_decoder
            ids = [i for i in ids if i not in control]
        try:
            text = self._encoding.decode(ids, errors=errors or self.errors)
        except (KeyError, OverflowError):  # ids without a token have no text, such as those of padding rows
            ids = [i for i in ids if self._convert_id_to_token(i) is not None]
            text = self._encoding.decode(ids, errors=errors or self.errors)
        # Only on request: byte-level tokens include their spaces, and old checkpoints were saved with this option on.
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text


class TokenSpans:
    """The offsets of one encoded text, as a BatchEncoding asks for them.

    Args:
        offsets: start and end of the characters of each token; (0, 0) for padding on either side.
    """

    n_sequences = 1

    def __init__(self, offsets: Sequence[tuple[int, int]]):
        self.offsets = offsets
        tokens = [index for index, (_, end) in enumerate(offsets) if end]
        self._range = (tokens[0], tokens[-1] + 1) if tokens else (0, 0)

    def char_to_token(self, char_index: int, sequence_index: int = 0) -> int | None:
        """The first token of a character; None if it was truncated."""
        first, last = self._range
        index = bisect.bisect_right(self.offsets, char_index, first, last, key=lambda span: span[1])
        return index if index < last and self.offsets[index][0] <= char_index and sequence_index == 0 else None

    def token_to_chars(self, index: int) -> tuple[int, int] | None:
        """Start and end of the characters of a token; None for padding."""
        start, end = self.offsets[index]
        return (start, end) if end else None


def _token_set(tokens: str | Collection[str], everything: Collection[str]) -> Collection[str]:
    if isinstance(tokens, str):
        return everything if tokens == "all" else {tokens}
    return set(tokens)


def _load_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """Read a tiktoken file: lines of `base64(token) rank`, in any order, to `{token: rank}`.

    Raises:
        ValueError: the file cannot be read or is broken. Not OSError, whose message from_pretrained would hide.
    """
    advice = "The file is broken or not completely downloaded: download it again."
    try:
        contents = read_small_file(path, MAX_VOCABULARY_BYTES)
    except OSError as error:
        raise ValueError(f"{path}: cannot read the vocabulary ({error.strerror}).") from error
    if contents.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the vocabulary itself: run `git lfs pull` in its folder.")

    ranks: dict[bytes, int] = {}
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(contents.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = b64decode(encoded, validate=True), int(rank_text)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected `base64(token) rank`, got {line[:60]!r}. {advice}"
            ) from error
        if not 0 <= rank < 2**31:
            raise ValueError(f"{path}, line {number}: the rank {rank} is out of range. {advice}")
        if token in ranks:
            raise ValueError(f"{path}, line {number}: the token {token!r} has rank {ranks[token]} already. {advice}")
        if rank in tokens:
            raise ValueError(f"{path}, line {number}: rank {rank} belongs to {tokens[rank]!r} already. {advice}")
        ranks[token] = rank
        tokens[rank] = token
    if not ranks:
        raise ValueError(f"{path} is empty. {advice}")
    return ranks


def _check_single_bytes(ranks: dict[bytes, int], path: str | os.PathLike) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the 256 single bytes, the first is 0x{missing[0]:02x}. Texts with that "
            "byte could not be encoded. The file is incomplete or of another kind: download it again."
        )


def _is_error_handler(value: object) -> bool:
    try:
        return isinstance(value, str) and callable(codecs.lookup_error(value))
    except LookupError:
        return False


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a setting of tokenizer_config.json, read from `path`, would fail where it is used."""
    for name, is_valid, description in (
        ("errors", _is_error_handler, "the name of an error handler, for example replace"),
        ("model_max_length", lambda value: value is None or (type(value) in (int, float) and value > 0), "above 0"),
        ("chat_template", lambda value: value is None or isinstance(value, (str, list, dict)), "a text"),
        ("added_tokens_decoder", lambda value: isinstance(value, dict), "an object"),
        ("model_input_names", lambda value: isinstance(value, list), "a list of names"),
        ("clean_up_tokenization_spaces", lambda value: value is None or isinstance(value, bool), "true or false"),
        ("split_special_tokens", lambda value: value is None or isinstance(value, bool), "true or false"),
    ):
        if name in settings and not is_valid(settings[name]):
            raise ValueError(f"{path}: {name} must be {description}, not {str(settings[name])[:60]!r}. Correct it.")


def _chat_format(generation_config_file: str | os.PathLike | None) -> object:
    """`chat_format` in a generation_config.json; None if it has none or cannot be read, since texts encode without."""
    if generation_config_file is None:
        return None
    try:
        return read_json_object(generation_config_file).get("chat_format")
    except (OSError, ValueError):
        return None


def _normalize(text: str) -> str:
    """NFC in linear time, without surrogates, as tiktoken encodes it.

    `unicodedata` sorts combining marks by insertion (10 s for 40,000 unordered ones).
    """
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", LONG_MARKS.sub(_order_marks, text))
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _spans(text: str) -> list[tuple[int, int]]:
    """For each character of the normalised text, the start and end of the characters of the text that it is made of."""
    spans = []
    start = 0
    for piece in _normalized_apart(text):
        normalized, end = _normalize(piece), start + len(piece)
        if normalized == piece:
            spans += [(index, index + 1) for index in range(start, end)]
        else:
            spans += [(start, end)] * len(normalized)
        start = end
    return spans


def _normalized_apart(text: str) -> Iterator[str]:
    """Split a text into the shortest pieces whose normal forms make up that of the text."""
    start = 0
    for index, character in enumerate(text):
        if character.isascii() or not unicodedata.combining(unicodedata.normalize("NFD", character)[0]):
            piece = text[start:index]
            joined = piece + character
            normalized = _normalize(joined)
            if piece and (normalized == joined or normalized == _normalize(piece) + _normalize(character)):
                yield piece
                start = index
    yield text[start:]


def _order_marks(run: re.Match[str]) -> str:
    decomposed = "".join(unicodedata.normalize("NFD", character) for character in run.group())
    groups = itertools.groupby(decomposed, key=lambda character: unicodedata.combining(character) > 0)
    return "".join(mark for _, group in groups for mark in sorted(group, key=unicodedata.combining))
