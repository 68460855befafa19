"""Measures the speed of this repository on one GPU: each part, and how much of the memory bandwidth it uses.

    python -m benchmarks.gpu_speed [--sections decode engine ...] [--shape 7B]

Models have a published shape and random weights, which does not change the work. Each section adds rows to a Markdown
table, most valuable first, and a section that fails does not end the table. A token reads all weights but the
embedding; "of copy" is that rate relative to a copy of 2 GiB on the device, which reads and writes. `make test-gpu`
runs this after its tests; see CONTRIBUTING.md.

- bandwidth: a copy, a sum, and a product of matrices, by CUDA events.
- engine: the engine of the server with 1, 16 and 64 rows: milliseconds per step, of which the GPU works; memory.
  One row, with its steps captured in CUDA graphs and not. A prompt of 2048 tokens, and again, with it in the cache.
- decode: after a prompt of 128 tokens: `generate`, the eager step captured as a CUDA graph, and the step compiled by
  torch with CUDA graphs. A captured step has the kernels of the eager one, without Python's time to launch them.
- kernel: attention of one token over the 8-bit cache, beside sdpa over a float cache, as in kv_cache.py.
- kernels: each operation of qwen.kernels, captured in a CUDA graph, beside torch's and what was predicted for it.
- profile: kernels of one eager step.
- prefill: a prompt of 2048 tokens.
- training: steps of LoRA with activation checkpointing.

On the CPU, `--device cpu --quick` tries all sections on tiny shapes.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

try:
    from benchmarks.decoding import decode_greedily, token_times
    from qwen import QWenLMHeadModel
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e ., then python -m benchmarks.gpu_speed")

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, StaticCache

from benchmarks.engine_steps import EngineSteps
from benchmarks.random_models import SHAPES, random_model
from qwen.checkpoint.loading import load_tokenizer
from qwen.finetuning.arguments import LoraArguments
from qwen.finetuning.model import add_lora
from qwen.model.gptq_linear_qwen import GPTQLinear
from qwen.model.kv_cache_qwen import QuantizedKVLayer, quantize_tokens, quantized_attention, triton_kernels
from qwen.serving.engine import Engine, TextStream
from tests.support.device_profile import profile_device
from tests.support.progress import Progress, Row, last_line, leave_broken_device

Figures = Iterator[tuple[str, str]]
"""Names and values, each as soon as it is known."""


class Bench:
    """What the sections share.

    Args:
        device: "cuda" or "cpu".
        shape: shape of the model, a key of SHAPES.
        quick: few tokens and small tensors.
    """

    def __init__(self, device: str, shape: str, quick: bool):
        self.device, self.shape, self.quick = device, shape, quick
        self.cuda = device == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.prompt = 16 if quick else 128
        self.tokens = 4 if quick else 64
        self.room = 64 if quick else 1024

    @functools.cached_property
    def model(self) -> QWenLMHeadModel:
        model = random_model(self.shape, self.dtype, self.device)
        model.generation_config = GenerationConfig()
        return model

    @functools.cached_property
    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written."""
        source = torch.ones(2**31 if self.cuda else 2**24, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source), 20)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a token reads."""
        return sum(weight.nbytes for weight in self.model.parameters()) - self.model.transformer.wte.weight.nbytes

    def decode_figure(self, seconds: float) -> str:
        """Describe the speed of decoding one row."""
        rate = self.weight_bytes / seconds
        share = rate / self.copy_bandwidth
        return f"{1 / seconds:.1f} tok/s, {1000 * seconds:.2f} ms, {rate / 1e9:.0f} GB/s, {share:.0%} of copy"

    def random_ids(self, length: int, rows: int = 1) -> torch.Tensor:
        return torch.randint(3000, (rows, length), generator=torch.Generator().manual_seed(0)).to(self.device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def wall(self, work: Callable[[], object]) -> float:
        """Return the seconds until the device has finished."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def seconds(self, work: Callable[[], object], runs: int) -> float:
        """Return the median seconds on the device. Before each run, a fill empties its cache and hides the launch."""
        if not self.cuda:
            return statistics.median(self.wall(work) for _ in range(3))
        found = []
        for _ in range(2 + runs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flushed.zero_()
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        return statistics.median(found[2:])

    @functools.cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.empty(2**30, dtype=torch.uint8, device=self.device)

    def peak_memory(self) -> str:
        return f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most" if self.cuda else ""


def bandwidth(bench: Bench) -> Figures:
    yield "copy", f"{bench.copy_bandwidth / 1e9:.0f} GB/s read and written"
    numbers = torch.ones(2**28 if bench.cuda else 2**20, dtype=torch.int64, device=bench.device)
    yield "sum", f"{numbers.nbytes / bench.seconds(numbers.sum, 10) / 1e9:.0f} GB/s read"
    size = 8192 if bench.cuda else 256
    left, right = torch.randn(2, size, size, dtype=bench.dtype, device=bench.device)
    yield f"product, {size}³", f"{2 * size**3 / bench.seconds(lambda: left @ right, 10) / 1e12:.2f} TFLOP/s"


@torch.no_grad()
def decode(bench: Bench) -> Figures:
    model = bench.model
    ids = bench.random_ids(bench.prompt)[0].tolist()
    times = token_times(functools.partial(decode_greedily, model), ids, 4 + bench.tokens)
    yield "1 row, eager", bench.decode_figure(statistics.median(b - a for a, b in pairwise(times[4:])))

    for rows in (1, 16):
        cache = StaticCache(config=model.config, max_cache_len=bench.room)
        replay, recorded = captured(bench, cache, prefilled(bench, cache, rows))
        figure = bench.decode_figure(seconds_per_step(bench, replay))
        yield f"{rows} row{'s' * (rows > 1)}, captured", f"{figure} per row; recorded in {recorded:.1f} s"

    cache = StaticCache(config=model.config, max_cache_len=bench.room)
    compiler = {"mode": "reduce-overhead"} if bench.cuda else {"backend": "eager"}
    step = torch.compile(model.forward, fullgraph=True, **compiler)
    slot = prefilled(bench, cache, 1)

    def compiled_step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        slot.copy_(step(slot, past_key_values=cache).logits[:, -1:].argmax(-1))

    first = bench.wall(lambda: repeat(compiled_step, 3))
    figure = bench.decode_figure(seconds_per_step(bench, compiled_step))
    yield "1 row, compiled", f"{figure}; the first three steps took {first:.0f} s"
    torch._dynamo.reset()


def prefilled(bench: Bench, cache: StaticCache, rows: int) -> torch.Tensor:
    """Encode a prompt, and return its next token (rows, 1)."""
    ids = bench.random_ids(bench.prompt, rows)
    return bench.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1).clone()


