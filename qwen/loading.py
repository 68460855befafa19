"""Alias of `qwen.checkpoint.loading` (the same module object), for programs that import this path."""

import sys

from .checkpoint import loading

sys.modules[__name__] = loading
