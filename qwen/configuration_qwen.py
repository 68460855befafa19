"""Alias of `qwen.model.configuration_qwen`, the very module: published code and documents import it by this path."""

import sys

from .model import configuration_qwen

sys.modules[__name__] = configuration_qwen
