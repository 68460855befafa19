"""Chat methods of the language model: `chat`, `chat_batch` and `chat_stream`; where a chat model's `generate` ends.

`ChatMixin` builds prompts with `qwen_generation_utils` and runs them through the model's `generate`. A streamed reply
is generated in a background thread, which passes its tokens through a queue and is kept for later replies.
"""

from __future__ import annotations

import atexit
import codecs
import copy
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast, overload

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
    Message,
    PastTurn,
    StopWordsLogitsProcessor,
    chat_turns,
    decode_tokens,
    encode_turns,
    extend_history,
    get_stop_words_ids,
    strips_reply,
)

GenerateKwargs: TypeAlias = dict[str, Any]  # of `generate`: what it passes on depends on the class of the model

CONTROL_ROWS = 512
"""An upper bound for the embedding rows from `<|endoftext|>` on: the control tokens and some unused rows."""

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.generation.utils import GenerateOutput

    class MixinBase(PreTrainedModel):
        """What the mixin expects of the class that it is mixed into."""

        generation_config: GenerationConfig
        generate: Callable[..., GenerateOutput | torch.LongTensor]
else:
    MixinBase = object


class ChatMixin(MixinBase):
    """Adds `chat`, `chat_stream` and `chat_batch` to a language model, and `stop_words_ids` to its `generate`."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args: Any,
        stop_words_ids: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | torch.LongTensor:
        """transformers' `generate` with the additional argument `stop_words_ids`.

        A chat model also ends at `<|im_end|>` and `<|im_start|>`, as `chat` does, unless the caller names
        `eos_token_id`; see `end_token_ids`.

        Left-padded batches need no attention mask: if none is given, it is derived from the pad token, even if that
        is also the eos token, as in the published generation configs.

        Args:
            stop_words_ids: token sequences; once a row ends with one of them, its next token is forced to be eos.
                Default: that of the generation config.

        Raises:
            ValueError: `stop_words_ids` has the wrong shape, or no eos token is set.
        """
        if stop_words_ids is None:
            stop_words_ids = self._generation_setting("stop_words_ids", generation_config)
        if stop_words_ids:
            check_stop_words(stop_words_ids)
            eos = kwargs.get("eos_token_id")
            eos = self._generation_setting("eos_token_id", generation_config) if eos is None else eos
            eos = eos[0] if isinstance(eos, Sequence) and eos else eos
            if eos is None:
                raise ValueError("stop_words_ids needs an eos token to end a row, but none is set: pass eos_token_id=…")
            logits_processor = LogitsProcessorList(logits_processor or [])
            logits_processor.append(StopWordsLogitsProcessor(stop_words_ids, int(eos)))
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and len(ids) > 1 and kwargs.get("attention_mask") is None:
            settings = kwargs.get("pad_token_id"), self._generation_setting("pad_token_id", generation_config)
            pad_token_ids = {*settings, self.config.pad_token_id} - {None}
            kwargs["attention_mask"] = left_padding_mask(ids, pad_token_ids)
        if generation_config is not None:
            generation_config = self.with_end_tokens(generation_config)
        elif "eos_token_id" not in kwargs:  # None disables it
            kwargs["eos_token_id"] = self.end_token_ids()
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def end_token_ids(self, generation_config: GenerationConfig | None = None) -> int | list[int] | None:
        """Return the ids that end generation: the eos token, and for a chat model the tokens that end a turn.

        A generation config with an eos token other than the model's own names all ends.
        """
        own = self.generation_config.eos_token_id
        eos = self._generation_setting("eos_token_id", generation_config)
        if eos != own or self._generation_setting("chat_format", generation_config) != "chatml":
            return eos
        return add_turn_ends(own, self.generation_config.pad_token_id, self.config.vocab_size)

    def with_end_tokens(self, generation_config: GenerationConfig) -> GenerationConfig:
        """Return a copy of a generation config with the ids of `end_token_ids`."""
        generation_config = copy.deepcopy(generation_config)
        generation_config.eos_token_id = self.end_token_ids(generation_config)
        return generation_config

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; adapters, with which peft and transformers set `peft_config`, make a base model a chat model.

        They are trained on conversations. The model remains a chat model when they are merged.
        """
        super().__setattr__(name, value)
        if name == "peft_config":
            self.generation_config = chat_generation_config(self.generation_config)

    @overload
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: object,
    ) -> tuple[str, History]: ...

    @overload
    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str | Sequence[Message],
        history: Sequence[PastTurn] | Sequence[Message] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: object,
    ) -> tuple[str, list[PastTurn] | list[Message]]: ...

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str | Sequence[Message],
        history: Sequence[PastTurn] | Sequence[Message] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: object,
    ) -> tuple[str, list[PastTurn] | list[Message]] | tuple[str, History]:
        """Answer one query.

        Args:
            query: the user's message, or a list of messages in any order, as in `apply_chat_template`:
                `{"role": "system" | "user" | "assistant", "content": …}`. If the last one is the assistant's, the
                reply continues it.
            history: earlier turns as (query, response) pairs, None in place of a message that was not sent, or as
                messages; not modified.
            system: system message; the default is omitted if the messages start with one of their own.
            stop_words_ids: additional token sequences that end the reply, such as [tokenizer.encode("Observation:")];
                the reply includes the one that ended it.
            generation_config: replaces the model's own.
            kwargs: further arguments of `generate`.

        Returns:
            The response, and a new history that ends with this turn: pairs, or messages if messages were given.

        Raises:
            ValueError: the model is a base model, the query is empty, the history has the wrong shape, the prompt is
                longer than the model's limit, or `stream` is passed.
        """
        (response,), (history,) = self.chat_batch(
            tokenizer, [query], [history], system, stop_words_ids, generation_config, **kwargs
        )
        return response, history

    def chat_batch(
        self,
        tokenizer: PreTrainedTokenizerBase,
        queries: Sequence[str | Sequence[Message]],
        histories: Sequence[Sequence[PastTurn] | Sequence[Message] | None] | None = None,
        system: str | Sequence[str] = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: object,
    ) -> tuple[list[str], list[list[PastTurn] | list[Message]]]:
        """Answer several queries in one `generate` call, each as `chat` would answer it alone.

        Args:
            queries: one per conversation, each as in `chat`.
            histories: one per query, each as in `chat`.
            system: one for all queries, or one per query.

        Returns:
            The responses and the new histories, in the order of the queries.

        Raises:
            ValueError: as for `chat`, or the lists differ in length.
        """
        if isinstance(queries, str) or any(isinstance(query, dict) for query in queries):
            raise ValueError("chat_batch takes a list of queries; chat takes one.")
        histories = [None] * len(queries) if histories is None else histories
        systems = system if isinstance(system, list | tuple) else [system] * len(queries)
        if not queries or not len(queries) == len(histories) == len(systems):
            raise ValueError(
                "chat_batch needs at least one query, and as many histories and system messages as queries, not "
                f"{len(queries)} queries, {len(histories)} histories and {len(systems)} system messages."
            )
        generate_kwargs = self._chat_generate_kwargs(tokenizer, stop_words_ids, generation_config, kwargs)
        encoded = [
            self._chat_prompt(tokenizer, *turn, generation_config)
            for turn in zip(queries, histories, systems, strict=True)
        ]
        prompts = [ids for ids, _ in encoded]
        length = max(len(ids) for ids in prompts)
        # Pad with a token that every prompt contains, so that a repetition penalty sees no additional token.
        padding = [length - len(ids) for ids in prompts]
        rows = [[tokenizer.im_start_id] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (length - pad) for pad in padding]
        output = self.generate(
            torch.tensor(rows, device=self.device),
            attention_mask=torch.tensor(mask, device=self.device),
            **generate_kwargs,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if len(sequences) != len(rows):
            raise ValueError("chat returns one reply per query: leave num_return_sequences at 1, or call generate.")
        responses = [
            cast(str, decode_tokens(row, tokenizer, context_length=length, lstrip=lstrip))
            for row, (_, lstrip) in zip(sequences, encoded, strict=True)
        ]
        return responses, [
            extend_history(history, query, response)
            for history, query, response in zip(histories, queries, responses, strict=True)
        ]

    def chat_stream(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str | Sequence[Message],
        history: Sequence[PastTurn] | Sequence[Message] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: object,
    ) -> Iterator[str]:
        """Answer one query as a stream: yield the whole reply so far each time it grows.

        The last text equals the response of `chat` if the same tokens are chosen. A character appears once all of its
        bytes are generated. Closing or dropping the iterator stops generation at the next token.

        Raises:
            ValueError: as for `chat`; raised by the call, not by the first iteration.
        """
        generate_kwargs = self._chat_generate_kwargs(tokenizer, stop_words_ids, generation_config, kwargs)
        if (generate_kwargs["generation_config"].num_beams or 1) > 1 or "streamer" in generate_kwargs:
            raise ValueError("chat_stream has its own streamer and generates one row: omit streamer and num_beams.")
        ids, lstrip = self._chat_prompt(tokenizer, query, history, system, generation_config)
        return self._stream(tokenizer, ids, generate_kwargs, lstrip)

    def _stream(
        self, tokenizer: PreTrainedTokenizerBase, ids: list[int], generate_kwargs: GenerateKwargs, lstrip: bool
    ) -> Iterator[str]:
        tokens = TokenQueue()
        criteria = StoppingCriteriaList(
            [*(generate_kwargs.pop("stopping_criteria", None) or []), CancellationCriteria(tokens)]
        )
        prompt = torch.tensor([ids], device=self.device)

        def run_generate() -> None:
            try:
                self.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=tokens,
                    stopping_criteria=criteria,
                    **generate_kwargs,
                )
            except BaseException as error:  # raised again in the thread that reads the stream
                tokens.queue.put(error)
            finally:
                tokens.queue.put(None)

        worker = StreamWorker.take()
        finished = worker.run_soon(run_generate)

        def stop() -> None:
            tokens.cancelled.set()
            # The garbage collector may close a dropped stream in the worker; a forked process does not have the worker.
            if worker.is_alive() and worker is not threading.current_thread():
                finished.wait()

        atexit.register(stop)  # an interpreter that exits while the thread computes aborts
        try:
            yield from detokenize_stream(tokens, tokenizer, lstrip)
        finally:
            atexit.unregister(stop)
            stop()

    def _generation_setting(self, name: str, generation_config: GenerationConfig | None) -> Any:
        """Return a field of the given generation config, or of the model's own if it is None there."""
        value = getattr(generation_config, name, None)
        return getattr(self.generation_config, name, None) if value is None else value

    def _chat_generate_kwargs(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words_ids: list[list[int]] | None,
        generation_config: GenerationConfig | None,
        kwargs: dict[str, object],
    ) -> GenerateKwargs:
        """Return the arguments of `generate` for a chat, including the stop tokens."""
        if "stream" in kwargs:
            raise ValueError("chat has no argument `stream`: call chat_stream, which yields the reply as it grows.")
        chat_format = self._generation_setting("chat_format", generation_config)
        if chat_format != "chatml":
            raise ValueError(f"This checkpoint is not a chat model: {explain_format(chat_format)}")
        if stop_words_ids is None:
            stop_words_ids = self._generation_setting("stop_words_ids", generation_config) or []
        check_stop_words(stop_words_ids)
        stop_words_ids = [*stop_words_ids, *get_stop_words_ids(chat_format, tokenizer)]
        # Stop words of one token are passed as eos tokens; longer ones need the logits processor.
        stop_token_ids = [words[0] for words in stop_words_ids if len(words) == 1]
        eos = cast("int | Sequence[int] | None", kwargs.pop("eos_token_id", None))
        eos = self._generation_setting("eos_token_id", generation_config) if eos is None else eos
        eos = [tokenizer.eod_id] if eos is None else [eos] if isinstance(eos, int) else [*eos]
        pad = kwargs.pop("pad_token_id", None)
        pad = self._generation_setting("pad_token_id", generation_config) if pad is None else pad
        config = copy.deepcopy(generation_config or self.generation_config)
        if kwargs.get("do_sample", config.do_sample) is False:
            # transformers warns about settings without effect, and replaces unset ones with the model's own
            kwargs = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | kwargs
        generate_kwargs = config.update(
            **kwargs,
            eos_token_id=list(dict.fromkeys([*eos, *stop_token_ids])),
            pad_token_id=tokenizer.eod_id if pad is None else pad,
        )
        longer = [words for words in stop_words_ids if len(words) != 1]
        if config.stop_strings:
            generate_kwargs["tokenizer"] = tokenizer
        return generate_kwargs | {"generation_config": config, "stop_words_ids": longer}

    def _chat_prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str | Sequence[Message],
        history: Sequence[PastTurn] | Sequence[Message] | None,
        system: str,
        generation_config: GenerationConfig | None,
    ) -> tuple[list[int], bool]:
        """Return the ids of the prompt, and whether to strip the reply at its beginning."""
        if isinstance(query, str) and not query.strip():
            raise ValueError(f"The query must be text and not empty, not {query!r}.")
        window = self._generation_setting("max_window_size", generation_config)
        turns, reply_start = chat_turns(query, history, system)
        _, ids = encode_turns(tokenizer, turns, window, reply_start)
        limit = self.config.max_context_length
        if len(ids) >= limit:
            raise ValueError(
                f"The prompt has {len(ids)} tokens and the model takes fewer than {limit}: shorten the query or the "
                "system message, or load with max_position_embeddings=… for more at your own risk."
            )
        if (highest := max(ids)) >= self.config.vocab_size:
            raise ValueError(
                f"The prompt has the token id {highest}, and the model {self.config.vocab_size} ids: the tokenizer is "
                "of another model. Load the one of this model."
            )
        return ids, strips_reply(reply_start)


