"""Recognises library errors by their message if they have no exception class of their own.

Each docstring quotes the message, the library and the version that raised it. tests/packaging/test_library_errors.py
provokes the real errors. Two places match messages themselves: qwen/model, which is copied into checkpoints without
this file, and qwen/sandbox/worker.py, which does not import the package.
"""

import torch

from .model.loading_qwen import is_damaged_weight_file

__all__ = [
    "is_damaged_weight_file",
    "is_deepspeed_mismatch",
    "is_gpu_memory_full",
    "is_main_memory_full",
    "is_memory_full",
    "is_nan_in_gptq",
    "is_shape_mismatch",
    "is_unusable_proxy",
    "is_write_failed",
]

UNUSABLE_PROXY_ADVICE = (
    "The proxy of the environment (all_proxy, https_proxy or http_proxy) cannot be used. For a SOCKS proxy, write its "
    'address as socks5://HOST:PORT and run: pip install "httpx[socks]" "requests[socks]"'
)


def is_main_memory_full(error: BaseException) -> bool:
    """Whether main memory is exhausted.

    Python and numpy raise MemoryError, torch a RuntimeError:
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate …
    bytes. Error code 12 (Cannot allocate memory)" (torch 2.13).
    """
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def is_gpu_memory_full(error: BaseException) -> bool:
    """Whether the memory of an accelerator is exhausted.

    torch raises torch.OutOfMemoryError if its own allocator fails. Other allocations raise RuntimeError:
    "CUDA error: out of memory" (torch 2.13, from CUDA calls), "Triton Error [CUDA]: out of memory" (Triton 3.7).
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def is_memory_full(error: BaseException) -> bool:
    """Whether main memory or the memory of an accelerator is exhausted."""
    return is_main_memory_full(error) or is_gpu_memory_full(error)


def is_shape_mismatch(error: BaseException) -> bool:
    """Whether tensors in a file have different shapes than the model.

    "You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the above report!"
    (transformers 5.17 to 5.24); "Error(s) in loading state_dict for …: size mismatch for …: copying a param with shape
    … from checkpoint, the shape in current model is …" (torch 2.13, if transformers delegates loading to it).
    """
    text = str(error)
    return isinstance(error, RuntimeError) and ("mismatched" in text or "size mismatch" in text)


def is_nan_in_gptq(error: BaseException) -> bool:
    """Whether GPTQ found NaN in a weight matrix.

    "Quantization: Failed due to `NaN` loss for `…`, please try increasing calibration data samples or enable
    fallback=True" (gptqmodel 7.6), a ValueError.
    """
    return isinstance(error, ValueError) and "NaN" in str(error)


def is_deepspeed_mismatch(error: BaseException) -> bool:
    """Whether the DeepSpeed configuration contradicts the training arguments.

    "Please correct the following DeepSpeed config values that mismatch TrainingArguments values: …" (transformers 5.17
    to 5.24), a ValueError.
    """
    return isinstance(error, ValueError) and "DeepSpeed config values" in str(error)


def is_write_failed(error: BaseException) -> bool:
    """Whether torch.save could not write its file, as on a full disk.

    "[enforce fail at inline_container.cc:672] . unexpected pos 145920 vs 145812"; "PytorchStreamWriter failed writing
    file data/0: file write failed" (torch 2.13), both a RuntimeError.
    """
    return isinstance(error, RuntimeError) and ("inline_container" in str(error) or "StreamWriter" in str(error))


def is_unusable_proxy(error: BaseException) -> bool:
    """Whether the HTTP client cannot use the proxy that the environment sets.

    "Using SOCKS proxy, but the 'socksio' package is not installed. …", an ImportError, and "Unknown scheme for proxy
    URL …", a ValueError (httpx 0.28); "Missing dependencies for SOCKS support." and "Unable to determine SOCKS version
    from …", both a ValueError (requests 2.34).
    """
    text = str(error)
    return (isinstance(error, ImportError) and "SOCKS proxy" in text) or (
        isinstance(error, ValueError)
        and any(part in text for part in ("scheme for proxy", "for SOCKS support", "determine SOCKS version"))
    )
