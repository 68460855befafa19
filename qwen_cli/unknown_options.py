"""Says what to use instead of an option that a command does not have.

The options are those of the published documents, of FastChat and vLLM, which these documents used for serving, and of
the converter of qwen.cpp.
"""

import difflib
from collections.abc import Collection, Sequence

_MODEL = ("--checkpoint-path", "--model_name_or_path")
# Option of another program → options here; the first one that a command has is named.
RENAMED: dict[str, tuple[str, ...]] = {
    "--model": _MODEL,
    "--model-path": _MODEL,
    "--model-name-or-path": _MODEL,
    "--checkpoint-path": _MODEL,
    "-c": _MODEL,
    "-i": _MODEL,
    "-m": _MODEL,
    "-d": ("--data_path",),
    "-t": ("--type",),
    "--host": ("--server-name",),
    "--port": ("--server-port",),
    "--use-cache-quantization": ("--int8-cache",),
    "--use-cache-kernel": ("--int8-cache",),
    "--gpus": ("--tensor-parallel-size",),
    "--num-gpus": ("--tensor-parallel-size",),
}
_GPUS = "all visible GPUs are used; CUDA_VISIBLE_DEVICES=0,1 before the command selects some"
_PARALLEL = "pass it to `vllm serve` instead, see docs/deployment.md"
_PRECISION = (
    "the device decides on the precision; in Python, from_pretrained takes bf16=True, fp16=True and fp32=True, and "
    "`vllm serve` takes --dtype"
)
# Option without a counterpart → what to do.
REMOVED: dict[str, str] = {
    "--gpus": _GPUS,
    "--num-gpus": _GPUS,
    "--tensor-parallel-size": _PARALLEL,
    "--pipeline-parallel-size": _PARALLEL,
    "--dtype": _PRECISION,
    "--bf16": _PRECISION,
    "--fp16": _PRECISION,
    "--device": "a GPU is used if there is one; --cpu-only avoids it",
    "--quantization": "omit it: the checkpoint says if it is in 4 or 8 bits; `qwen quantize` makes such ones",
    "--trust-remote-code": "omit it: the code beside the weights is not used",
    "--use-flash-attn": "omit it: flash attention is used where it is installed and runs",
}


def unknown_options_message(words: Sequence[str], known: Collection[str]) -> str:
    """Return the error for words that a parser does not accept.

    Args:
        words: unknown options, with their values.
        known: options of the parser.
    """
    hints = []
    for option in (word.partition("=")[0] for word in words if word.startswith("-")):
        hint = _hint(option, known)
        if hint is not None:
            hints.append(f"{option}: {hint}")
    return "; ".join([f"unrecognized arguments: {' '.join(words)}", *hints])


def _hint(option: str, known: Collection[str]) -> str | None:
    spelling = option.replace("_", "-")
    by_spelling = {other.replace("_", "-"): other for other in known}
    for replacement in (by_spelling.get(spelling), *RENAMED.get(spelling, ())):
        if replacement in known:
            return f"use {replacement}"
    if spelling in REMOVED:
        return REMOVED[spelling]
    near = difflib.get_close_matches(option, known, n=1)
    return f"did you mean {near[0]}?" if near else None
