"""Measures memory and time of fine-tuning by method and length, and throughput compared with transformers' Qwen2.

    python benchmarks/finetune.py [--shape 7B] [--methods lora qlora …] [--lengths 256 512 …]
    python benchmarks/finetune.py --beside-qwen2 [--shape …]
    python benchmarks/finetune.py --baseline OLD [--shape 1.8B --layers 4 --precision fp32 --accumulation 1]

Models have random weights and samples random tokens, all of them trained on; this does not change the work. Batch 1,
accumulation 8, activation checkpointing, as in the published tables. Each cell runs in a separate process. Its peak
memory is what CUDA reserved or, on the CPU, the maximum resident size. Times are medians of the steps after the first.
--baseline compares with the code of another folder, for example a `git worktree`, in turns; the share of the loss is
the time of the loss of as many positions alone, forward and backward. Prints Markdown tables.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

try:
    from qwen_cli.console import quiet_imports

    quiet_imports()  # before transformers is imported
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch
from memory import peak_bytes
from random_models import SHAPES, config, write_quantized
from transformers import Qwen2ForCausalLM, Trainer, TrainerCallback

from qwen import QWenConfig, QWenLMHeadModel
from qwen.data.datasets import Collator
from qwen.export.qwen2 import qwen2_config
from qwen.finetuning.arguments import LoraArguments, TrainingArguments, parse
from qwen.finetuning.model import EMBEDDINGS, add_lora, load_for_training
from qwen.finetuning.trainer import SupervisedTrainer

METHODS = {"lora": "LoRA", "lora-embeddings": "LoRA (emb)", "qlora": "Q-LoRA", "full": "full"}
PRECISIONS = {"lora": "bf16", "lora-embeddings": "bf16", "qlora": "fp16", "full": "bf16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.8B" if gpu else "small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096, 8192] if gpu else [256, 512, 1024]
    )
    parser.add_argument("--steps", type=int, default=4, help="steps per cell; the first is not counted")
    parser.add_argument("--beside-qwen2", action="store_true", help="throughput compared with transformers' Qwen2")
    parser.add_argument("--layers", type=int, help="layers of the shape (default: all)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="default: fp32 without a GPU")
    parser.add_argument("--accumulation", type=int, default=8, help="rows per step")
    parser.add_argument("--baseline", metavar="FOLDER", help="repository of another version, to compare with")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(cell(arguments.cell[0], int(arguments.cell[1]), arguments)))
    elif arguments.baseline:
        beside_baseline(arguments)
    elif arguments.beside_qwen2:
        beside_qwen2(arguments)
    else:
        table(arguments)


def table(arguments: argparse.Namespace) -> None:
    """Print GB of peak memory / seconds per iteration, one row per method and one column per length."""
    print("| " + " | ".join([arguments.shape, *map(str, arguments.lengths)]) + " |")
    print("|" + "---|" * (len(arguments.lengths) + 1), flush=True)
    for method in arguments.methods:
        cells = []
        for length in arguments.lengths:
            figures = run_cell(method, length, arguments)
            cells.append(
                figures if isinstance(figures, str) else f"{figures['gigabytes']:.1f} / {figures['seconds']:.1f}"
            )
        print(f"| {METHODS[method]} | " + " | ".join(cells) + " |", flush=True)


def beside_baseline(arguments: argparse.Namespace) -> None:
    """Print seconds a step, peak memory and the share of the loss of two versions, one after the other in each cell."""
    print("| trained | length | s/step: before | after | ratio | GB: before | after | ratio | loss: before | after |")
    print("|" + "---|" * 10, flush=True)
    for method in arguments.methods:
        for length in arguments.lengths:
            both = [run_cell(method, length, arguments, Path(root)) for root in (arguments.baseline, ROOT)]
            cells = []
            for name in ("seconds", "gigabytes"):
                cells += [each if isinstance(each, str) else f"{each[name]:.2f}" for each in both]
                known = [each[name] for each in both if not isinstance(each, str)]
                cells.append(f"{known[1] / known[0]:.2f}" if len(known) == 2 else "")
            cells += ["" if isinstance(each, str) else f"{each['loss'] / each['seconds']:.0%}" for each in both]
            print(f"| {METHODS[method]} | {length} | " + " | ".join(cells) + " |", flush=True)


def run_cell(method: str, length: int, arguments: argparse.Namespace, root: Path = ROOT) -> dict[str, float] | str:
    """Return the figures of `cell` in a process of its own, with the code in a folder; or why there are none."""
    command = [sys.executable, __file__, "--cell", method, str(length)]
    for name in ("shape", "steps", "layers", "precision", "accumulation"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemory" in done.stderr or done.returncode == -signal.SIGKILL:  # by CUDA, or by the system
        return "out of memory"
    print(done.stderr[-2000:], file=sys.stderr)
    return "failed"


def cell(method: str, length: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Return peak memory in GB, seconds per iteration, and seconds of its loss, for one method and length."""
    with tempfile.TemporaryDirectory() as folder:
        model = quantized_model(arguments.shape, Path(folder)) if method == "qlora" else random_model(method, arguments)
        if method in ("lora", "lora-embeddings"):
            modules_to_save = EMBEDDINGS if method == "lora-embeddings" else []
            model = add_lora(model, LoraArguments(), modules_to_save)
        seconds = train(model, length, settings(method, folder, arguments), SupervisedTrainer, arguments)
    figures = {"gigabytes": peak_bytes() / 1e9, "seconds": statistics.median(seconds)}
    return figures | {"loss": arguments.accumulation * loss_seconds(model, length, precision_of(method, arguments))}


