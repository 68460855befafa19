"""Measures the engine of the server without HTTP: decoding steps, memory, and the turns of a conversation.

    python -m benchmarks.engine [--shape 1.8B] [--dtype bfloat16] [--rows 1 4 16]

The model is the bundled one, or has a published shape and random weights, which does not change the work. A cell that
does not fit into the memory is left out, and the others are measured.

- steps: rows that decode at the same time, greedily, after prompts of the same length that have nothing in common.
  Scheduler, model and sampler run, not the detokenizer. "prompts" is the speed of encoding all of them. On a GPU,
  torch's profiler counts kernels, the launches of the host (one is that of a CUDA graph with most of the kernels) and
  its waits. On a CPU nothing is launched, and `python -m benchmarks.launches` counts what a GPU would be asked to do.
  Instead, the table has the bytes of keys and values that a step reads in place and that it copies, computed from their
  places in the cache: new tokens are copied into it.
- conversation: time to the first token of each turn, in the engine itself, with prefix reuse and without, alternating.
  Each turn adds 200 tokens, or fewer so that 8 turns fit into the trained length: 16 of reply, the rest of question.
"""

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

try:
    from qwen_cli.console import quiet_imports

    quiet_imports()  # before transformers is imported
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e ., then python -m benchmarks.engine")

import torch

from benchmarks.engine_steps import EngineSteps
from benchmarks.random_models import SHAPES, random_model
from benchmarks.status_line import show_status
from qwen import QWenLMHeadModel
from qwen.checkpoint.loading import load_model_quietly, load_tokenizer
from qwen.model.tokenization_qwen import QWenTokenizer
from qwen.serving.engine import Engine
from qwen.serving.engine.engine import SHARED_FROM, affordable_tokens
from qwen.serving.engine.model_runner import ModelRunner
from qwen.serving.engine.paged_kv_cache import bytes_per_token
from qwen_cli.arguments import int_in_range
from tests.support.device_profile import profile_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TURNS, TURN_TOKENS, REPLY_TOKENS = 8, 200, 16
ROOM = 1024  # slots beyond those of each row, so that rows lie in the cache as in one of the usual size
IDS = 3000  # prompts have token ids below this


class Traffic(NamedTuple):
    """Bytes of keys and values that attention reads in place in a step, and that are copied."""

    read: int
    copied: int

    @classmethod
    def of(cls, runner: ModelRunner) -> "Traffic":
        """Return that of the last step on a CPU, which only decoded."""
        read = copied = 0
        for layer in runner.cache.layers:
            lengths = [
                row.length if layer.window is None else min(row.length, layer.window) for row in layer.layout.rows
            ]
            heads = len(layer.pools[0])
            stored = sum(heads * pool.shape[2] * pool.itemsize for pool in layer.pools)  # bytes of a token
            read += sum(lengths) * stored
            copied += len(lengths) * stored
        return cls(read, copied)


def random_ids(length: int, seed: object) -> list[int]:
    draw = random.Random(str(seed))
    return [draw.randrange(IDS) for _ in range(length)]


