"""The `chat` methods of the language model: prompt, generation and streaming of replies.

`ChatMixin` builds prompts with `qwen_generation_utils` and runs them through the model's `generate`. A streamed reply
is generated in a thread of its own, and its tokens pass through a queue.
"""

from __future__ import annotations

import atexit
import codecs
import copy
import queue
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .qwen_generation_utils import (
    DEFAULT_SYSTEM,
    History,
    StopWordsLogitsProcessor,
    decode_tokens,
    get_stop_words_ids,
    make_context,
)


class ChatMixin:
    """`chat`, `chat_stream` and `chat_batch` for a language model, and `stop_words_ids` for its `generate`."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        stop_words_ids: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, and it takes `stop_words_ids`.

        Batches padded on the left need no attention mask: where none is given it is read from the pad token, also
        where that is the eos token, as in the published generation configs.

        Args:
            stop_words_ids: token sequences; once a row ends with any of them, its next token is forced to be eos.
                Where it is not given, that of the generation config counts.

        Raises:
            ValueError: `stop_words_ids` of the wrong shape, or no eos token to end the row with.
        """
        if stop_words_ids is None:
            stop_words_ids = self._generation_setting("stop_words_ids", generation_config)
        if stop_words_ids:
            check_stop_words(stop_words_ids)
            eos = kwargs.get("eos_token_id")
            eos = self._generation_setting("eos_token_id", generation_config) if eos is None else eos
            eos = eos[0] if isinstance(eos, Sequence) and eos else eos
            if eos is None:
                raise ValueError("stop_words_ids ends a row with its eos token, and none is set: pass eos_token_id=…")
            logits_processor = LogitsProcessorList(logits_processor or [])
            logits_processor.append(StopWordsLogitsProcessor(stop_words_ids, int(eos)))
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and len(ids) > 1 and kwargs.get("attention_mask") is None:
            settings = kwargs.get("pad_token_id"), self._generation_setting("pad_token_id", generation_config)
            pads = {*settings, self.config.pad_token_id} - {None}
            kwargs["attention_mask"] = mask_of_left_padding(ids, pads)
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer one query.

        Args:
            history: earlier turns, (query, response) each; left as it is.
            system: what the model is told to be.
            stop_words_ids: token sequences that end the reply too, such as [tokenizer.encode("Observation:")]; the
                reply holds the one that ended it.
            generation_config: in place of the model's own.
            kwargs: anything that `generate` takes.

        Returns:
            The response, and a new history that ends with this turn.

        Raises:
            ValueError: a base model, an empty query, a history of the wrong shape, a prompt longer than the model's
                limit, or the argument `stream`.
        """
        (response,), (history,) = self.chat_batch(
            tokenizer, [query], [history], system, stop_words_ids, generation_config, **kwargs
        )
        return response, history

    def chat_batch(
        self,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[str],
        histories: Sequence[Sequence[tuple[str, str]] | None] | None = None,
        system: str | Sequence[str] = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> tuple[list[str], list[History]]:
        """Answer many queries in one `generate`; each as `chat` would answer it alone.

        Args:
            queries: one a conversation.
            histories: one a query, None for an empty one.
            system: one for all, or one a query.

        Returns:
            The responses, and the new histories, in the order of the queries.

        Raises:
            ValueError: as `chat`, or lists of different lengths.
        """
        if isinstance(queries, str):
            raise ValueError("chat_batch takes a list of queries; chat takes one.")
        histories = [None] * len(queries) if histories is None else histories
        systems = system if isinstance(system, list | tuple) else [system] * len(queries)
        if not queries or not len(queries) == len(histories) == len(systems):
            raise ValueError(
                "chat_batch needs at least one query, and as many histories and system messages as queries, not "
                f"{len(queries)} queries, {len(histories)} histories and {len(systems)} system messages."
            )
        arguments = self._chat_arguments(tokenizer, stop_words_ids, generation_config, kwargs)
        prompts = [
            self._chat_prompt(tokenizer, *turn, generation_config)
            for turn in zip(queries, histories, systems, strict=True)
        ]
        length = max(len(ids) for ids in prompts)
        # Padded with a token that every prompt holds anyway, so that a repetition penalty sees no new one.
        padding = [length - len(ids) for ids in prompts]
        rows = [[tokenizer.im_start_id] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (length - pad) for pad in padding]
        output = self.generate(
            torch.tensor(rows, device=self.device), attention_mask=torch.tensor(mask, device=self.device), **arguments
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if len(sequences) != len(rows):
            raise ValueError("chat answers each query once: leave num_return_sequences at 1, or call generate.")
        responses = [decode_tokens(row, tokenizer, context_length=length) for row in sequences]
        turns = zip(queries, responses, strict=True)
        return responses, [[*map(tuple, past or []), turn] for past, turn in zip(histories, turns, strict=True)]

    def chat_stream(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """Answer one query while it is being written: the whole reply so far, each time it has grown.

        The last one equals the response of `chat` under the same choices. A character appears when all of its bytes
        are there. Closing the iterator, or dropping it, ends the computation at the next token.

        Raises:
            ValueError: as `chat`, at the call and not at the first piece.
        """
        arguments = self._chat_arguments(tokenizer, stop_words_ids, generation_config, kwargs)
        if (arguments["generation_config"].num_beams or 1) > 1 or "streamer" in arguments:
            raise ValueError("chat_stream has its own streamer and writes one row: leave out streamer and num_beams.")
        ids = self._chat_prompt(tokenizer, query, history, system, generation_config)
        return self._stream(tokenizer, ids, arguments)

    def _stream(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], arguments: dict[str, Any]) -> Iterator[str]:
        tokens = TokenQueue()
        criteria = StoppingCriteriaList([*(arguments.pop("stopping_criteria", None) or []), Abandoned(tokens)])
        prompt = torch.tensor([ids], device=self.device)

        def work() -> None:
            try:
                self.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=tokens,
                    stopping_criteria=criteria,
                    **arguments,
                )
            except BaseException as error:  # raised again where somebody is waiting for the text
                tokens.queue.put(error)
            finally:
                tokens.queue.put(None)

        worker = threading.Thread(target=work, name="chat_stream", daemon=True)

        def stop() -> None:
            tokens.abandoned.set()
            worker.join()

        worker.start()
        atexit.register(stop)  # an interpreter that exits under a working thread aborts
        try:
            yield from reply_so_far(tokens, tokenizer)
        finally:
            atexit.unregister(stop)
            stop()

    def _generation_setting(self, name: str, generation_config: GenerationConfig | None) -> Any:
        """A field of the given generation config, or of the model's own where that one leaves it open."""
        value = getattr(generation_config, name, None)
        return getattr(self.generation_config, name, None) if value is None else value

    def _chat_arguments(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words_ids: list[list[int]] | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """The arguments of `generate` for a chat, with what ends a reply among them."""
        if "stream" in kwargs:
            raise ValueError("chat has no argument `stream`: call chat_stream, which yields the reply as it grows.")
        chat_format = self._generation_setting("chat_format", generation_config)
        if chat_format != "chatml":
            raise ValueError(
                f'This checkpoint is no chat model: its chat_format is {chat_format!r}, not "chatml". '
                "Use a chat checkpoint such as Qwen/Qwen-7B-Chat, or complete text with generate. If it is a chat "
                "model, its generation_config.json is missing: put it beside the weights."
            )
        if stop_words_ids is None:
            stop_words_ids = self._generation_setting("stop_words_ids", generation_config) or []
        check_stop_words(stop_words_ids)
        stop_words_ids = [*stop_words_ids, *get_stop_words_ids(chat_format, tokenizer)]
        # One-token stop words end the row at once, as an eos does; longer ones are watched for.
        ends = [words[0] for words in stop_words_ids if len(words) == 1]
        eos = kwargs.pop("eos_token_id", None)
        eos = self._generation_setting("eos_token_id", generation_config) if eos is None else eos
        eos = [tokenizer.eod_id] if eos is None else [eos] if isinstance(eos, int) else [*eos]
        pad = kwargs.pop("pad_token_id", None)
        pad = self._generation_setting("pad_token_id", generation_config) if pad is None else pad
        config = copy.deepcopy(generation_config or self.generation_config)
        if kwargs.get("do_sample", config.do_sample) is False:
            # transformers warns of settings without effect, and takes the model's own for those that are not set
            kwargs = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | kwargs
        arguments = config.update(
            **kwargs,
            eos_token_id=list(dict.fromkeys([*eos, *ends])),
            pad_token_id=tokenizer.eod_id if pad is None else pad,
        )
        longer = [words for words in stop_words_ids if len(words) != 1]
        return arguments | {"generation_config": config, "stop_words_ids": longer}

    def _chat_prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None,
        system: str,
        generation_config: GenerationConfig | None,
    ) -> list[int]:
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"The query must be text and not empty, not {query!r}.")
        window = self._generation_setting("max_window_size", generation_config)
        window = {} if window is None else {"max_window_size": window}
        _, ids = make_context(tokenizer, query, history, system, **window)
        limit = self.config.max_context_length
        if len(ids) >= limit:
            raise ValueError(
                f"The prompt has {len(ids)} tokens and the model takes fewer than {limit}: shorten the query or the "
                "system message, or load with max_position_embeddings=… for more at your own risk."
            )
        return ids


