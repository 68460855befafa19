"""Checks the arguments of `from_pretrained` and chooses device, precision and attention from them."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from transformers import GPTQConfig, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, logging

from .gptq_linear_qwen import BITS
from .gptq_qwen import choose_kernel as choose_kernel  # re-exported for old imports
from .gptq_qwen import is_gptq, quantization_of

logger = logging.get_logger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check_arguments(kwargs: Mapping[str, object]) -> None:
    """Check that the arguments of `from_pretrained` do not contradict one another.

    Raises:
        ValueError: two of them do; the message says which and what to pass.
    """
    if kwargs.get("dtype") is not None and kwargs.get("torch_dtype", kwargs["dtype"]) != kwargs["dtype"]:
        raise ValueError(f"dtype={kwargs['dtype']} and torch_dtype={kwargs['torch_dtype']} contradict each other.")
    for name in ("load_in_8bit", "load_in_4bit"):
        if kwargs.get(name):
            raise ValueError(
                f"transformers 5 has no argument {name}: pass quantization_config=BitsAndBytesConfig({name}=True)."
            )
    if "num_gpus" in kwargs:
        raise ValueError(
            'There is no argument num_gpus: device_map="auto" uses all visible GPUs, and the environment variable '
            "CUDA_VISIBLE_DEVICES=0,1 selects some."
        )
    flags = [name for name in PRECISIONS if kwargs.get(name)]
    if len(flags) > 1:
        raise ValueError(
            f"{' and '.join(f'{name}=True' for name in flags)} contradict each other: pass one of bf16=True, "
            "fp16=True, fp32=True, or none of them."
        )
    requested = kwargs.get("dtype", kwargs.get("torch_dtype"))
    dtype = None if requested in (None, "auto") else as_dtype(requested)
    if flags and dtype not in (None, PRECISIONS[flags[0]]):
        raise ValueError(f"{flags[0]}=True and dtype={requested} contradict each other: pass only one of the two.")

    attention = kwargs.get("attn_implementation")
    use_flash_attn = kwargs.get("use_flash_attn", "auto")
    if attention is not None and use_flash_attn != "auto" and use_flash_attn != ("flash" in str(attention)):
        raise ValueError(
            f"use_flash_attn={use_flash_attn} and attn_implementation={attention!r} contradict each other: pass one of "
            "the two."
        )
    wants_flash = use_flash_attn is True or "flash" in str(attention)
    if wants_flash and (kwargs.get("fp32") or dtype is torch.float32):
        raise ValueError(
            "Flash attention computes in half precision, not in float32: pass bf16=True or fp16=True, or leave flash "
            "attention out."
        )


def as_dtype(dtype: object) -> torch.dtype:
    """`"bfloat16"`, `"torch.bfloat16"` or `torch.bfloat16` → `torch.bfloat16`.

    Raises:
        ValueError: not the name of a torch dtype.
    """
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f'dtype={dtype!r} is not a torch dtype: pass torch.bfloat16, torch.float32 or "auto".')
    return found


def check_devices(device_map: object) -> None:
    """Check that this machine has the devices that a `device_map` names.

    Raises:
        ValueError: it does not; the message says what it has.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None and device_map is not None and not is_on_cpu(device_map):
        check_driver()
    count = 0 if accelerator is None else torch.accelerator.device_count()
    for place in device_map.values() if isinstance(device_map, dict) else [device_map]:
        named, _, index = str(place).partition(":")
        if isinstance(place, int):  # of the accelerator, whatever its type
            named, index = "cuda" if accelerator is None else accelerator.type, str(place)
        if named not in ("cuda", "mps", "xpu"):  # others have no standard way to ask; "auto", "cpu" …
            continue
        if accelerator is None or named != accelerator.type or int(index or 0) >= count:
            found = "no GPU that this torch can use" if accelerator is None else f"{count} of type {accelerator.type!r}"
            raise ValueError(
                f'device_map={device_map!r} names {place!r}, but this machine has {found}. Pass device_map="auto", '
                'which uses what there is, or "cpu". If it has a GPU, install its driver and the build of torch for '
                "it: https://pytorch.org/get-started."
            )


def check_driver() -> None:
    """Check that torch can use the driver of an NVIDIA GPU, if this machine has one. Otherwise torch finds no GPU.

    Raises:
        ValueError: the driver is too old.
    """
    if torch.version.cuda is None:
        return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        # "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by …"
        # (torch 2.13); also raised where there is no driver, with another text.
        if "too old" not in str(error):
            return
        raise ValueError(
            f"The NVIDIA driver of this machine is too old for this build of torch (CUDA {torch.version.cuda}): update "
            "the driver, install a build of torch for it (https://pytorch.org/get-started), or use the CPU: "
            'device_map="cpu" in Python, --cpu-only with the commands.'
        ) from error


