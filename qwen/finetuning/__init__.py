"""Fine-tuning: full, LoRA and Q-LoRA, on the Trainer of transformers."""
