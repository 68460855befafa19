"""Measures the accuracy of quantized models.

    python -m benchmarks.quantization

Scores the bundled chat model on its held-out questions with 8-bit and 4-bit GPTQ weights, quantized here with the
calibration data of the bundled 4-bit checkpoint, and with the 8-bit key/value cache. Prints a Markdown table.
inference.py measures speed and memory.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

try:
    from checkpoints.recipe.evaluate import all_cases, answer, score
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e . && python -m benchmarks.quantization")

from qwen.checkpoint.loading import BUNDLED_CHAT, load_model_quietly, load_tokenizer
from qwen.data.conversation_file import ConversationFile
from qwen.quantization import calibration_samples, quantize
from qwen.quiet import quiet_loading


def main() -> None:
    """Print the correct answers to the held-out questions, and the difference to float32 in percentage points."""
    print("| weights | key/value cache | correct | questions | score | difference |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        int8, int4 = Path(work, "int8"), Path(work, "int4")
        conversations = ConversationFile(BUNDLED_CHAT / "calibration.json")
        samples = calibration_samples(conversations, load_tokenizer(BUNDLED_CHAT), max_length=1024)
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
            correct, total = score(cases)["overall"]
            points = 100 * correct / total
            exact = points if exact is None else exact
            row = (weights, cache, correct, total, f"{points:.1f}%", f"{points - exact:+.1f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
