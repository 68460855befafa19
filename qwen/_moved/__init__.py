"""Aliases of moved modules: importing an old path warns and returns the new module. Removed in the next release.

Each file here has the name of an old module and replaces itself by the new one. `qwen` and its packages search this
folder after their own (`__path__`), so no import hook is needed.
"""

import importlib
import sys
import warnings
from pathlib import Path

MOVED: dict[str, str] = {
    "qwen.adapters": "qwen.checkpoint.adapters",
    "qwen.cache_qwen": "qwen.model.kv_cache_qwen",
    "qwen.chat_data": "qwen.data.samples",
    "qwen.chat_datasets": "qwen.data.datasets",
    "qwen.chat_files": "qwen.data.conversation_file",
    "qwen.checkpoint_files": "qwen.checkpoint.files",
    "qwen.code_interpreter": "qwen.tools.code_interpreter",
    "qwen.export.weights": "qwen.checkpoint.weights",
    "qwen.finetuning.interrupts": "qwen.finetuning.callbacks",
    "qwen.finetuning.legacy_arguments": "qwen.finetuning.transformers4_arguments",
    "qwen.finetuning.processes": "qwen.finetuning.distributed",
    "qwen.finetuning.progress": "qwen.finetuning.callbacks",
    "qwen.gptq_qwen": "qwen.model.gptq_qwen",
    "qwen.hubs": "qwen.checkpoint.hub",
    "qwen.kernels_qwen": "qwen.model.kv_cache_triton_qwen",
    "qwen.modelscope_chat": "qwen.integrations.modelscope",
    "qwen.modelscope_pipeline": "qwen.integrations.modelscope",
    "qwen.options_qwen": "qwen.model.loading_options_qwen",
    "qwen.react": "qwen.tools",
    "qwen.react.format": "qwen.tools.react",
    "qwen.react.messages": "qwen.tools.messages",
    "qwen.react.reply": "qwen.tools.reply",
    "qwen.serving.app": "qwen.serving.api.app",
    "qwen.serving.chat": "qwen.serving.api.chat",
    "qwen.serving.choices": "qwen.serving.api.generation",
    "qwen.serving.completions": "qwen.serving.api.completions",
    "qwen.serving.constraints": "qwen.serving.engine.grammar",
    "qwen.serving.errors": "qwen.serving.api.errors",
    "qwen.serving.logprobs": "qwen.serving.api.logprobs",
    "qwen.serving.metrics": "qwen.serving.api.metrics",
    "qwen.serving.protocol": "qwen.serving.api.request_types",
    "qwen.serving.ragged_cache": "qwen.serving.engine.paged_kv_cache",
    "qwen.serving.responses": "qwen.serving.api.response_types",
    "qwen.serving.sampler": "qwen.serving.engine.sampler",
    "qwen.serving.scheduler": "qwen.serving.engine.scheduler",
    "qwen.serving.security": "qwen.serving.api.middleware",
    "qwen.serving.server": "qwen.serving.api.server",
    "qwen.serving.text": "qwen.serving.engine.detokenizer",
    "qwen.serving.web_page": "qwen.serving.web.page",
    "qwen.serving.web_texts": "qwen.serving.web.texts",
    "qwen.target_folder": "qwen.checkpoint.staging",
    "qwen.window_qwen": "qwen.model.window_attention_qwen",
}


def old_paths(package: str) -> str:
    """Return the folder of aliases for a package's submodules, to append to its `__path__`."""
    return str(Path(__file__).parent.joinpath(*package.split(".")[1:]))


def redirect(old: str) -> None:
    """Make the old path of a module an alias of the module at its new path.

    Args:
        old: `__name__` of the file that calls this.
    """
    new = MOVED[old]
    warnings.warn(f"{old} has moved: import {new}. The next release removes the old path.", FutureWarning, stacklevel=3)
    for name, target in MOVED.items():
        if name == old or name.startswith(f"{old}."):
            module = sys.modules[name] = importlib.import_module(target)
            if name != old:  # the import system does this for the module itself
                setattr(sys.modules[old], name.rpartition(".")[2], module)
