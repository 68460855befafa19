"""Alias of `qwen.model.tokenization_qwen`, the very module: published code and documents import it by this path."""

import sys

from .model import tokenization_qwen

sys.modules[__name__] = tokenization_qwen
