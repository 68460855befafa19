"""Exports checkpoints of this family to formats that other engines read.

`qwen2` writes the Qwen2 architecture, which all current engines support and which computes the same function up to the
trained length. `gguf_file` writes llama.cpp's format. Both convert tensor by tensor and never load the whole model.
"""

from .._moved import old_paths
from .gguf_file import export_gguf
from .qwen2 import export_qwen2

__path__.append(old_paths(__name__))

__all__ = ["export_gguf", "export_qwen2"]
