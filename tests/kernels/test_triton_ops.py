"""The Triton operations: their results, and compilation, launches and waits on pretended GPUs."""

import os
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch

from qwen import QWenConfig, QWenLMHeadModel
from tests.kernels.packed_weights import packed_linear
from tests.support import ROOT
from tests.support.launch_counter import DeviceWork, count_device_work

pytest.importorskip("triton", reason="Triton has no build for this platform")

import triton

from qwen.kernels import triton_linear, triton_ops
from tests.pretend_gpu.conftest import gpus as gpus
from tests.support.pretend_kernels import KERNELS
from tests.support.triton_driver import pretend_triton

BLOCK_SIZE, TABLE_WIDTH = 16, 512


@pytest.mark.process
def test_operations_equal_torch():
    """Run triton_cases.py, on the GPU or in the interpreter."""
    mode = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/triton_cases.py"],
        cwd=ROOT,
        env={**os.environ, **mode},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def tiny_model(bits: int | None, quantized_cache: bool) -> QWenLMHeadModel:
    """A layer whose heads have the published size, on a pretended GPU.

    Args:
        bits: of the weights; None for bfloat16.
        quantized_cache: keys and values are in 8 bits.
    """
    config = QWenConfig(
        hidden_size=256, num_hidden_layers=1, num_attention_heads=2, kv_channels=128, intermediate_size=1024,
        vocab_size=512, use_cache_quantization=quantized_cache,
    )  # fmt: skip
    model = QWenLMHeadModel(config).bfloat16().eval().to("cuda:0")
    block = model.transformer.h[0]
    for parent, name in product((block.attn, block.mlp), ("c_attn", "c_proj", "w1", "w2")) if bits is not None else ():
        layer = getattr(parent, name, None)
        if layer is not None:
            options = {"symmetric": True, "act_order": False, "bias": layer.bias is not None, "dtype": torch.bfloat16}
            size = layer.in_features, layer.out_features
            packed, _ = packed_linear(*size, bits, 128, **options, device="cuda:0", seed=0)
            setattr(parent, name, packed)
    return model


def pools(quantized: bool) -> list[torch.Tensor]:
    kinds = [(128, torch.uint8), (1, torch.bfloat16), (1, torch.bfloat16)] if quantized else [(128, torch.bfloat16)]
    return [torch.zeros(2, 4096, width, dtype=kind, device="cuda:0") for width, kind in 2 * kinds]


def check_code(target: str, folder: Path) -> None:
    """Assert that no compiled kernel spills registers, and that what streams from memory is prefetched."""
    for kernel in KERNELS:
        for compiled in kernel.device_caches[0][0].values():
            if target == "gfx942":
                assert ".vgpr_spill_count: 0\n" in compiled.asm["amdgcn"], kernel
                continue
            file = folder / "kernel.cubin"
            file.write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
            assert re.search("STACK:0 .* LOCAL:0 ", usage.stdout), (kernel, usage.stdout)
            if kernel in (triton_linear.linear_kernel, triton_linear.packed_linear_kernel, triton_ops.attend_kernel):
                assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", compiled.asm["ptx"]), kernel


@pytest.mark.slow
@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("target", "bits"), [("sm_80", 8), ("sm_90", 4), ("gfx942", 8)])
def test_packed_weights_and_cache_compile(target, bits, tmp_path, monkeypatch):
    """With four rows, which take the most registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model = tiny_model(bits, quantized_cache=True)
    with pretend_triton(target, *KERNELS) as launches, count_device_work() as work:
        triton_ops.warm_up(model, pools(quantized=True), BLOCK_SIZE, TABLE_WIDTH, rows=(4, 5))
        check_code(target, tmp_path)
    assert not work.waits.total(), work.table("waits")
    assert set(launches.compiled) == {kernel.__name__ for kernel in KERNELS}


@pytest.mark.slow
@pytest.mark.usefixtures("gpus")
def test_warm_up_compiles_all_that_steps_launch(tmp_path, monkeypatch):
    """Other lengths, rows, positions and windows compile nothing, and nothing waits."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model, cache = tiny_model(None, False), pools(False)
    with pretend_triton("sm_90", *KERNELS) as launches:
        triton_ops.warm_up(model, cache, BLOCK_SIZE, TABLE_WIDTH, rows=(1, 4, 5))
        check_code("sm_90", tmp_path)
        warm = Counter(launches.compiled)
        for rows, window in ((1, None), (3, 1), (4, 512), (9, None)):
            work = decode_layer(model, cache, rows, window)
            assert not work.waits.total(), work.table("waits")
            assert work.launches.total() == (9 if rows <= triton_ops.MAX_ROWS else 11), work.table("launches")
        assert launches.compiled == warm


def decode_layer(model: QWenLMHeadModel, cache: list[torch.Tensor], rows: int, window: int | None) -> DeviceWork:
    """Run a layer for a token of each of some sequences; return its work without that of making the inputs."""
    block, device = model.transformer.h[0], "cuda:0"
    attn, mlp = block.attn, block.mlp
    numbers = torch.arange(7 * rows, dtype=torch.int32, device=device)  # inputs are parts of one tensor in the engine
    tables = torch.zeros(rows, TABLE_WIDTH, dtype=torch.int32, device=device)
    slots = torch.zeros(rows + 1, dtype=torch.long, device=device)[1:]
    cos, sin = torch.ones(2, rows, model.config.rotary_dim, device=device)
    scale = torch.ones(rows + 1, device=device)[1:]
    x = torch.zeros(rows, model.config.hidden_size, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), count_device_work() as work:
        normed = triton_ops.rms_norm(x, block.ln_1.weight, block.ln_1.eps)
        qkv = triton_ops.linear(normed, attn.c_attn).view(rows, 3, -1, attn.head_dim)
        query = triton_ops.rope_append(qkv, cos, sin, scale, slots, cache)
        arguments = tables, numbers[1 : 1 + rows], numbers[3 : 3 + rows], BLOCK_SIZE, attn.scaling, window
        attended = triton_ops.attend(query, cache, *arguments)
        x = triton_ops.linear(attended.view(rows, -1), attn.c_proj, x)
        normed = triton_ops.rms_norm(x, block.ln_2.weight, block.ln_2.eps)
        triton_ops.linear(triton_ops.swiglu_linear(normed, mlp.w1, mlp.w2), mlp.c_proj, x)
    return work
