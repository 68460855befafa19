"""Decoding speed and memory by size and precision, in the form of the published tables, beside other engines.

    python benchmarks/inference.py [--sizes 1.8B 7B 14B] [--precisions bf16 int8 int4] [--cpu-only]
    python benchmarks/inference.py -c CHECKPOINT

Sizes are published shapes with random weights, which changes neither work nor memory. One row of random tokens goes in,
and exactly `--generate` tokens come out, greedily; medians, after a warm-up. The published tables are made with
`--context 1` or 2048 and `--generate` 2048 or 8192, that of the memory for a prompt with `--context 2048 --generate 1`.

- tok/s: of the generated tokens after the first; "with the prompt": those of prompt and reply, by all the time.
- memory: the peak of a process of its own. On a GPU what CUDA allocated; on the CPU what was resident, libraries and
  mapped files included, of which loading quantized weights needs most.
- weights: what a token has to read, so all but the embedding; and what share that makes of the speed at which this
  device reads its memory, which is measured first. It is above 100% where weights stay in a processor's cache.

Engines: "this"; "Qwen2", the same float weights in transformers' Qwen2ForCausalLM; and on the CPU "llama.cpp", where
llama-cpp-python and gguf are installed, with the same float weights or, in as many bits, its own Q8_0 and Q4_0.
What does not fit into the free memory is not tried. Ctrl-C ends the table. GB are 10^9 bytes.
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
    sys.exit(f"{error}. In the folder of the repository: pip install -e .")

import torch
from decoding import Decoder, decode_greedily, token_times
from memory import available, resident
from qwen2 import as_qwen2
from random_models import SHAPES, config, fill, random_model, write_quantized

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
LIBRARIES = 0.6e9  # bytes of a process without a model
REPACKING = {"int8": 1.6, "int4": 1.1}  # on the CPU, memory at most by size of the weights, mapped files not counted

# The publication's, on one A100-80G, by tokens generated; it speaks of 1 and of 2048 tokens of context.
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
# By tokens of context and generated.
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
    """A key of SHAPES, or where `is_checkpoint`, a folder or a hub id."""
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
        """The key of SHAPES, also of a checkpoint."""
        of = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        shape = [getattr(self.config, name) for name in of]
        return next((name for name in SHAPES if [getattr(config(name), key) for key in of] == shape), None)

    @property
    def is_written(self) -> bool:
        """Whether the engine reads a file that is made for it."""
        return self.engine == "llama.cpp" or (not self.is_checkpoint and BITS[self.precision] <= 8)


class Failed(Exception):
    """Why a cell has no figures, for the table."""


# ---- the table ----


def main() -> int:
    arguments = parse()
    if arguments.task:
        task, folder, cell = json.loads(arguments.task)
        return child(task, Path(folder), Cell(**cell) if cell else None)
    for name in ("SIGTERM", "SIGHUP"):  # the processes of cells end with this one
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        table(cells(arguments), arguments.cpu_only)
    except (OSError, ValueError, Failed) as error:  # CheckpointError is among them
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        show("")
        print("\nStopped: the table ends here.", file=sys.stderr)
        return 130
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1.8B"], help="random weights (1.8B)")
    models.add_argument("-c", "--checkpoint-path", help="a folder or a hub id, instead of random weights")
    add_hub_argument(parser)
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=BITS,
        help="bf16 int8 int4 without it; of a checkpoint, what it can be had in",
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="those that are installed without it")
    parser.add_argument("--context", type=int, default=1, metavar="N", help="tokens that go in (1)")
    parser.add_argument("--generate", type=int, metavar="N", help="tokens that come out (2048 on a GPU, else 32)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="decodings, of which the median counts (3)")
    parser.add_argument("--cpu-only", action="store_true", help="stay off the GPU")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.cpu_only = arguments.cpu_only or not torch.cuda.is_available()
    if arguments.generate is None:
        arguments.generate = 32 if arguments.cpu_only else 2048
    for name in ("context", "generate", "repeat"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}: it must be at least 1")
    return arguments


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """All of the table.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ValueError: it cannot be had in the precision that was asked for, or by the engine.
    """
    is_checkpoint = arguments.checkpoint_path is not None
    models, precisions = arguments.sizes, arguments.precisions or ["bf16", "int8", "int4"]
    if is_checkpoint:
        checkpoint = Checkpoint.open(arguments.checkpoint_path, hub=arguments.hub)
        precisions = checkpoint_precisions(checkpoint, arguments.precisions)
        models = [checkpoint.name]
    engines = arguments.engines or installed(arguments.cpu_only)
    if missing := set(engines) - set(installed(arguments.cpu_only)):
        raise ValueError(
            f"{missing.pop()} is measured on the CPU alone, and needs `pip install llama-cpp-python gguf`: add "
            "--cpu-only, or leave it out of --engines."
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


def checkpoint_precisions(checkpoint: Checkpoint, asked: list[str] | None) -> list[str]:
    name, settings = checkpoint.name, checkpoint.config
    own = ["bf16", "fp32"]
    if is_gptq(settings):
        own = [f"int{settings.quantization_config['bits']}"]
        if own[0] not in BITS:
            raise ValueError(f"{name} has weights of {own[0]}: only int8 and int4 are measured.")
    if wrong := set(asked or []) - set(own):
        raise ValueError(
            f"{name} cannot be had in {wrong.pop()}, but in {' and '.join(own)}. run_gptq.py writes a float checkpoint "
            "in 4 or 8 bits."
        )
    return asked or own[:1]


def installed(cpu_only: bool) -> list[str]:
    llama = cpu_only and all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
    return list(ENGINES if llama else ENGINES[:2])


def table(rows: list[Cell], cpu_only: bool) -> None:
    show("Measuring how fast the device reads ...")
    device = run("device", None, None, cpu_only)
    context, generate = rows[0].context, rows[0].generate
    show("")
    reading = f"reading {device['bandwidth'] / 1e9:.0f} GB/s"
    print(f"{device['name']}, torch {torch.__version__}, {reading}. {context} + {generate} tokens.\n")
    names = ["tok/s", "with the prompt", "memory, GB", "weights, GB", "of reading"]
    quoted = [published(cell) for cell in rows]
    if any(speed for speed, _ in quoted):
        names.insert(2, "published")
    if any(memory for _, memory in quoted):
        names.insert(-2, "published, GB")
    print("| | weights | engine | " + " | ".join(names) + " |\n|---|---|---|" + "---:|" * len(names), flush=True)
    for number, (cell, quotes) in enumerate(zip(rows, quoted, strict=True), 1):
        label = f"{Path(cell.model).name} | {cell.precision}"
        step = f"{number} of {len(rows)}, {label.replace(' |', '')}, {cell.engine}: "
        try:
            figures = measured(cell, device, cpu_only, step)
        except Failed as failure:
            show("")
            print(f"| {label} | {cell.engine} | {failure} |" + " |" * (len(names) - 1), flush=True)
            continue
        kernel = "" if figures["kernel"] in (None, "Linear") else f", {figures['kernel']}"
        columns = {
            "tok/s": figures["speed"],
            "with the prompt": figures["whole_speed"],
            "published": quotes[0],
            "memory, GB": figures["peak"] and figures["peak"] / 1e9,
            "published, GB": quotes[1],
            "weights, GB": figures["read"] / 1e9,
        }
        texts = {name: "" if value is None else f"{value:.2f}" for name, value in columns.items()}
        share = figures["speed"] and f"{figures['speed'] * figures['read'] / device['bandwidth']:.0%}"
        texts["of reading"] = share or ""
        show("")
        print(f"| {label} | {cell.engine}{kernel} | " + " | ".join(texts[name] for name in names) + " |", flush=True)


def published(cell: Cell) -> tuple[float | None, float | None]:
    """Tokens a second, prompt and reply together, and GB; None where this is not a cell of the published tables."""
    speeds = PUBLISHED_SPEEDS.get(cell.generate, {}) if cell.context in (1, 2048) else {}
    memory = PUBLISHED_MEMORY.get((cell.context, cell.generate), {})
    return tuple(figures.get(cell.size, {}).get(cell.precision) for figures in (speeds, memory))


def measured(cell: Cell, device: dict, cpu_only: bool, step: str) -> dict:
    """Raises Failed."""
    needed, free = needed_bytes(cell, cpu_only), device["free"] if not cpu_only else free_memory()
    if free is not None and needed > free:
        raise Failed(f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
    with tempfile.TemporaryDirectory() as folder:
        if cell.is_written:
            show(f"{step}making the weights ...")
            if (room := shutil.disk_usage(folder).free) < needed:
                raise Failed(f"needs about {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, {room / 1e9:.1f} are free")
            run("write", folder, cell, cpu_only, step)
        return run("measure", folder, cell, cpu_only, step)


def needed_bytes(cell: Cell, cpu_only: bool) -> float:
    """Of weights and cache; on the CPU also of the libraries, and of a second copy where one is made on the way."""
    with torch.device("meta"):
        parameters = dict(QWenLMHeadModel(cell.config).named_parameters())
    bits = BITS[cell.precision]
    whole = sum(weight.numel() for weight in parameters.values())
    packed = 0
    if bits <= 8:
        packed = sum(weight.numel() for name, weight in parameters.items() if ".h." in name and weight.dim() == 2)
    itemsize = 4 if bits == 32 else 2
    quantized = packed * (bits + (16 + bits) / 128) / 8  # a scale and a zero point for 128 weights
    settings = cell.config
    width = settings.num_attention_heads * settings.kv_channels
    cache = 2 * settings.num_hidden_layers * width * (cell.context + cell.generate) * itemsize
    weights = itemsize * (whole - packed) + quantized
    if not cpu_only:
        return weights + cache
    if cell.engine == "this":
        weights *= REPACKING.get(cell.precision, 1)
    elif cell.engine == "llama.cpp" and cell.is_checkpoint:
        weights *= 2  # as they are loaded, and as they are written for it
    return weights + cache + LIBRARIES


def free_memory() -> int | None:
    """Bytes of main memory; None where the system is not Linux."""
    return available() if Path("/proc/meminfo").exists() else None


# ---- a process for each task ----


def run(task: str, folder: str | None, cell: Cell | None, cpu_only: bool, step: str = "") -> dict:
    """What `child` finds, in a process of its own, so that its memory is its own too.

    Raises:
        Failed: it says why, or it ended without a word.
    """
    environment = dict(os.environ)
    if cpu_only:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, "--task", json.dumps([task, folder or "", cell and asdict(cell)])]
    # Its own group: Ctrl-C is for the table alone.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0)
    result = None
    try:
        for line in process.stdout:
            message = json.loads(line) if line.startswith("{") else {}  # libraries may speak there too
            if "progress" in message:
                show(step + message["progress"])
            result = message.get("result", result)
            if "failed" in message:
                raise Failed(message["failed"])
        if process.wait() == -9:  # SIGKILL: Linux ended it
            raise Failed("out of memory")
        if result is None:
            raise Failed("failed: see above")
        return result
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def show(text: str) -> None:
    """On a terminal, in place of what was shown there before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def child(task: str, folder: Path, cell: Cell | None) -> int:
    tasks = {"device": device_figures, "write": lambda: write(cell, folder), "measure": lambda: measure(cell, folder)}
    try:
        tell(result=tasks[task]())
    except (MemoryError, RuntimeError) as error:
        if not is_memory_full(error):
            raise
        tell(failed="out of memory")
    except (OSError, ValueError) as error:  # CheckpointError is among them
        tell(failed=" ".join(str(error).split()))
    return 0


