"""GPTQLinear: exact weights in every layout, and what torch does to modules."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch

from qwen.model.gptq_linear_qwen import GPTQLinear, replace_linear_layers
from tests.support.published_gptq import packed

INPUTS, OUTPUTS = 512, 48


def layer_and_matrix(
    bits: int = 4,
    group_size: int = 128,
    *,
    act_order: bool = False,
    sym: bool = True,
    checkpoint_format: str = "gptq",
    inputs: int = INPUTS,
) -> tuple[GPTQLinear, np.ndarray]:
    """Return a layer of random weights, loaded from their packed form, and its matrix (N, K) in float64."""
    generator = np.random.default_rng(0)
    size, top = inputs if group_size == -1 else group_size, 2**bits - 1
    integers = generator.integers(0, top + 1, (inputs, OUTPUTS))
    groups = -(-inputs // size)
    zeros = np.full((groups, OUTPUTS), 2 ** (bits - 1))
    if not sym:
        zeros = generator.integers(0, top + 1, (groups, OUTPUTS))
    scales = generator.uniform(0.001, 0.1, (groups, OUTPUTS)).astype(np.float16)
    g_idx = np.arange(inputs) // size
    if act_order:
        g_idx = g_idx[generator.permutation(inputs)]

    words = packed(zeros.T, bits).T.copy()
    if checkpoint_format == "gptq":  # 1 is subtracted from each field of a word, with borrow, as GPTQModel does
        words = (words.view(np.uint32) - np.uint32(sum(1 << shift for shift in range(0, 32, bits)))).view(np.int32)
    tensors = {"qweight": packed(integers, bits), "qzeros": words, "scales": scales, "g_idx": g_idx.astype(np.int32)}
    layer = GPTQLinear(inputs, OUTPUTS, bias=True, bits=bits, group_size=group_size)
    bias = generator.normal(size=OUTPUTS).astype(np.float32)
    layer.load_state_dict({name: torch.from_numpy(values) for name, values in (tensors | {"bias": bias}).items()})
    layer.finish_loading(checkpoint_format)
    return layer.eval(), (scales[g_idx].astype(np.float64) * (integers - zeros[g_idx])).T


LAYOUTS = [
    {"bits": bits, "group_size": group_size, "act_order": act_order, "sym": sym, "checkpoint_format": checkpoint_format}
    for bits, group_size, act_order, sym, checkpoint_format in itertools.product(
        (4, 8), (16, 32, 64, 128, 256, -1), (False, True), (True, False), ("gptq", "gptq_v2")
    )
]


def test_every_layout_is_dequantized_exactly():
    for layout in LAYOUTS:
        layer, matrix = layer_and_matrix(**layout)
        assert np.array_equal(layer.weight.double().numpy(), matrix), layout
        assert (layer.zeros is None) == layout["sym"]
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(layer.dequantize(dtype), torch.from_numpy(matrix).float().to(dtype)), (layout, dtype)


@pytest.mark.parametrize(("inputs", "group_size"), [(520, 128), (200, -1), (448, 256)])
def test_widths_that_groups_do_not_divide(inputs, group_size):
    layer, matrix = layer_and_matrix(inputs=inputs, group_size=group_size, sym=False)
    assert np.array_equal(layer.weight.double().numpy(), matrix)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), ()], ids=str)
def test_it_computes_like_nn_linear(shape):
    layer, matrix = layer_and_matrix(act_order=True, sym=False)
    plain = torch.nn.Linear(INPUTS, OUTPUTS)
    plain.load_state_dict({"weight": torch.from_numpy(matrix), "bias": layer.bias})
    x = torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), plain(x))
    layer, plain = layer.to(torch.bfloat16), plain.to(torch.bfloat16)
    assert torch.equal(layer(x.bfloat16()), plain(x.bfloat16()))


def test_inputs_get_gradients():
    layer, matrix = layer_and_matrix()
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.from_numpy(matrix).float().sum(0).expand(3, -1))


def test_other_types_keep_the_weights_exact():
    layer, matrix = layer_and_matrix(sym=False)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.scales.dtype == torch.float32
    assert layer.to("cpu").weight.dtype == torch.float64
    assert np.array_equal(layer.float().weight.double().numpy(), matrix)


def test_copies_compute_the_same():
    layer, _ = layer_and_matrix(act_order=True)
    x = torch.randn(2, INPUTS)
    other, _ = layer_and_matrix(act_order=True)
    other.scales.zero_()
    other.load_state_dict(layer.state_dict())
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(duplicate(x), layer(x))
        assert duplicate.weight.dtype == layer.weight.dtype


def test_weights_cannot_be_assigned():
    """peft merges adapters by assigning to `weight.data`."""
    layer, matrix = layer_and_matrix()
    with pytest.raises(RuntimeError, match=r"cannot be changed.*without -Int4 or -Int8"):
        layer.weight.data += 1
    with pytest.raises(RuntimeError, match="cannot be changed"):
        layer.weight.data = torch.zeros(OUTPUTS, INPUTS)
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(OUTPUTS, INPUTS)
    with pytest.raises(KeyError):
        layer.weight = torch.nn.Parameter(torch.zeros(OUTPUTS, INPUTS))
    assert np.array_equal(layer.weight.double().numpy(), matrix)


def test_g_idx_must_divide_the_inputs_into_groups():
    layer = GPTQLinear(INPUTS, OUTPUTS, bias=False, bits=4, group_size=128)
    layer.qzeros.zero_()
    layer.g_idx.zero_()
    with pytest.raises(ValueError, match="g_idx does not divide the 512 inputs into groups of 128"):
        layer.finish_loading()


@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [(516, 48, 128), (512, 50, 128), (512, 48, 100)])
def test_sizes_must_fill_words(inputs, outputs, group_size):
    with pytest.raises(ValueError, match="multiples of 8"):
        GPTQLinear(inputs, outputs, bias=False, bits=4, group_size=group_size)


def test_layers_are_replaced():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8, bias=False))
    replace_linear_layers(model.bfloat16(), {"bits": 8, "group_size": 32}, kept=model[2])
    assert repr(model[0]) == "GPTQLinear(in_features=64, out_features=32, bias=True, bits=8, group_size=32)"
    assert model[0].dtype == torch.bfloat16
    assert model[0].scales.dtype == torch.float32
    assert type(model[2]) is torch.nn.Linear
