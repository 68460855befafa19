#!/usr/bin/env python
"""Chat through vLLM as through `model.chat`, on one GPU or on several.

    python examples/vllm_wrapper.py -c Qwen/Qwen-7B-Chat
    python examples/vllm_wrapper.py -c Qwen/Qwen-72B-Chat --tensor-parallel-size 4

    model = vLLMWrapper("Qwen/Qwen-7B-Chat", tensor_parallel_size=1)
    response, history = model.chat(query="你好", history=None)

Revolves around token ids: the library makes those of the prompt and reads those of the reply, and vLLM sees nothing
else, so that no text in a message becomes a control token. vLLM knows these models in the format of Qwen2 only: a
checkpoint is exported on first use. How the network is computed and shared out among GPUs is vLLM's affair, and how to
serve a model to others is told in docs/deployment.md.
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
from typing import Any

try:
    from qwen_cli.arguments import add_checkpoint_argument, add_hub_argument, add_seed_argument
    from qwen_cli.console import explain_errors, quiet_imports

    quiet_imports()  # before transformers is imported

    from qwen import Checkpoint, CheckpointError, QWenTokenizer
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the folder of the repository: pip install -e .")

from filelock import FileLock
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from qwen.checkpoint.files import VOCABULARY, check_vocabulary, read_json
from qwen.export import export_qwen2
from qwen.export.source import open_source
from qwen.model.qwen_generation_utils import (
    DEFAULT_SYSTEM,
    History,
    check_stop_words,
    decode_tokens,
    get_stop_words_ids,
    make_context,
    reply_so_far,
)
from qwen.quiet import quiet_loading

MAX_WINDOW_SIZE = 6144  # where a checkpoint names none, as in make_context

# Settings of `generate` that vLLM has too, and its names for them.
SETTINGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")


class vLLMWrapper:
    """A chat model that vLLM runs, with the methods of ours. To be used from one thread.

    Args:
        path: a chat checkpoint, float or GPTQ, as a folder or a hub id; or a folder that export.py has written. None is
            the bundled toy.
        tensor_parallel_size: over how many GPUs each matrix is spread.
        max_length: export for prompts of so many tokens, beyond the trained length (see export.py).
        hub: where an id is fetched from, "huggingface" or "modelscope"; None is $QWEN_HUB, or the former.
        engine_arguments: for vLLM's EngineArgs: gpu_memory_utilization, dtype, pipeline_parallel_size, max_model_len,
            kv_cache_dtype, ...

    Attributes:
        folder: where the exported model lies.
        tokenizer: the library's.
        limit: tokens that a prompt and its reply may have together.

    Raises:
        ImportError: vLLM is not installed.
        CheckpointError: the checkpoint is missing or incomplete, no chat model, or of another architecture.
        ValueError: the engine refuses its arguments.
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
        self.folder, self.tokenizer, self._generation = prepared(path, max_length, hub)
        self._engine = start_engine(self.folder, tensor_parallel_size=tensor_parallel_size, **engine_arguments)
        self.limit = self._engine.model_config.max_model_len
        self._numbers = itertools.count()
        self._arrived: dict[str, deque[int | None]] = {}  # the tokens of each reply, None at its end

    def chat(
        self,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        **settings: Any,
    ) -> tuple[str, History]:
        """Answer one query.

        Args:
            history: earlier turns, (query, response) each; left as it is. The newest are kept that the checkpoint's
                window and the engine have room for.
            system: what the model is told to be.
            stop_words_ids: token sequences that end the reply too; the reply holds the one that ended it.
            settings: in place of the checkpoint's: do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
                max_new_tokens, min_new_tokens, and seed.

        Returns:
            The response, and a new history that ends with this turn.

        Raises:
            ValueError: an empty query, a history of the wrong shape, a prompt longer than the engine's limit, or a
                setting that vLLM does not have or refuses.
        """
        (response,), (history,) = self.chat_batch([query], [history], system, stop_words_ids, **settings)
        return response, history

    def chat_batch(
        self,
        queries: Sequence[str],
        histories: Sequence[Sequence[tuple[str, str]] | None] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        **settings: Any,
    ) -> tuple[list[str], list[History]]:
        """Answer many queries at once, each as `chat` would.

        Args:
            histories: one a query, None for an empty one.

        Returns:
            The responses, and the new histories, in the order of the queries.

        Raises:
            ValueError: as `chat`, or lists of different lengths.
        """
        histories = [None] * len(queries) if histories is None else histories
        if isinstance(queries, str) or len(queries) != len(histories):
            raise ValueError("chat_batch takes a list of queries and as many histories; chat takes one of each.")
        parameters, stop_words = self._parameters(settings, stop_words_ids)
        prompts = [
            self._prompt(query, history, system, parameters.max_tokens)
            for query, history in zip(queries, histories, strict=True)
        ]
        requests: list[str] = []
        try:
            for prompt in prompts:
                request = self._submit(prompt, parameters)
                requests.append(request)  # at once: should the next one fail, this one is ended
            replies = [list(self._reply(request, stop_words)) for request in requests]
        finally:
            self._end(requests)
        responses = [decode_tokens(reply, self.tokenizer) for reply in replies]
        turns = zip(queries, responses, strict=True)
        return responses, [[*map(tuple, past or []), turn] for past, turn in zip(histories, turns, strict=True)]

    def chat_stream(
        self,
        query: str,
        history: Sequence[tuple[str, str]] | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Answer one query while it is being written: the whole reply so far, each time it has grown.

        Several may be open at a time. Closing the iterator, or dropping it, ends the computation.

        Raises:
            ValueError: as `chat`, at the call and not at the first piece.
        """
        parameters, stop_words = self._parameters(settings, stop_words_ids)
        return self._stream(self._prompt(query, history, system, parameters.max_tokens), parameters, stop_words)

    def _stream(self, prompt: list[int], parameters: Any, stop_words: list[list[int]]) -> Iterator[str]:
        request = self._submit(prompt, parameters)
        try:
            yield from reply_so_far(self._reply(request, stop_words), self.tokenizer)
        finally:
            self._end([request])

    def _prompt(self, query: Any, history: Any, system: str, max_new_tokens: int | None) -> list[int]:
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"The query must be text and not empty, not {query!r}.")
        _, alone = make_context(self.tokenizer, query, system=system)
        if len(alone) >= self.limit:
            raise ValueError(
                f"The prompt has {len(alone)} tokens and the engine takes fewer than {self.limit}: shorten it, or "
                "export for longer ones with max_length=…"
            )
        # The original reads beyond its trained length, the engine ends there: older turns go to make room for a reply.
        reply = self.limit if max_new_tokens is None else max_new_tokens
        window = self._generation.get("max_window_size") or MAX_WINDOW_SIZE
        window = min(window, self.limit - len(alone) - min(reply, self.limit // 4))
        return make_context(self.tokenizer, query, history, system, window)[1]

    def _parameters(self, settings: dict[str, Any], stop_words_ids: Any) -> tuple[Any, list[list[int]]]:
        """vLLM's parameters for a reply, and the stop words that it does not know: those of several tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        known = {*SETTINGS, "do_sample"}
        if unknown := sorted(settings.keys() - known - {"seed"}):
            raise ValueError(f"There is no setting {unknown[0]} here. There are {', '.join(sorted(known))} and seed.")
        settings = {name: self._generation.get(name) for name in known} | settings
        if not settings["do_sample"]:
            settings |= dict.fromkeys(SAMPLING_ONLY) | {"temperature": 0}
        chosen = {SETTINGS.get(name, name): value for name, value in settings.items() if value is not None}
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
        except Exception as error:  # vLLM has a class of its own for it
            raise ValueError(f"vLLM refuses these settings: {error}") from error
        return parameters, [words for words in stop_words_ids if len(words) > 1]

    def _submit(self, prompt: list[int], parameters: Any) -> str:
        request = str(next(self._numbers))
        self._engine.add_request(request, {"prompt_token_ids": prompt}, parameters)
        self._arrived[request] = deque()
        return request

    def _reply(self, request: str, stop_words: list[list[int]]) -> Iterator[int]:
        """The tokens of a reply as they come."""
        arrived, reply = self._arrived[request], []
        while True:
            while not arrived:
                self._step()
            token = arrived.popleft()
            if token is None:
                return
            reply.append(token)
            yield token
            if any(reply[-len(words) :] == words for words in stop_words):
                return

    def _step(self) -> None:
        """Let all replies that are being written grow, whoever reads them."""
        for output in self._engine.step():
            if (arrived := self._arrived.get(output.request_id)) is not None:
                arrived.extend(output.outputs[0].token_ids)
                if output.finished:
                    arrived.append(None)

    def _end(self, requests: Iterable[str]) -> None:
        """Forget replies, and compute no more of them."""
        for request in requests:
            del self._arrived[request]
            with contextlib.suppress(Exception):  # an engine that has died, or heard Ctrl-C first, has nothing to stop
                self._engine.abort_request([request])  # nothing to one that is done


def check_vllm() -> None:
    """Raise ImportError where there is no vLLM, before anything is exported for it."""
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vLLM is not installed: `pip install vllm`.")


def start_engine(folder: Path, **engine_arguments: Any) -> Any:
    """vLLM's engine for an exported model.

    Raises:
        ValueError: it does not start with these arguments; what vLLM has logged before says more.
    """
    from vllm import EngineArgs, LLMEngine

    # Text is ours: vLLM sees token ids only.
    arguments = {"model": str(folder), "skip_tokenizer_init": True, "disable_log_stats": True} | engine_arguments
    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"vLLM does not start: {error}") from error


