"""Unusual places for weights: accelerate's main device elsewhere, an embedding apart from its layers, or offloaded."""

import pytest
import torch
from accelerate import dispatch_model

from qwen import QWenLMHeadModel
from qwen.checkpoint.loading import load_tokenizer
from qwen.model import gptq_qwen
from tests.pretend_gpu.models import LAYERS, SPREAD, placed, tiny_model
from tests.pretend_gpu.test_generation import STATIC, WINDOWS, generated
from tests.support import flash_attention

pytestmark = [pytest.mark.usefixtures("gpus"), pytest.mark.slow]


@torch.no_grad()
def test_flash_attn_is_not_chosen_for_weights_on_the_cpu(bundled_chat, monkeypatch, tmp_path):
    flash_attention.install(monkeypatch, tmp_path)
    model = QWenLMHeadModel.from_pretrained(bundled_chat)
    assert model.device.type == "cpu"
    model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("config", [{}, WINDOWS], ids=["", "windows"])
def test_static_cache_with_the_embedding_on_another_gpu(config):
    layers = {f"transformer.h.{layer}": "cuda:1" for layer in range(LAYERS)}
    model = placed(tiny_model(**config), "two GPUs", layers)
    assert generated(model, "cuda:0", **STATIC) == generated(tiny_model(**config), "cpu", **STATIC)


@torch.no_grad()
def test_embedding_on_another_gpu_than_the_main_one():
    """accelerate takes the main device from a set; for a map of names ("cuda:1") it is any of them."""
    model = dispatch_model(tiny_model(), SPREAD, main_device="cuda:1")
    assert generated(model, "cuda:0") == generated(tiny_model(), "cpu")


def test_kernel_of_gptq_weights_is_named_on_hopper(monkeypatch):
    """GPTQModel's own choice there downloads its sources and compiles for minutes."""
    monkeypatch.setattr(gptq_qwen, "_has_nvcc", lambda: True)
    weights = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    assert gptq_qwen.choose_kernel(weights, torch.device("cuda")) != "auto"


def test_chat_with_an_offloaded_embedding(bundled_chat):
    tokenizer = load_tokenizer(bundled_chat)
    model = QWenLMHeadModel.from_pretrained(bundled_chat, device_map="cpu").eval()
    settings = {"do_sample": False, "max_new_tokens": 4}
    reply = model.chat(tokenizer, "Hello!", **settings)[0]
    others = dict.fromkeys(("transformer.drop", "transformer.h", "transformer.ln_f", "lm_head"), "cuda:0")
    model = dispatch_model(model, {"transformer.wte": "cpu", **others}, main_device="cuda:0")
    assert model.chat(tokenizer, "Hello!", **settings)[0] == reply
