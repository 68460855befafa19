"""Alias of `qwen.model.tokenization_qwen` (the same module object), for published code that imports this path."""

import sys

from .model import tokenization_qwen

sys.modules[__name__] = tokenization_qwen
