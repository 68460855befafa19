"""Measures memory and time of fine-tuning by method and length, and throughput compared with transformers' Qwen2.

    python benchmarks/finetune.py [--shape 7B] [--methods lora qlora …] [--lengths 256 512 …]
    python benchmarks/finetune.py --beside-qwen2 [--shape …]

Models have random weights and samples random tokens, all of them trained on; this does not change the work. Batch 1,
accumulation 8, activation checkpointing, as in the published tables. Each cell runs in a separate process. Its peak
memory is what CUDA reserved or, on the CPU, the maximum resident size. Times are medians of the steps after the first.
Prints Markdown tables.
"""

import argparse
import contextlib
import json
import os
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

from qwen import QWenLMHeadModel
from qwen.data.datasets import Collator
from qwen.export.qwen2 import qwen2_config
from qwen.finetuning.arguments import LoraArguments, TrainingArguments, parse
from qwen.finetuning.model import EMBEDDINGS, add_lora, load_for_training
from qwen.finetuning.trainer import SupervisedTrainer

METHODS = {"lora": "LoRA", "lora-embeddings": "LoRA (emb)", "qlora": "Q-LoRA", "full": "full"}
PRECISIONS = {"lora": "bf16", "lora-embeddings": "bf16", "qlora": "fp16", "full": "bf16"}
ACCUMULATION = 8


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
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(cell(arguments.shape, arguments.cell[0], int(arguments.cell[1]), arguments.steps)))
    elif arguments.beside_qwen2:
        beside_qwen2(arguments.shape, arguments.lengths, arguments.steps)
    else:
        table(arguments)


def table(arguments: argparse.Namespace) -> None:
    """Print GB of peak memory / seconds per iteration, one row per method and one column per length."""
    print("| " + " | ".join([arguments.shape, *map(str, arguments.lengths)]) + " |")
    print("|" + "---|" * (len(arguments.lengths) + 1), flush=True)
    for method in arguments.methods:
        cells = []
        for length in arguments.lengths:
            command = [sys.executable, __file__, "--shape", arguments.shape, "--steps", str(arguments.steps)]
            done = subprocess.run([*command, "--cell", method, str(length)], capture_output=True, text=True)
            if done.returncode == 0:
                figures = json.loads(done.stdout.splitlines()[-1])
                cells.append(f"{figures['gigabytes']:.1f} / {figures['seconds']:.1f}")
            else:
                cells.append("out of memory" if "OutOfMemory" in done.stderr else "failed")
                print(done.stderr[-2000:], file=sys.stderr)
        print(f"| {METHODS[method]} | " + " | ".join(cells) + " |", flush=True)


def cell(shape: str, method: str, length: int, steps: int) -> dict[str, float]:
    """Return peak memory in GB and seconds per iteration for one method and length."""
    with tempfile.TemporaryDirectory() as folder:
        model = quantized_model(shape, Path(folder)) if method == "qlora" else random_model(shape, method)
        if method in ("lora", "lora-embeddings"):
            modules_to_save = EMBEDDINGS if method == "lora-embeddings" else []
            model = add_lora(model, LoraArguments(), modules_to_save)
        seconds = train(model, length, steps, settings(method, folder), SupervisedTrainer)
    return {"gigabytes": peak_bytes() / 1e9, "seconds": statistics.median(seconds)}


def beside_qwen2(shape: str, lengths: list[int], steps: int) -> None:
    """Print tokens/s of both models with `Trainer`, and on half-prompt samples with `SupervisedTrainer` for ours."""
    print("| trained | length | Qwen2, tok/s | this, tok/s | ratio | half prompt: Qwen2 | this | ratio |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for method in ("full", "lora"):
        peer, ours = random_qwen2(shape, method), random_model(shape, method)
        if method == "lora":
            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            peer = add_lora(peer, LoraArguments(lora_target_modules=names), [])
            ours = add_lora(ours, LoraArguments(), [])
        for length in lengths:
            columns = []
            for prompt, trainer in ((0, Trainer), (length // 2, SupervisedTrainer)):  # which skips logits of prompts
                seconds: dict[str, list[float]] = {"peer": [], "ours": []}
                for _ in range(3):  # alternating, so that both see the same machine load
                    with tempfile.TemporaryDirectory() as folder:
                        seconds["peer"] += train(peer, length, steps, settings(method, folder), Trainer, prompt)
                        seconds["ours"] += train(ours, length, steps, settings(method, folder), trainer, prompt)
                speeds = {who: ACCUMULATION * length / statistics.median(times) for who, times in seconds.items()}
                columns += [f"{speeds['peer']:.0f}", f"{speeds['ours']:.0f}", f"{speeds['ours'] / speeds['peer']:.2f}"]
            print(f"| {method} | {length} | " + " | ".join(columns) + " |", flush=True)


def train(
    model: torch.nn.Module,
    length: int,
    steps: int,
    arguments: TrainingArguments,
    trainer: type[Trainer],
    prompt: int = 0,
) -> list[float]:
    """Return the seconds of each step but the first, on samples of `length` random tokens, `prompt` of them masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 3000, (steps * ACCUMULATION, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    samples = [
        {"input_ids": row, "labels": targets} for row, targets in zip(ids.tolist(), labels.tolist(), strict=True)
    ]
    arguments.max_steps = steps
    timer = StepTimer()
    trainer(model, arguments, data_collator=Collator(0), train_dataset=samples, callbacks=[timer]).train()
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


def settings(method: str, folder: str) -> TrainingArguments:
    """Return the published settings, in half precision on a GPU."""
    precision = {PRECISIONS[method]: True} if torch.cuda.is_available() else {"use_cpu": True}
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ACCUMULATION,
        activation_checkpointing=True,
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **precision,
    )


def random_model(shape: str, method: str) -> QWenLMHeadModel:
    with default_placement(method):
        model = QWenLMHeadModel(config(shape))
    model.config.use_cache = False
    return model


def random_qwen2(shape: str, method: str) -> Qwen2ForCausalLM:
    with default_placement(method):
        model = Qwen2ForCausalLM(qwen2_config(config(shape)))
    model.config.use_cache = False
    return model


@contextlib.contextmanager
def default_placement(method: str) -> Iterator[None]:
    """Create weights on their device; frozen ones in half precision on a GPU, like `load_for_training`."""
    gpu = torch.cuda.is_available()
    torch.set_default_dtype(torch.bfloat16 if gpu and method != "full" else torch.float32)
    try:
        with torch.device("cuda" if gpu else "cpu"):
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
