"""Measures decoding speed and memory by size and precision, like the published tables, and compares engines.

    python benchmarks/inference.py [--sizes 1.8B 7B 14B] [--precisions bf16 int8 int4] [--cpu-only]
    python benchmarks/inference.py -c CHECKPOINT

Sizes are published shapes with random weights, which does not change work or memory. The prompt is one sequence of
random tokens; exactly `--generate` tokens are generated greedily. Reports medians after a warm-up. The published tables
use `--context 1` or 2048 and `--generate` 2048 or 8192; the prompt memory table uses `--context 2048 --generate 1`.
With `--rounds`, the engines take turns at each precision.

- tok/s: generated tokens per second after the first one; "prompt": tokens of the prompt by the time to the first token;
  "incl. prompt": tokens of prompt and reply by total time.
- memory: peak of a separate process. On a GPU, allocated by CUDA; on the CPU, resident size including libraries and
  mapped files.
- weights: bytes that each token reads, all weights but the embedding; "of bandwidth": the share of the memory bandwidth
  of the device, which is measured first. It exceeds 100% if weights stay in a CPU cache.

Engines: "this", `generate`; "engine", the same model in the server's engine, without HTTP; "Qwen2", the same float
weights in transformers' Qwen2ForCausalLM; on the CPU, if gguf is installed, also "llama.cpp" of llama-cpp-python, which
pip compiles for the machine, and "xllamacpp", a compiled one: with the same float weights, or their own Q8_0 and Q4_0
for 8 and 4 bits beside an output matrix in bfloat16. To keep llama-cpp-python out of this environment:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --target ~/llama.cpp --no-deps llama-cpp-python diskcache
    PYTHONPATH=~/llama.cpp python benchmarks/inference.py

Cells that do not fit into free memory are skipped. Ctrl-C ends the table. GB are 10^9 bytes.
"""

import argparse
import contextlib
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
from unittest import mock

try:
    from qwen_cli.arguments import add_hub_argument
    from qwen_cli.console import quiet_imports

    quiet_imports()  # before transformers is imported
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch
from decoding import decode_greedily, token_times
from memory import available_bytes, resident_bytes
from qwen2 import as_qwen2
from random_models import SHAPES, config, fill, random_model, write_quantized
from status_line import show_status
from transformers import GenerationConfig, PreTrainedModel

from qwen import Checkpoint, QWenConfig, QWenLMHeadModel
from qwen.checkpoint.loading import load_config, load_model_quietly, load_tokenizer
from qwen.library_errors import is_memory_full
from qwen.model.gptq_qwen import is_gptq
from qwen.model.tokenization_qwen import QWenTokenizer
from qwen.quiet import quiet_loading
from qwen.serving.engine import Engine, TextStream
from qwen.serving.engine.sampling_params import SamplingParams
from qwen.serving.engine.sequence import SampledToken

BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GGUF_KINDS = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
ENGINES = ("this", "engine", "Qwen2", "llama.cpp", "xllamacpp")
OURS = ENGINES[:2]
LLAMA_CPP = {"llama.cpp": "llama_cpp", "xllamacpp": "xllamacpp"}  # engine → module
WARM_UP = 8  # tokens
LIBRARY_BYTES = 0.6e9  # bytes of a process without a model

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
        return self.engine in LLAMA_CPP or (not self.is_checkpoint and BITS[self.precision] <= 8)

    def file_folder(self, parent: Path) -> Path:
        """Return where that file is, which several engines may read."""
        return parent / ("gguf" if self.engine in LLAMA_CPP else "gptq")


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
        print_table(make_cells(arguments), arguments.cpu_only, arguments.rounds)
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
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="turns of each engine, in new processes; also medians (1)"
    )
    parser.add_argument("--cpu-only", action="store_true", help="do not use a GPU")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.cpu_only = arguments.cpu_only or not torch.cuda.is_available()
    if arguments.generate is None:
        arguments.generate = 32 if arguments.cpu_only else 2048
    for name in ("context", "generate", "repeat", "rounds"):
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
        name = missing.pop()
        package = LLAMA_CPP[name].replace("llama_cpp", "llama-cpp-python")
        raise ValueError(
            f"{name} runs on the CPU only and needs `pip install {package} gguf`: add --cpu-only, or remove it from "
            "--engines."
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
        if engine in OURS or BITS[precision] >= 16 or (engine in LLAMA_CPP and not is_checkpoint)
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
    def is_installed(engine: str) -> bool:
        return cpu_only and all(importlib.util.find_spec(name) for name in (LLAMA_CPP[engine], "gguf"))

    return [engine for engine in ENGINES if engine not in LLAMA_CPP or is_installed(engine)]


def print_table(rows: list[Cell], cpu_only: bool, rounds: int) -> None:
    show_status("Measuring memory bandwidth ...")
    device = run("device", None, None, cpu_only)
    context, generate = rows[0].context, rows[0].generate
    show_status("")
    bandwidth = f"memory bandwidth {device['bandwidth'] / 1e9:.0f} GB/s"
    print(f"{device['name']}, torch {torch.__version__}, {bandwidth}. {context} + {generate} tokens.\n")
    names = ["tok/s", "incl. prompt", "memory, GB", "weights, GB", "of bandwidth"]
    published = {cell: published_figures(cell) for cell in rows}
    if any(speed for speed, _ in published.values()):
        names.insert(2, "published")
    if any(memory for _, memory in published.values()):
        names.insert(-2, "published, GB")
    if context > 1:
        names.insert(1, "prompt, tok/s")
    print("| | weights | engine | " + " | ".join(names) + " |\n|---|---|---|" + "---:|" * len(names), flush=True)
    for (model, precision), group in itertools.groupby(rows, key=lambda cell: (cell.model, cell.precision)):
        with tempfile.TemporaryDirectory() as folder:
            measured = measure_in_turns(list(group), rounds, Path(folder), device, cpu_only)
        for cell, figures in measured.items():
            label = f"{Path(model).name} | {precision}"
            if isinstance(figures, MeasurementError):
                print(f"| {label} | {cell.engine} | {figures} |" + " |" * (len(names) - 1), flush=True)
                continue
            kernel = "" if figures["kernel"] in (None, "Linear") else f", {figures['kernel']}"
            columns = {
                "tok/s": figures["speed"],
                "prompt, tok/s": figures["prompt_speed"],
                "incl. prompt": figures["whole_speed"],
                "published": published[cell][0],
                "memory, GB": figures["peak"] and figures["peak"] / 1e9,
                "published, GB": published[cell][1],
                "weights, GB": figures["read"] / 1e9,
            }
            texts = {name: "" if value is None else f"{value:.2f}" for name, value in columns.items()}
            share = figures["speed"] and f"{figures['speed'] * figures['read'] / device['bandwidth']:.0%}"
            texts["of bandwidth"] = share or ""
            values = " | ".join(texts[name] for name in names)
            print(f"| {label} | {cell.engine}{kernel} | {values} |", flush=True)


def published_figures(cell: Cell) -> tuple[float | None, float | None]:
    """Return tokens per second, including the prompt, and GB; None for cells that were not published."""
    speeds = PUBLISHED_SPEEDS.get(cell.generate, {}) if cell.context in (1, 2048) else {}
    memory = PUBLISHED_MEMORY.get((cell.context, cell.generate), {})
    return tuple(figures.get(cell.size, {}).get(cell.precision) for figures in (speeds, memory))


def measure_in_turns(
    cells: list[Cell], rounds: int, folder: Path, device: dict, cpu_only: bool
) -> dict[Cell, dict | MeasurementError]:
    """Measure cells in turns, each in a new process, and return their medians, or why a cell was not measured.

    Args:
        folder: for the files that the engines read.
    """
    turns: dict[Cell, list[dict]] = {cell: [] for cell in cells}
    failures: dict[Cell, MeasurementError] = {}
    for number in range(rounds):
        for cell in cells:
            if cell in failures:
                continue
            turn = f", turn {number + 1} of {rounds}" if rounds > 1 else ""
            step = f"{Path(cell.model).name} {cell.precision}, {cell.engine}{turn}: "
            try:
                turns[cell].append(measure_in_child(cell, folder, device, cpu_only, step))
            except MeasurementError as failure:
                failures[cell] = failure
            show_status("")
    return {cell: failures.get(cell) or medians(turns[cell]) for cell in cells}


def medians(turns: list[dict]) -> dict:
    """Return the median of each figure that is a number, and otherwise the first one."""
    return {
        name: statistics.median(turn[name] for turn in turns) if isinstance(first, int | float) else first
        for name, first in turns[0].items()
    }


def measure_in_child(cell: Cell, parent: Path, device: dict, cpu_only: bool, step: str) -> dict:
    """Measure a cell, with its file in a folder of `parent`; raises MeasurementError."""
    needed, free = needed_bytes(cell, cpu_only), device["free"] if not cpu_only else free_memory()
    if free is not None and needed > free:
        raise MeasurementError(f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} free")
    folder = cell.file_folder(parent)
    if cell.needs_file and not folder.exists():
        show_status(f"{step}writing weights ...")
        if (room := shutil.disk_usage(parent).free) < needed:
            raise MeasurementError(
                f"needs about {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, {room / 1e9:.1f} free"
            )
        folder.mkdir()
        try:
            run("write", folder, cell, cpu_only, step)
        except MeasurementError:
            shutil.rmtree(folder)
            raise
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
    if cell.engine in LLAMA_CPP and cell.is_checkpoint:
        weights *= 2  # the loaded and the written copy
    return weights + cache + LIBRARY_BYTES


def free_memory() -> int | None:
    """Return the bytes of available main memory; None on systems other than Linux."""
    return available_bytes() if Path("/proc/meminfo").exists() else None


# ---- one process per task ----


def run(task: str, folder: Path | None, cell: Cell | None, cpu_only: bool, step: str = "") -> dict:
    """Run `run_task` in a separate process, so that its peak memory can be measured, and return its result.

    Raises:
        MeasurementError: the process reported an error or ended without a result.
    """
    environment = dict(os.environ)
    if cpu_only:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, "--task", json.dumps([task, str(folder or ""), cell and asdict(cell)])]
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
    except (OSError, ValueError, MeasurementError) as error:  # CheckpointError is among them
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
    if cell.engine not in LLAMA_CPP:
        with quiet_loading(progress=False):
            write_quantized(cell.model, folder, BITS[cell.precision])
        return {}
    from qwen.export.gguf_file import LazyTensor, write_gguf
    from qwen.export.source import open_checkpoint

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
    # GPTQ checkpoints have a 16-bit embedding and output matrix. xllamacpp ends the process without a vocabulary.
    write_gguf(
        folder / "model.gguf",
        cell.config,
        entries,
        kind,
        output_type=None if kind == "f32" else "bf16",
        source=open_checkpoint(cell.model if cell.is_checkpoint else None, cell.hub),
    )
    return {}


