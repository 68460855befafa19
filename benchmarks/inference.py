"""Measures decoding speed and memory by size and precision, like the published tables, and compares engines.

    python benchmarks/inference.py [--sizes 1.8B 7B 14B] [--precisions bf16 int8 int4] [--cpu-only]
    python benchmarks/inference.py -c CHECKPOINT

Sizes are published shapes with random weights, which does not change work or memory. The prompt is one sequence of
random tokens; exactly `--generate` tokens are generated greedily. Reports medians after a warm-up. The published tables
use `--context 1` or 2048 and `--generate` 2048 or 8192; the prompt memory table uses `--context 2048 --generate 1`.

- tok/s: generated tokens per second after the first one; "incl. prompt": tokens of prompt and reply by total time.
- memory: peak of a separate process. On a GPU, allocated by CUDA; on the CPU, resident size including libraries and
  mapped files, which peaks while quantized weights are loaded.
- weights: bytes that each token reads, all weights but the embedding; "of bandwidth": the share of the memory bandwidth
  of the device, which is measured first. It exceeds 100% if weights stay in a CPU cache.

Engines: "this"; "Qwen2", the same float weights in transformers' Qwen2ForCausalLM; on the CPU also "llama.cpp", if
llama-cpp-python and gguf are installed, with the same float weights or its own Q8_0 and Q4_0 for 8 and 4 bits.
Cells that do not fit into free memory are skipped. Ctrl-C ends the table. GB are 10^9 bytes.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    from qwen_cli.arguments import add_hub_argument
    from qwen_cli.console import quiet_imports

    quiet_imports()  # before transformers is imported
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch
from decoding import Decoder, decode_greedily, token_times
from memory import available_bytes, resident_bytes
from qwen2 import as_qwen2
from random_models import SHAPES, config, fill, random_model, write_quantized
from status_line import show_status

from qwen import Checkpoint, QWenConfig, QWenLMHeadModel
from qwen.checkpoint.loading import load_config, load_model_quietly
from qwen.library_errors import is_memory_full
from qwen.model.gptq_qwen import is_gptq
from qwen.quiet import quiet_loading

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GGUF_KINDS = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
ENGINES = ("this", "Qwen2", "llama.cpp")
WARM_UP = 8  # tokens
LIBRARY_BYTES = 0.6e9  # bytes of a process without a model
REPACKING_FACTOR = {"int8": 1.6, "int4": 1.1}  # CPU: peak memory relative to the weights, without mapped files

# Published for one A100-80G, by generated tokens, with 1 and with 2048 tokens of context.
PUBLISHED_SPEEDS = {
    2048: {
        "1.8B": {"bf16": 54.09, "int8": 55.56, "int4": 71.07},
        "7B": {"bf16": 40.93, "int8": 37.47, "int4": 50.09},
        "14B": {"bf16": 32.22, "int8": 29.28, "int4": 38.72},
        "72B": {"int4": 11.32},
    },
    8192: {
        "7B": {"bf16": 36.14, "int8": 32.54, "int4": 38.61},
        "14B": {"bf16": 24.87, "int8": 24.22, "int4": 27.33},
    },
}
# By tokens of context and generated tokens.
PUBLISHED_MEMORY = {
    (1, 2048): {
        "1.8B": {"bf16": 4.23, "int8": 3.48, "int4": 2.91},
        "7B": {"bf16": 16.99, "int8": 11.20, "int4": 8.21},
        "14B": {"bf16": 30.15, "int8": 18.81, "int4": 13.01},
        "72B": {"int4": 48.86},
    },
    (2048, 1): {
        "7B": {"bf16": 16.99, "int8": 11.20, "int4": 8.21},
        "14B": {"bf16": 30.15, "int8": 18.81, "int4": 13.01},
    },
    (1, 8192): {
        "7B": {"bf16": 22.53, "int8": 16.62, "int4": 13.63},
        "14B": {"bf16": 38.94, "int8": 27.54, "int4": 21.79},
    },
}


@dataclass(frozen=True)
class Cell:
    model: str
    """Key of SHAPES or, if `is_checkpoint`, a folder or hub id."""
    is_checkpoint: bool
    precision: str
    engine: str
    context: int
    generate: int
    repeat: int
    hub: str | None = None

    @functools.cached_property
    def config(self) -> QWenConfig:
        return load_config(self.model, hub=self.hub) if self.is_checkpoint else config(self.model)

    @property
    def size(self) -> str | None:
        """Key of SHAPES; for a checkpoint, the matching one."""
        fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        shape = [getattr(self.config, name) for name in fields]
        return next((name for name in SHAPES if [getattr(config(name), field) for field in fields] == shape), None)

    @property
    def needs_file(self) -> bool:
        """Whether the engine reads a file that must be written first."""
        return self.engine == "llama.cpp" or (not self.is_checkpoint and BITS[self.precision] <= 8)


class MeasurementError(Exception):
    """A cell could not be measured. The message is shown in the table."""


# ---- the table ----


def main() -> int:
    arguments = parse()
    if arguments.task:
        task, folder, cell = json.loads(arguments.task)
        return run_task(task, Path(folder), Cell(**cell) if cell else None)
    for name in ("SIGTERM", "SIGHUP"):  # end the cell processes, too
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        print_table(make_cells(arguments), arguments.cpu_only)
    except (OSError, ValueError, MeasurementError) as error:  # CheckpointError is among them
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show_status("")
        print("\nStopped: the table ends here.", file=sys.stderr)
        return 130
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1.8B"], help="random weights (1.8B)")
    models.add_argument("-c", "--checkpoint-path", help="local folder or hub id, instead of random weights")
    add_hub_argument(parser)
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=BITS,
        help="default: bf16 int8 int4; for a checkpoint, its own",
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all that are installed")
    parser.add_argument("--context", type=int, default=1, metavar="N", help="prompt tokens (1)")
    parser.add_argument("--generate", type=int, metavar="N", help="generated tokens (2048 on a GPU, else 32)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="repetitions; the median is reported (3)")
    parser.add_argument("--cpu-only", action="store_true", help="do not use a GPU")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.cpu_only = arguments.cpu_only or not torch.cuda.is_available()
    if arguments.generate is None:
        arguments.generate = 32 if arguments.cpu_only else 2048
    for name in ("context", "generate", "repeat"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}: it must be at least 1")
    return arguments


def make_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return the cells of the table.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ValueError: the checkpoint is not available in a requested precision, or an engine cannot be used.
    """
    is_checkpoint = arguments.checkpoint_path is not None
    models, precisions = arguments.sizes, arguments.precisions or ["bf16", "int8", "int4"]
    if is_checkpoint:
        checkpoint = Checkpoint.open(arguments.checkpoint_path, hub=arguments.hub)
        precisions = checkpoint_precisions(checkpoint, arguments.precisions)
        models = [checkpoint.name]
    engines = arguments.engines or installed_engines(arguments.cpu_only)
    if missing := set(engines) - set(installed_engines(arguments.cpu_only)):
        raise ValueError(
            f"{missing.pop()} runs on the CPU only and needs `pip install llama-cpp-python gguf`: add --cpu-only, or "
            "remove it from --engines."
        )
    combined = [
        Cell(
            model,
            is_checkpoint,
            precision,
            engine,
            arguments.context,
            arguments.generate,
            arguments.repeat,
            arguments.hub,
        )
        for model, precision, engine in itertools.product(models, precisions, engines)
        if engine == "this" or BITS[precision] >= 16 or (engine == "llama.cpp" and not is_checkpoint)
    ]
    if not combined:
        raise ValueError(f"{' and '.join(engines)} cannot read these quantized weights: add `this` to --engines.")
    return combined


