"""Says what replaces the published file of this name, which spread a model over several GPUs."""

import sys
from typing import NoReturn

MESSAGE = (
    'load_model_on_gpus is gone: AutoModelForCausalLM.from_pretrained(name, device_map="auto") uses all visible GPUs, '
    "and so do the scripts. CUDA_VISIBLE_DEVICES=0,1 selects some. See docs/migration.md."
)


def __getattr__(name: str) -> NoReturn:
    if name == "load_model_on_gpus":
        raise ImportError(MESSAGE)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(MESSAGE)
