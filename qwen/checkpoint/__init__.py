"""From a name to a loaded checkpoint: hubs, folders of weights, LoRA adapters, and folders that are written whole."""