def explain_format(chat_format: object) -> str:
    """Return why a checkpoint with this `chat_format` is not a chat model, and what to do."""
    if chat_format is None:
        return (
            "generation_config.json is missing or has no chat_format. If this is a chat model, put the file of its "
            "model page next to the weights; if it was trained on conversations, write "
            '"chat_format": "chatml" into it. Otherwise complete text with generate.'
        )
    return (
        f'its generation_config.json says "chat_format": "{chat_format}", not "chatml", so it completes text '
        "(generate). Use a chat checkpoint such as Qwen/Qwen-7B-Chat. If it was trained on conversations, set "
        '"chat_format": "chatml" in that file.'
    )


def set_chat_format(settings: dict[str, object]) -> None:
    """Turn the fields of a base model's generation config into a chat model's, in place."""
    if settings.get("chat_format") != "chatml":
        settings["chat_format"] = "chatml"
        settings.pop("stop_words_ids", None)  # those of a base model


def chat_generation_config(config: GenerationConfig) -> GenerationConfig:
    """Return a generation config as a chat model's, which a base model trained on conversations becomes."""
    config = copy.deepcopy(config)
    set_chat_format(vars(config))
    return config


def add_turn_ends(
    eos_token_id: int | list[int] | None, pad_token_id: int | None, vocab_size: int
) -> int | list[int] | None:
    """Add the ids of `<|im_start|>` and `<|im_end|>` to the eos tokens of a chat model's generation config.

    They are the two ids after that of `<|endoftext|>`, the first control token, which is the published eos and pad
    token. One of the two may have been replaced by another control token, or the eos token by a list: `<|endoftext|>`
    is the first control token that is left. If the eos tokens were all replaced by regular tokens, these are kept as
    the only ends.
    """
    if eos_token_id is None:
        return None
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    ids = {*eos, *([] if pad_token_id is None else [pad_token_id])}
    control = {token for token in ids if max(ids) - token < CONTROL_ROWS}
    end = min(control, default=-1)
    if control.isdisjoint(eos) or not 0 <= end < vocab_size - 2:
        return eos_token_id
    return list(dict.fromkeys([*eos, end + 1, end + 2]))


