"""Recognises errors that libraries raise without a class of their own, by their sentences.

Where a library has a class, it is used. Each docstring quotes the sentence, and names the library and the version that
it was seen in; tests/packaging/test_library_errors.py provokes the real errors.

Two places keep a sentence of their own: qwen/model, which travels without this file, and qwen/sandbox/worker.py, which
imports nothing of the package.
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
]


def is_main_memory_full(error: BaseException) -> bool:
    """Whether there was no main memory left.

    Python and numpy raise MemoryError, torch a RuntimeError:
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate …
    bytes. Error code 12 (Cannot allocate memory)" (torch 2.13).
    """
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def is_gpu_memory_full(error: BaseException) -> bool:
    """Whether there was no memory left on an accelerator.

    torch raises torch.OutOfMemoryError where its own allocator fails. Libraries that allocate beside it do not, and
    their errors come as RuntimeError: "CUDA error: out of memory" (torch 2.13, of CUDA's own calls), "Triton Error
    [CUDA]: out of memory" (Triton 3.7).
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def is_memory_full(error: BaseException) -> bool:
    """Whether there was no memory left, of either kind."""
    return is_main_memory_full(error) or is_gpu_memory_full(error)


def is_shape_mismatch(error: BaseException) -> bool:
    """Whether tensors of a file have other shapes than the network.

    "You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the above report!"
    (transformers 5.17 to 5.24); "Error(s) in loading state_dict for …: size mismatch for …: copying a param with shape
    … from checkpoint, the shape in current model is …" (torch 2.13, where transformers leaves loading to it).
    """
    text = str(error)
    return isinstance(error, RuntimeError) and ("mismatched" in text or "size mismatch" in text)


def is_nan_in_gptq(error: BaseException) -> bool:
    """Whether GPTQ met NaN in a matrix.

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
