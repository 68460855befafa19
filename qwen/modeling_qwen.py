"""Alias of `qwen.model.modeling_qwen`, the very module: published code and documents import it by this path."""

import sys

from .model import modeling_qwen

sys.modules[__name__] = modeling_qwen
