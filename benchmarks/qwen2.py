"""This architecture as transformers' Qwen2, which computes the same function up to the trained length."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen import QWenConfig, QWenLMHeadModel

GLOBAL_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def qwen2_config(config: QWenConfig) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        intermediate_size=config.intermediate_size // 2,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_emb_base},
        tie_word_embeddings=False,
    )


def as_qwen2(model: QWenLMHeadModel) -> Qwen2ForCausalLM:
    """The same weights, not copied, in the other architecture. They are floats, with biases where published models
    have them."""
    config = qwen2_config(model.config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in GLOBAL_NAMES:
            tensors[GLOBAL_NAMES[name]] = tensor
            continue
        layer, part = name.removeprefix("transformer.h.").split(".", 1)
        module, kind = part.rsplit(".", 1)
        targets = LAYER_NAMES[module]
        for target, piece in zip(targets, tensor.chunk(len(targets)), strict=True):
            tensors[f"model.layers.{layer}.{target}.{kind}"] = piece
    with torch.device("meta"):
        peer = Qwen2ForCausalLM._from_config(config, dtype=model.dtype)
    peer.load_state_dict(tensors, assign=True)
    peer.model.rotary_emb = Qwen2RotaryEmbedding(config).to(model.device)  # its buffers are in no file
    return peer.eval()