def prepared(
    path: str | os.PathLike | None, max_length: int | None, hub: str | None = None
) -> tuple[Path, QWenTokenizer, dict[str, Any]]:
    """An exported model: its folder, and the tokenizer and the generation config of its checkpoint.

    Raises:
        CheckpointError: it is not to be had, or no chat model.
    """
    if path is not None and is_exported(folder := Path(path).expanduser()):
        if max_length is not None:
            raise CheckpointError(
                f"{folder} is exported already: max_length is chosen there, `export.py --max-length`."
            )
        return exported_before(folder)
    with quiet_loading(progress=path is not None):
        Checkpoint.open(path, hub=hub).require_chat()  # before the weights are fetched
        source, tokenizer = open_source(path, hub)
        return exported(source.name, source.folder, max_length), tokenizer, source.generation_settings


def is_exported(folder: Path) -> bool:
    """Whether this folder holds a model in the format of Qwen2."""
    config = folder / CONFIG_NAME
    return config.is_file() and read_json(config, folder).get("model_type") == "qwen2"


def exported_before(folder: Path) -> tuple[Path, QWenTokenizer, dict[str, Any]]:
    """What `prepared` returns, for a folder of export.py's."""
    check_vocabulary(folder)
    if not (folder / "chat_template.jinja").is_file():
        raise CheckpointError(f"{folder} is no chat model of this family. Export a chat checkpoint, or name it here.")
    generation = folder / GENERATION_CONFIG_NAME
    tokenizer = QWenTokenizer(str(folder / VOCABULARY))
    return folder, tokenizer, read_json(generation, folder) if generation.is_file() else {}


