"""Compares the 8-bit key/value cache with the float cache: bytes, memory, speed and error.

    python benchmarks/kv_cache.py [--parts arithmetic memory bytes speed accuracy] [--plot FILE]

- arithmetic: computed size of weights and cache of the 7B shape in bfloat16, like the published tables.
- memory: peak while generating from a prompt of one token, each cell in a separate process: allocated / reserved by
  CUDA or, on the CPU, growth of the resident size plus the weights.
- bytes: size of a cache after a prompt and after further tokens in a model with random weights, compared with the
  formula: allocated by CUDA or, on the CPU, the storage of all live tensors. Also shows whether it was reallocated.
- speed: attention of one token (32 heads of 128 channels), and decoding steps of a model. Alternating runs, medians
  after a warm-up. On a GPU by CUDA events, each run after a write of 1 GiB, which flushes the caches and hides the
  launch. On the CPU by processor time of one thread.
- accuracy: error of the logits of the reference vectors in tests/golden, compared with full precision.

Without a GPU the model has 14M parameters; 7B needs a GPU with 80 GB. Prints Markdown tables; GB are 10^9 bytes.
"""

import argparse
import functools
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

try:
    from qwen import QWenLMHeadModel
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch
from memory import resident_bytes
from random_models import SHAPES, config
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Cache

from qwen.model.kv_cache_qwen import (
    QuantizedKVCache,
    QuantizedKVLayer,
    dequantize_cache_torch,
    quantized_attention,
    triton_kernels,
)

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
UNIT, UNIT_BYTES = ("GB", 1e9) if GPU else ("MB", 1e6)
CACHES = {  # config fields of each
    "float": {},
    "int8": {"use_cache_quantization": True},
    "int8, kernel": {"use_cache_quantization": True, "use_cache_kernel": True},
}

# Published GB on an A100-80G; None: out of memory.
BATCHES, LENGTHS = (1, 4, 16, 32, 64, 100), (512, 1024, 2048, 4096, 8192)
PUBLISHED_BATCHES = {"float": (16.3, 24.1, 31.7, 48.7, None, None), "int8": (15.5, 17.2, 22.3, 30.2, 48.2, 72.4)}
PUBLISHED_LENGTHS = {"float": (15.2, 16.3, 17.6, 19.5, 23.2), "int8": (15.0, 15.5, 15.8, 16.6, 17.6)}


