"""How the layers of a model get the operations for a GPU; tests/pretend_gpu has the engine with them."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from qwen.kernels.fused_block import FusedBlock, FusedLinear, has_gpu_kernels, prepare
from qwen.kernels.gpu import are_joined, gpu_kernels, join_weights
from qwen.model.modeling_qwen import QWenBlock
from tests.kernels.packed_weights import loaded_linear
from tests.pretend_gpu.conftest import gpus as gpus
from tests.pretend_gpu.models import placed, tiny_model
from tests.support.cuda_guard import NoGuard
from tests.support.pretend_cuda import pretend_cuda


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    gpu_kernels.cache_clear()
    yield
    gpu_kernels.cache_clear()


@pytest.mark.parametrize("bias", [False, True])
def test_joined_weights_are_views_of_one_matrix(bias):
    value, gate = nn.Linear(6, 4, bias=bias), nn.Linear(6, 4, bias=bias)
    x = torch.ones(2, 6)
    expected = value(x), gate(x)
    assert not are_joined(value, gate)
    with torch.inference_mode():
        join_weights(value, gate)
    assert are_joined(value, gate)
    assert not are_joined(gate, value)
    assert torch.equal(value(x), expected[0])
    assert torch.equal(gate(x), expected[1])
    assert value.weight.untyped_storage().data_ptr() == gate.weight.untyped_storage().data_ptr()
    gate(x).sum().backward()  # they are no tensors of inference
    assert not are_joined(*copy.deepcopy((value, gate)))
    gate.weight.data = gate.weight.data.clone()
    assert not are_joined(value, gate)


def test_packed_weights_are_not_joined():
    assert not are_joined(loaded_linear(64, 64, 4, 32), loaded_linear(64, 64, 4, 32))


@pytest.mark.usefixtures("gpus")
def test_models_that_stay_plain(caplog, monkeypatch):
    """Without Triton, which is logged once; in `generate`; on two GPUs."""
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from tests.support.pretend_kernels import pretend_kernels

    model = placed(tiny_model(), "one GPU")
    for _ in range(2):
        prepare(model, devices=("cpu", "cuda"))
    assert not has_gpu_kernels(model)
    (record,) = caplog.records
    assert "takes longer on a GPU: Triton does not run here" in record.message
    with pretend_kernels():
        spread = placed(tiny_model(), "two GPUs")
        prepare(spread, devices=("cpu", "cuda"))
        prepare(model)
        for each in (spread, model):
            assert type(each.transformer.h[0]) is QWenBlock
            assert not has_gpu_kernels(each)
        prepare(model, devices=("cpu", "cuda"))
        assert has_gpu_kernels(model)
        assert type(model.transformer.h[0]) is FusedBlock
        assert type(model.lm_head) is FusedLinear
        assert all(are_joined(block.mlp.w1, block.mlp.w2) for block in model.transformer.h)


def test_the_variable_that_keeps_torch(caplog, monkeypatch):
    monkeypatch.setenv("QWEN_KERNELS", "torch")
    assert gpu_kernels(torch.device("cuda", 0)) is None
    assert caplog.text.strip().endswith("takes longer on a GPU: QWEN_KERNELS=torch")


def test_gpus_that_triton_does_not_support(caplog):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from tests.support.triton_driver import pretend_triton

    try:
        with pretend_cuda(capability=(7, 5)), pretend_triton("sm_80"):
            assert gpu_kernels(torch.device("cuda", 0)) is None
    except NoGuard as reason:
        pytest.skip(str(reason))
    assert "Triton needs a GPU of compute capability 8.0" in caplog.text
