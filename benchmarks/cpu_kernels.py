"""Measures the operations of `qwen.kernels` on a CPU, on their own; `inference.py` measures whole models with them.

    python -m benchmarks.cpu_kernels [--parts linear calls loading] [--shapes 1.8B 7B]

- linear: GB/s of weights that the linear layers of a shape read, for 1 and 4 rows of activations, beside torch's
  `F.linear`. With one row in float32, that reads as fast as the memory allows, and percentages are relative to it. The
  copies of a matrix that are read in turn do not fit into the processor's cache. What is measured for a matrix takes
  turns too, and the medians are shown.
- calls: torch operators and C functions that Python calls for one token in one layer.
- loading: peak memory while a GPTQ checkpoint is loaded, less that of the imports, beside the size of its file.
"""

import argparse
import concurrent.futures
import copy
import itertools
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

try:
    from qwen_cli.console import quiet_imports

    quiet_imports()  # before transformers is imported
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e ., then python -m benchmarks.cpu_kernels")

import torch
from torch import nn

from benchmarks.decoding import decode_greedily
from benchmarks.engine_steps import EngineSteps
from benchmarks.memory import resident_bytes
from benchmarks.random_models import SHAPES, config, fill, write_quantized
from benchmarks.status_line import show_status
from qwen import QWenConfig, QWenLMHeadModel
from qwen.checkpoint.files import weight_files
from qwen.checkpoint.loading import BUNDLED_CHAT_INT4, load_model_quietly
from qwen.kernels.cpu import CPUKernels, cpu_kernels
from qwen.model.gptq_linear_qwen import GPTQLinear
from tests.support.call_counter import Calls, count_calls

ROWS = (1, 4)
GROUP_SIZE = 128
LEAST_BYTES = 2**28  # of the copies of a matrix that are read in turn, at least
PROMPT, WARM_UP, COUNTED = 20, 2, 2  # tokens; decoding steps before and while counting


class Speed(NamedTuple):
    """One operation on all copies of a matrix.

    Args:
        run: (copy, activations) → output.
    """

    copies: list[nn.Linear]
    run: Callable[[nn.Linear, torch.Tensor], torch.Tensor]
    dtype: torch.dtype


# ---- linear ----


def matrices(settings: QWenConfig) -> dict[str, tuple[int, int]]:
    """Return the outputs and inputs of the linear layers."""
    hidden, width = settings.hidden_size, settings.intermediate_size // 2
    projection = settings.num_attention_heads * settings.kv_channels
    return {
        "c_attn": (3 * projection, hidden),
        "attn.c_proj": (hidden, projection),
        "w1, w2": (width, hidden),
        "mlp.c_proj": (hidden, width),
        "lm_head": (settings.vocab_size, hidden),
    }


