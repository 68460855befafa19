"""What other engines do not do, and up to which length that makes no difference.

They know neither dynamic NTK nor LogN, which act beyond the trained length only.
"""

import torch

from ..model.configuration_qwen import QWenConfig
from ..model.rope_qwen import ntk_alpha


def exact_length(config: QWenConfig) -> int:
    """Up to how many tokens the network is a plain one."""
    tricks = config.use_dynamic_ntk or config.use_logn_attn
    exact = config.seq_length if tricks else max(config.seq_length, config.max_position_embeddings)
    return min([exact, *(config.windows if config.use_window_attn else [])])


def check_network(config: QWenConfig) -> None:
    """Refuse networks that neither Qwen2 nor llama.cpp has words for.

    Raises:
        ValueError: says what they lack.
    """
    if config.rotary_pct != 1:
        raise ValueError(f"Other engines turn all channels of a head, and this model {config.rotary_pct} of them.")
    if not config.scale_attn_weights:
        raise ValueError("Other engines scale attention by the root of the head size, which this model does not.")


def rope_base(config: QWenConfig, max_length: int | None) -> float:
    """The base of RoPE for prompts of `max_length` tokens: what dynamic NTK would choose for those, here for all.

    Args:
        max_length: None for the trained length.

    Raises:
        ValueError: a length that is none, or that this model is not stretched to.
    """
    base = float(config.rotary_emb_base)
    if max_length is None:
        return base
    if not 1 <= max_length < 2**31:
        raise ValueError(f"A length of {max_length} tokens is none.")
    if max_length <= exact_length(config):
        return base
    if not config.use_dynamic_ntk:
        raise ValueError(
            f"{max_length} tokens are beyond the {exact_length(config)} of this model, which stretches its rotary "
            "embedding for no longer prompts (use_dynamic_ntk is false in its config.json)."
        )
    alpha = ntk_alpha(torch.tensor([max_length]), config.seq_length).item()
    return base * alpha ** (config.rotary_dim / (config.rotary_dim - 2))


def remarks(config: QWenConfig, max_length: int | None, chat_format: str | None) -> list[str]:
    """What a user of the exported model has to know, as sentences.

    Args:
        chat_format: what the checkpoint says that it speaks, None where it says nothing.
    """
    exact = exact_length(config)
    named = [
        name
        for name, used in (("dynamic NTK", config.use_dynamic_ntk), ("LogN attention", config.use_logn_attn))
        if used
    ]
    if max_length is not None and max_length > exact:
        left_out = " LogN attention is left out." if config.use_logn_attn else ""
        found = [
            f"The rotary embedding is stretched for prompts up to {max_length} tokens, for shorter ones too: the "
            f"outputs are near those of the original, and not the same.{left_out}"
        ]
    elif named:
        found = [
            f"Exact up to {exact} tokens, and offered for no more: other engines do not know "
            f"{' and '.join(named)}. --max-length stretches the rotary embedding."
        ]
    else:
        found = [f"Exact up to {exact} tokens: this model uses neither dynamic NTK nor LogN attention."]
    if chat_format is None:
        found.append(
            "Exported as a base model, without a chat template: generation_config.json, which would name a "
            "chat_format, is not there or does not. If this is a chat model, put that file beside the weights."
        )
    if config.use_window_attn:
        found.append("Window attention, which config.json asks for, is left out.")
    if config.use_cache_quantization:
        found.append("The 8-bit key/value cache is not the model's but the engine's affair, and left out.")
    return found
