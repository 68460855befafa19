"""This architecture as a GGUF file, llama.cpp's format. Needs the package gguf."""

from collections.abc import Iterable
from pathlib import Path

import gguf
import torch
from gguf.quants import quantize

from qwen import QWenConfig

# Our names → those of GGUF's "qwen" architecture.
GLOBAL_NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "ln_1.weight": "attn_norm.weight",
    "attn.c_attn.weight": "attn_qkv.weight",
    "attn.c_attn.bias": "attn_qkv.bias",
    "attn.c_proj.weight": "attn_output.weight",
    "ln_2.weight": "ffn_norm.weight",
    "mlp.w1.weight": "ffn_up.weight",
    "mlp.w2.weight": "ffn_gate.weight",
    "mlp.c_proj.weight": "ffn_down.weight",
}


def write_gguf(config: QWenConfig, tensors: Iterable[tuple[str, torch.Tensor]], path: Path, kind: str = "F32") -> None:
    """Write a file without a vocabulary: token ids go in and come out.

    Args:
        tensors: all of a state dict; each is held in memory until the file is written, in its new type.
        kind: of the matrices in the layers: "F32", "BF16", "Q8_0" or "Q4_0". The embedding and the output matrix are
            in 16 bits where those are in fewer, as in GPTQ checkpoints; vectors are in float32.
    """
    writer = gguf.GGUFWriter(str(path), "qwen")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_freq_base(float(config.rotary_emb_base))
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    in_layers = gguf.GGMLQuantizationType[kind]
    outside = in_layers if kind == "F32" else gguf.GGMLQuantizationType.BF16
    for name, tensor in tensors:
        if name in GLOBAL_NAMES:
            target, type_ = GLOBAL_NAMES[name], outside
        else:
            layer, part = name.removeprefix("transformer.h.").split(".", 1)
            target, type_ = f"blk.{layer}.{LAYER_NAMES[part]}", in_layers
        if tensor.dim() == 1:
            type_ = gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, quantize(tensor.float().numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