def captured(bench: Bench, cache: StaticCache, slot: torch.Tensor) -> tuple[Callable[[], object], float]:
    """Record the eager step as a CUDA graph; return its replay and the seconds that this took."""

    def step() -> None:
        slot.copy_(bench.model(slot, past_key_values=cache).logits[:, -1:].argmax(-1))

    start = time.perf_counter()
    replay = recorded(bench, step)
    return replay, time.perf_counter() - start


def recorded(bench: Bench, work: Callable[[], object]) -> Callable[[], object]:
    """Record work as a CUDA graph, and return its replay."""
    if not bench.cuda:
        return work
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up, as torch asks for
        work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def seconds_per_step(bench: Bench, step: Callable[[], object]) -> float:
    return min(bench.wall(lambda: repeat(step, bench.tokens)) / bench.tokens for _ in range(2))


def repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


@torch.no_grad()
def kernel(bench: Bench) -> Figures:
    name = "torch" if triton_kernels(bench.device) is None else "Triton"
    for rows, tokens in ((2, 200),) if bench.quick else ((32, 4096), (8, 8192), (1, 32768), (1, 4096)):
        query = torch.randn(rows, 32, 1, 128, dtype=bench.dtype, device=bench.device)
        key, value = torch.randn(2, rows, 32, tokens, 128, dtype=bench.dtype, device=bench.device)
        layer = QuantizedKVLayer()
        layer.update(key, value)
        states = layer.states
        attend = functools.partial(quantized_attention, None, query, states, states, None, 128**-0.5)
        seconds = bench.seconds(attend, 20)
        floats = bench.seconds(functools.partial(scaled_dot_product_attention, query, key, value), 20)
        exact = scaled_dot_product_attention(query, *states.dequantize(bench.dtype)).transpose(1, 2).float()
        error = ((attend()[0].float() - exact).norm() / exact.norm()).item()
        rate = sum(tensor.nbytes for tensor in states.segments[0]) / seconds
        yield (
            f"{rows} × {tokens}, {name}",
            f"{1e6 * seconds:.0f} µs, {rate / 1e9:.0f} GB/s, {rate / bench.copy_bandwidth:.0%} of copy; "
            f"float cache {1e6 * floats:.0f} µs; error {error:.0e}",
        )