def left_padding_mask(ids: torch.Tensor, pad_token_ids: Collection[int]) -> torch.Tensor:
    """Attention mask of left-padded rows: 0 for leading pad tokens, 1 elsewhere. ids: (B, S) → (B, S)."""
    is_token = ~torch.isin(ids, torch.tensor(sorted(pad_token_ids), dtype=ids.dtype, device=ids.device))
    return is_token.long().cummax(dim=-1).values


class StreamWorker(threading.Thread):
    """A thread that generates streamed replies, one at a time.

    It is kept for the next one: PyTorch gives each thread that computes a team of its own, and captures the CUDA graphs
    of compiled models for each thread.
    """

    idle: ClassVar[list[StreamWorker]] = []

    def __init__(self):
        super().__init__(name="chat_stream", daemon=True)
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self.start()

    @classmethod
    def take(cls) -> StreamWorker:
        """Return an idle worker, or a new one, so that concurrent streams do not wait for each other."""
        while True:
            try:
                worker = cls.idle.pop()  # atomic
            except IndexError:
                return cls()
            if worker.is_alive():  # not so in a process that was forked since
                return worker

    def run_soon(self, task: Callable[[], None]) -> threading.Event:
        """Run a function in this thread; return an event that is set when it has ended and the thread is idle again."""
        finished = threading.Event()
        self._tasks.put((task, finished))
        return finished

    def run(self) -> None:
        """Called by `start`."""
        while True:
            task, finished = self._tasks.get()
            task()
            del task  # it holds the model
            self.idle.append(self)
            finished.set()
            del finished


