"""GPTQ weights: detection, kernel choice, and checks before training and saving.

The layers are GPTQModel's, inserted by transformers' quantizer. This file chooses the kernel for each device, accepts
the all-zero biases of published files, and raises an error when weights that were repacked for a kernel are trained or
saved.
"""

import copy
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

if TYPE_CHECKING:  # what the mixin expects of the class that it is mixed into
    from transformers import GPTQConfig
    from transformers import PreTrainedModel as MixinBase
    from transformers.utils.loading_report import LoadStateDictInfo
else:
    MixinBase = object

logger = logging.get_logger(__name__)

TRAINING_KERNELS = ("gptq_torch", "gptq_triton")
"""Kernels whose gradients are always correct. Other trainable kernels lose gradients after an eval forward."""

GPTQ_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
"""Suffixes of the tensors that store a quantized linear layer."""


def is_gptq(config: PreTrainedConfig) -> bool:
    """Return whether the weights are quantized with GPTQ, as in the published Int4 and Int8 checkpoints."""
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict):
        quantization = vars(quantization) if quantization is not None else {}
    return quantization.get("quant_method") == "gptq"


def missing_packages() -> list[str]:
    """Return the names of packages that GPTQ weights need and that are not installed."""
    return [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]


def explain_missing_packages(name: str | os.PathLike) -> str:
    """Say what to install to load a checkpoint with GPTQ weights."""
    return (
        f"{name} is quantized (GPTQ), which needs two more packages: `pip install gptqmodel optimum`. "
        "Or use the model without -Int4 or -Int8. (auto-gptq does not run with transformers 5.)"
    )


def choose_kernel(quantization: Mapping[str, object], dtype: torch.dtype | str, device: torch.device) -> str:
    """Return GPTQModel's fastest `backend` for these GPTQ weights on this device.

    On NVIDIA GPUs the fast kernels are compiled with nvcc at the first load; without nvcc that fails, so the Triton
    kernel is used. From compute capability 8.0 on, weights like the published ones get Marlin. GPTQModel would choose
    Machete on Hopper, which downloads CUTLASS and compiles it. On other accelerators, and on the CPU for layouts that
    its 4-bit kernel supports, GPTQModel chooses. Other weights on the CPU are computed in 8 bits with one scale per row
    in bfloat16, which is fast, and unpacked in every forward in other precisions, which is slow but exact.

    Args:
        quantization: `quantization_config` of config.json.
    """
    bits, group_size = quantization.get("bits"), quantization.get("group_size", 128)
    if device.type == "cuda" and torch.version.hip is None and bits in (2, 4, 8) and not _has_nvcc():
        logger.warning(
            "nvcc, which compiles the fastest kernels for GPTQ weights, was not found: Triton's are used. For faster "
            "replies install the CUDA toolkit (or set CUDA_HOME to it); the first load then takes minutes."
        )
        return "gptq_triton"
    if device.type == "cuda" and _is_for_marlin(quantization):
        logger.warning_once(
            "The GPTQ weights are computed by Marlin. GPTQModel compiles it with nvcc at the first load on a machine, "
            "and in bfloat16 another time at the first token. Each takes minutes; the results are kept."
        )
        return "gptq_marlin"
    if device.type != "cpu" or (bits == 4 and group_size in (32, 64, 128)):
        return "auto"
    convertible = bits in (2, 4, 8) and group_size in (-1, 16, 32, 64, 128) and sys.platform in ("linux", "win32")
    return "gptq_torch_int8" if convertible and dtype is torch.bfloat16 else "torch"


def _is_for_marlin(quantization: Mapping[str, object]) -> bool:
    """Return whether GPTQModel's kernel Marlin computes with these weights, on all NVIDIA GPUs of this machine."""
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return (
        torch.version.hip is None
        and sys.platform == "linux"
        and min(capabilities, default=(0, 0)) >= (8, 0)
        and quantization.get("sym", True) is True
        and quantization.get("bits") in (4, 8)
        and quantization.get("group_size", 128) in (-1, 32, 64, 128)
    )


def _has_nvcc() -> bool:
    from torch.utils import cpp_extension

    return cpp_extension.CUDA_HOME is not None


