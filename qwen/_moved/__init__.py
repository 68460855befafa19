"""Aliases of modules that have moved: an old path leads to the very module, and warns. They go with the next release.

Each file beside this one has the name of an old module and replaces itself by the new one. `qwen` and its packages
search this folder after their own (`__path__`), so no import hook is needed.
"""

import importlib
import sys
import warnings

MOVED: dict[str, str] = {
    "qwen.cache_qwen": "qwen.model.kv_cache_qwen",
    "qwen.gptq_qwen": "qwen.model.gptq_qwen",
    "qwen.kernels_qwen": "qwen.model.kv_cache_triton_qwen",
    "qwen.options_qwen": "qwen.model.loading_options_qwen",
    "qwen.window_qwen": "qwen.model.window_attention_qwen",
}


def redirect(old: str) -> None:
    """Make the old path of a module an alias of the module at its new path.

    Args:
        old: `__name__` of the file that calls this.
    """
    new = MOVED[old]
    warnings.warn(
        f"{old} has moved: import {new}. The old path goes with the next release.", FutureWarning, stacklevel=3
    )
    sys.modules[old] = importlib.import_module(new)
