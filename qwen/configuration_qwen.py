"""Alias of `qwen.model.configuration_qwen` (the same module object), for published code that imports this path."""

import sys

from .model import configuration_qwen

sys.modules[__name__] = configuration_qwen
