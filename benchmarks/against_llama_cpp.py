"""Compares greedy tokens and decoding speed with llama.cpp, an independent implementation of the same architecture.

    pip install llama-cpp-python gguf      # builds llama.cpp; 8 minutes on 2 cores
    python benchmarks/against_llama_cpp.py [-c CHECKPOINT] [--new-tokens 48]

Writes the weights to a temporary GGUF file in float32, so that both use the same values. llama.cpp does not support
dynamic NTK and LogN: prompt and reply must fit into the trained length. Prints a Markdown table; the exit status is 1
if a token differs.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

try:
    from qwen import make_context
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .")

import torch
from llama_cpp import Llama

from qwen.checkpoint.loading import load_model
from qwen.export import export_gguf

PROMPTS = [
    "Hello!",
    "你好，你是谁？",
    "What is 47 + 38?",
    "请问 91 减 27 等于几？",
    "My name is Alice. Please remember it.",
    "Tell me about this repository.",
    "Which checkpoints are there?",
    "谢谢，再见！",
]


def llama_greedy(llama: Llama, ids: list[int], new_tokens: int, ends: set[int]) -> list[int]:
    llama.reset()
    llama.eval(ids)
    tokens = []
    while len(tokens) < new_tokens:
        tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        if tokens[-1] in ends:
            break
        llama.eval(tokens[-1:])
    return tokens


def our_greedy(model, ids: list[int], new_tokens: int, ends: set[int]) -> list[int]:
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, top_p=None, top_k=None, eos_token_id=list(ends)
    )
    return output[0, len(ids) :].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--checkpoint-path", help="chat checkpoint (default: the bundled one)")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=3, help="repetitions; the median time is reported")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.checkpoint_path, cpu_only=True, fp32=True)
    ends = {tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id}
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export_gguf(arguments.checkpoint_path, path, kind="f32")
        llama = Llama(
            str(path), n_ctx=model.config.seq_length, n_threads=torch.get_num_threads(), logits_all=True, verbose=False
        )
        print("| prompt | tokens | equal | ours, tok/s | llama.cpp, tok/s |\n|---|---|---|---|---|")
        for prompt in PROMPTS:
            ids = make_context(tokenizer, prompt, system="You are a helpful assistant.")[1]
            seconds = {our_greedy: [], llama_greedy: []}
            for _ in range(arguments.runs):
                results = []
                for decode, engine in ((our_greedy, model), (llama_greedy, llama)):
                    start = time.perf_counter()
                    results.append(decode(engine, ids, arguments.new_tokens, ends))
                    seconds[decode].append(time.perf_counter() - start)
            ours, theirs = results
            failures += ours != theirs
            rates = [len(ours) / statistics.median(times) for times in seconds.values()]
            print(f"| {prompt} | {len(ours)} | {'yes' if ours == theirs else 'NO'} | {rates[0]:.0f} | {rates[1]:.0f} |")
    print(f"\nSame greedy tokens for {len(PROMPTS) - failures} of {len(PROMPTS)} prompts.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
