"""Small random models on the CPU, on one pretended GPU, and spread over two."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model

from qwen import QWenConfig, QWenLMHeadModel

LAYERS = 2
SPREAD = {
    "transformer.wte": "cuda:0",
    "transformer.drop": "cuda:0",
    **{f"transformer.h.{layer}": f"cuda:{layer * 2 // LAYERS}" for layer in range(LAYERS)},
    "transformer.ln_f": "cuda:1",
    "lm_head": "cuda:1",
}
"""The embedding and half of the layers on the first GPU, the rest on the second."""


def tiny_model(dtype: torch.dtype = torch.float32, layers: int = LAYERS, **config: Any) -> QWenLMHeadModel:
    """Create the same model each time: trained length 32, so that short prompts use NTK and LogN."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "intermediate_size": 128}
    lengths = {"seq_length": 32, "max_position_embeddings": 2048}
    model = QWenLMHeadModel(QWenConfig(vocab_size=512, num_hidden_layers=layers, **shape, **lengths, **config))
    return model.to(dtype).eval()


def placed(model: QWenLMHeadModel, where: str, changes: Mapping[str, str] = SPREAD) -> QWenLMHeadModel:
    """Put a model on "cpu", on "one GPU", or on "two GPUs" with accelerate's hooks.

    Args:
        changes: devices that replace those of `SPREAD`.
    """
    if where == "cpu":
        return model
    if where == "one GPU":
        return model.to("cuda")
    return dispatch_model(model, {**SPREAD, **changes}, main_device="cuda:0")