def checkpoint_precisions(checkpoint: Checkpoint, requested: list[str] | None) -> list[str]:
    name, settings = checkpoint.name, checkpoint.config
    own = ["bf16", "fp32"]
    if is_gptq(settings):
        own = [f"int{settings.quantization_config['bits']}"]
        if own[0] not in BITS:
            raise ValueError(f"{name} has {own[0]} weights, which are not supported: use int8 or int4.")
    if wrong := set(requested or []) - set(own):
        raise ValueError(
            f"{name} is not available in {wrong.pop()}, only in {' and '.join(own)}. Quantize a float checkpoint to 8 "
            "or 4 bits with run_gptq.py."
        )
    return requested or own[:1]


def installed_engines(cpu_only: bool) -> list[str]:
    llama = cpu_only and all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
    return list(ENGINES if llama else ENGINES[:2])


def print_table(rows: list[Cell], cpu_only: bool) -> None:
    show_status("Measuring memory bandwidth ...")
    device = run("device", None, None, cpu_only)
    context, generate = rows[0].context, rows[0].generate
    show_status("")
    bandwidth = f"memory bandwidth {device['bandwidth'] / 1e9:.0f} GB/s"
    print(f"{device['name']}, torch {torch.__version__}, {bandwidth}. {context} + {generate} tokens.\n")
    names = ["tok/s", "incl. prompt", "memory, GB", "weights, GB", "of bandwidth"]
    published = [published_figures(cell) for cell in rows]
    if any(speed for speed, _ in published):
        names.insert(2, "published")
    if any(memory for _, memory in published):
        names.insert(-2, "published, GB")
    print("| | weights | engine | " + " | ".join(names) + " |\n|---|---|---|" + "---:|" * len(names), flush=True)
    for number, (cell, published_cell) in enumerate(zip(rows, published, strict=True), 1):
        label = f"{Path(cell.model).name} | {cell.precision}"
        step = f"{number} of {len(rows)}, {label.replace(' |', '')}, {cell.engine}: "
        try:
            figures = measure_in_child(cell, device, cpu_only, step)
        except MeasurementError as failure:
            show_status("")
            print(f"| {label} | {cell.engine} | {failure} |" + " |" * (len(names) - 1), flush=True)
            continue
        kernel = "" if figures["kernel"] in (None, "Linear") else f", {figures['kernel']}"
        columns = {
            "tok/s": figures["speed"],
            "incl. prompt": figures["whole_speed"],
            "published": published_cell[0],
            "memory, GB": figures["peak"] and figures["peak"] / 1e9,
            "published, GB": published_cell[1],
            "weights, GB": figures["read"] / 1e9,
        }
        texts = {name: "" if value is None else f"{value:.2f}" for name, value in columns.items()}
        share = figures["speed"] and f"{figures['speed'] * figures['read'] / device['bandwidth']:.0%}"
        texts["of bandwidth"] = share or ""
        show_status("")
        print(f"| {label} | {cell.engine}{kernel} | " + " | ".join(texts[name] for name in names) + " |", flush=True)