@torch.no_grad()
def kernels(bench: Bench) -> Figures:
    """On a CPU in Triton's interpreter if TRITON_INTERPRET=1 is set, else the definitions in torch."""
    ops: Any = importlib.import_module(
        "qwen.kernels.triton_ops"
        if bench.cuda or os.environ.get("TRITON_INTERPRET") == "1"
        else "qwen.kernels.reference"
    )
    yield from linear_kernels(bench, ops)
    yield from cache_kernels(bench, ops)


# Share of the copy bandwidth by (bits, rows), estimated from the instructions of the compiled loops for an H200, of
# which three quarters of the slots are filled: with packed weights, they take longer than reading.
PREDICTED_LINEAR = {(16, 1): 0.85, (16, 4): 0.85, (8, 1): 0.75, (8, 4): 0.40, (4, 1): 0.55, (4, 4): 0.25}
PREDICTED_ATTENTION = {False: 0.85, True: 0.75}  # by whether the cache is in 8 bits


def linear_kernels(bench: Bench, ops: Any) -> Figures:
    """The linear layers of a 7B model, each with so many copies that no cache holds them."""
    width, inner = (64, 96) if bench.quick else (4096, 11008)
    shapes = {"c_attn": (width, 3 * width), "c_proj": (width, width), "swiglu": (width, inner), "down": (inner, width)}
    for bits in (16, 8, 4):
        head = {"lm_head": (width, 256 if bench.quick else 151936)} if bits == 16 else {}  # is not quantized
        for name, (inputs, outputs) in (shapes | head).items():
            size = inputs * outputs * bits // 8 * (2 if name == "swiglu" else 1)
            layers = [
                random_linear(bench, inputs, outputs, bits)
                for _ in range(2 * max(1, 2**27 // size if bench.cuda else 1))
            ]
            pairs = list(zip(layers[::2], layers[1::2], strict=True))
            for rows in (1, 4):
                x = torch.randn(rows, inputs, dtype=bench.dtype, device=bench.device)
                if name == "swiglu":
                    calls = [functools.partial(ops.swiglu_linear, x, *pair) for pair in pairs]
                else:
                    calls = [functools.partial(ops.linear, x, layer) for layer in layers]
                figure = kernel_figure(bench, calls, sum(map(weight_bytes, layers)), PREDICTED_LINEAR[bits, rows])
                if bits == 16:
                    torch_calls = [functools.partial(torch.nn.functional.linear, x, layer.weight) for layer in layers]
                    seconds = bench.seconds(recorded(bench, run_all(torch_calls)), 10) / len(calls)
                    figure += f"; F.linear {1e6 * seconds:.1f} µs"
                yield f"{name} {inputs} × {outputs}, {bits} bits, {rows} rows", figure


def random_linear(bench: Bench, inputs: int, outputs: int, bits: int) -> torch.nn.Linear:
    with torch.device(bench.device):
        if bits == 16:
            return torch.nn.Linear(inputs, outputs, bias=False, dtype=bench.dtype)
        layer = GPTQLinear(inputs, outputs, bias=False, bits=bits, group_size=32 if bench.quick else 128)
        layer.qweight.random_(-(2**31), 2**31)
        layer.scales.fill_(2**-bits / inputs**0.5)
        layer.qzeros.zero_()
        layer.g_idx.copy_(torch.arange(inputs) // layer.group_size)
        layer.finish_loading()
        return layer.to(bench.dtype)


def weight_bytes(layer: torch.nn.Linear) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))


def cache_kernels(bench: Bench, ops: Any) -> Figures:
    """Append and attend in each of several layers, over blocks in random order."""
    heads, size, block_size = (2, 16, 16) if bench.quick else (32, 128, 16)
    for rows, tokens in ((1, 40), (3, 20)) if bench.quick else ((1, 8192), (64, 2048)):
        width = -(-tokens // block_size)
        tables = torch.randperm(rows * width, device=bench.device).view(rows, width).int()
        row_of = torch.arange(rows, dtype=torch.int32, device=bench.device)
        lengths = torch.full_like(row_of, tokens)
        slots = tables[:, -1].long() * block_size + (tokens - 1) % block_size
        qkv = torch.randn(rows, 3, heads, size, dtype=bench.dtype, device=bench.device)
        cos = torch.ones(rows, size, device=bench.device)
        for quantized in (False, True):
            key = torch.randn(heads, rows * width * block_size, size, dtype=bench.dtype, device=bench.device)
            pools = [*quantize_tokens(key), *quantize_tokens(key)] if quantized else [key, key.clone()]
            stored = sum(pool.nbytes for pool in pools)
            copies = [[pool.clone() for pool in pools] for _ in range(max(1, 2**28 // stored) if bench.cuda else 1)]
            append = [functools.partial(ops.rope_append, qkv, cos, cos, None, slots, copy) for copy in copies]
            attend = [
                functools.partial(ops.attend, qkv[:, 0], copy, tables, row_of, lengths, block_size, size**-0.5)
                for copy in copies
            ]
            kind = f"{rows} × {tokens} tokens, {'8 bits' if quantized else 'float'}"
            seconds = bench.seconds(recorded(bench, run_all(append)), 10) / len(copies)
            yield f"rope_append, {kind}", f"{1e6 * seconds:.1f} µs; predicted 3 to 5 µs, the time of a launch"
            yield f"attend, {kind}", kernel_figure(bench, attend, stored * len(copies), PREDICTED_ATTENTION[quantized])
            if not quantized:
                states = [pool.unflatten(1, (rows, -1)).transpose(0, 1) for pool in pools]
                query = qkv[:, 0, :, None]
                sdpa = functools.partial(scaled_dot_product_attention, query, *states)
                yield f"sdpa without blocks, {kind}", f"{1e6 * bench.seconds(recorded(bench, sdpa), 10):.1f} µs"


def kernel_figure(bench: Bench, calls: list[Callable[[], object]], total: int, predicted: float) -> str:
    """Describe the speed of calls that read `total` bytes, beside a predicted share of the copy bandwidth."""
    seconds = bench.seconds(recorded(bench, run_all(calls)), 10)
    share, expected = total / seconds / bench.copy_bandwidth, total / bench.copy_bandwidth / predicted / len(calls)
    return (
        f"{1e6 * seconds / len(calls):.1f} µs, {total / seconds / 1e9:.0f} GB/s, {share:.0%} of copy; "
        f"predicted {1e6 * expected:.1f} µs, {predicted:.0%}"
    )


def run_all(calls: list[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def engine(bench: Bench) -> Figures:
    tokenizer = load_tokenizer()  # ids in, ids out: any will do
    ban_ends = dict.fromkeys((tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id), -100.0)
    alone = 0.0  # tokens per second of one row
    for rows in (1, 2) if bench.quick else (1, 16, 64):
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        served = Engine(bench.model, tokenizer, max_batch_size=rows, max_queue=rows, cache_tokens=1024 * rows)
        try:
            params = served.params(temperature=0.0, max_tokens=300, logit_bias=ban_ends)
            prompt = bench.random_ids(bench.prompt)[0].tolist()
            first_reply_of(served, prompt)
            ready = time.perf_counter() - start
            start = time.perf_counter()
            streams = [served.start([number, *prompt], params) for number in range(rows)]
            last = streams[-1]

            def wait_for(count: int, stream=last) -> int:
                """Wait until a reply has that many more tokens; return how many."""
                goal = stream.completion_tokens + count
                begun = stream.completion_tokens
                while stream.completion_tokens < goal:
                    if served.failed or stream.finish_reason:  # noqa: B023  the loop ends with the engine
                        raise RuntimeError(f"the reply ended ({stream.finish_reason}) before its {goal} tokens")
                    time.sleep(0.0005)
                return stream.completion_tokens - begun

            wait_for(1)
            first = time.perf_counter() - start
            wait_for(4)
            start = time.perf_counter()
            steps = wait_for(4 if bench.quick else 32)
            seconds = (time.perf_counter() - start) / steps
            counted: list[int] = []
            profile = profile_device(lambda: counted.append(wait_for(4)))  # noqa: B023  runs here
            totals = profile.seconds.total(), profile.launches.total(), profile.host_launches, profile.waits
            busy, kernels, launches, waits = (total / counted[0] for total in totals)
            alone = alone or 1 / seconds
            yield (
                f"{rows} row{'s' * (rows > 1)}",
                f"{1000 * seconds:.2f} ms a step, {rows / seconds:.0f} tok/s, {rows / seconds / alone:.1f} × one row; "
                f"the device works {1000 * busy:.2f} ms in {kernels:.0f} kernels; the host launches {launches:.0f} "
                f"times and waits {waits:.1f} times; ready after {ready:.1f} s, first token of the last after "
                f"{1000 * first:.0f} ms{bench.peak_memory()}",
            )
        finally:
            served.close(timeout=0)
    yield from engine_captured(bench)

    length = 64 if bench.quick else 2048
    served = Engine(bench.model, tokenizer, max_batch_size=1, cache_tokens=4 * length)
    try:
        first_reply_of(served, bench.random_ids(length)[0].tolist())  # warms up
        prompt = bench.random_ids(length)[0].flip(0).tolist()
        first, again = first_reply_of(served, prompt), first_reply_of(served, prompt)
        assert first.first_token_seconds is not None
        assert again.first_token_seconds is not None
        yield (
            f"prompt of {length} tokens, twice",
            f"first token after {1000 * first.first_token_seconds:.1f} ms, then after "
            f"{1000 * again.first_token_seconds:.1f} ms with {again.cached_tokens} tokens from the cache",
        )
    finally:
        served.close(timeout=0)


def first_reply_of(served: Engine, prompt: list[int]) -> TextStream:
    """Wait for a reply of one token."""
    stream = served.start(prompt, served.params(temperature=0.0, max_tokens=1))
    for _ in stream:
        pass
    return stream


def engine_captured(bench: Bench) -> Figures:
    """One row of the engine, without its thread and its detokenizer."""
    found = {}
    for captured in (True, False):
        steps = EngineSteps(bench.model, rows=1, cache_tokens=bench.room, max_length=bench.room, captured=captured)
        ids = bench.random_ids(bench.prompt)[0].tolist()
        steps.add(ids, max_tokens=bench.room - bench.prompt, temperature=0.0)
        steps.decode_all()
        repeat(steps.take, 4)
        found[captured] = seconds_per_step(bench, steps.take)
        ratio = "" if captured else f"; captured is {found[False] / found[True]:.1f} times as fast"
        yield f"1 row, {'captured' if captured else 'eager'}", bench.decode_figure(found[captured]) + ratio


@torch.no_grad()
def profile(bench: Bench) -> Figures:
    cache = bench.model.transformer.new_cache()
    ids = bench.random_ids(bench.prompt)
    token = bench.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    step = functools.partial(bench.model, token, past_key_values=cache, use_cache=True)
    repeat(step, 3)
    seconds = bench.wall(lambda: repeat(step, 4)) / 4
    found = profile_device(step)
    busy = found.seconds.total()
    yield (
        "one eager step",
        f"{1000 * seconds:.2f} ms, of which the device works {1000 * busy:.2f} ms in {found.launches.total()} kernels",
    )
    for name, spent in found.seconds.most_common(12):
        yield f"{found.launches[name]} × {name[:60]}", f"{1000 * spent:.3f} ms, {spent / busy:.0%}"


@torch.no_grad()
def prefill(bench: Bench) -> Figures:
    length = 64 if bench.quick else 2048
    ids = bench.random_ids(length)
    seconds = bench.seconds(lambda: bench.model(ids, use_cache=True, logits_to_keep=1), 5)
    work = 2 * bench.weight_bytes / bench.dtype.itemsize * length / seconds
    yield f"{length} tokens", f"{length / seconds:.0f} tok/s, {1000 * seconds:.1f} ms, {work / 1e12:.2f} TFLOP/s"


def training(bench: Bench) -> Figures:
    """LoRA changes the model, so this section is the last."""
    model = bench.model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = add_lora(model, LoraArguments(), [])
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-4)
    for length in (32,) if bench.quick else (512, 2048):
        ids = bench.random_ids(length)

        def step(ids: torch.Tensor = ids) -> None:
            with torch.autocast(bench.device, torch.bfloat16, enabled=bench.cuda):
                loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        seconds = min(bench.wall(step) for _ in range(3))
        yield f"LoRA, {length} tokens", f"{1000 * seconds:.0f} ms, {length / seconds:.0f} tok/s{bench.peak_memory()}"


SECTIONS = {  # with the seconds that each takes on an H200, estimated
    "bandwidth": (bandwidth, 5),
    "engine": (engine, 60),
    "decode": (decode, 70),
    "kernel": (kernel, 15),
    "kernels": (kernels, 90),
    "profile": (profile, 5),
    "prefill": (prefill, 5),
    "training": (training, 15),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shape", choices=SHAPES, help="shape of the model (default: 7B, with --quick: small)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few tokens, to try the script")
    parser.add_argument("--seconds", type=float, default=600, help="leave out sections after this time (%(default)s)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU. To try the script without one: --device cpu --quick.")

    deadline = time.monotonic() + arguments.seconds
    file = os.environ.get("PROGRESS_FILE")  # set by `make test-gpu`, which makes the table of it
    progress = Progress(Path(file)) if file else None
    bench = Bench(arguments.device, arguments.shape or ("small" if arguments.quick else "7B"), arguments.quick)
    failed = False
    if progress is None:
        print(f"{bench.shape}, torch {torch.__version__}\n\n| case | result | seconds | figure |\n|---|---|---:|---|")

    def report(row: Row) -> None:
        if progress is None:
            print(f"| {row.case} | {row.result} | {row.seconds:.1f} | {row.figure} |", flush=True)
        else:
            progress.row(row)

    for name in arguments.sections:
        section, estimate = SECTIONS[name]
        if progress is not None:
            if name in progress.begun():
                continue
            progress.begin(name)
        start = time.monotonic()
        if start + (0 if arguments.quick else estimate) > deadline:
            report(Row(name, "skipped", 0.0, f"{deadline - start:.0f} s are left, and it takes about {estimate}"))
        else:
            try:
                for case, figure in section(bench):
                    report(Row(f"{name}: {case}", "ok", time.monotonic() - start, figure))
            except Exception as error:  # the other sections are worth running
                failed = True
                report(Row(name, "FAIL", time.monotonic() - start, last_line(f"{type(error).__name__}: {error}")))
        if progress is not None:
            progress.end(name)
        gc.collect()
        if failed:
            leave_broken_device()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
