"""Counts kernel launches and waits of the host per decoded token on a GPU, for each way to decode. Needs no GPU.

    python -m benchmarks.launches
    python -m benchmarks.launches --lines "server, 16 rows, greedy"

The model has the layers of a 7B one and a tiny width, in bfloat16: counts depend on neither width nor machine. Tensors
only pretend to be on a GPU. `tests/support/pretend_cuda.py` says how, and `tests/support/launch_counter.py` what counts
as a launch and as a wait.
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

try:
    from benchmarks.engine_steps import EngineSteps
    from benchmarks.qwen2 import as_qwen2
    from tests.support.cuda_guard import NoGuard
    from tests.support.launch_counter import DeviceWork, count_device_work
    from tests.support.pretend_cuda import pretend_cuda
    from tests.support.varlen_attention import varlen_on_cpu
except ModuleNotFoundError as error:
    sys.exit(f"{error}. In the repository folder, run: pip install -e .[test] && python -m benchmarks.launches")

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from qwen import QWenConfig, QWenLMHeadModel
from qwen.model import kv_cache_qwen
from qwen.serving.engine.decode_step import DecodeStep

VOCABULARY = 512
PROMPT = 20  # tokens
WARM_UP, STEPS = 3, 4  # decoding steps before and while counting
ROWS = 16  # of the server
DEFAULT_SAMPLING = {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.1}  # of the published checkpoints


class Step(NamedTuple):
    """Counts of one decoding step, and the work of several.

    Args:
        captured: of the launches, those that a CUDA graph holds: the host launches them at once.
    """

    launches: float
    waits: float
    work: DeviceWork
    captured: float = 0

    @classmethod
    def mean(cls, work: DeviceWork, captured: DeviceWork | None = None) -> "Step":
        held = 0 if captured is None else sum(captured.launches.values())
        return cls(sum(work.launches.values()) / STEPS, sum(work.waits.values()) / STEPS, work, held / STEPS)


def tiny_model(layers: int, **config: Any) -> QWenLMHeadModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_attention_heads": 2, "kv_channels": 16, "intermediate_size": 64}
    lengths = {"seq_length": 2048, "max_position_embeddings": 8192}
    model = QWenLMHeadModel(QWenConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **shape, **lengths, **config))
    return model.to("cuda", torch.bfloat16).eval()


def generate_step(model: PreTrainedModel, rows: int = 1, padded: bool = False, **settings: Any) -> Step:
    """Count by the difference between a shorter and a longer reply of `generate`."""
    model.generation_config = GenerationConfig()
    ids = torch.randint(VOCABULARY - 1, (rows, PROMPT), generator=torch.Generator().manual_seed(0)).to("cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : PROMPT // 2] = 0
    counts = []
    for tokens in (WARM_UP, WARM_UP + STEPS):
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "eos_token_id": VOCABULARY - 1}
        with count_device_work() as work:
            model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths, **settings)
        counts.append(work)
    return Step.mean(counts[1].since(counts[0]))


def server_step(model: QWenLMHeadModel, rows: int = ROWS, **params: Any) -> Step:
    """Count the steps of the engine while some rows are running, the host one step behind the device."""
    # A graph would hold what DecodeStep.run launches; here is none to record it.
    length = model.config.max_context_length
    steps = EngineSteps(model, rows=rows, cache_tokens=2**16, max_length=length, captured=False)
    for row in range(rows):
        prompt = [(row + position) % VOCABULARY for position in range(PROMPT + row)]  # each of another length
        steps.add(prompt, max_tokens=100, seed=row, **params)
    captured, run = DeviceWork(), DecodeStep.run

    def counted_run(step: DecodeStep) -> torch.Tensor:
        before = work.copy()
        logits = run(step)
        captured.add(work.since(before))
        return logits

    with count_device_work() as work, mock.patch.object(DecodeStep, "run", counted_run):
        for _ in range(WARM_UP):
            steps.take()
        before, before_captured = work.copy(), captured.copy()
        for _ in range(STEPS):
            steps.take()
        counted = work.since(before)
    return Step.mean(counted, captured.since(before_captured))


def fused_server_step(layers: int, rows: int = ROWS, quantized: bool = False, **params: Any) -> Step:
    """`server_step` with the Triton operations, which are compiled, but not run."""
    from tests.support.pretend_kernels import pretend_kernels

    with pretend_kernels():
        return server_step(tiny_model(layers, use_cache_quantization=quantized), rows, **params)


def kernel_step(layers: int) -> Step:
    """`generate` with the Triton kernels of the 8-bit cache, which are compiled, but not run."""
    from qwen.model import kv_cache_triton_qwen as kernels
    from tests.support.triton_driver import pretend_triton

    used = kernels.append_kernel, kernels.decode_kernel, kernels.combine_kernel
    with contextlib.ExitStack() as stack:
        stack.callback(kv_cache_qwen.triton_kernels.cache_clear)
        stack.enter_context(pretend_triton("sm_90", *used))
        kv_cache_qwen.triton_kernels.cache_clear()
        return generate_step(tiny_model(layers, use_cache_quantization=True, use_cache_kernel=True))


PATHS: dict[str, Callable[[int], Step]] = {
    "generate, 1 row": lambda layers: generate_step(tiny_model(layers)),
    "generate, 1 row, transformers' Qwen2": lambda layers: generate_step(as_qwen2(tiny_model(layers))),
    "generate, 2 stop words": lambda layers: generate_step(tiny_model(layers), stop_words_ids=[[3, 4], [7, 8]]),
    "generate, padded batch": lambda layers: generate_step(tiny_model(layers), rows=2, padded=True),
    "generate, static cache, not compiled": lambda layers: generate_step(
        tiny_model(layers), cache_implementation="static", disable_compile=True
    ),
    "generate, 8-bit cache": lambda layers: generate_step(tiny_model(layers, use_cache_quantization=True)),
    "generate, 8-bit cache with kernel": kernel_step,
    "server, 1 row, greedy": lambda layers: fused_server_step(layers, rows=1, temperature=0.0),
    "server, 16 rows, greedy": lambda layers: fused_server_step(layers, temperature=0.0),
    "server, 16 rows, default sampling": lambda layers: fused_server_step(layers, **DEFAULT_SAMPLING),
    "server, 16 rows, logprobs 5": lambda layers: fused_server_step(layers, temperature=0.0, top_logprobs=5),
    "server, 16 rows, 8-bit cache": lambda layers: fused_server_step(layers, quantized=True, temperature=0.0),
    "server, 16 rows, greedy, without Triton": lambda layers: server_step(tiny_model(layers), temperature=0.0),
}
"""Name of a way to decode → function that counts its step for a number of layers."""


def count(path: str, layers: int) -> Step:
    """Count one decoding step of a path of `PATHS`.

    Raises:
        NoGuard: there is a real GPU, or no C++ compiler.
    """
    with torch.no_grad(), pretend_cuda(), varlen_on_cpu():
        return PATHS[path](layers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts kernel launches and waits per decoded token, without a GPU.")
    parser.add_argument("--layers", type=int, default=32, help="of the model (default: 32, as Qwen-7B)")
    parser.add_argument("--lines", choices=PATHS, metavar="PATH", help="print the lines of one row of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        if arguments.lines is not None:
            work = count(arguments.lines, arguments.layers).work
            for kind in ("waits", "launches"):
                print(f"{kind} per token:\n{work.table(kind, STEPS)}\n")
            return
        print("| path | launches | of these captured | waits |\n|---|---:|---:|---:|")
        for path in PATHS:
            step = count(path, arguments.layers)
            print(f"| {path} | {step.launches:,.0f} | {step.captured:,.0f} | {step.waits:g} |", flush=True)
    except NoGuard as error:
        sys.exit(f"launches: {error}")


if __name__ == "__main__":
    main()
