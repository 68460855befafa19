"""Arguments of `from_pretrained`: check that they agree, and choose device, precision and attention from them."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, logging

from .gptq_qwen import choose_kernel as choose_kernel  # for those who import it from here
from .gptq_qwen import is_gptq

logger = logging.get_logger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse arguments of `from_pretrained` that contradict one another.

    Raises:
        ValueError: says which two, and what to pass.
    """
    if kwargs.get("dtype") is not None and kwargs.get("torch_dtype", kwargs["dtype"]) != kwargs["dtype"]:
        raise ValueError(f"dtype={kwargs['dtype']} and torch_dtype={kwargs['torch_dtype']} contradict each other.")
    asked = [name for name in PRECISIONS if kwargs.get(name)]
    if len(asked) > 1:
        raise ValueError(
            f"{' and '.join(f'{name}=True' for name in asked)} contradict each other: pass one of bf16=True, "
            "fp16=True, fp32=True, or none of them."
        )
    named = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = None if named in (None, "auto") else as_dtype(named)
    if asked and dtype not in (None, PRECISIONS[asked[0]]):
        raise ValueError(f"{asked[0]}=True and dtype={named} contradict each other: pass only one of the two.")

    attention = kwargs.get("attn_implementation")
    flash = kwargs.get("use_flash_attn", "auto")
    if attention is not None and flash != "auto" and flash != ("flash" in str(attention)):
        raise ValueError(
            f"use_flash_attn={flash} and attn_implementation={attention!r} contradict each other: pass one of the two."
        )
    wants_flash = flash is True or "flash" in str(attention)
    if wants_flash and (kwargs.get("fp32") or dtype is torch.float32):
        raise ValueError(
            "Flash attention and float32 contradict each other: it computes in half precision, so pass bf16=True or "
            "fp16=True, or leave flash attention out."
        )


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`"bfloat16"`, `"torch.bfloat16"` or `torch.bfloat16` → `torch.bfloat16`.

    Raises:
        ValueError: not the name of a torch dtype.
    """
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f'dtype={dtype!r} is not a torch dtype: pass torch.bfloat16, torch.float32 or "auto".')
    return found


def target_device(device_map: Any) -> torch.device:
    """Where `from_pretrained(device_map=…)` will compute: the accelerator if there is one and it is not ruled out."""
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if all(str(place) in ("cpu", "disk", "meta") for place in places) or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def choose_dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype | str:
    """The precision to load in when the caller names no dtype.

    The flag that is set; else bfloat16 on a GPU that computes in it, float16 on one that does not, and float32 on the
    CPU, whatever the weights are stored in. What surrounds quantized weights stays as it is stored, and beside GPTQ
    weights on the CPU is bfloat16, the only precision that the kernels there are fast in.
    """
    for name, dtype in PRECISIONS.items():
        if getattr(config, name):
            return dtype
    if getattr(config, "quantization_config", None) is not None:
        return torch.bfloat16 if is_gptq(config) and device.type == "cpu" else "auto"
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.bfloat16


def choose_attention(
    config: PreTrainedConfig, dtype: torch.dtype | str, device: torch.device, requested: str | None = None
) -> str:
    """The name for transformers' attention interface that `use_flash_attn` means here.

    Flash attention works on a GPU in half precision and beside a cache in 16 bits; asked for elsewhere it is switched
    off with a warning that says why.

    Args:
        requested: `attn_implementation`, where the caller names one; it stands unless it is flash attention together
            with the 8-bit cache.
    """
    flash_requested = requested is not None and "flash" in requested
    if requested is not None and not (flash_requested and config.use_cache_quantization):
        return requested
    if config.use_flash_attn is False:
        return "sdpa"
    obstacle = None
    if config.use_cache_quantization:
        obstacle = "use_cache_quantization=True keeps the cache in 8 bits"
    elif device.type != "cuda":
        obstacle = f"it does not run on {device.type}"
    elif dtype is torch.float32:
        obstacle = "it does not compute in float32; load with bf16=True or fp16=True"
    elif not is_flash_attn_2_available():
        obstacle = "the flash-attn package is not installed"
    elif torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        obstacle = "it needs a GPU of compute capability 8.0 (A100, RTX 30) or newer"
    if obstacle is None:
        return "flash_attention_2"
    if config.use_flash_attn is True or flash_requested:
        logger.warning(f"Flash attention is switched off: {obstacle}.")
    return "sdpa"