def print_row(cells: Iterable[object]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(*names: str) -> None:
    print()
    print_row(names)
    print("|" + "---:|" * len(names), flush=True)


def measure_steps(model: QWenLMHeadModel, rows: int, prompt: int, tokens: int) -> list[str]:
    """Return the cells of a row of the table of steps.

    Raises:
        RuntimeError: the rows do not fit into the memory.
    """
    cuda = model.device.type == "cuda"
    cache_tokens = min(rows * (prompt + 2 * tokens + ROOM), affordable_tokens(model))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps = EngineSteps(model, rows=rows, cache_tokens=cache_tokens, max_length=prompt + 2 * tokens + 8)
    for row in range(rows):
        steps.add(random_ids(prompt, row), max_tokens=2 * tokens + 8, temperature=0.0)
    start = time.perf_counter()
    steps.decode_all()
    encoding = time.perf_counter() - start
    for _ in range(3):
        steps.take()
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        steps.take()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds)
    blocks = steps.scheduler.block_manager
    held = (blocks.num_blocks - blocks.num_free) * blocks.block_size * bytes_per_token(model)
    cells = [f"{1000 * step:.1f}", f"{rows / step:.1f}", f"{rows * prompt / encoding:.0f}", f"{held / 1e6:.1f}"]
    if cuda:
        counted = 4
        profile = profile_device(lambda: [steps.take() for _ in range(counted)])
        numbers = profile.launches.total(), profile.host_launches, profile.waits
        cells += [f"{number / counted:.0f}" for number in numbers]
        return [*cells, f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"]
    traffic = Traffic.of(steps.runner)
    return [*cells, f"{traffic.read / 1e6:.1f}", f"{traffic.copied / 1e6:.2f}"]


def print_steps(model: QWenLMHeadModel, rows: list[int], prompts: list[int], tokens: int) -> None:
    head = ["rows", "prompt", "step, ms", "tok/s", "prompts, tok/s", "cache in use, MB"]
    if model.device.type == "cuda":
        print_head(*head, "kernels a step", "launches of the host", "waits", "peak memory, GB")
    else:
        print_head(*head, "K/V read a step, MB", "K/V copied a step, MB")
    for prompt in prompts:
        for count in rows:
            show_status(f"{count} rows, prompts of {prompt} tokens ...")
            try:
                cells = measure_steps(model, count, prompt, tokens)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                cells = [f"not measured: {str(error).partition(chr(10))[0]}"]
            gc.collect()
            show_status("")
            print_row([count, prompt, *cells])


def measure_turns(engine: Engine, seed: int, turn_tokens: int) -> list[tuple[float, float]]:
    """Return for each turn the seconds to its first token, and the share of its prompt that was in the cache."""
    ban_ends = dict.fromkeys(engine.end_token_ids, -100.0)
    params = engine.params(temperature=0.0, max_tokens=REPLY_TOKENS, top_logprobs=0, logit_bias=ban_ends)
    history: list[int] = []
    turns = []
    for turn in range(TURNS):
        history += random_ids(turn_tokens - REPLY_TOKENS, (seed, turn))
        stream = engine.start(history, params)
        reply = [token.token_id for piece in stream for token in piece.tokens]  # only there with log-probabilities
        assert stream.first_token_seconds is not None
        turns.append((stream.first_token_seconds, stream.cached_tokens / len(history)))
        history = history + reply
    return turns


def print_conversations(model: QWenLMHeadModel, tokenizer: QWenTokenizer, rounds: int) -> None:
    turn_tokens = min(TURN_TOKENS, model.config.seq_length // TURNS)
    cache_tokens = min(2 * (rounds + 1) * TURNS * turn_tokens, affordable_tokens(model))
    names = {True: "yes", False: "no"}
    engines = {
        reuse: Engine(model, tokenizer, max_batch_size=1, cache_tokens=cache_tokens, prefix_reuse=reuse)
        for reuse in names
    }
    found: dict[bool, list] = {reuse: [] for reuse in names}
    try:
        for number in range(rounds + 1):  # the first is not counted
            for reuse, engine in engines.items():
                show_status(f"conversation {number + 1} of {rounds + 1}, prefix reuse: {names[reuse]} ...")
                found[reuse].append(measure_turns(engine, number, turn_tokens))
    finally:
        for engine in engines.values():
            engine.close(timeout=0)
        show_status("")
    print_head(
        "prefix reuse", *(f"turn {turn + 1}, ms" for turn in range(TURNS)), f"turn {TURNS} / turn 1",
        f"of turn {TURNS}'s prompt from the cache",
    )  # fmt: skip
    for reuse, conversations in found.items():
        first = [statistics.median(turns[turn][0] for turns in conversations[1:]) for turn in range(TURNS)]
        share = statistics.median(turns[-1][1] for turns in conversations[1:])
        print_row(
            [names[reuse], *(f"{1000 * each:.1f}" for each in first), f"{first[-1] / first[0]:.2f}", f"{share:.0%}"]
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape (default: the bundled model)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", type=int_in_range(1), metavar="N", help="default: 1 4 16 64")
    parser.add_argument("--prompts", nargs="+", type=int_in_range(1), metavar="N", help="tokens (default: 128 2048)")
    parser.add_argument("--quick", action="store_true", help="few tokens, to try the script")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU. Measure this machine without one: --device cpu.")

    dtype = DTYPES[arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")]
    if arguments.shape is None:
        model, tokenizer = load_model_quietly(cpu_only=arguments.device == "cpu", dtype=dtype)
    else:
        model, tokenizer = random_model(arguments.shape, dtype, arguments.device), load_tokenizer()
    rows = arguments.rows or ([1, 2] if arguments.quick else [1, 4, 16, 64])
    prompts = arguments.prompts or ([32] if arguments.quick else [128, 2048])
    tokens, rounds = (4, 1) if arguments.quick else (32, 3)
    longest = model.config.max_context_length - 2 * tokens - 8
    if max(prompts) > longest:
        parser.error(f"--prompts {max(prompts)}: the model takes prompts of at most {longest} tokens here.")
    if model.device.type == "cpu" and model.num_parameters() < SHARED_FROM:
        torch.set_num_threads(1)  # as the engine does

    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    name, precision = arguments.shape or "bundled model", str(dtype).removeprefix("torch.")
    print(f"{name}, {precision}, {device}, torch {torch.__version__}")
    print_steps(model, rows, prompts, tokens)
    print_conversations(model, tokenizer, rounds)


if __name__ == "__main__":
    main()
