"""Alias of `qwen.model.modeling_qwen` (the same module object), for published code that imports this path."""

import sys

from .model import modeling_qwen

sys.modules[__name__] = modeling_qwen
