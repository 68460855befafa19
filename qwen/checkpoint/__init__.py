"""Checkpoints: download, validation and loading, LoRA adapters, and safe writing of model folders."""