def measure(cell: Cell, folder: Path) -> dict:
    send_message(progress="loading ...")
    load = {"engine": load_engine, "llama.cpp": load_llama_cpp, "xllamacpp": load_xllamacpp}
    with contextlib.ExitStack() as stack:
        with quiet_loading(progress=False):
            times_of, facts = load.get(cell.engine, load_transformers)(cell, folder, stack)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(cell.config.vocab_size, (cell.context,), generator=generator).tolist()
        times_of(ids, min(WARM_UP, cell.generate))
        speeds, prompt_speeds, whole_speeds = [], [], []
        for number in range(cell.repeat):
            times = times_of(ids, cell.generate, Progress(f"decoding {number + 1} of {cell.repeat}"))
            if len(times) != cell.generate + 1:
                raise MeasurementError(f"ended after {len(times) - 1} tokens")
            if cell.generate > 1:
                speeds.append((cell.generate - 1) / (times[-1] - times[1]))
            prompt_speeds.append(cell.context / (times[1] - times[0]))
            whole_speeds.append((cell.context + cell.generate) / (times[-1] - times[0]))
        return {
            "speed": statistics.median(speeds) if speeds else None,
            "prompt_speed": statistics.median(prompt_speeds),
            "whole_speed": statistics.median(whole_speeds),
            "peak": peak_bytes(),
            **facts(),
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


Loaded = tuple[Callable[..., list[float]], Callable[[], dict]]
"""`token_times` of an engine, and a function that returns the weight bytes that a token reads ("read") and the class of
the linear layers ("kernel") where it depends on the machine."""


def load_ours(cell: Cell, folder: Path) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    dtype = DTYPES.get(cell.precision)
    if cell.needs_file:
        return load_model_quietly(folder)
    if cell.is_checkpoint:
        return load_model_quietly(cell.model, hub=cell.hub, **({"dtype": dtype} if dtype else {}))
    return random_model(cell.model, dtype, "cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer()


def load_transformers(cell: Cell, folder: Path, stack: contextlib.ExitStack) -> Loaded:
    model, _ = load_ours(cell, folder)
    if cell.engine == "Qwen2":
        model = as_qwen2(model)
    decode = functools.partial(decode_greedily, model)
    return functools.partial(token_times, decode), functools.partial(model_facts, model)


def load_engine(cell: Cell, folder: Path, stack: contextlib.ExitStack) -> Loaded:
    """Load the model into the server's engine, whose thread calls back for each token."""
    model, tokenizer = load_ours(cell, folder)
    model.generation_config = GenerationConfig()  # without stop words
    cache_tokens = 2 * (cell.context + cell.generate) + 1024
    engine = Engine(model, tokenizer, max_batch_size=1, cache_tokens=cache_tokens, prefix_reuse=False)
    stack.callback(engine.close)
    engine.end_token_ids = frozenset()
    hand_on = TextStream.on_token

    def decode(ids: list[int], tokens: int, on_token: Callable[[], None]) -> list[int]:
        generated = []

        def timed(stream: TextStream, token: SampledToken) -> bool:
            done = hand_on(stream, token)
            generated.append(token.token_id)
            on_token()
            return done

        with mock.patch.object(TextStream, "on_token", timed):
            for _ in engine.start(ids, SamplingParams(max_tokens=tokens, temperature=0.0)):
                pass
        return generated

    return functools.partial(token_times, decode), functools.partial(model_facts, model)


def model_facts(model: PreTrainedModel) -> dict:
    tensors = itertools.chain(model.parameters(), model.buffers())
    read = sum(tensor.nbytes for tensor in tensors) - model.get_input_embeddings().weight.nbytes
    linear = next(layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    return {"read": read, "kernel": type(linear).__name__}


def load_llama_cpp(cell: Cell, folder: Path, stack: contextlib.ExitStack) -> Loaded:
    from llama_cpp import Llama

    path = folder / "model.gguf"
    threads = torch.get_num_threads()
    length = cell.context + cell.generate
    llama = Llama(str(path), n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False)

    def decode(ids: list[int], tokens: int, on_token: Callable[[], None]) -> list[int]:
        llama.reset()  # clears the cached prompt
        generated = []
        for token in itertools.islice(llama.generate(ids, temp=0.0), tokens):
            generated.append(token)
            on_token()
        return generated

    return functools.partial(token_times, decode), functools.partial(gguf_facts, path)


def load_xllamacpp(cell: Cell, folder: Path, stack: contextlib.ExitStack) -> Loaded:
    """Load into llama.cpp's server, in this process and without HTTP. It takes the times itself."""
    import xllamacpp

    path = folder / "model.gguf"
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_parallel = 1
    parameters.n_ctx = cell.context + cell.generate + 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)

    def times_of(ids: list[int], tokens: int, progress: Progress | None = None) -> list[float]:
        request = {"prompt": ids, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        timings = server.handle_completions(request)["timings"]
        first, rest = timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000
        others = max(1, timings["predicted_n"] - 1)
        return [0.0, *(first + rest * number / others for number in range(timings["predicted_n"]))]

    return times_of, functools.partial(gguf_facts, path)


def gguf_facts(path: Path) -> dict:
    from gguf import GGUFReader

    tensors = (tensor for tensor in GGUFReader(path).tensors if tensor.name != "token_embd.weight")
    return {"read": sum(int(tensor.n_bytes) for tensor in tensors), "kernel": None}


if __name__ == "__main__":
    sys.exit(main())
