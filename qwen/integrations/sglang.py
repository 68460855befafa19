"""Plugin for SGLang, which has the network itself and lacks the configuration and the tokenizer.

SGLang calls `register`, by the entry point `sglang.srt.plugins`, in each of its processes. `import qwen` has then
registered both classes with transformers, which SGLang loads them by. Its `QWenLMHeadModel` has neither dynamic NTK nor
LogN; by default it takes `seq_length` tokens, where both change nothing. The rest it finds where it looks:

- base of RoPE: `config.rope_theta`, another name of `rotary_emb_base`;
- chat template, and the token that ends a reply: those of `QWenTokenizer`.
"""

import logging

from transformers import AutoConfig

from ..model.configuration_qwen import QWenConfig

logger = logging.getLogger("sglang.qwen")  # below SGLang's logger, whose settings apply


def register() -> None:
    """Log an error if SGLang would load another configuration for these models."""
    try:
        found = type(AutoConfig.for_model(QWenConfig.model_type))
    except Exception as error:
        logger.error("First-generation Qwen models cannot be served, other models can: %s", error)
        return
    if found is not QWenConfig:
        logger.error(
            "First-generation Qwen models cannot be served: %s.%s is registered for them. Remove the plugin that does.",
            found.__module__,
            found.__name__,
        )
