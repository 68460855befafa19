"""Features that other engines lack, and the prompt length up to which exports are exact.

Dynamic NTK and LogN attention are not supported elsewhere; they only act beyond the trained length.
"""

import torch

from ..model.configuration_qwen import QWenConfig
from ..model.rope_qwen import ntk_alpha


def exact_length(config: QWenConfig) -> int:
    """Return the number of tokens up to which the network works without dynamic NTK, LogN and window attention."""
    extends_context = config.use_dynamic_ntk or config.use_logn_attn
    exact = config.seq_length if extends_context else max(config.seq_length, config.max_position_embeddings)
    return min([exact, *(config.layer_window_sizes if config.use_window_attn else [])])


def check_architecture(config: QWenConfig) -> None:
    """Validate that Qwen2 and llama.cpp can represent the network.

    Raises:
        ValueError: names the setting that they do not support.
    """
    if config.rotary_pct != 1:
        raise ValueError(
            f"config.json has rotary_pct {config.rotary_pct}: other engines cannot run this model, because they "
            "rotate all channels of a head."
        )
    if not config.scale_attn_weights:
        raise ValueError(
            "config.json has scale_attn_weights false: other engines cannot run this model, because they scale "
            "attention by 1/sqrt(head size)."
        )


def rope_base(config: QWenConfig, max_length: int | None) -> float:
    """Return the RoPE base that dynamic NTK uses for prompts of `max_length` tokens; exports use it for all prompts.

    Args:
        max_length: None for the trained length.

    Raises:
        ValueError: invalid length, or one that this model does not support.
    """
    base = float(config.rotary_emb_base)
    if max_length is None:
        return base
    if not 1 <= max_length < 2**31:
        raise ValueError(f"Invalid length {max_length}: it must be 1 to {2**31 - 1} tokens.")
    if max_length <= exact_length(config):
        return base
    if not config.use_dynamic_ntk:
        raise ValueError(
            f"{max_length} tokens exceed the {exact_length(config)} of this model, and its rotary embedding cannot be "
            "scaled for longer prompts (use_dynamic_ntk is false in its config.json)."
        )
    alpha = ntk_alpha(torch.tensor([max_length]), config.seq_length).item()
    return base * alpha ** (config.rotary_dim / (config.rotary_dim - 2))


def export_notes(config: QWenConfig, max_length: int | None, chat_format: str | None) -> list[str]:
    """Return notes for users of the exported model, as sentences.

    Args:
        chat_format: from the checkpoint's generation_config.json. None: not given.
    """
    exact = exact_length(config)
    unsupported = [
        name
        for name, enabled in (("dynamic NTK", config.use_dynamic_ntk), ("LogN attention", config.use_logn_attn))
        if enabled
    ]
    if max_length is not None and max_length > exact:
        left_out = " LogN attention is left out." if config.use_logn_attn else ""
        notes = [
            f"The rotary embedding is scaled for prompts of up to {max_length} tokens, also for shorter ones: outputs "
            f"are close to the original's but not identical.{left_out}"
        ]
    elif unsupported:
        notes = [
            f"Exact up to {exact} tokens, the maximum length of the export: other engines do not support "
            f"{' and '.join(unsupported)}. For longer prompts, scale the rotary embedding with --max-length."
        ]
    else:
        notes = [f"Exact up to {exact} tokens: this model uses neither dynamic NTK nor LogN attention."]
    if chat_format is None:
        notes.append(
            "Exported as a base model, without a chat template: generation_config.json is missing or has no "
            "chat_format. If this is a chat model, put that file beside the weights."
        )
    if config.use_window_attn:
        notes.append("Window attention, enabled in config.json, is left out.")
    if config.use_cache_quantization:
        notes.append("The 8-bit key/value cache is left out: configure it in the engine.")
    return notes