def main() -> None:
    parts = {
        "arithmetic": arithmetic,
        "memory": memory,
        "bytes": measure_cache_bytes,
        "speed": speed,
        "accuracy": accuracy,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--shape", choices=SHAPES, default="7B" if GPU else "small", help="shape of the measured model")
    parser.add_argument(
        "--batches", nargs="*", type=int, default=BATCHES if GPU else (16, 64), help="rows, for the memory part"
    )
    parser.add_argument("--tokens", type=int, default=1024 if GPU else 192, help="tokens per row, for the memory part")
    parser.add_argument(
        "--lengths", nargs="*", type=int, default=LENGTHS if GPU else (), help="tokens of one row, for the memory part"
    )
    parser.add_argument("--runs", type=int, default=50 if GPU else 9, help="repetitions; the median is reported")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also plot the arithmetic part; needs matplotlib")
    parser.add_argument("--cell", nargs=3, metavar=("CACHE", "BATCH", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib.")
    if arguments.cell:
        kind, batch, tokens = arguments.cell
        print(json.dumps(peak_bytes(arguments.shape, kind, int(batch), int(tokens))))
        return
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}")
    for name, part in parts.items():  # in this order: `memory` needs the whole GPU
        if name in arguments.parts:
            part(arguments)
    if arguments.plot:
        plot(arguments.plot)


def token_bytes(shape: str, kind: str, itemsize: int = 2) -> float:
    """Return the cache bytes per token, with `itemsize` bytes per float."""
    hidden, layers, heads, *_ = SHAPES[shape]
    return 2 * layers * hidden * (itemsize if kind == "float" else 1 + 2 * itemsize / (hidden // heads))


def weight_bytes(shape: str) -> int:
    with torch.device("meta"):
        return 2 * sum(parameter.numel() for parameter in QWenLMHeadModel(config(shape)).parameters())


def arithmetic(arguments: argparse.Namespace) -> None:
    weights = weight_bytes("7B")
    for head, columns, tokens_of, figures in (
        ("rows of 1024 tokens", BATCHES, lambda batch: 1024 * batch, PUBLISHED_BATCHES),
        ("tokens of one row", LENGTHS, lambda length: length, PUBLISHED_LENGTHS),
    ):
        print(f"\n| 7B, {head} | " + " | ".join(map(str, columns)) + " |\n|---|" + "---:|" * len(columns))
        for kind, published_row in figures.items():
            sums = ((weights + tokens_of(column) * token_bytes("7B", kind)) / 1e9 for column in columns)
            print(f"| {kind}: weights and cache, GB | " + " | ".join(f"{figure:.1f}" for figure in sums) + " |")
            print(
                f"| {kind}: published, whole process | " + " | ".join(map(format_figure, published_row)) + " |",
                flush=True,
            )


def memory(arguments: argparse.Namespace) -> None:
    if not GPU and not Path("/proc/self/status").exists():
        print("\nThe memory part needs Linux's /proc/self/status: skipped.")
        return
    shape, weights = arguments.shape, weight_bytes(arguments.shape)
    sizes = [(batch, arguments.tokens) for batch in arguments.batches] + [(1, length) for length in arguments.lengths]
    head = f"\n| {shape}, rows × tokens | cache | weights and cache, {UNIT} | peak, {UNIT} |"
    print(head + " published, GB |\n|---|---|---:|---:|---:|" if shape == "7B" else head + "\n|---|---|---:|---:|")
    for batch, tokens in sizes:
        for kind in ("float", "int8, kernel"):
            formula = (weights + batch * tokens * token_bytes(shape, kind)) / UNIT_BYTES
            row = [f"{batch} × {tokens}", kind, f"{formula:.1f}", peak_cell(shape, kind, batch, tokens)]
            if shape == "7B":
                row.append(published(kind.split(",")[0], batch, tokens))
            print("| " + " | ".join(row) + " |", flush=True)


def published(kind: str, batch: int, tokens: int) -> str:
    if batch == 1 and tokens in LENGTHS:
        return format_figure(PUBLISHED_LENGTHS[kind][LENGTHS.index(tokens)])
    if tokens == 1024 and batch in BATCHES:
        return format_figure(PUBLISHED_BATCHES[kind][BATCHES.index(batch)])
    return ""


def format_figure(figure: float | None) -> str:
    return "out of memory" if figure is None else f"{figure:.1f}"


def peak_cell(shape: str, kind: str, batch: int, tokens: int) -> str:
    """Run `peak_bytes` in a separate process."""
    command = [sys.executable, __file__, "--shape", shape, "--cell", kind, str(batch), str(tokens)]
    # Otherwise glibc keeps freed memory of varying sizes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return " / ".join(f"{figure / UNIT_BYTES:.1f}" for figure in json.loads(done.stdout.splitlines()[-1]))
    if "OutOfMemory" in done.stderr:
        return "out of memory"
    print(done.stderr[-2000:], file=sys.stderr)
    return "failed"


@torch.no_grad()
def peak_bytes(shape: str, kind: str, batch: int, tokens: int) -> list[int]:
    """Return the peak bytes while each row generates `tokens` tokens: allocated and reserved, or resident."""
    model = random_model(shape, torch.bfloat16, kind)
    ids = torch.ones(batch, 1, dtype=torch.long, device=DEVICE)
    if not GPU:
        model.generate(ids, **fixed_length(4))  # loads libraries, which do not count
        before = resident_bytes("VmRSS")
    model.generate(ids, **fixed_length(tokens))
    if GPU:
        return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    return [resident_bytes("VmHWM") - before + weight_bytes(shape)]


def fixed_length(tokens: int) -> dict:
    return {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}


@torch.no_grad()
def measure_cache_bytes(arguments: argparse.Namespace) -> None:
    shape = arguments.shape
    model = random_model(shape, torch.bfloat16)
    model(torch.ones(1, 2, dtype=torch.long, device=DEVICE))  # libraries allocate memory at the first call
    print(f"\n| {shape}, rows × tokens | cache | size, bytes | formula | overhead | reallocated since the prompt |")
    print("|---|---|---:|---:|---:|---|")
    for batch, prompt in ((1, 1024), (4, 512), (16, 256), (1, 2048)):
        ids = torch.randint(SHAPES[shape][-1], (batch, prompt), device=DEVICE)
        for kind in ("float", "int8"):
            before = live_bytes()
            cache, tokens, pointers = new_cache(model, kind), 0, []
            for new in (prompt, 1, 127):
                model(ids[:, :new], past_key_values=cache, use_cache=True, logits_to_keep=1)
                found = live_bytes() - before
                tokens += new
                formula = batch * tokens * token_bytes(shape, kind)
                now = data_pointers(cache)
                moved = "" if not pointers else "no" if now[: len(pointers)] == pointers else "yes"
                pointers = pointers or now
                row = (kind, f"{found:,}", f"{formula:,.0f}", f"{found / formula - 1:.1%}", moved)
                print(f"| {batch} × {tokens} | " + " | ".join(row) + " |", flush=True)
            del cache


def live_bytes() -> int:
    """Return the bytes of all tensors on the device."""
    gc.collect()
    if GPU:
        return torch.cuda.memory_allocated()
    tensors = (object_ for object_ in gc.get_objects() if issubclass(type(object_), torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def data_pointers(cache: Cache) -> list[int]:
    """Return the data pointers of the first layer's tensors, in order of allocation."""
    layer = cache.layers[0]
    if isinstance(layer, QuantizedKVLayer):
        return [tensor.data_ptr() for segment in layer.states.segments for tensor in segment]
    return [layer.keys.data_ptr(), layer.values.data_ptr()]


@torch.no_grad()
def speed(arguments: argparse.Namespace) -> None:
    if not GPU:
        torch.set_num_threads(1)
    attention(arguments.runs)
    steps(arguments.shape, arguments.runs)


def attention(runs: int) -> None:
    """Print times of attention of one token. Bandwidth counts cache bytes; a copy counts bytes read and written."""
    copy = copy_bandwidth(runs)
    kernel = "torch" if triton_kernels(DEVICE) is None else "the Triton kernel"
    print(f"\nThe fused attention uses {kernel}. Bandwidth of a copy on the device: {copy / 1e9:.0f} GB/s.\n")
    print(
        "| rows × tokens | precision | float cache, sdpa, ms | int8, dequantized, sdpa, ms | int8, fused, ms "
        "| speedup over dequantized | over float | GB/s | of copy |"
    )
    print("|---|---|" + "---:|" * 7, flush=True)
    for batch, tokens in ((1, 32768), (8, 8192), (32, 4096)) if GPU else ((1, 1024), (1, 4096), (8, 1024)):
        for dtype in (torch.bfloat16,) if GPU else (torch.float32, torch.bfloat16):
            query = torch.randn(batch, 32, 1, 128, dtype=dtype, device=DEVICE)
            key, value = torch.randn(2, batch, 32, tokens, 128, dtype=dtype, device=DEVICE)
            layer = QuantizedKVLayer()
            layer.update(key, value)
            found = medians(attention_variants(query, key, value, layer), runs)
            # In pieces is faster on a CPU, whose cache they fit, and at once on a GPU.
            dequantized = min(found["in pieces"], found["at once"])
            read = sum(tensor.nbytes for tensor in layer.states.segments[0]) / found["bytes"]
            cells = [f"{1000 * seconds:.2f}" for seconds in (found["float"], dequantized, found["bytes"])]
            cells += [f"{seconds / found['bytes']:.1f}" for seconds in (dequantized, found["float"])]
            cells += [f"{read / 1e9:.0f}", f"{read / copy:.0%}"]
            name = str(dtype).removeprefix("torch.")
            print(f"| {batch} × {tokens} | {name} | " + " | ".join(cells) + " |", flush=True)


def copy_bandwidth(runs: int) -> float:
    """Return the bytes read and written per second."""
    source = torch.ones(2**31 if GPU else 2**28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians({"copy": lambda: target.copy_(source)}, runs)["copy"]


def attention_variants(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: QuantizedKVLayer
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the variants to time. query: (B, H, 1, D); key, value: (B, H, T, D); layer: the 8-bit cache of them."""
    states, segment = layer.states, layer.states.segments[0]
    return {
        "float": lambda: scaled_dot_product_attention(query, key, value),
        "in pieces": lambda: scaled_dot_product_attention(query, *states.dequantize(query.dtype)),
        "at once": lambda: scaled_dot_product_attention(
            query, dequantize_cache_torch(*segment[:3]), dequantize_cache_torch(*segment[3:])
        ),
        "bytes": lambda: quantized_attention(None, query, states, states, None, query.shape[-1] ** -0.5)[0],
    }


def steps(shape: str, runs: int) -> None:
    """Print decoded tokens per second of all rows together, at given cache lengths."""
    print(f"\n| {shape}, rows × tokens | precision | " + " | ".join(f"{kind}, tok/s" for kind in CACHES) + " |")
    print("|---|---|" + "---:|" * len(CACHES), flush=True)
    for dtype in (torch.bfloat16,) if GPU else (torch.float32, torch.bfloat16):
        model = random_model(shape, dtype)
        for batch, tokens in ((1, 4096), (8, 4096), (32, 1024)) if GPU else ((1, 1024), (1, 4096), (8, 1024)):
            try:
                seconds = medians(step_variants(model, batch, tokens), runs).values()
                cells = [f"{batch / each:.0f}" for each in seconds]
            except torch.OutOfMemoryError:
                cells = ["out of memory"] * len(CACHES)
            name = str(dtype).removeprefix("torch.")
            print(f"| {batch} × {tokens} | {name} | " + " | ".join(cells) + " |", flush=True)


def step_variants(model: QWenLMHeadModel, batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Return a decoding step of each row after `tokens` random tokens, for each kind of cache."""
    settings = model.config
    shape = (2, batch, settings.num_attention_heads, tokens, settings.kv_channels)
    ids = torch.randint(settings.vocab_size, (batch, 1), device=DEVICE)
    variants = {}
    for kind in CACHES:
        cache = new_cache(model, kind)
        for layer in range(settings.num_hidden_layers):
            cache.update(*torch.randn(shape, dtype=model.dtype, device=DEVICE), layer)
        variants[kind] = functools.partial(model, ids, past_key_values=cache, use_cache=True)
    return variants


def medians(functions: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Return the median seconds of each function, in alternating runs, after two warm-up runs that may compile."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(2 + runs):
        for name, function in functions.items():
            seconds[name].append(time_call(function))
    return {name: statistics.median(found[2:]) for name, found in seconds.items()}


def time_call(function: Callable[[], object]) -> float:
    if not GPU:
        start = time.process_time()
        function()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    l2_flush_buffer().zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


@functools.cache
def l2_flush_buffer() -> torch.Tensor:
    return torch.empty(2**30, dtype=torch.uint8, device=DEVICE)


@torch.no_grad()
def accuracy(arguments: argparse.Namespace) -> None:
    name = "int8kv/decode"
    expected = load_file(GOLDEN / "expected.safetensors")
    case = next(case for case in json.loads((GOLDEN / "cases.json").read_text()) if case["name"] == name)
    ids = expected[f"{name}.input_ids"].long().to(DEVICE)
    exact = QWenLMHeadModel.from_pretrained(GOLDEN, fp32=True).eval().to(DEVICE)(ids).logits
    print("\n| 8-bit cache | max logit error / max logit |\n|---|---:|")
    print(f"| reference | {relative_error(expected[f'{name}.logits'].to(DEVICE), exact):.2%} |")
    for kind in ("int8", "int8, kernel"):
        model = QWenLMHeadModel.from_pretrained(GOLDEN, fp32=True, **CACHES[kind]).eval().to(DEVICE)
        outputs = model(ids[:, : case["n_prompt"]], use_cache=True)
        logits = [outputs.logits]
        for position in range(case["n_prompt"], ids.shape[1]):
            outputs = model(ids[:, position : position + 1], past_key_values=outputs.past_key_values, use_cache=True)
            logits.append(outputs.logits)
        print(f"| {kind} | {relative_error(torch.cat(logits, dim=1), exact):.2%} |", flush=True)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).abs().max() / exact.abs().max()).item()


def random_model(shape: str, dtype: torch.dtype, kind: str = "float") -> QWenLMHeadModel:
    settings = config(shape)
    for name, value in CACHES[kind].items():
        setattr(settings, name, value)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()


def new_cache(model: QWenLMHeadModel, kind: str) -> Cache:
    """Create the cache that `generate` would."""
    if kind == "float":
        return model.transformer.new_cache()
    return QuantizedKVCache("use_cache_kernel" in CACHES[kind])


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    weights = weight_bytes("7B") / 1e9
    panels = (
        (axes[0], "rows, 1024 tokens each", BATCHES, 1024, PUBLISHED_BATCHES),
        (axes[1], "tokens, one row", LENGTHS, 1, PUBLISHED_LENGTHS),
    )
    for axis, label, positions, tokens, figures in panels:
        for colour, kind, name in (("tab:blue", "float", "bfloat16 cache"), ("tab:orange", "int8", "int8 cache")):
            sums = [weights + x * tokens * token_bytes("7B", kind) / 1e9 for x in positions]
            axis.plot(positions, sums, color=colour, label=f"{name}: weights and cache")
            known = [(x, value) for x, value in zip(positions, figures[kind], strict=True) if value is not None]
            axis.plot(*zip(*known, strict=True), "o", color=colour, fillstyle="none", label=f"{name}: published")
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].axhline(80, color="gray", linestyle=":", linewidth=1)
    axes[0].text(1, 81, "A100-80G", color="gray", fontsize=8)
    axes[0].set(ylabel="memory (GB)", ylim=(0, 90))
    axes[1].legend(fontsize=8, loc="lower right")
    figure.suptitle("7B in bfloat16", fontsize=11)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
