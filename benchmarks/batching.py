"""Compares eight conversations in one batch with the same eight one by one, in float32 and bfloat16.

    python benchmarks/batching.py [-c CHECKPOINT] [--batch 8] [--new-tokens 64]

Every conversation generates the same number of tokens. The two modes alternate; medians are reported. Prints a Markdown
table of new tokens per second.
"""

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

try:
    from qwen.checkpoint.loading import load_model
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch

QUESTIONS = [
    "Hello, who are you?",
    "What is 12 + 30?",
    "你好，你能做什么？",
    "Tell me about this repository.",
    "请问 45 加 17 等于几？",
    "How do I start the chat?",
    "Which checkpoints are there?",
    "谢谢！",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", help="chat checkpoint (default: the bundled one)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5, help="repetitions; the median is reported")
    parser.add_argument("--cpu-only", action="store_true")
    arguments = parser.parse_args()

    queries = [QUESTIONS[i % len(QUESTIONS)] for i in range(arguments.batch)]
    length = arguments.new_tokens
    settings = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
    print("| precision | one by one, tok/s | together, tok/s | ratio |\n|---|---|---|---|")
    for precision in ("fp32", "bf16"):
        model, tokenizer = load_model(arguments.checkpoint_path, cpu_only=arguments.cpu_only, **{precision: True})

        def one_by_one(model=model, tokenizer=tokenizer):
            for query in queries:
                model.chat(tokenizer, query, **settings)

        def together(model=model, tokenizer=tokenizer):
            model.chat_batch(tokenizer, queries, **settings)

        seconds = {one_by_one: [], together: []}
        together()  # warm-up
        for _ in range(arguments.runs):
            for run, times in seconds.items():
                start = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        alone, batch = (statistics.median(times) for times in seconds.values())
        tokens = arguments.batch * length
        print(f"| {precision} | {tokens / alone:.0f} | {tokens / batch:.0f} | {alone / batch:.1f} |")


if __name__ == "__main__":
    main()
