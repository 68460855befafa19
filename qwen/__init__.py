"""First-generation Qwen models on transformers 5.

Importing this package registers its classes with transformers' Auto classes, so that every published checkpoint loads
with this code, whatever code lies beside its weights.
"""

from . import quiet  # noqa: F401  the first, for it is about the next

# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ._moved import old_paths
from .model.configuration_qwen import QWenConfig
from .model.modeling_qwen import QWenLMHeadModel, QWenModel
from .model.qwen_generation_utils import decode_tokens, get_stop_words_ids, make_context
from .model.tokenization_qwen import QWenTokenizer
from .modelscope_pipeline import teach_modelscope

AutoConfig.register(QWenConfig.model_type, QWenConfig)
AutoModel.register(QWenConfig, QWenModel)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel)
# Known by its name, which published checkpoints give, and not by QWenConfig: for a config class that it knows,
# AutoTokenizer would run the tokenizer code beside the weights where trust_remote_code is set.
AutoTokenizer.register(QWenTokenizer, slow_tokenizer_class=QWenTokenizer)

# ModelScope's pipelines are told when they are imported; nothing of ModelScope is imported here.
teach_modelscope()

# Saved checkpoints take the code along, so that they load where this package is not installed.
QWenConfig.register_for_auto_class()
QWenModel.register_for_auto_class("AutoModel")
QWenLMHeadModel.register_for_auto_class("AutoModelForCausalLM")
QWenTokenizer.register_for_auto_class("AutoTokenizer")

__path__.append(old_paths(__name__))  # searched last

__all__ = [
    "QWenConfig",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenTokenizer",
    "decode_tokens",
    "get_stop_words_ids",
    "make_context",
]