def published_figures(cell: Cell) -> tuple[float | None, float | None]:
    """Return tokens per second, including the prompt, and GB; None for cells that were not published."""
    speeds = PUBLISHED_SPEEDS.get(cell.generate, {}) if cell.context in (1, 2048) else {}
    memory = PUBLISHED_MEMORY.get((cell.context, cell.generate), {})
    return tuple(figures.get(cell.size, {}).get(cell.precision) for figures in (speeds, memory))


def measure_in_child(cell: Cell, device: dict, cpu_only: bool, step: str) -> dict:
    """Measure a cell; raises MeasurementError."""
    needed, free = needed_bytes(cell, cpu_only), device["free"] if not cpu_only else free_memory()
    if free is not None and needed > free:
        raise MeasurementError(f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} free")
    with tempfile.TemporaryDirectory() as folder:
        if cell.needs_file:
            show_status(f"{step}writing weights ...")
            if (room := shutil.disk_usage(folder).free) < needed:
                raise MeasurementError(
                    f"needs about {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, {room / 1e9:.1f} free"
                )
            run("write", folder, cell, cpu_only, step)
        return run("measure", folder, cell, cpu_only, step)


def needed_bytes(cell: Cell, cpu_only: bool) -> float:
    """Return the bytes of weights and cache; on the CPU including libraries and temporary copies."""
    with torch.device("meta"):
        parameters = dict(QWenLMHeadModel(cell.config).named_parameters())
    bits = BITS[cell.precision]
    whole = sum(weight.numel() for weight in parameters.values())
    packed = 0
    if bits <= 8:
        packed = sum(weight.numel() for name, weight in parameters.items() if ".h." in name and weight.dim() == 2)
    itemsize = 4 if bits == 32 else 2
    quantized = packed * (bits + (16 + bits) / 128) / 8  # one scale and zero point per 128 weights
    settings = cell.config
    width = settings.num_attention_heads * settings.kv_channels
    cache = 2 * settings.num_hidden_layers * width * (cell.context + cell.generate) * itemsize
    weights = itemsize * (whole - packed) + quantized
    if not cpu_only:
        return weights + cache
    if cell.engine == "this":
        weights *= REPACKING_FACTOR.get(cell.precision, 1)
    elif cell.engine == "llama.cpp" and cell.is_checkpoint:
        weights *= 2  # the loaded and the written copy
    return weights + cache + LIBRARY_BYTES


