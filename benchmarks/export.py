"""Measures time, memory and exactness of exports of the published shapes.

    python benchmarks/export.py [--sizes 1.8B 7B 14B 72B] [--layers 2]

Each shape has random weights in bfloat16, few layers, and files of the size of its largest tensor. The export runs in a
separate process; its memory is the peak of that process minus what it used after imports, also given relative to the
largest weight file. Then both networks read the same 64 tokens in float32. Prints a Markdown table; the exit status is
1 if memory reaches the size of two files, or if logits differ by more than 1e-4 of the largest logit.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

try:
    from qwen_cli.console import quiet_imports

    quiet_imports()  # before transformers is imported
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch
from memory import resident_bytes
from random_models import SHAPES, write_checkpoint
from transformers import Qwen2ForCausalLM

from qwen import QWenLMHeadModel
from qwen.export import export_gguf, export_qwen2
from qwen.quiet import quiet_loading


def export(kind: str, source: Path, target: Path, results: multiprocessing.Queue) -> None:
    """Export, in a separate process, and put the seconds and the memory growth in bytes into `results`."""
    with quiet_loading(progress=False):
        before, start = resident_bytes("VmRSS"), time.perf_counter()
        if kind == "Qwen2":
            export_qwen2(source, target)
        else:
            export_gguf(source, target, kind="f16")
        results.put((time.perf_counter() - start, resident_bytes("VmHWM") - before))


def logits(model_class: type, folder: Path) -> torch.Tensor:
    with quiet_loading(progress=False):
        model = model_class.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    ids = torch.randint(3000, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1.8B", "7B", "14B", "72B"])
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    context, failures = multiprocessing.get_context("spawn"), 0
    print("| | format | seconds | memory, GB | largest file, GB | memory / file | max logit difference |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as work:
            source = Path(work) / "source"
            source.mkdir()
            largest = write_checkpoint(size, source, arguments.layers)
            for kind, target in (("Qwen2", Path(work) / "out"), ("GGUF f16", Path(work) / "out.gguf")):
                results = context.Queue()
                process = context.Process(target=export, args=(kind, source, target, results))
                process.start()
                seconds, used = results.get(timeout=1800)
                process.join()
                difference = ""
                if kind == "Qwen2":
                    ours = logits(QWenLMHeadModel, source)
                    relative = ((logits(Qwen2ForCausalLM, target) - ours).abs().max() / ours.abs().max()).item()
                    failures += relative > 1e-4
                    difference = f"{relative:.1e}"
                failures += used >= 2 * largest
                ratio = used / largest
                print(
                    f"| {size} | {kind} | {seconds:.0f} | {used / 1e9:.2f} | {largest / 1e9:.2f} | {ratio:.2f} | "
                    f"{difference} |",
                    flush=True,
                )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
