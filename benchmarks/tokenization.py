"""Compares the throughput of QWenTokenizer with tiktoken.

    python benchmarks/tokenization.py [--megabytes 10] [--runs 5] [--vocab qwen.tiktoken]

The text is half source code of the standard library, half generated Chinese. Methods alternate, so that other load on
the machine affects all of them, and medians are reported. All run on one thread, so processor time is measured, which
excludes other processes.
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
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")


def published_vocabulary() -> str:
    """Return the path of the vocabulary in the PyPI package dashscope."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None:
        sys.exit("No vocabulary found: `pip install dashscope`, or give a file with --vocab.")
    return str(Path(spec.origin).parent / "resources" / "qwen.tiktoken")


def sample_text(size: int) -> str:
    """Return a text of `size` UTF-8 bytes: Python sources, then sentences of random Chinese characters."""
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


def median_seconds(methods: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Run the methods alternately, `runs` times each, and return the median CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(runs):
        for name, method in methods.items():
            start = time.process_time()
            method()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=10, help="size of the text (default 10)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each method (default 5)")
    parser.add_argument("--vocab", help="tiktoken file (default: that of dashscope)")
    args = parser.parse_args()

    tokenizer = QWenTokenizer(args.vocab or published_vocabulary())
    encoding = tokenizer.tokenizer
    text = sample_text(int(args.megabytes * 1e6))
    lines = text.splitlines(keepends=True)
    size = len(text.encode())
    special = set(tokenizer.special_tokens)

    single_text = {
        "tiktoken, encode(text)": lambda: encoding.encode(text, allowed_special=special, disallowed_special=()),
        "QWenTokenizer, encode(text)": lambda: tokenizer.encode(text),
        "QWenTokenizer, tokenizer(text)": lambda: tokenizer(text)["input_ids"],
    }
    batch = {
        "tiktoken, encode(line) each": lambda: [encoding.encode(line, disallowed_special=()) for line in lines],
        "QWenTokenizer, tokenizer(lines)": lambda: tokenizer(lines)["input_ids"],
    }
    expected = encoding.encode(text, allowed_special=special, disallowed_special=())
    if not tokenizer.encode(text) == tokenizer(text)["input_ids"] == expected:
        sys.exit("The ids differ from those of tiktoken: the times would not be comparable.")

    print(f"{size / 1e6:.1f} MB, {len(expected):,} tokens, {len(lines):,} lines, median of {args.runs} runs\n")
    print("| method | MB/s | tokens/s | relative to tiktoken |")
    print("|---|---:|---:|---:|")
    for methods in (single_text, batch):
        seconds = median_seconds(methods, args.runs)
        reference = next(iter(seconds.values()))
        for name, value in seconds.items():
            print(f"| {name} | {size / value / 1e6:.2f} | {len(expected) / value:,.0f} | {reference / value:.1%} |")


if __name__ == "__main__":
    main()
