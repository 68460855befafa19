"""Triton kernels of the 8-bit cache: their results, and compilation for NVIDIA and AMD without a GPU."""

import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from packaging.version import Version

from qwen.model import kv_cache_qwen
from tests.support import ROOT

pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton import __version__ as triton_version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile

from qwen.model import kv_cache_triton_qwen

TARGETS = {
    "A100": GPUTarget("cuda", 80, 32),
    "H100": GPUTarget("cuda", 90, 32),
    "MI300": GPUTarget("hip", "gfx942", 64),
}
STATES = {"key_ptr": "*bf16", "value_ptr": "*bf16"}
STORE = {
    f"{part}_{name}_ptr": kind
    for part in ("key", "value")
    for name, kind in (("q", "*u8"), ("scale", "*bf16"), ("zero", "*bf16"))
}


def compiled(kernel, target: str, types: dict[str, str], **constants) -> CompiledKernel:
    """Compile as a launch does: parameters in neither `types` nor `constants` are 32-bit integers."""
    if target == "MI300" and Version(triton_version) < Version("3.4") and shutil.which("ld.lld") is None:
        pytest.skip("this version of Triton has no linker for ROCm: apt install lld")
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return compile(ASTSource(fn=kernel, signature=kinds, constexprs=values), target=TARGETS[target])


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "mask"), [("A100", None), ("H100", "boolean"), ("MI300", "additive")])
def test_decoding_compiles(target, mask):
    types = {"q_ptr": "*bf16", "table_ptr": "*i64", "sm_scale": "fp32"}
    types |= dict.fromkeys(("out_ptr", "max_ptr", "sum_ptr"), "*fp32")
    types["mask_ptr"] = {"boolean": "*i1", "additive": "*bf16"}.get(mask)
    constants = {
        "SCALE_DTYPE": kv_cache_triton_qwen.tl.bfloat16,
        "ALIGNED": 16,
        "D": 128,
        "BLOCK_D": 128,
        "TILE_SIZE": kv_cache_qwen.TILE_SIZE,
    }
    constants |= {"MASK": mask} | ({"mask_ptr": None} if mask is None else {})
    if target == "A100":  # a launch turns integers equal to 1 into constants
        constants |= {"num_heads": 1, "tiles_per_split": 1}
    kernel = compiled(kv_cache_triton_qwen.decode_kernel, target, types, **constants)
    if target == "MI300":
        assert "global_load_dwordx4" in kernel.asm["amdgcn"]
    else:
        # The kernel's speed depends on prefetching keys and values 16 bytes at a time.
        assert re.search(r"cp\.async\.cg\.shared\.global.*0x10", kernel.asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_appending_and_combining_compile(target):
    shape = {"D": 128, "BLOCK_D": 128}
    for constants in ({}, {"num_tokens": 1}):
        types = {**STATES, **STORE, "tiny": "fp32"}
        compiled(kv_cache_triton_qwen.append_kernel, target, types, BLOCK_S=16, **shape, **constants)
    types = {"out_ptr": "*bf16", **dict.fromkeys(("partial_ptr", "max_ptr", "sum_ptr"), "*fp32")}
    compiled(kv_cache_triton_qwen.combine_kernel, target, types, BLOCK_SPLITS=16, **shape)


@pytest.mark.process
def test_kernels_equal_torch():
    """Run tests/model/kernel_cases.py, on the GPU or under the interpreter."""
    mode = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/kernel_cases.py"],
        cwd=ROOT,
        env={**os.environ, **mode},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.fixture
def fresh_triton_kernels():
    kv_cache_qwen.triton_kernels.cache_clear()
    yield
    kv_cache_qwen.triton_kernels.cache_clear()


@pytest.mark.usefixtures("fresh_triton_kernels")
@pytest.mark.parametrize("missing", ["Triton", "a GPU"])
def test_missing_triton_or_gpu_falls_back_to_torch(missing, monkeypatch, caplog):
    if missing == "Triton":
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "qwen.model.kv_cache_triton_qwen")
    elif torch.cuda.is_available():
        pytest.skip("Triton runs here")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert kv_cache_qwen.triton_kernels("cuda") is None
    assert "use_cache_kernel=True falls back to torch" in caplog.text
    assert "a C compiler" in caplog.text