def is_on_cpu(device_map: object) -> bool:
    """Return whether a `device_map` names no device but the CPU."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(str(place) in ("cpu", "disk", "meta") for place in places)


def target_device(device_map: object) -> torch.device:
    """Return the device `from_pretrained(device_map=…)` computes on: the accelerator if available and not excluded."""
    if is_on_cpu(device_map) or not torch.accelerator.is_available():
        return torch.device("cpu")
    return cast(torch.device, torch.accelerator.current_accelerator())  # None only if none is available


def needs_gptqmodel(config: PreTrainedConfig, quantization_config: object, device_map: object) -> bool:
    """Return whether weights are loaded with GPTQModel, because they are not, or cannot be, loaded as `GPTQLinear`.

    Args:
        quantization_config: the caller's, who chooses one of GPTQModel's kernels with it.
        device_map: the caller's. Without one, GPTQ weights are loaded on the CPU.
    """
    if not is_gptq(config):
        return isinstance(quantization_config, GPTQConfig)
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return (
        quantization_config is not None
        or quantization_of(config).get("bits") not in BITS
        or any(str(place) in ("disk", "meta") for place in places)
        or target_device("cpu" if device_map is None else device_map).type != "cpu"
    )


def attention_devices(device_map: object) -> list[torch.device]:
    """Return the devices that a model may compute attention on after `from_pretrained(device_map=…)`.

    Without a device_map, the weights are on torch's default device, whatever GPUs there are.
    """
    device = torch.get_default_device() if device_map is None else target_device(device_map)
    if device.type != "cuda" or device_map is None:
        return [device]
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    names = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in places]
    named = [torch.device(name) for name in names if name.startswith("cuda")]
    return named or [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def prefer_one_gpu(config: PreTrainedConfig, dtype: torch.dtype | str) -> str:
    """Return the `device_map` for "auto": the first GPU that has room for everything, otherwise "auto".

    transformers spreads layers over all GPUs, which compute one after another: it makes a small model slower. Room is
    needed for the weights, a tenth of them for activations, and a key/value cache of the trained length.
    """
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return "auto"
    itemsize = as_dtype((None if dtype == "auto" else dtype) or config.dtype or torch.float32).itemsize
    bits = quantization_of(config).get("bits")
    projection = config.num_attention_heads * config.kv_channels
    matrices = config.num_hidden_layers * config.hidden_size * (4 * projection + 3 * config.intermediate_size // 2)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    cache = 2 * config.num_hidden_layers * projection * config.seq_length * itemsize
    weights = matrices * (bits or 8 * itemsize) // 8 + embeddings * itemsize
    for index in range(torch.cuda.device_count()):
        unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)  # torch has it, but it is free
        if 1.1 * weights + cache <= torch.cuda.mem_get_info(index)[0] + unused:
            return f"cuda:{index}"
    return "auto"


def choose_dtype(config: PreTrainedConfig, device: torch.device) -> torch.dtype | str:
    """Choose the precision to load in when the caller passes no dtype.

    A precision flag takes precedence. Otherwise bfloat16 on GPUs that support it, float16 on other GPUs and float32 on
    the CPU, independent of the stored dtype. The unquantized tensors of a quantized checkpoint keep their stored dtype,
    except with GPTQ on the CPU: their float16 is slow there, and float32 doubles the memory.
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
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    devices: Sequence[torch.device],
    requested: str | None = None,
) -> str:
    """Choose the attention implementation of transformers for `use_flash_attn`.

    Flash attention needs a GPU, half precision and a 16-bit cache. If it is requested without them, it is switched off
    with a warning that gives the reason.

    Args:
        devices: those that compute, see `attention_devices`.
        requested: the caller's `attn_implementation`; kept unless it is flash attention together with the 8-bit cache.
    """
    flash_requested = requested is not None and "flash" in requested
    if requested is not None and not (flash_requested and config.use_cache_quantization):
        return requested
    if config.use_flash_attn is False:
        return "sdpa"
    reason = None
    if config.use_cache_quantization:
        reason = "use_cache_quantization=True keeps the cache in 8 bits"
    elif others := {device.type for device in devices} - {"cuda"}:
        reason = f"it does not run on {min(others)}"
    elif dtype is torch.float32:
        reason = "it does not compute in float32; load with bf16=True or fp16=True"
    elif not is_flash_attn_2_available():
        reason = "the flash-attn package is not installed"
    elif torch.version.cuda and any(torch.cuda.get_device_capability(device) < (8, 0) for device in devices):
        reason = "it needs a GPU of compute capability 8.0 (A100, RTX 30) or newer"
    if reason is None:
        return "flash_attention_2"
    if config.use_flash_attn is True or flash_requested:
        logger.warning(f"Flash attention is switched off: {reason}.")
    return "sdpa"