class TokenQueue(BaseStreamer):
    """Passes the new tokens of one row from the generating thread to the reading one."""

    def __init__(self):
        self.queue: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each token."""
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.prompt_seen = True

    def end(self) -> None:
        pass  # the thread puts the end marker itself, so that an error ends the stream too

    def __iter__(self) -> Iterator[int]:
        while (item := self.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class CancellationCriteria(StoppingCriteria):
    """Stops generation after the reader has closed the stream."""

    def __init__(self, tokens: TokenQueue):
        self.tokens = tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        stop = torch.full((len(input_ids),), self.tokens.cancelled.is_set(), device=input_ids.device)
        return cast(torch.BoolTensor, stop)


def detokenize_stream(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, lstrip: bool = True) -> Iterator[str]:
    """Yield the stripped text of a reply so far each time it grows by whole characters.

    Args:
        lstrip: strip at the beginning too; False for a reply that continues a message.
    """
    strip = str.strip if lstrip else str.rstrip
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    stop_token_ids = {tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id}
    text = yielded = ""
    for token in tokens:
        if token in stop_token_ids:
            break
        piece = cast("bytes | str | None", tokenizer.convert_ids_to_tokens(token))
        if piece is None:  # an embedding row without a token
            continue
        text += decoder.decode(piece) if isinstance(piece, bytes) else decoder.decode(b"", final=True) + piece
        if strip(text) != yielded:
            yielded = strip(text)
            yield yielded
    text += decoder.decode(b"", final=True)
    if strip(text) != yielded:
        yield strip(text)


def check_stop_words(stop_words_ids: object) -> None:
    """Check that `stop_words_ids` is a list of non-empty lists of token ids.

    Raises:
        ValueError: it is not; the message shows an example.
    """
    if not isinstance(stop_words_ids, list | tuple) or not all(
        isinstance(words, list | tuple) and words and all(isinstance(token, int) and token >= 0 for token in words)
        for words in stop_words_ids
    ):
        raise ValueError(
            "stop_words_ids must be a list of lists of token ids such as [tokenizer.encode('Observation:')], "
            f"not {stop_words_ids!r}."
        )
