"""Alias of `qwen.model.qwen_generation_utils` (the same module object), for published code that imports this path."""

import sys

from .model import qwen_generation_utils

sys.modules[__name__] = qwen_generation_utils