def exported(name: str, checkpoint: Path, max_length: int | None) -> Path:
    """The folder in the cache with this checkpoint in the format of Qwen2, made if need be.

    Args:
        name: of the checkpoint, as people know it.
        checkpoint: the folder that its files lie in.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen" / "export"
    folder = cache / f"{Path(name).resolve().name}-{identity(checkpoint, max_length)}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):  # another process may be at it: then wait for it
        if not is_exported(folder):
            shutil.rmtree(folder, ignore_errors=True)  # what a killed process has left
            print(f"Exporting {name} for vLLM, once: to {folder}", file=sys.stderr, flush=True)
            for remark in export_qwen2(checkpoint, folder, max_length=max_length, progress=sys.stderr.isatty()):
                print(remark, file=sys.stderr, flush=True)
    return folder


def identity(checkpoint: Path, max_length: int | None) -> str:
    """Another one for another checkpoint, or if a file of this one has changed."""
    files = sorted(
        path for path in checkpoint.iterdir() if path.suffix in (".json", ".tiktoken", ".safetensors", ".bin")
    )
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([str(checkpoint.resolve()), facts, max_length]).encode()).hexdigest()[:16]


def conversation(model: vLLMWrapper, system: str, settings: dict[str, Any]) -> None:
    """Answer line after line of standard input."""
    history: History = []
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Chat with a first-generation Qwen model that vLLM runs. Ctrl-D or Ctrl-C leaves."
    )
    add_checkpoint_argument(parser, "the small bundled model; a folder that export.py has written will do as well")
    add_hub_argument(parser)
    parser.add_argument("--system", metavar="TEXT", default=DEFAULT_SYSTEM, help="system prompt (default: %(default)r)")
    add_seed_argument(parser)
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="export for prompts of N tokens, beyond the trained length"
    )
    engine = parser.add_argument_group("of vLLM, which has its own defaults")
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
    """Returns the exit status: 0, 1 where no conversation could begin, 130 after Ctrl-C."""
    arguments = vars(parse())
    name, system, seed = arguments.pop("checkpoint_path"), arguments.pop("system"), arguments.pop("seed")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    with explain_errors(errors=(ImportError, OSError, ValueError)) as ending:
        conversation(vLLMWrapper(name, **arguments), system, {"seed": seed})
    return ending.status


if __name__ == "__main__":
    sys.exit(main())