def configure_kernel(
    config: PreTrainedConfig,
    quantization_config: "GPTQConfig | None",
    dtype: torch.dtype | str,
    device: torch.device,
) -> "tuple[PreTrainedConfig, GPTQConfig | None]":
    """Set the kernel in both configurations that transformers merges, and return them.

    A kernel named in the checkpoint was chosen on the machine that wrote it, so it is ignored.

    Args:
        config: of a checkpoint, quantized or not.
        quantization_config: the caller's; its `backend` takes precedence unless it is "auto".
    """
    if not is_gptq(config):
        return config, quantization_config
    config = copy.deepcopy(config)
    stored = config.quantization_config
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kernel = choose_kernel(stored, dtype, device)
    config.quantization_config = {**stored, "backend": kernel}
    if quantization_config is not None and getattr(quantization_config, "backend", None) == "auto":
        quantization_config = copy.copy(quantization_config)
        quantization_config.backend = kernel
    return config, quantization_config


class GPTQMixin(MixinBase):
    """Adapts loading, training and saving of a PreTrainedModel whose weights may be quantized with GPTQ."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in transformers."""
        loaded = super().from_pretrained(*args, **kwargs)
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if hasattr(module, "int8_weight_nk") and not hasattr(module, "qweight"):
                module.qweight = module.int8_weight_nk  # peft reads it to put adapters on the same device
        return loaded

    def train(self, mode: bool = True) -> Self:
        """As in torch.

        Raises:
            RuntimeError: the kernel of the quantized weights does not pass gradients.
        """
        if mode and is_gptq(self.config):
            for module in self.modules():
                kernel = getattr(module, "backend", None)
                if hasattr(module, "SUPPORTS_TRAINING") and kernel not in TRAINING_KERNELS:
                    raise RuntimeError(
                        f"These weights were loaded for a fast inference kernel ({type(module).__name__}) that does "
                        f"not pass gradients. To train adapters on them, load them with "
                        f"from_pretrained(..., quantization_config=GPTQConfig(bits={module.bits}, "
                        f'backend="torch")). Other arguments of GPTQConfig, such as use_exllama, do not change the '
                        "kernel."
                    )
        return super().train(mode)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            ValueError: the weights come from a quantized checkpoint and were repacked for a kernel; no file format
                stores that layout.
        """
        repacked = is_gptq(self.config) and getattr(getattr(self, "hf_quantizer", None), "pre_quantized", False)
        if repacked and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "This model cannot be saved: its GPTQ weights were repacked for the kernel that computes with them. "
                f"Copy {self.config.name_or_path} instead; its weights are the same. Adapters can be saved."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        *args: Any,
        **kwargs: Any,
    ) -> "tuple[LoadStateDictInfo, dict]":
        """As in transformers, but all-zero biases without a parameter are not reported as unexpected: published GPTQ
        files have one for every layer.

        Raises:
            OSError: the tensors do not match the GPTQ layers of this network, which would compute with random ones.
        """
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        names = loaded[0]
        names.unexpected_keys -= zero_biases(names.unexpected_keys, checkpoint_files or [])
        if is_gptq(model.config):
            if missing := sorted(name for name in names.missing_keys if name.endswith(GPTQ_SUFFIXES)):
                raise OSError(
                    f"The weight files lack {len(missing)} GPTQ tensors, for example {missing[0]}: the "
                    "checkpoint is incomplete. Download all of it again."
                )
            if biases := sorted(name for name in names.unexpected_keys if name.endswith(".bias")):
                raise OSError(
                    f"The weight files have {len(biases)} biases that are not zero and that config.json rules out, "
                    f'for example {biases[0]}. Set "no_bias": false in config.json.'
                )
        return loaded


def zero_biases(names: set[str], files: list[str]) -> set[str]:
    """Return the names of biases that are all zeros in the safetensors files."""
    found = set()
    if biases := {name for name in names if name.endswith(".bias")}:
        for path in files:
            if str(path).endswith(".safetensors"):
                with safe_open(path, "pt") as file:
                    here = biases.intersection(file.keys())
                    found |= {name for name in here if not file.get_tensor(name).any()}
    return found


# Old names; the next release removes them.
PARTS = GPTQ_SUFFIXES
with_kernel = configure_kernel
