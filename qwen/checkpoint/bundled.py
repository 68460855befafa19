"""Paths of the toy checkpoints in the repository. They are not part of the installed package."""

from pathlib import Path

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
BUNDLED_CHAT = CHECKPOINTS / "qwen-tiny-chat"
BUNDLED_BASE = CHECKPOINTS / "qwen-tiny-base"
BUNDLED_CHAT_INT4 = CHECKPOINTS / "qwen-tiny-chat-int4"
