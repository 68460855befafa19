"""Checkpoints of this family in the formats that other engines read.

`qwen2` writes the architecture that every current engine knows and that computes the same function up to the trained
length; `gguf_file` writes llama.cpp's format. Both work tensor by tensor and never hold a model; neither knows how a
model runs.
"""

from .._moved import old_paths
from .gguf_file import export_gguf
from .qwen2 import export_qwen2

__path__.append(old_paths(__name__))

__all__ = ["export_gguf", "export_qwen2"]
