"""Logits on the device, compared with the reference vectors and with the CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qwen.data.samples import pack_samples
from tests.model.test_modeling import VARIANTS, decode_one_by_one, golden_case_names, relative_error
from tests.on_gpu.device import DEVICE
from tests.on_gpu.models import INT8, INT8_KERNEL, left_padded, load_golden, random_ids

# Relative to the largest logit. bfloat16 has 8 bits of mantissa, float16 has 11.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


@pytest.fixture(scope="module")
def expected(golden):
    return load_file(golden / "expected.safetensors", device=DEVICE)


@pytest.fixture(scope="module")
def cases(golden):
    return {case["name"]: case for case in json.loads((golden / "cases.json").read_text())}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", golden_case_names())
@torch.no_grad()
def test_logits_equal_the_reference(expected, cases, name, dtype, attention, record_property):
    model = load_golden(dtype=dtype, fp32=False, attn_implementation=attention, **VARIANTS[name.split("/")[0]])
    ids, mask = expected[f"{name}.input_ids"].long(), expected.get(f"{name}.attention_mask")
    if "n_prompt" in cases[name]:
        logits = decode_one_by_one(model, ids, cases[name]["n_prompt"])
    else:
        logits = model(ids, attention_mask=mask).logits
    assert logits.device.type == DEVICE
    assert logits.dtype == dtype
    here = slice(None) if mask is None else mask.bool()
    error = relative_error(logits[here].float(), expected[f"{name}.logits"][here])
    record_property("figure", f"error {error:.1e}")
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("options", [INT8, INT8_KERNEL], ids=["torch", "kernel"])
@torch.no_grad()
def test_8_bit_cache_is_close_to_full_precision(expected, cases, model, options, record_property):
    name = "int8kv/decode"
    ids, n_prompt = expected[f"{name}.input_ids"].long(), cases[name]["n_prompt"]
    exact = model(ids).logits
    error = relative_error(decode_one_by_one(load_golden(**options), ids, n_prompt), exact)
    record_property("figure", f"error {error:.2%}")
    assert 1e-6 < error < relative_error(expected[f"{name}.logits"], exact)


@pytest.mark.parametrize("lengths", [(5, 20, 31), (7, 40, 100)], ids=["within seq_length", "beyond seq_length"])
@torch.no_grad()
def test_padded_rows_equal_the_rows_alone(model, lengths):
    rows = [random_ids(length) for length in lengths]
    ids, mask = (tensor.to(DEVICE) for tensor in left_padded(rows))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` passes them: LogN depends on them
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for index, row in enumerate(rows):
        alone = model(row.to(DEVICE)).logits[0]
        assert relative_error(logits[index, -row.shape[1] :], alone) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_packed_samples_equal_the_samples_alone(dtype):
    """In one row without a mask; the positions show where a sample begins."""
    model = load_golden(dtype=dtype, fp32=False).train()  # as in training, without dynamic NTK
    model.config.use_cache = False
    samples = [random_ids(length)[0].tolist() for length in (3, 20, 1, 40)]
    batch = pack_samples([{"input_ids": ids, "labels": ids} for ids in samples])
    packed = model(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}).logits[0]
    alone = torch.cat([model(torch.tensor([ids], device=DEVICE)).logits[0] for ids in samples])
    assert relative_error(packed, alone) < TOLERANCE[dtype]
