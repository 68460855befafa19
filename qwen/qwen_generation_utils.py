"""Alias of `qwen.model.qwen_generation_utils`, the very module: published code and documents import it by this path."""

import sys

from .model import qwen_generation_utils

sys.modules[__name__] = qwen_generation_utils
