"""Quantization: what it costs in right answers, and what it gains in speed and memory.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --speed [--shape 7B] [--tokens 2048]

The first scores the bundled chat model on its held-out questions: with GPTQ weights of 8 and 4 bits, made here from the
calibration data of the bundled 4-bit checkpoint, and with the 8-bit key/value cache. The second decodes with models of
a published shape, in turns, each in a process of its own, whose peak memory is its own: what CUDA reserved, or on the
CPU the largest resident size, which loading determines. Prints Markdown tables.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import qwen.quiet  # noqa: F401, I001  before transformers, of which it keeps back the chatter

import torch
from decoding import decode_greedily, token_times
from memory import peak
from random_models import SHAPES, random_model, write_quantized

from checkpoints.recipe.evaluate import all_cases, answer, score
from qwen import QWenLMHeadModel
from qwen.loading import BUNDLED_CHAT, load_model_quietly
from qwen.quiet import quiet_loading

WEIGHTS = {"float32": 32, "bfloat16": 16, "Int8": 8, "Int4": 4}
PROMPT = 16


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="decoding speed and memory instead of right answers")
    parser.add_argument("--shape", choices=SHAPES, default="1.8B")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS)[gpu:])
    parser.add_argument("--tokens", type=int, default=2048 if gpu else 32, help="generated in each decoding")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each kind of weights, in turns")
    parser.add_argument("--repeat", type=int, default=3, help="decodings in each process, after one that warms up")
    parser.add_argument("--cell", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        model = model_of(arguments.shape, arguments.weights[0], Path(arguments.cell))
        print(json.dumps(decode(model, arguments.tokens, arguments.repeat)))
    elif arguments.speed:
        speeds(arguments)
    else:
        scores()


def scores() -> None:
    """Right answers to the held-out questions of the bundled model, and how many points that is from float32."""
    from checkpoints.recipe.quantize import calibration
    from qwen.quantization import quantize

    print("| weights | key/value cache | right | asked | score | difference |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        int8, int4 = Path(work, "int8"), Path(work, "int4")
        samples = calibration(BUNDLED_CHAT)
        for folder, bits in ((int8, 8), (int4, 4)):
            with quiet_loading(progress=False):
                quantize(BUNDLED_CHAT, folder, samples, bits=bits, cpu_only=True)
        exact = None
        for weights, cache, folder, options in (
            ("float32", "float32", BUNDLED_CHAT, {}),
            ("bfloat16", "bfloat16", BUNDLED_CHAT, {"bf16": True}),
            ("Int8", "bfloat16", int8, {}),
            ("Int4", "bfloat16", int4, {}),
            ("float32", "int8", BUNDLED_CHAT, {"int8_cache": True}),
            ("Int4", "int8", int4, {"int8_cache": True}),
        ):
            model, tokenizer = load_model_quietly(folder, cpu_only=True, **options)
            cases = all_cases()
            answer(cases, model, tokenizer)
            right, asked = score(cases)["overall"]
            points = 100 * right / asked
            exact = points if exact is None else exact
            row = (weights, cache, right, asked, f"{points:.1f}%", f"{points - exact:+.1f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def speeds(arguments: argparse.Namespace) -> None:
    """Tokens a second of decoding and GB of memory, a row for each kind of weights."""
    rounds: dict[str, list[dict]] = {weights: [] for weights in arguments.weights}
    with tempfile.TemporaryDirectory() as work:
        for weights in arguments.weights:
            if WEIGHTS[weights] <= 8:
                Path(work, weights).mkdir()
                write_quantized(arguments.shape, Path(work, weights), WEIGHTS[weights])
        for _ in range(arguments.rounds):
            for weights, figures in rounds.items():
                command = [sys.executable, __file__, "--shape", arguments.shape, "--weights", weights]
                command += ["--tokens", str(arguments.tokens), "--repeat", str(arguments.repeat)]
                done = subprocess.run([*command, "--cell", str(Path(work, weights))], capture_output=True, text=True)
                if done.returncode != 0:
                    sys.exit(f"{weights} failed:\n{done.stderr[-2000:]}")
                figures.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"| {arguments.shape} | kernel | tok/s | of {arguments.weights[0]} | memory, GB |")
    print("|---|---|---:|---:|---:|")
    base = None
    for weights, figures in rounds.items():
        speed = statistics.median(speed for figure in figures for speed in figure["speeds"])
        base = speed if base is None else base
        memory = max(figure["gigabytes"] for figure in figures)
        print(f"| {weights} | {figures[0]['kernel']} | {speed:.1f} | {speed / base:.1f} | {memory:.2f} |")


def model_of(shape: str, weights: str, folder: Path) -> QWenLMHeadModel:
    """As `load_model` gives it: float weights as they are made here, quantized ones from `folder`."""
    if WEIGHTS[weights] <= 8:
        return load_model_quietly(folder)[0]
    return random_model(shape, getattr(torch, weights), "cuda" if torch.cuda.is_available() else "cpu")


def decode(model: QWenLMHeadModel, tokens: int, repeat: int) -> dict:
    """Tokens a second after the first token in each of `repeat` greedy decodings of one row, and peak memory."""
    ids = list(range(100, 100 + PROMPT))
    found = []
    for _ in range(1 + repeat):
        times = token_times(functools.partial(decode_greedily, model), ids, tokens)
        found.append((tokens - 1) / (times[-1] - times[1]))
    kernel = type(model.transformer.h[0].attn.c_attn).__name__
    return {"speeds": found[1:], "gigabytes": peak() / 1e9, "kernel": kernel}


if __name__ == "__main__":
    main()
