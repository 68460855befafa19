#!/usr/bin/env python
"""`model.chat` on top of vLLM, on one or several GPUs.

    python examples/vllm_wrapper.py -c Qwen/Qwen-7B-Chat
    python examples/vllm_wrapper.py -c Qwen/Qwen-72B-Chat --tensor-parallel-size 4

    model = vLLMWrapper("Qwen/Qwen-7B-Chat", tensor_parallel_size=1)
    response, history = model.chat(query="你好", history=None)

Prompts and replies are encoded and decoded here: vLLM sees token ids only, so that no text in a message becomes a
control token. vLLM supports these models in the Qwen2 format only, so a checkpoint is exported on first use.
docs/deployment.md explains how to serve a model.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    from qwen_cli.arguments import add_checkpoint_argument, add_hub_argument, add_seed_argument
    from qwen_cli.console import explain_errors, quiet_imports

    quiet_imports()  # before transformers is imported

    from qwen import Checkpoint, CheckpointError, QWenTokenizer
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

from filelock import FileLock
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from qwen.checkpoint.files import VOCABULARY, check_vocabulary, read_json
from qwen.export import export_qwen2
from qwen.export.source import open_checkpoint
from qwen.model.chat_qwen import check_stop_words, detokenize_stream
from qwen.model.qwen_generation_utils import (
    DEFAULT_SYSTEM,
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

MAX_WINDOW_SIZE = 6144  # default if the checkpoint sets none, as in encode_turns

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
        path: a chat checkpoint (float or GPTQ) as a folder or hub id, or a folder written by export.py. None is the
            bundled toy.
        tensor_parallel_size: number of GPUs that each matrix is split over.
        max_length: export for prompts of up to this many tokens, beyond the trained length (see export.py).
        hub: hub to download from, "huggingface" or "modelscope" (default: $QWEN_HUB or "huggingface").
        engine_arguments: for vLLM's EngineArgs: gpu_memory_utilization, dtype, pipeline_parallel_size, max_model_len,
            kv_cache_dtype, ...

    Attributes:
        folder: folder of the exported model.
        tokenizer: the checkpoint's QWenTokenizer.
        max_model_len: maximum number of tokens of a prompt and its reply together.

    Raises:
        ImportError: vLLM is not installed.
        CheckpointError: the checkpoint is missing or incomplete, not a chat model, or of another architecture.
        ValueError: the engine rejects its arguments.
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        tensor_parallel_size: int = 1,
        *,
        max_length: int | None = None,
        hub: str | None = None,
        **engine_arguments: Any,
    ):
        check_vllm()
        self.folder, self.tokenizer, self._generation = prepare_model(path, max_length, hub)
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
                "Shorten it, or export for longer prompts with max_length=…"
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
    """Raise ImportError if vLLM is not installed, before anything is exported."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vLLM is not installed: `pip install vllm`.")


def start_engine(folder: Path, **engine_arguments: Any) -> Any:
    """Start vLLM's engine for an exported model.

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


def prepare_model(
    path: str | os.PathLike | None, max_length: int | None, hub: str | None = None
) -> tuple[Path, QWenTokenizer, dict[str, Any]]:
    """Export a checkpoint if necessary. Return its exported folder, tokenizer and generation config.

    Raises:
        CheckpointError: the checkpoint is missing or invalid, or not a chat model.
    """
    if path is not None and is_exported(folder := Path(path).expanduser()):
        if max_length is not None:
            raise CheckpointError(
                f"{folder} is already exported. Set its length when exporting: `export.py --max-length`."
            )
        return load_exported(folder)
    with quiet_loading(progress=path is not None):
        Checkpoint.open(path, hub=hub).require_chat()  # before the weights are downloaded
        source, tokenizer = open_checkpoint(path, hub)
        return export_to_cache(source.name, source.folder, max_length), tokenizer, source.generation_settings


def is_exported(folder: Path) -> bool:
    """Return whether the folder contains a model in the Qwen2 format."""
    config = folder / CONFIG_NAME
    return config.is_file() and read_json(config, folder).get("model_type") == "qwen2"


def load_exported(folder: Path) -> tuple[Path, QWenTokenizer, dict[str, Any]]:
    """Return the values of `prepare_model` for a folder written by export.py."""
    check_vocabulary(folder)
    if not (folder / "chat_template.jinja").is_file():
        raise CheckpointError(f"{folder} is not a chat model of this family. Export a chat checkpoint or pass one.")
    generation = folder / GENERATION_CONFIG_NAME
    tokenizer = QWenTokenizer(str(folder / VOCABULARY))
    return folder, tokenizer, read_json(generation, folder) if generation.is_file() else {}


def export_to_cache(name: str, checkpoint: Path, max_length: int | None) -> Path:
    """Export a checkpoint to the cache, unless it is there already, and return the folder.

    Args:
        name: folder or hub id of the checkpoint, for messages and the folder's name.
        checkpoint: the folder with its files.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen" / "export"
    folder = cache / f"{Path(name).resolve().name}-{cache_key(checkpoint, max_length)}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):  # wait for another process that exports it
        if not is_exported(folder):
            shutil.rmtree(folder, ignore_errors=True)  # left over from a killed process
            print(f"Exporting {name} for vLLM (first use only) to {folder}", file=sys.stderr, flush=True)
            for remark in export_qwen2(checkpoint, folder, max_length=max_length, progress=sys.stderr.isatty()):
                print(remark, file=sys.stderr, flush=True)
    return folder


def cache_key(checkpoint: Path, max_length: int | None) -> str:
    """Hash the path, files and max_length: a different or changed checkpoint has another key."""
    files = sorted(
        path for path in checkpoint.iterdir() if path.suffix in (".json", ".tiktoken", ".safetensors", ".bin")
    )
    file_stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([str(checkpoint.resolve()), file_stats, max_length]).encode()).hexdigest()[:16]


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
    parser = argparse.ArgumentParser(
        description="Chat with a first-generation Qwen model on vLLM. Ctrl-D or Ctrl-C exits."
    )
    add_checkpoint_argument(parser, "the bundled toy; a folder written by export.py also works")
    add_hub_argument(parser)
    parser.add_argument("--system", metavar="TEXT", default=DEFAULT_SYSTEM, help="system prompt (default: %(default)r)")
    add_seed_argument(parser)
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="export for prompts of up to N tokens, beyond the trained length"
    )
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