def free_memory() -> int | None:
    """Return the bytes of available main memory; None on systems other than Linux."""
    return available_bytes() if Path("/proc/meminfo").exists() else None


# ---- one process per task ----


def run(task: str, folder: str | None, cell: Cell | None, cpu_only: bool, step: str = "") -> dict:
    """Run `run_task` in a separate process, so that its peak memory can be measured, and return its result.

    Raises:
        MeasurementError: the process reported an error or ended without a result.
    """
    environment = dict(os.environ)
    if cpu_only:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, "--task", json.dumps([task, folder or "", cell and asdict(cell)])]
    # Own process group: Ctrl-C is only sent to this process.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0)
    result = None
    try:
        for line in process.stdout:
            message = json.loads(line) if line.startswith("{") else {}  # libraries may print to stdout, too
            if "progress" in message:
                show_status(step + message["progress"])
            result = message.get("result", result)
            if "failed" in message:
                raise MeasurementError(message["failed"])
        if process.wait() == -9:  # SIGKILL by Linux's OOM killer
            raise MeasurementError("out of memory")
        if result is None:
            raise MeasurementError("failed: see above")
        return result
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run_task(task: str, folder: Path, cell: Cell | None) -> int:
    tasks = {
        "device": device_figures,
        "write": lambda: write_weights(cell, folder),
        "measure": lambda: measure(cell, folder),
    }
    try:
        send_message(result=tasks[task]())
    except (MemoryError, RuntimeError) as error:
        if not is_memory_full(error):
            raise
        send_message(failed="out of memory")
    except (OSError, ValueError) as error:  # CheckpointError is among them
        send_message(failed=" ".join(str(error).split()))
    return 0


def send_message(**message: object) -> None:
    print(json.dumps(message), flush=True)


# ---- tasks of the child process ----


def device_figures() -> dict:
    """Return the device's name, free memory and bandwidth in bytes per second, from summing a GiB of integers."""
    gpu = torch.cuda.is_available()
    numbers = torch.ones(2**27, dtype=torch.int64, device="cuda" if gpu else "cpu")
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        numbers.sum().item()  # item() waits for the device
        seconds.append(time.perf_counter() - start)
    bandwidth = numbers.nbytes / statistics.median(seconds[3:])
    del numbers
    if gpu:
        torch.cuda.empty_cache()
        free = sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
        return {"name": torch.cuda.get_device_name(), "bandwidth": bandwidth, "free": free}
    return {"name": f"CPU, {torch.get_num_threads()} threads", "bandwidth": bandwidth}