def cache_bytes() -> int:
    """Return the size of the processor's last cache; 0 on systems other than Linux."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(size.read_text().strip().removesuffix("K")) for size in sizes), default=0)


def dense_copies(outputs: int, inputs: int, dtype: torch.dtype, least: int) -> list[nn.Linear]:
    """Return equal layers in separate memory, together of at least so many bytes."""
    count = math.ceil(least / (outputs * inputs * dtype.itemsize))
    layers = []
    for weight in fill("weight", torch.empty(count, outputs, inputs, dtype=dtype)):
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    return layers


def packed_copies(outputs: int, inputs: int, bits: int, least: int) -> list[nn.Linear]:
    """Return GPTQ layers of random integers, together of at least so many bytes."""
    layer = GPTQLinear(inputs, outputs, bias=False, bits=bits, group_size=GROUP_SIZE)
    layer.qweight.random_(-(2**31), 2**31 - 1)
    layer.qzeros.fill_({4: 0x77777777, 8: 0x7F7F7F7F}[bits])  # the middle minus 1, as this layout stores it
    layer.scales.fill_(0.002 * 2 ** (4 - bits))
    layer.g_idx.copy_(torch.arange(inputs) // GROUP_SIZE)
    layer.finish_loading()
    return [layer, *(copy.deepcopy(layer) for _ in range(math.ceil(least / weight_bytes(layer)) - 1))]


def weight_bytes(layer: nn.Linear) -> int:
    """Return the bytes of weights, and of scales, that the layer reads."""
    if isinstance(layer, GPTQLinear):
        return layer.qweight.nbytes + layer.scales.nbytes
    return layer.weight.nbytes


def operations(kernels: CPUKernels, outputs: int, inputs: int, is_packed: bool, least: int) -> dict[str, Speed]:
    """Return what is measured, by its column of the table."""

    def torch_linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight)

    def kernel(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(x, layer)

    bf16 = dense_copies(outputs, inputs, torch.bfloat16, least)
    found = {
        "float32, torch": Speed(dense_copies(outputs, inputs, torch.float32, least), torch_linear, torch.float32),
        "bf16, torch": Speed(bf16, torch_linear, torch.bfloat16),
        "bf16": Speed(bf16, kernel, torch.bfloat16),
    }
    for bits in (8, 4) if is_packed else ():
        found[f"int{bits}"] = Speed(packed_copies(outputs, inputs, bits, least), kernel, torch.bfloat16)
    return found


@torch.inference_mode()
def read_rates(found: dict[str, Speed], inputs: int, rows: Iterable[int], turns: int) -> dict[tuple[str, int], float]:
    """Return bytes per second by operation and rows, after a turn that does not count."""
    seconds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in found for count in rows}
    for _ in range(turns + 1):
        for (name, count), taken in seconds.items():
            speed = found[name]
            x = torch.linspace(-1, 1, count * inputs).view(count, inputs).to(speed.dtype)
            start = time.perf_counter()
            for layer in speed.copies:
                speed.run(layer, x)
            taken.append(time.perf_counter() - start)
    return {
        (name, count): sum(map(weight_bytes, found[name].copies)) / statistics.median(taken[1:])
        for (name, count), taken in seconds.items()
    }


def print_linear(kernels: CPUKernels, shapes: list[str], quick: bool) -> None:
    least, turns = (2**20, 2) if quick else (max(LEAST_BYTES, 2 * cache_bytes()), 9)
    names = ["float32, torch", "bf16, torch", "bf16", "int8", "int4"]
    print_head(3, "shape", "matrix", "outputs × inputs", "rows", *(f"{name}, GB/s" for name in names))
    for shape in shapes:
        for matrix, (outputs, inputs) in matrices(config(shape)).items():
            show_status(f"{shape}, {matrix} ...")
            found = operations(kernels, outputs, inputs, matrix != "lm_head", least)  # GPTQ leaves that one
            rates = read_rates(found, inputs, ROWS, turns)
            show_status("")
            whole = rates["float32, torch", 1]
            for rows in ROWS:
                cells = [rates.get((name, rows)) for name in names]
                texts = ("" if cell is None else f"{cell / 1e9:.1f} ({cell / whole:.0%})" for cell in cells)
                print_row([shape, matrix, f"{outputs} × {inputs}", rows, *texts])


# ---- calls ----


def engine_calls(model: QWenLMHeadModel) -> Calls:
    """Return the calls of `COUNTED` decoding steps of the server's engine, for one sequence."""
    steps = EngineSteps(model, rows=1, cache_tokens=1024, max_length=128)
    steps.add(range(PROMPT), max_tokens=100, temperature=0.0)
    steps.decode_all()
    for _ in range(WARM_UP):
        steps.take()
    with count_calls() as calls:
        for _ in range(COUNTED):
            steps.take()
    return calls


def generate_calls(model: QWenLMHeadModel) -> Calls:
    """Return the calls of `COUNTED` decoding steps of `generate`: the difference of two replies."""
    found = []
    for tokens in (WARM_UP, WARM_UP + COUNTED):
        with count_calls() as calls:
            decode_greedily(model, list(range(PROMPT)), tokens)
        found.append(calls)
    return found[1].since(found[0])


