"""First-generation Qwen models on transformers 5.

Importing this package registers its classes with transformers' Auto classes, so that published checkpoints load with
this code instead of the code beside their weights. The import has no other side effects.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from ._moved import old_paths
from ._version import __version__
from .checkpoint.checkpoint import Checkpoint
from .checkpoint.files import CheckpointError
from .checkpoint.loading import load_model
from .kernels.fused_block import prepare
from .model.configuration_qwen import QWenConfig
from .model.modeling_qwen import INFERENCE_PREPARERS, QWenLMHeadModel, QWenModel
from .model.qwen_generation_utils import decode_tokens, get_stop_words_ids, make_context
from .model.tokenization_qwen import QWenTokenizer

AutoConfig.register(QWenConfig.model_type, QWenConfig)
AutoModel.register(QWenConfig, QWenModel)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel)
# Registered by class name, which published checkpoints contain, instead of by QWenConfig: for a registered config
# class, AutoTokenizer would run the tokenizer code beside the weights if trust_remote_code is set.
AutoTokenizer.register(QWenTokenizer, slow_tokenizer_class=QWenTokenizer)
# The name is also in most published config.json; AutoTokenizer needs it in folders without tokenizer_config.json.
QWenConfig.tokenizer_class = QWenTokenizer.__name__  # type: ignore[attr-defined]  # an optional field

INFERENCE_PREPARERS.append(prepare)

# Saved checkpoints include the model code, so that they load where this package is not installed.
QWenConfig.register_for_auto_class()
QWenModel.register_for_auto_class("AutoModel")
QWenLMHeadModel.register_for_auto_class("AutoModelForCausalLM")
QWenTokenizer.register_for_auto_class("AutoTokenizer")

__path__.append(old_paths(__name__))  # searched last

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "QWenConfig",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenTokenizer",
    "__version__",
    "decode_tokens",
    "get_stop_words_ids",
    "load_model",
    "make_context",
]