def tell(**message: object) -> None:
    print(json.dumps(message), flush=True)


# ---- what is measured there ----


def device_figures() -> dict:
    """Its name, its free memory, and bytes a second of summing up a GiB of integers."""
    gpu = torch.cuda.is_available()
    numbers = torch.ones(2**27, dtype=torch.int64, device="cuda" if gpu else "cpu")
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        numbers.sum().item()  # a number: the device has done its work
        seconds.append(time.perf_counter() - began)
    bandwidth = numbers.nbytes / statistics.median(seconds[3:])
    del numbers
    if gpu:
        torch.cuda.empty_cache()
        free = sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
        return {"name": torch.cuda.get_device_name(), "bandwidth": bandwidth, "free": free}
    return {"name": f"CPU, {torch.get_num_threads()} threads", "bandwidth": bandwidth}


def write(cell: Cell, folder: Path) -> dict:
    """The files that `measure` reads: a GPTQ checkpoint of random integers, or one for llama.cpp."""
    if cell.engine != "llama.cpp":
        with quiet_loading(progress=False):
            write_quantized(cell.model, folder, BITS[cell.precision])
        return {}
    from qwen.export.gguf_file import Entry, write_gguf

    if cell.is_checkpoint:
        model, _ = load_model_quietly(cell.model, hub=cell.hub, cpu_only=True, dtype=DTYPES[cell.precision])
        entries = [Entry(name, tensor.shape, lambda held=tensor: held) for name, tensor in model.state_dict().items()]
    else:
        with torch.device("meta"):
            empty = QWenLMHeadModel(cell.config).state_dict()
        entries = [
            Entry(name, tensor.shape, lambda name=name, shape=tensor.shape: fill(name, torch.empty(shape)))
            for name, tensor in empty.items()
        ]
    kind = GGUF_KINDS[cell.precision]
    # The embedding and the output matrix are in 16 bits in GPTQ checkpoints.
    write_gguf(folder / "model.gguf", cell.config, entries, kind, outside=None if kind == "f32" else "bf16")
    return {}


