"""`device_map="auto"` on several pretended GPUs, and what a step copies between them."""

import pytest
import torch

from qwen import QWenConfig, QWenLMHeadModel
from qwen.model import loading_options_qwen
from qwen.model.loading_options_qwen import prefer_one_gpu
from tests.pretend_gpu.models import placed, tiny_model
from tests.support.launch_counter import count_device_work

pytestmark = pytest.mark.usefixtures("gpus")

GB = 10**9
SHAPES = {  # as published; trained length 8192
    "1.8B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 11008},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 22016},
    "14B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 27392},
}
INT4 = {"quant_method": "gptq", "bits": 4}


@pytest.fixture
def free_memory(monkeypatch):
    """Bytes that are free on each GPU; may be changed."""
    free = [24 * GB, 24 * GB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 * GB))
    return free


@pytest.mark.parametrize(
    ("shape", "quantization", "gigabytes", "fits"),
    [
        ("1.8B", None, 6, True),  # 3.7 GB of weights, 1.6 GB of cache
        ("1.8B", None, 5, False),
        ("7B", None, 24, True),
        ("7B", None, 16, False),  # the weights only
        ("7B", INT4, 12, True),
        ("14B", None, 24, False),
        ("14B", None, 40, True),
        ("14B", INT4, 18, True),
    ],
)
def test_a_model_that_fits_with_its_cache_is_put_on_one_gpu(shape, quantization, gigabytes, fits, free_memory):
    config = QWenConfig(vocab_size=151936, seq_length=8192, **SHAPES[shape], quantization_config=quantization)
    free_memory[:] = [gigabytes * GB] * 2
    assert prefer_one_gpu(config, torch.bfloat16) == ("cuda:0" if fits else "auto")
    free_memory[0] = GB
    assert prefer_one_gpu(config, torch.bfloat16) == ("cuda:1" if fits else "auto")


def test_auto_loads_to_the_first_gpu_with_room(golden, free_memory):
    for expected in ("cuda:0", "cuda:1"):
        model = QWenLMHeadModel.from_pretrained(golden, device_map="auto")
        assert {str(parameter.device) for parameter in model.parameters()} == {expected}
        free_memory[0] = 1000


@pytest.mark.parametrize(
    "config", [{}, {"use_window_attn": True, "window_sizes": [8, 12, 16, 64]}], ids=["", "windows"]
)
@torch.no_grad()
def test_positions_are_copied_once_to_another_gpu(config):
    transfers = []
    for layers_there in (1, 3):
        there = {f"transformer.h.{layer}": f"cuda:{int(layer >= 4 - layers_there)}" for layer in range(4)}
        model = placed(tiny_model(layers=4, **config), "two GPUs", there)
        ids = torch.arange(40, device="cuda:0")[None]
        with count_device_work() as work:
            logits = model(ids).logits
        assert torch.equal(logits.cpu(), tiny_model(layers=4, **config)(ids.cpu()).logits)
        transfers.append(work.transfers.total())
    assert transfers[0] == transfers[1]


def test_stop_words_are_copied_once():
    model = tiny_model().to("cuda")
    waits = []
    for new_tokens in (4, 8):
        ids = torch.arange(10, device="cuda")[None]
        settings = {"do_sample": False, "eos_token_id": 511, "pad_token_id": 511, "min_new_tokens": new_tokens}
        with count_device_work() as plain:
            model.generate(ids, max_new_tokens=new_tokens, **settings)
        with count_device_work() as stopping:
            model.generate(ids, max_new_tokens=new_tokens, stop_words_ids=[[500, 501], [502]], **settings)
        waits.append(stopping.waits.total() - plain.waits.total())
    assert waits[0] == waits[1]


def test_flash_attention_asks_the_gpu_that_is_used(golden, monkeypatch, free_memory):
    """An A100, and a T4, which has no flash attention."""
    asked = []
    monkeypatch.setattr(loading_options_qwen, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device.index) or [(8, 0), (7, 5)][device.index]
    )
    free_memory[0] = 1000
    model = QWenLMHeadModel.from_pretrained(golden, device_map="auto", bf16=True)
    assert model.config._attn_implementation == "sdpa"
    assert asked == [1]
