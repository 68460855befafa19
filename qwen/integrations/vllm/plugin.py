"""Registers these models with vLLM, in each of its processes. Imports nothing of vLLM before vLLM calls `register`."""

import logging

from .versions import OLDEST, release_of

# vLLM's settings of log level and format apply to loggers below its own.
logger = logging.getLogger("vllm.qwen")


def register() -> None:
    """Register the model, its tokenizer and its tool parser. Logs an error instead of raising it.

    vLLM ends with an error of a plugin, also if it is to serve another model.
    """
    try:
        _register()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.error("First-generation Qwen models cannot be served, other models can: %s", reason)


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.version import __version__ as version

    release = release_of(version)
    if release is not None and release < OLDEST:
        logger.warning(
            "First-generation Qwen models need vLLM %d.%d or newer, and this is %s: update vLLM, or export them with "
            "export.py.",
            *OLDEST,
            version,
        )
        return

    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.tool_parsers import ToolParserManager
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from ...model.configuration_qwen import QWenConfig
    from .config import ARCHITECTURE, TOKENIZER_MODE, QWenArchConfigConvertor, QWenModelConfig

    # `import qwen` has registered QWenConfig, whose type "qwen" no other model has, with AutoConfig.
    MODEL_ARCH_CONFIG_CONVERTORS[QWenConfig.model_type] = QWenArchConfigConvertor
    MODELS_CONFIG_MAP[ARCHITECTURE] = QWenModelConfig
    if TOKENIZER_MODE not in TokenizerRegistry.tokenizers:  # vLLM warns of a second registration
        TokenizerRegistry.register(TOKENIZER_MODE, f"{__package__}.tokenizer", "QWenTokenizerLoader")
        RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm.renderers.hf", "HfRenderer")
    ToolParserManager.register_lazy_module("qwen_react", f"{__package__}.tool_parser", "QWenReActToolParser")
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:QWenLMHeadModel")
