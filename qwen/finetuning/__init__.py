"""Fine-tuning: full, LoRA and Q-LoRA, on the Trainer of transformers."""

from .._moved import old_paths

__path__.append(old_paths(__name__))