def loss_seconds(model: torch.nn.Module, length: int, precision: str) -> float:
    """Return the seconds of the loss of as many positions alone, forward and backward."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    weight = network.transformer.ln_f.weight
    hidden = torch.randn(1, length, len(weight), device=weight.device, dtype=DTYPES[precision], requires_grad=True)
    labels = torch.randint(0, 3000, (1, length), device=weight.device)
    start = synchronized_time()
    with torch.autocast(weight.device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        if hasattr(network, "loss_without_logits"):
            loss = network.loss_without_logits(hidden, shift_labels=labels)
        else:
            loss = network.loss_function(network.lm_head(hidden), None, network.config.vocab_size, shift_labels=labels)
    loss.backward()
    return synchronized_time() - start


def beside_qwen2(arguments: argparse.Namespace) -> None:
    """Print tokens/s of both models with `Trainer`, and on half-prompt samples with `SupervisedTrainer` for ours."""
    print("| trained | length | Qwen2, tok/s | this, tok/s | ratio | half prompt: Qwen2 | this | ratio |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for method in ("full", "lora"):
        peer, ours = random_qwen2(method, arguments), random_model(method, arguments)
        if method == "lora":
            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            peer = add_lora(peer, LoraArguments(lora_target_modules=names), [])
            ours = add_lora(ours, LoraArguments(), [])
        for length in arguments.lengths:
            columns = []
            for prompt, trainer in ((0, Trainer), (length // 2, SupervisedTrainer)):  # which skips logits
                seconds: dict[str, list[float]] = {"peer": [], "ours": []}
                for _ in range(3):  # alternating, so that both see the same machine load
                    for who, model, kind in (("peer", peer, Trainer), ("ours", ours, trainer)):
                        with tempfile.TemporaryDirectory() as folder:
                            options = settings(method, folder, arguments)
                            seconds[who] += train(model, length, options, kind, arguments, prompt)
                tokens = arguments.accumulation * length
                speeds = {who: tokens / statistics.median(times) for who, times in seconds.items()}
                columns += [f"{speeds['peer']:.0f}", f"{speeds['ours']:.0f}", f"{speeds['ours'] / speeds['peer']:.2f}"]
            print(f"| {method} | {length} | " + " | ".join(columns) + " |", flush=True)


def train(
    model: torch.nn.Module,
    length: int,
    options: TrainingArguments,
    trainer: type[Trainer],
    arguments: argparse.Namespace,
    prompt: int = 0,
) -> list[float]:
    """Return the seconds of each step but the first, on samples of `length` random tokens, `prompt` of them masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 3000, (arguments.steps * arguments.accumulation, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    samples = [
        {"input_ids": row, "labels": targets} for row, targets in zip(ids.tolist(), labels.tolist(), strict=True)
    ]
    options.max_steps = arguments.steps
    timer = StepTimer()
    trainer(model, options, data_collator=Collator(0), train_dataset=samples, callbacks=[timer]).train()
    return timer.seconds[1:]


class StepTimer(TrainerCallback):
    """Records the seconds of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.start = synchronized_time()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(synchronized_time() - self.start)


def synchronized_time() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def precision_of(method: str, arguments: argparse.Namespace) -> str:
    """Return the precision that was asked for, or the published one on a GPU."""
    return arguments.precision or (PRECISIONS[method] if torch.cuda.is_available() else "fp32")


def settings(method: str, folder: str, arguments: argparse.Namespace) -> TrainingArguments:
    """Return the published settings."""
    precision = precision_of(method, arguments)
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=arguments.accumulation,
        activation_checkpointing=True,
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
    )


def random_model(method: str, arguments: argparse.Namespace) -> QWenLMHeadModel:
    with default_placement(method, arguments):
        model = QWenLMHeadModel(shape_config(arguments))
    model.config.use_cache = False
    return model


def random_qwen2(method: str, arguments: argparse.Namespace) -> Qwen2ForCausalLM:
    with default_placement(method, arguments):
        model = Qwen2ForCausalLM(qwen2_config(shape_config(arguments)))
    model.config.use_cache = False
    return model


def shape_config(arguments: argparse.Namespace) -> QWenConfig:
    result = config(arguments.shape)
    result.num_hidden_layers = arguments.layers or result.num_hidden_layers
    return result


@contextlib.contextmanager
def default_placement(method: str, arguments: argparse.Namespace) -> Iterator[None]:
    """Create weights on their device; frozen ones in half precision if it trains in one, like `load_for_training`."""
    torch.set_default_dtype(torch.float32 if method == "full" else DTYPES[precision_of(method, arguments)])
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def quantized_model(shape: str, folder: Path) -> torch.nn.Module:
    """Load a GPTQ checkpoint of random integers like a real one."""
    write_quantized(shape, folder)
    half = ["--fp16"] if torch.cuda.is_available() else []
    argv = ["--q_lora", "--model_name_or_path", str(folder), "--data_path", "-", "--output_dir", str(folder), *half]
    return load_for_training(parse(argv)[0])[0]


if __name__ == "__main__":
    main()
