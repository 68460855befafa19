"""Converts models to transformers' Qwen2, which computes the same function up to the trained length."""

import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen import QWenLMHeadModel
from qwen.export.qwen2 import qwen2_config, qwen2_tensors


def as_qwen2(model: QWenLMHeadModel) -> Qwen2ForCausalLM:
    """Return the model as Qwen2, sharing its weights: floats, with biases only where published models have them."""
    config = qwen2_config(model.config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors |= qwen2_tensors(name, tensor)
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    peer.load_state_dict(tensors, assign=True)
    peer.model.rotary_emb = Qwen2RotaryEmbedding(config).to(model.device)  # buffers are not in the state dict
    return peer.eval()