def mask_of_left_padding(ids: torch.Tensor, pad_token_ids: Collection[int]) -> torch.Tensor:
    """0 for the pad tokens in front of each row, 1 for all else. ids: (B, S) → (B, S)."""
    is_token = ~torch.isin(ids, torch.tensor(sorted(pad_token_ids), dtype=ids.dtype, device=ids.device))
    return is_token.long().cummax(dim=-1).values


class TokenQueue(BaseStreamer):
    """Carries the new tokens of one row from the thread that generates to the one that reads."""

    def __init__(self):
        self.queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.abandoned = threading.Event()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each token."""
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.prompt_seen = True

    def end(self) -> None:
        pass  # the thread says itself when it is done, so that an error ends the stream too

    def __iter__(self) -> Iterator[int]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class Abandoned(StoppingCriteria):
    """Ends a generation whose reader has gone."""

    def __init__(self, tokens: TokenQueue):
        self.tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.tokens.abandoned.is_set(), device=input_ids.device)


def reply_so_far(tokens: Iterator[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Tokens of a reply → its text so far, trimmed, each time it has grown by whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    ends = {tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id}
    text = shown = ""
    for token in tokens:
        if token in ends:
            break
        if token >= len(tokenizer):  # a row of the matrix without a token
            continue
        piece = tokenizer.convert_ids_to_tokens(token)
        text += decoder.decode(piece) if isinstance(piece, bytes) else decoder.decode(b"", final=True) + piece
        if text.strip() != shown:
            shown = text.strip()
            yield shown
    text += decoder.decode(b"", final=True)
    if text.strip() != shown:
        yield text.strip()


def check_stop_words(stop_words_ids: Any) -> None:
    """Refuse what is not a list of non-empty lists of token ids.

    Raises:
        ValueError: shows the form.
    """
    if not isinstance(stop_words_ids, list | tuple) or not all(
        isinstance(words, list | tuple) and words and all(isinstance(token, int) and token >= 0 for token in words)
        for words in stop_words_ids
    ):
        raise ValueError(
            "stop_words_ids is a list of lists of token ids such as [tokenizer.encode('Observation:')], "
            f"not {stop_words_ids!r}."
        )
