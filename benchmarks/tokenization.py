"""Throughput of QWenTokenizer against bare tiktoken, on one text, in one process.

    python benchmarks/tokenization.py [--megabytes 10] [--runs 5] [--vocab qwen.tiktoken]

The text is half source code of the standard library, half generated Chinese. The ways take turns, so that a slow moment
of the machine falls on all of them, and each is given by its median. All of them run on one thread, so the time is that
of the process: other work on the machine does not count.
"""

import argparse
import importlib.util
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

try:
    from qwen.model.tokenization_qwen import QWenTokenizer
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the folder of the repository: pip install -e .")


def published_vocabulary() -> str:
    """The path of the vocabulary that the PyPI package dashscope ships."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None:
        sys.exit("No vocabulary: `pip install dashscope`, or name a file with --vocab.")
    return str(Path(spec.origin).parent / "resources" / "qwen.tiktoken")


def sample_text(size: int) -> str:
    """A text of `size` bytes in UTF-8: Python sources, then sentences of random Chinese characters."""
    code = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if len(code) < size // 2 and "site-packages" not in path.parts:
            code += path.read_bytes()
    code = code[: size // 2].decode(errors="ignore")
    rng = random.Random(0)
    common = [chr(rng.randrange(0x4E00, 0x9FA6)) for _ in range(3000)]
    chinese = []
    missing = size - len(code.encode())
    while missing > 0:
        sentence = "".join(rng.choices(common, k=rng.randrange(4, 30))) + rng.choice("，。！？\n")
        chinese.append(sentence)
        missing -= len(sentence.encode())
    return code + "".join(chinese)


def interleaved(ways: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Run all ways in turn, `runs` times, and return the median CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10, help="size of the text (default 10)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each way (default 5)")
    parser.add_argument("--vocab", help="a tiktoken file (default: the one of dashscope)")
    args = parser.parse_args()

    tokenizer = QWenTokenizer(args.vocab or published_vocabulary())
    bare = tokenizer.tokenizer
    text = sample_text(int(args.megabytes * 1e6))
    lines = text.splitlines(keepends=True)
    size = len(text.encode())
    everything = set(tokenizer.special_tokens)

    whole = {
        "tiktoken, encode(text)": lambda: bare.encode(text, allowed_special=everything, disallowed_special=()),
        "QWenTokenizer, encode(text)": lambda: tokenizer.encode(text),
        "QWenTokenizer, tokenizer(text)": lambda: tokenizer(text)["input_ids"],
    }
    batch = {
        "tiktoken, encode(line) each": lambda: [bare.encode(line, disallowed_special=()) for line in lines],
        "QWenTokenizer, tokenizer(lines)": lambda: tokenizer(lines)["input_ids"],
    }
    expected = bare.encode(text, allowed_special=everything, disallowed_special=())
    if not tokenizer.encode(text) == tokenizer(text)["input_ids"] == expected:
        sys.exit("The ids differ from tiktoken's: the times would compare different work.")

    print(f"{size / 1e6:.1f} MB, {len(expected):,} tokens, {len(lines):,} lines, median of {args.runs} runs\n")
    print("| way | MB/s | tokens/s | of bare tiktoken |")
    print("|---|---:|---:|---:|")
    for ways in (whole, batch):
        seconds = interleaved(ways, args.runs)
        reference = next(iter(seconds.values()))
        for name, value in seconds.items():
            print(f"| {name} | {size / value / 1e6:.2f} | {len(expected) / value:,.0f} | {reference / value:.1%} |")


if __name__ == "__main__":
    main()
