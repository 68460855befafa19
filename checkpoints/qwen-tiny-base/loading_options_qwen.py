"""What the keyword arguments of `from_pretrained` mean: which contradict one another, and what they choose here.

Knows devices and dtypes, not layers.
"""

import sys
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, logging

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


def is_gptq(config: PreTrainedConfig) -> bool:
    """Whether the weights of the checkpoint are quantized with GPTQ, as the published Int4 and Int8 ones are."""
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict):
        quantization = vars(quantization) if quantization is not None else {}
    return quantization.get("quant_method") == "gptq"


def choose_kernel(quantization: dict[str, Any], dtype: torch.dtype | str, device: torch.device) -> str:
    """The `backend` of GPTQModel that multiplies with GPTQ weights of this kind fastest, on this device.

    Its automatic choice on an accelerator, and on the CPU for what the kernel of 4 bits there takes. On NVIDIA's GPUs
    that choice compiles itself with nvcc at the first load; without nvcc it fails, and Triton's kernel is taken. All
    else on the CPU is computed in 8 bits with one scale a row, which is fast in bfloat16 alone, and in other precisions
    unpacked in every pass, which is slow and exact.

    Args:
        quantization: `quantization_config` of config.json.
    """
    bits, group_size = quantization.get("bits"), quantization.get("group_size", 128)
    if device.type == "cuda" and torch.version.hip is None and bits in (2, 4, 8) and not _has_nvcc():
        logger.warning(
            "The fastest kernels for GPTQ weights are compiled with nvcc, which is not found: Triton's are used. With "
            "the CUDA toolkit installed (or CUDA_HOME set to it) the first load takes minutes, and answers are faster."
        )
        return "gptq_triton"
    if device.type != "cpu" or (bits == 4 and group_size in (32, 64, 128)):
        return "auto"
    convertible = bits in (2, 4, 8) and group_size in (-1, 16, 32, 64, 128) and sys.platform in ("linux", "win32")
    return "gptq_torch_int8" if convertible and dtype is torch.bfloat16 else "torch"


def _has_nvcc() -> bool:
    from torch.utils import cpp_extension

    return cpp_extension.CUDA_HOME is not None


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