PATHS: dict[str, Callable[[QWenLMHeadModel], Calls]] = {"engine": engine_calls, "generate": generate_calls}


def calls_a_layer(model: QWenLMHeadModel, path: str) -> Calls:
    """Return the calls of `COUNTED` decoding steps that one layer adds.

    Args:
        model: one that nothing else uses: it loses a layer.
        path: key of `PATHS`.
    """
    whole = PATHS[path](model)
    model.transformer.h = model.transformer.h[:-1]
    model.config.num_hidden_layers -= 1
    return whole.since(PATHS[path](model))


def tiny_model(dtype: torch.dtype) -> QWenLMHeadModel:
    settings = config("small")
    settings.num_hidden_layers = 2
    return QWenLMHeadModel(settings).to(dtype).eval()


MODELS: dict[str, Callable[[], QWenLMHeadModel]] = {
    "float32": lambda: tiny_model(torch.float32),
    "bf16": lambda: tiny_model(torch.bfloat16),
    "int4": lambda: load_model_quietly(BUNDLED_CHAT_INT4, cpu_only=True)[0],
}


def print_calls() -> None:
    print_head(2, "path", "weights", "calls a layer", "torch operators", "C functions")
    for path, (weights, make) in itertools.product(PATHS, MODELS.items()):
        calls = calls_a_layer(make(), path)
        counts = calls.total(), calls.torch.total(), calls.c.total()
        print_row([path, weights, *(f"{count / COUNTED:g}" for count in counts)])


# ---- loading ----


def load(folder: Path) -> tuple[float, int]:
    """Return the seconds that loading takes, and the bytes by which this process grew at most, which has to be new.

    A small checkpoint is loaded before, for everything that is imported and compiled only then.
    """
    load_model_quietly(BUNDLED_CHAT_INT4, cpu_only=True)
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    load_model_quietly(folder, cpu_only=True)
    return time.perf_counter() - start, resident_bytes("VmHWM") - before


def loading_memory(folder: Path) -> tuple[float, int]:
    """Return the result of `load` from a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(load, folder).result()


def print_loading(shapes: list[str]) -> None:
    print_head(2, "shape", "weights", "file, GB", "memory, GB", "memory / file", "seconds")
    for shape in shapes:
        for bits in (8, 4):
            with tempfile.TemporaryDirectory() as work:
                show_status(f"{shape}, int{bits} ...")
                write_quantized(shape, Path(work), bits)
                size = sum(Path(work, name).stat().st_size for name in weight_files(Path(work)))
                seconds, memory = loading_memory(Path(work))
                show_status("")
            cells = f"{size / 1e9:.2f}", f"{memory / 1e9:.2f}", f"{memory / size:.2f}", f"{seconds:.1f}"
            print_row([shape, f"int{bits}", *cells])


# ---- the tables ----


def print_row(cells: Iterable[Any]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_head(texts: int, *names: str) -> None:
    """Print the head of a table whose first columns are texts."""
    print()
    print_row(names)
    print("|" + "---|" * texts + "---:|" * (len(names) - texts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = ("linear", "calls", "loading")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: 1.8B 7B; only 1.8B is loaded")
    parser.add_argument("--quick", action="store_true", help="small matrices, to try the script")
    arguments = parser.parse_args()
    kernels = cpu_kernels()
    if kernels is None:
        sys.exit("There is nothing to measure: the kernels are not available, for the reason above.")
    shapes = arguments.shapes or (["small"] if arguments.quick else ["1.8B", "7B"])
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if "linear" in arguments.parts:
        print_linear(kernels, shapes, arguments.quick)
    if "calls" in arguments.parts:
        print_calls()
    if "loading" in arguments.parts:
        print_loading(arguments.shapes or shapes[:1])


if __name__ == "__main__":
    main()