def measure(cell: Cell, folder: Path) -> dict:
    tell(progress="loading ...")
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
        "peak": peak(),
        "read": read(),
        "kernel": kernel,
    }


class Progress:
    """Tells now and then how many tokens there are; once a second costs nothing that could be measured."""

    def __init__(self, label: str):
        self.label, self.told = label, time.perf_counter()

    def __call__(self, done: int) -> None:
        if time.perf_counter() - self.told > 1:
            self.told = time.perf_counter()
            tell(progress=f"{self.label}, {done} tokens")


def peak() -> int | None:
    """Bytes; None on the CPU where the system is not Linux."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    return resident("VmHWM") if Path("/proc/self/status").exists() else None


def load_transformers(cell: Cell, folder: Path) -> tuple[Decoder, Callable[[], int], str]:
    """How to decode, how many bytes of weights a token reads, and the name of the linear layers."""
    dtype = DTYPES.get(cell.precision)
    if cell.is_written:
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
        llama.reset()  # or it would remember the prompt
        found = []
        for token in itertools.islice(llama.generate(ids, temp=0.0), tokens):
            found.append(token)
            on_token()
        return found

    def read() -> int:
        return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors if tensor.name != "token_embd.weight")

    return decode, read, None


if __name__ == "__main__":
    sys.exit(main())
