#!/usr/bin/env python
"""`model.chat` on top of vLLM, on one or several GPUs.

    python examples/vllm_wrapper.py -c Qwen/Qwen-7B-Chat
    python examples/vllm_wrapper.py -c Qwen/Qwen-72B-Chat --tensor-parallel-size 4

    model = vLLMWrapper("Qwen/Qwen-7B-Chat", tensor_parallel_size=1)
    response, history = model.chat(query="你好", history=None)

Prompts and replies are encoded and decoded here: vLLM sees token ids only, so that no text in a message becomes a
control token. vLLM reads the checkpoint as it is, with the plugin of this package (qwen.integrations.vllm), which needs
no import: vLLM finds it where the package is installed. docs/deployment.md explains how to serve a model.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

try:
    from qwen_cli.arguments import add_checkpoint_argument, add_hub_argument, add_seed_argument, make_parser
    from qwen_cli.console import explain_errors, quiet_imports

    quiet_imports()  # before transformers is imported

    from qwen import Checkpoint
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

from qwen.export.source import open_checkpoint
from qwen.model.chat_qwen import check_stop_words, detokenize_stream
from qwen.model.qwen_generation_utils import (
    DEFAULT_SYSTEM,
    MAX_WINDOW_SIZE,
    Message,
    PastTurn,
    chat_turns,
    decode_tokens,
    encode_turns,
    extend_history,
    get_stop_words_ids,
    strips_reply,
)
from qwen.quiet import quiet_loading

# Settings of `generate` → their names in vLLM.
VLLM_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")


class Prompt(NamedTuple):
    """Token ids of a prompt, and whether the reply is stripped at its beginning."""

    ids: list[int]
    strips_reply: bool


class vLLMWrapper:
    """A chat model on vLLM with the methods of `QWenLMHeadModel`. Not thread-safe.

    Args:
        path: a chat checkpoint (float or GPTQ) as a folder or hub id. None is the bundled toy.
        tensor_parallel_size: number of GPUs that each matrix is split over.
        hub: hub to download from, "huggingface" or "modelscope" (default: $QWEN_HUB or "huggingface").
        engine_arguments: for vLLM's EngineArgs: gpu_memory_utilization, dtype, pipeline_parallel_size, max_model_len,
            kv_cache_dtype, ...

    Attributes:
        folder: folder of the checkpoint.
        tokenizer: the checkpoint's QWenTokenizer.
        max_model_len: maximum number of tokens of a prompt and its reply together.

    Raises:
        ImportError: vLLM is not installed, or cannot find the plugin.
        CheckpointError: the checkpoint is missing or incomplete, not a chat model, or of another architecture.
        ValueError: the engine rejects its arguments.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        tensor_parallel_size: int = 1,
        *,
        hub: str | None = None,
        **engine_arguments: Any,
    ):
        check_vllm()
        with quiet_loading(progress=path is not None):
            Checkpoint.open(path, hub=hub).require_chat()  # before the weights are downloaded
            source, self.tokenizer = open_checkpoint(path, hub)
        self.folder, self._generation = source.folder, source.generation_settings
        self._engine = start_engine(self.folder, tensor_parallel_size=tensor_parallel_size, **engine_arguments)
        self.max_model_len = self._engine.model_config.max_model_len
        self._request_ids = itertools.count()
        self._queues: dict[str, deque[int | None]] = {}  # unread tokens by request, None marks the end

    def chat(
        self,
        query: str | Sequence[Message],
        history: Sequence[PastTurn] | Sequence[Message] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        **settings: Any,
    ) -> tuple[str, list[PastTurn] | list[Message]]:
        """Answer one query.

        Args:
            query: the user's message, or a list of messages in any order, as in `model.chat`.
            history: earlier turns as (query, response) pairs or messages; not modified. The oldest ones are dropped if
                they exceed the checkpoint's window or the engine's limit.
            system: the system prompt.
            stop_words_ids: additional token sequences that end the reply; the reply includes the matched one.
            settings: override the checkpoint's: do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
                max_new_tokens, min_new_tokens; also seed.

        Returns:
            The response and a new history that ends with this turn.

        Raises:
            ValueError: an empty query, a history of the wrong shape, a prompt longer than the engine's limit, or an
                unknown or invalid setting.
        """
        (response,), (history,) = self.chat_batch([query], [history], system, stop_words_ids, **settings)
        return response, history

    def chat_batch(
        self,
        queries: Sequence[str | Sequence[Message]],
        histories: Sequence[Sequence[PastTurn] | Sequence[Message] | None] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        **settings: Any,
    ) -> tuple[list[str], list[list[PastTurn] | list[Message]]]:
        """Answer several queries in one batch, each as `chat` would.

        Args:
            histories: one per query; None is an empty history.

        Returns:
            The responses and the new histories, in the order of the queries.

        Raises:
            ValueError: as in `chat`, or lists of different lengths.
        """
        histories = [None] * len(queries) if histories is None else histories
        if isinstance(queries, str) or len(queries) != len(histories):
            raise ValueError("chat_batch takes a list of queries and as many histories. For a single query, call chat.")
        parameters, stop_words = self._sampling_params(settings, stop_words_ids)
        prompts = [
            self._encode_prompt(query, history, system, parameters.max_tokens)
            for query, history in zip(queries, histories, strict=True)
        ]
        requests: list[str] = []
        try:
            for prompt in prompts:
                request = self._add_request(prompt.ids, parameters)
                requests.append(request)  # recorded at once: it is aborted if the next one fails
            replies = [list(self._generate_tokens(request, stop_words)) for request in requests]
        finally:
            self._abort(requests)
        responses = [
            decode_tokens(reply, self.tokenizer, lstrip=prompt.strips_reply)
            for reply, prompt in zip(replies, prompts, strict=True)
        ]
        return responses, [
            extend_history(history, query, response)
            for history, query, response in zip(histories, queries, responses, strict=True)
        ]

    def chat_stream(
        self,
        query: str | Sequence[Message],
        history: Sequence[PastTurn] | Sequence[Message] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Answer one query and yield the whole reply so far each time it grows.

        Several streams may be open at a time. Closing or dropping the iterator aborts the request.

        Raises:
            ValueError: as in `chat`, raised by the call and not by the first `next`.
        """
        parameters, stop_words = self._sampling_params(settings, stop_words_ids)
        return self._stream(self._encode_prompt(query, history, system, parameters.max_tokens), parameters, stop_words)

    def _stream(self, prompt: Prompt, parameters: Any, stop_words: list[list[int]]) -> Iterator[str]:
        request = self._add_request(prompt.ids, parameters)
        try:
            tokens = self._generate_tokens(request, stop_words)
            yield from detokenize_stream(tokens, self.tokenizer, prompt.strips_reply)
        finally:
            self._abort([request])

    def _encode_prompt(self, query: Any, history: Any, system: str, max_new_tokens: int | None) -> Prompt:
        if isinstance(query, str) and not query.strip():
            raise ValueError(f"The query must not be empty, but is {query!r}.")
        turns, reply_start = chat_turns(query, history, system)
        _, shortest = encode_turns(self.tokenizer, turns, 0, reply_start)
        if len(shortest) >= self.max_model_len:
            raise ValueError(
                f"The prompt has {len(shortest)} tokens, but the engine takes fewer than {self.max_model_len}. "
                "Shorten it, or pass a larger max_model_len=…, if you set one."
            )
        # The engine stops at its limit, where `model.chat` would go on: drop old turns to leave room for the reply.
        reply = self.max_model_len if max_new_tokens is None else max_new_tokens
        window = self._generation.get("max_window_size") or MAX_WINDOW_SIZE
        window = min(window, self.max_model_len - len(shortest) - min(reply, self.max_model_len // 4))
        return Prompt(encode_turns(self.tokenizer, turns, window, reply_start)[1], strips_reply(reply_start))

    def _sampling_params(self, settings: dict[str, Any], stop_words_ids: Any) -> tuple[Any, list[list[int]]]:
        """Return vLLM's sampling parameters, and the multi-token stop words, which vLLM does not support."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        supported = {*VLLM_NAMES, "do_sample"}
        if unknown := sorted(settings.keys() - supported - {"seed"}):
            raise ValueError(f"Unknown setting {unknown[0]}. Use {', '.join(sorted(supported))} or seed.")
        settings = {name: self._generation.get(name) for name in supported} | settings
        if not settings["do_sample"]:
            settings |= dict.fromkeys(SAMPLING_ONLY) | {"temperature": 0}
        chosen = {VLLM_NAMES.get(name, name): value for name, value in settings.items() if value is not None}
        chosen.pop("do_sample", None)
        if stop_words_ids is None:
            stop_words_ids = self._generation.get("stop_words_ids") or []
        check_stop_words(stop_words_ids)
        stop_words_ids = [*stop_words_ids, *get_stop_words_ids("chatml", self.tokenizer), [self.tokenizer.eod_id]]
        try:
            parameters = SamplingParams(
                **{"max_tokens": None} | chosen,
                stop_token_ids=[words[0] for words in stop_words_ids if len(words) == 1],
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
        except Exception as error:  # vLLM raises its own exception classes
            raise ValueError(f"vLLM rejected the settings: {error}") from error
        return parameters, [words for words in stop_words_ids if len(words) > 1]

    def _add_request(self, prompt: list[int], parameters: Any) -> str:
        request = str(next(self._request_ids))
        self._engine.add_request(request, {"prompt_token_ids": prompt}, parameters)
        self._queues[request] = deque()
        return request

    def _generate_tokens(self, request: str, stop_words: list[list[int]]) -> Iterator[int]:
        """Yield the tokens of a reply, up to a stop word."""
        queue, reply = self._queues[request], []
        while True:
            while not queue:
                self._step()
            token = queue.popleft()
            if token is None:
                return
            reply.append(token)
            yield token
            if any(reply[-len(words) :] == words for words in stop_words):
                return

    def _step(self) -> None:
        """Run one engine step and queue the new tokens of all requests."""
        for output in self._engine.step():
            if (queue := self._queues.get(output.request_id)) is not None:
                queue.extend(output.outputs[0].token_ids)
                if output.finished:
                    queue.append(None)

    def _abort(self, requests: Iterable[str]) -> None:
        """Abort requests and drop their unread tokens."""
        for request in requests:
            del self._queues[request]
            with contextlib.suppress(Exception):  # the engine may be dead, or stopped by Ctrl-C
                self._engine.abort_request([request])  # no-op for a finished request


def check_vllm() -> None:
    """Raise ImportError if vLLM or the plugin is missing, before anything is downloaded."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vLLM is not installed: `pip install vllm`.")
    if not entry_points(group="vllm.general_plugins", name="qwen"):
        raise ImportError("vLLM cannot find the plugin of this package. In the repository folder: `pip install -e .`.")


def start_engine(folder: Path, **engine_arguments: Any) -> Any:
    """Start vLLM's engine for a checkpoint.

    Raises:
        ValueError: the engine does not start; vLLM's log has the details.
    """
    from vllm import EngineArgs, LLMEngine

    # vLLM receives token ids only.
    arguments = {"model": str(folder), "skip_tokenizer_init": True, "disable_log_stats": True} | engine_arguments
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"vLLM failed to start: {error}") from error


def chat_loop(model: vLLMWrapper, system: str, settings: dict[str, Any]) -> None:
    """Answer standard input line by line."""
    history: list[PastTurn] = []
    while True:
        try:
            query = input("User> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not query:
            continue
        shown = reply = ""
        try:
            for reply in model.chat_stream(query, history, system, **settings):
                print(reply.removeprefix(shown), end="", flush=True)
                shown = reply
            print(flush=True)
            history = [*history, (query, reply)]
        except ValueError as error:
            print(error, file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = make_parser("Chat with a first-generation Qwen model on vLLM. Ctrl-D or Ctrl-C exits.", None)
    add_checkpoint_argument(parser, "the bundled toy")
    add_hub_argument(parser)
    parser.add_argument("--system", metavar="TEXT", default=DEFAULT_SYSTEM, help="system prompt (default: %(default)r)")
    add_seed_argument(parser)
    engine = parser.add_argument_group("vLLM options (defaults: vLLM's)")
    for name, kind in (
        ("tensor-parallel-size", int),
        ("pipeline-parallel-size", int),
        ("gpu-memory-utilization", float),
        ("max-model-len", int),
        ("dtype", str),
    ):
        engine.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, metavar="X")
    return parser.parse_args()


def main() -> int:
    """Return the exit status: 0, 1 if the conversation could not start, 130 after Ctrl-C."""
    arguments = vars(parse_args())
    name, system, seed = arguments.pop("checkpoint_path"), arguments.pop("system"), arguments.pop("seed")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with explain_errors(errors=(ImportError, OSError, ValueError)) as result:
        chat_loop(vLLMWrapper(name, **arguments), system, {"seed": seed})
    return result.status


if __name__ == "__main__":
    sys.exit(main())
