"""Alias of `qwen.checkpoint.loading`, the very module: documents and programs import it by this path."""

import sys

from .checkpoint import loading

sys.modules[__name__] = loading
