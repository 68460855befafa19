"""Fields that change replies on vLLM, SGLang or llama.cpp's server, and that this server does not have.

A request that sets one of them is refused, rather than answered with a text that it did not ask for. Values that leave
replies as they are, which many clients send by default, are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping

from .errors import invalid_request

# The values that change nothing.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "use_beam_search": (False,),
    "logits_processors": ([],),
    "custom_logit_processor": ("",),
    "chat_template": (),
    "prompt_embeds": ([],),
    "lora_path": ("",),
    "lora": ([],),
    "stop_regex": ("", []),
    "typical_p": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "repeat_penalty": (1,),
    "n_predict": (-1,),
    "return_hidden_states": (False,),
}
ADVICE = {
    "use_beam_search": "Sample several choices with n.",
    "repeat_penalty": "Send repetition_penalty.",
    "n_predict": "Send max_tokens.",
}


def refuse_unsupported(fields: Mapping[str, object]) -> None:
    """Raise ApiError for a field that would change the reply on another server.

    Args:
        fields: the unknown fields of a request.
    """
    for name, value in fields.items():
        if value is not None and name in NEUTRAL_VALUES and value not in NEUTRAL_VALUES[name]:
            raise invalid_request(f"{name} is not supported by this server. {ADVICE.get(name, 'Omit it.')}", name)
