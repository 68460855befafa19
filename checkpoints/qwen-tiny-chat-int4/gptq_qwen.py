"""GPTQ weights in a model: how to recognise them, which kernel multiplies with them, and what such a model cannot do.

The layers themselves are GPTQModel's, and transformers' quantizer puts them in place. This file adds what these leave
open: it chooses the kernel for each device, accepts the biases of zeros in published files, and refuses to train or
save weights that were repacked for a kernel.
"""

import copy
import os
import sys
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

TRAINING_KERNELS = ("gptq_torch", "gptq_triton")
"""Kernels that pass right gradients whatever was computed before. Others that claim to, stop after a first answer."""

PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
"""What a linear layer is stored as."""


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


def with_kernel(
    config: PreTrainedConfig, asked: Any, dtype: torch.dtype | str, device: torch.device
) -> tuple[PreTrainedConfig, Any]:
    """The two configurations that transformers merges, both naming the kernel to load for.

    What a file says of kernels is of the machine that wrote it and does not count.

    Args:
        config: of a checkpoint, quantized or not.
        asked: the caller's `quantization_config`; its `backend` wins unless it leaves the choice open.
    """
    if not is_gptq(config):
        return config, asked
    config = copy.deepcopy(config)
    stored = config.quantization_config
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kernel = choose_kernel(stored, dtype, device)
    config.quantization_config = {**stored, "backend": kernel}
    if getattr(asked, "backend", None) == "auto":
        asked = copy.copy(asked)
        asked.backend = kernel
    return config, asked


class GPTQMixin:
    """Loading, training and saving of a PreTrainedModel whose weights may be quantized with GPTQ."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        loaded = super().from_pretrained(*args, **kwargs)
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if hasattr(module, "int8_weight_nk") and not hasattr(module, "qweight"):
                module.qweight = module.int8_weight_nk  # peft asks for it, to put adapters on the same device
        return loaded

    def train(self, mode: bool = True) -> "GPTQMixin":
        """As in torch.

        Raises:
            RuntimeError: gradients would not come through the kernel of the quantized weights.
        """
        if mode and is_gptq(self.config):
            for module in self.modules():
                kernel = getattr(module, "backend", None)
                if hasattr(module, "SUPPORTS_TRAINING") and kernel not in TRAINING_KERNELS:
                    raise RuntimeError(
                        f"No gradients pass through the kernel that these weights were loaded for "
                        f"({type(module).__name__}), which is there to answer fast. To train adapters on them, load "
                        f"them with from_pretrained(..., quantization_config=GPTQConfig(bits={module.bits}, "
                        f'backend="torch")). Other arguments of GPTQConfig, such as use_exllama, do not change the '
                        "kernel."
                    )
        return super().train(mode)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            ValueError: the weights were read from a quantized checkpoint and repacked for a kernel, which no file
                format knows.
        """
        repacked = is_gptq(self.config) and getattr(getattr(self, "hf_quantizer", None), "pre_quantized", False)
        if repacked and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "This model cannot be saved: its GPTQ weights were repacked for the kernel that computes with them. "
                f"Copy {self.config.name_or_path} instead, they have not changed. An adapter is saved without them."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but biases of zeros that the network has no place for are not reported as unexpected:
        published GPTQ files have one for every layer.

        Raises:
            OSError: the tensors are not those of GPTQ weights for this network; it would compute with random ones.
        """
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        names = loaded[0]
        names.unexpected_keys -= zero_biases(names.unexpected_keys, checkpoint_files or [])
        if is_gptq(model.config):
            if missing := sorted(name for name in names.missing_keys if name.endswith(PARTS)):
                raise OSError(
                    f"{len(missing)} tensors of its GPTQ weights are in none of the weight files, for example "
                    f"{missing[0]}: the checkpoint is incomplete. Download it again as a whole."
                )
            if biases := sorted(name for name in names.unexpected_keys if name.endswith(".bias")):
                raise OSError(
                    f"Its weight files have {len(biases)} biases that its config.json rules out and that are not zero, "
                    f'for example {biases[0]}. Set "no_bias": false there.'
                )
        return loaded


def zero_biases(names: set[str], files: list[str]) -> set[str]:
    """Those of the tensors that are biases of nothing but zeros, in safetensors files."""
    found = set()
    if biases := {name for name in names if name.endswith(".bias")}:
        for path in files:
            if str(path).endswith(".safetensors"):
                with safe_open(path, "pt") as file:
                    here = biases.intersection(file.keys())
                    found |= {name for name in here if not file.get_tensor(name).any()}
    return found
