"""Cases that need torch's C++ code to see GPUs: the backward pass, and devices given as numbers.

tests/pretend_gpu/test_preloaded.py runs this file in a process that loads `tests/support/cuda_guard.cpp` before torch.
"""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qwen import QWenLMHeadModel
from qwen.data.samples import pack_samples, pad_samples
from tests.pretend_gpu.models import placed, tiny_model
from tests.pretend_gpu.test_generation import generated
from tests.support import flash_attention
from tests.support.launch_counter import count_device_work

pytestmark = pytest.mark.usefixtures("gpus")

SAMPLES = [{"input_ids": list(range(n, 2 * n)), "labels": list(range(n, 2 * n))} for n in (7, 12, 20)]
PADDED, PACKED = pad_samples(SAMPLES, 0), pack_samples(SAMPLES)


def with_lora(model: QWenLMHeadModel) -> torch.nn.Module:
    """Frozen weights keep their precision, trained ones are float32, as in qwen/finetuning/model.py."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj", "w1", "w2"], task_type="CAUSAL_LM", lora_dropout=0.0)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor], autocast: torch.dtype | None = None) -> list[float]:
    """Train three steps; return the losses."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    model.train()
    found = []
    for _ in range(3):
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        assert all(parameter.grad.device == parameter.device for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize("where", ["one GPU", "two GPUs"])
@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
def test_full_training_equals_the_cpus(batch, where):
    assert losses(placed(tiny_model(), where), batch) == pytest.approx(losses(tiny_model(), batch), rel=1e-4)


def test_gradient_checkpointing_equals_the_cpus():
    model = tiny_model().to("cuda")
    model.gradient_checkpointing_enable()
    assert losses(model, PADDED) == pytest.approx(losses(tiny_model(), PADDED), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lora_on_half_precision_equals_the_cpus(dtype):
    """bfloat16 as in LoRA, float16 as the unquantized tensors of Q-LoRA."""
    on_gpu, on_cpu = (
        losses(with_lora(tiny_model(dtype).to(device)), PADDED, torch.bfloat16) for device in ("cuda", "cpu")
    )
    assert on_gpu == pytest.approx(on_cpu, rel=0.01)


@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
def test_training_with_flash_attention(batch, monkeypatch, tmp_path):
    flash_attention.install(monkeypatch, tmp_path)
    model = tiny_model()
    model.set_attn_implementation("flash_attention_2")
    on_gpu = losses(model.to("cuda"), batch, torch.bfloat16)
    assert flash_attention.calls.total() > 0
    assert on_gpu == pytest.approx(losses(tiny_model(), batch), rel=0.02)


def test_automatic_device_map(bundled_chat):
    """Two GPUs, each with room for about half of the model."""
    ids = torch.arange(20)[None]
    on_cpu = QWenLMHeadModel.from_pretrained(bundled_chat, device_map="cpu")
    size = sum(parameter.numel() * 4 for parameter in on_cpu.parameters())
    memory = {0: int(0.7 * size), 1: size}
    model = QWenLMHeadModel.from_pretrained(bundled_chat, device_map="auto", max_memory=memory, fp32=True)
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0", "cuda:1"}
    with torch.no_grad():
        torch.testing.assert_close(model(ids.to("cuda:0")).logits.cpu(), on_cpu(ids).logits, rtol=1e-4, atol=1e-4)


def test_layers_offloaded_to_the_cpu():
    """accelerate copies their weights to the GPU for each forward, so each waits."""
    changes = {
        "transformer.h.1": "cpu",
        "transformer.ln_f": "cuda:0",
        "lm_head": "cuda:0",
    }
    model = placed(tiny_model(), "two GPUs", changes)
    with count_device_work() as work:
        assert generated(model, "cuda:0") == generated(tiny_model(), "cpu")
    assert work.waits.total() > 6