def write_weights(cell: Cell, folder: Path) -> dict:
    """Write the file that `measure` reads: a GPTQ checkpoint of random integers, or a GGUF file for llama.cpp."""
    if cell.engine != "llama.cpp":
        with quiet_loading(progress=False):
            write_quantized(cell.model, folder, BITS[cell.precision])
        return {}
    from qwen.export.gguf_file import LazyTensor, write_gguf

    if cell.is_checkpoint:
        model, _ = load_model_quietly(cell.model, hub=cell.hub, cpu_only=True, dtype=DTYPES[cell.precision])
        entries = [
            LazyTensor(name, tensor.shape, lambda held=tensor: held) for name, tensor in model.state_dict().items()
        ]
    else:
        with torch.device("meta"):
            empty = QWenLMHeadModel(cell.config).state_dict()
        entries = [
            LazyTensor(name, tensor.shape, lambda name=name, shape=tensor.shape: fill(name, torch.empty(shape)))
            for name, tensor in empty.items()
        ]
    kind = GGUF_KINDS[cell.precision]
    # GPTQ checkpoints have a 16-bit embedding and output matrix.
    write_gguf(folder / "model.gguf", cell.config, entries, kind, output_type=None if kind == "f32" else "bf16")
    return {}


def measure(cell: Cell, folder: Path) -> dict:
    send_message(progress="loading ...")
    with quiet_loading(progress=False):
        decode, read, kernel = (load_llama_cpp if cell.engine == "llama.cpp" else load_transformers)(cell, folder)
    ids = torch.randint(cell.config.vocab_size, (cell.context,), generator=torch.Generator().manual_seed(0)).tolist()
    token_times(decode, ids, min(WARM_UP, cell.generate))
    speeds, whole_speeds = [], []
    for number in range(cell.repeat):
        times = token_times(decode, ids, cell.generate, Progress(f"decoding {number + 1} of {cell.repeat}"))
        if cell.generate > 1:
            speeds.append((cell.generate - 1) / (times[-1] - times[1]))
        whole_speeds.append((cell.context + cell.generate) / (times[-1] - times[0]))
    return {
        "speed": statistics.median(speeds) if speeds else None,
        "whole_speed": statistics.median(whole_speeds),
        "peak": peak_bytes(),
        "read": read(),
        "kernel": kernel,
    }


class Progress:
    """Reports the number of tokens at most once a second, which does not affect the measurement."""

    def __init__(self, label: str):
        self.label, self.reported = label, time.perf_counter()

    def __call__(self, done: int) -> None:
        if time.perf_counter() - self.reported > 1:
            self.reported = time.perf_counter()
            send_message(progress=f"{self.label}, {done} tokens")


def peak_bytes() -> int | None:
    """Return the peak memory in bytes; None on a CPU without Linux."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    return resident_bytes("VmHWM") if Path("/proc/self/status").exists() else None


def load_transformers(cell: Cell, folder: Path) -> tuple[Decoder, Callable[[], int], str]:
    """Return the decoder, the weight bytes that a token reads (as a function), and the class of the linear layers."""
    dtype = DTYPES.get(cell.precision)
    if cell.needs_file:
        model, _ = load_model_quietly(folder)
    elif cell.is_checkpoint:
        model, _ = load_model_quietly(cell.model, hub=cell.hub, **({"dtype": dtype} if dtype else {}))
    else:
        model = random_model(cell.model, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    kernel = type(model.transformer.h[0].attn.c_attn).__name__
    if cell.engine == "Qwen2":
        model = as_qwen2(model)
    return functools.partial(decode_greedily, model), lambda: weight_bytes(model), kernel


def weight_bytes(model: torch.nn.Module) -> int:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sum(tensor.nbytes for tensor in tensors) - model.get_input_embeddings().weight.nbytes


def load_llama_cpp(cell: Cell, folder: Path) -> tuple[Decoder, Callable[[], int], None]:
    from gguf import GGUFReader
    from llama_cpp import Llama

    path = str(folder / "model.gguf")
    threads = torch.get_num_threads()
    llama = Llama(path, n_ctx=cell.context + cell.generate, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(ids: list[int], tokens: int, on_token: Callable[[], None]) -> list[int]:
        llama.reset()  # clears the cached prompt
        generated = []
        for token in itertools.islice(llama.generate(ids, temp=0.0), tokens):
            generated.append(token)
            on_token()
        return generated

    def read() -> int:
        return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors if tensor.name != "token_embd.weight")

    return decode, read, None


if __name__ == "__main__":
    sys.exit(main())
