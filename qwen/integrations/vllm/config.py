"""What vLLM has to know of these models before it builds one: lengths, positions, tokenizer, prefix caching."""

import logging
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.version import __version__ as vllm_version

from ...export.limits import check_architecture, exact_length
from ...model.configuration_qwen import QWenConfig
from ...model.rope_qwen import ntk_alpha
from .versions import NEWEST, release_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

ARCHITECTURE = "QWenLMHeadModel"
TOKENIZER_MODE = "qwen"
SCHEDULER = f"{__package__}.scheduler.create_scheduler"
logger = logging.getLogger("vllm.qwen")


def count_doublings(length: int, seq_length: int) -> int:
    """Return how often the trained length must be doubled to hold a prompt: α of dynamic NTK is 2^(this + 1) − 1."""
    return int(ntk_alpha(torch.tensor([length], device="cpu"), seq_length).item() + 1).bit_length() - 2


def uses_dynamic_ntk(config: QWenConfig, max_model_len: int) -> bool:
    """Return whether some prompts need another rotary embedding than others."""
    return config.use_dynamic_ntk and max_model_len > config.seq_length


def uses_logn(config: QWenConfig, max_model_len: int) -> bool:
    """Return whether some queries are scaled."""
    return config.use_logn_attn and max_model_len > config.seq_length


class QWenArchConfigConvertor(ModelArchConfigConvertorBase):
    """The length that vLLM offers: all that the model supports. By default it would be the trained length."""

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        config = self.hf_config
        if config.use_window_attn:  # not supported here, and without effect up to the smallest window
            return exact_length(config), "window_sizes"
        return config.max_context_length, "max_position_embeddings"


class QWenModelConfig(VerifyAndUpdateConfig):
    """Changes vLLM's options for these models. vLLM calls both methods, the first one earlier."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Choose the tokenizer and the kind of positions.

        Raises:
            ValueError: vLLM's layers cannot represent the network.
        """
        config = model_config.hf_config
        check_network(config)
        release = release_of(vllm_version)
        if release is not None and release > NEWEST:
            logger.warning(
                "First-generation Qwen models were tried with vLLM up to %d.%d, and this is %s: compare some replies "
                "with those of model.chat.",
                *NEWEST,
                vllm_version,
            )
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE
        if uses_dynamic_ntk(config, model_config.max_model_len):
            # vLLM then asks the model for the positions of each prompt: QWenLMHeadModel.get_mrope_input_positions.
            half = config.rotary_dim // 2
            config.rope_parameters = {
                "rope_type": "default",
                "rope_theta": float(config.rotary_emb_base),
                "mrope_section": [half - 2, 1, 1],
            }

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Let prompts share cached keys only where these are equal.

        Raises:
            ValueError: keys may come from elsewhere.
        """
        config, max_model_len = vllm_config.model_config.hf_config, vllm_config.model_config.max_model_len
        if not uses_dynamic_ntk(config, max_model_len):
            return
        advice = f"--max-model-len {config.seq_length}, up to which there is no dynamic NTK"
        if getattr(vllm_config, "kv_transfer_config", None) is not None:
            raise ValueError(
                "A key/value connector may reuse the keys of a prompt for a longer one, which dynamic NTK makes wrong: "
                f"leave it out, or set {advice}."
            )
        if not vllm_config.cache_config.enable_prefix_caching:
            return
        if vllm_config.scheduler_config.scheduler_cls is None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        elif vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
            vllm_config.cache_config.enable_prefix_caching = False
            logger.warning(
                "Prefix caching is off: it needs the scheduler of this plugin, because keys depend on the length of "
                "the prompt. Leave out --scheduler-cls, or set %s.",
                advice,
            )


def check_network(config: QWenConfig) -> None:
    """Check that vLLM's layers of Qwen2 can represent the network.

    Raises:
        ValueError: names the setting that they do not support.
    """
    check_architecture(config)
    if config.num_attention_heads * config.kv_channels != config.hidden_size:
        raise ValueError(
            f"{config.num_attention_heads} heads of {config.kv_channels} channels are not supported with hidden_size "
            f"{config.hidden_size}: vLLM's layers expect as many channels in all heads together."
        )
