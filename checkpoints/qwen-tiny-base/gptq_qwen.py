"""GPTQ weights: detection, loading, kernel choice, and checks before training and saving.

On the CPU the layers are `GPTQLinear`, which needs torch alone. On GPUs and for training they are GPTQModel's, inserted
by transformers' quantizer. This file loads the former and chooses the kernel of the latter, accepts the all-zero biases
of published files, and raises an error when weights that were rearranged while loading are trained or saved.
"""

import contextlib
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
from transformers.utils.quantization_config import QuantizationMethod

from .gptq_linear_qwen import GPTQLinear, replace_linear_layers

if TYPE_CHECKING:  # what the mixin expects of the class that it is mixed into
    from transformers import GPTQConfig
    from transformers import PreTrainedModel as MixinBase
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils.loading_report import LoadStateDictInfo
else:
    MixinBase = object

logger = logging.get_logger(__name__)

TRAINING_KERNELS = ("gptq_torch", "gptq_triton")
"""Kernels whose gradients are always correct. Other trainable kernels lose gradients after an eval forward."""

GPTQ_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
"""Suffixes of the tensors that store a quantized linear layer."""


def quantization_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return `quantization_config` as a dictionary, which is empty if the weights are not quantized."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None or isinstance(quantization, dict):
        return quantization or {}
    return quantization.to_dict()


def is_gptq(config: PreTrainedConfig) -> bool:
    """Return whether the weights are quantized with GPTQ, as in the published Int4 and Int8 checkpoints."""
    return quantization_of(config).get("quant_method") == "gptq"


def missing_packages() -> list[str]:
    """Return the names of packages that GPTQModel's layers need and that are not installed."""
    return [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]


def explain_missing_packages(name: str | os.PathLike) -> str:
    """Say what to install to load a checkpoint with GPTQ weights for a GPU or for training."""
    return (
        f"{name} is quantized (GPTQ), which needs two more packages on a GPU, for training, and with other than 4 or 8 "
        "bits: `pip install gptqmodel optimum`. Or use the CPU (--cpu-only with the commands), or the model without "
        "-Int4 or -Int8. (auto-gptq does not run with transformers 5.)"
    )


def choose_kernel(quantization: Mapping[str, object], device: torch.device) -> str:
    """Return GPTQModel's fastest `backend` for these GPTQ weights on this device.

    On NVIDIA GPUs the fast kernels are compiled with nvcc at the first load; without nvcc that fails, so the Triton
    kernel is used. From compute capability 8.0 on, weights like the published ones get Marlin. GPTQModel would choose
    Machete on Hopper, which downloads CUTLASS and compiles it. On other accelerators GPTQModel chooses. On the CPU it
    serves training, for which its exact kernel is the only one that passes gradients.

    Args:
        quantization: `quantization_config` of config.json.
    """
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if is_nvidia and quantization.get("bits") in (2, 4, 8) and not _has_nvcc():
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
    return "torch" if device.type == "cpu" else "auto"


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
    stored = quantization_of(config)
    kernel = choose_kernel(stored, device)
    config.quantization_config = {**stored, "backend": kernel}
    if quantization_config is not None and getattr(quantization_config, "backend", None) == "auto":
        quantization_config = copy.copy(quantization_config)
        quantization_config.backend = kernel
    return config, quantization_config


class GPTQMixin(MixinBase):
    """Adapts loading, training and saving of a PreTrainedModel whose weights may be quantized with GPTQ."""

    is_quantized: bool
    quantization_method: QuantizationMethod

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in transformers. A config with `gptq_layers`, set by `load_in_torch`, gets `GPTQLinear` layers.

        Raises:
            OSError: the groups of the weights contradict config.json.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if hasattr(model.config, "gptq_layers"):
            quantization = model.config.quantization_config = model.config.gptq_layers
            del model.config.gptq_layers
            # What transformers' quantizer sets: Trainer and peft treat the model accordingly.
            model.is_quantized, model.quantization_method = True, QuantizationMethod.GPTQ
            for name, module in model.named_modules():
                if isinstance(module, GPTQLinear):
                    try:
                        module.finish_loading(quantization.get("checkpoint_format", "gptq"))
                    except ValueError as error:
                        raise OSError(
                            f"The weights of {name} cannot be loaded: {error}. Download config.json and the weight "
                            "files again, or load them with GPTQModel: from_pretrained(..., quantization_config="
                            f'GPTQConfig(bits={module.bits}, backend="torch")).'
                        ) from error
        return loaded

    def train(self, mode: bool = True) -> Self:
        """As in torch.

        Raises:
            RuntimeError: the layers with quantized weights do not pass gradients.
        """
        if mode and is_gptq(self.config):
            for module in self.modules():
                is_kernel = hasattr(module, "SUPPORTS_TRAINING")  # of GPTQModel
                if isinstance(module, GPTQLinear) or (is_kernel and module.backend not in TRAINING_KERNELS):
                    raise RuntimeError(
                        f"These weights were loaded for inference only ({type(module).__name__}). To train adapters on "
                        "them, install GPTQModel (`pip install gptqmodel optimum`) and load them with "
                        f"from_pretrained(..., quantization_config=GPTQConfig(bits={module.bits}, "
                        f'backend="torch")). Other arguments of GPTQConfig, such as use_exllama, do not change the '
                        "kernel."
                    )
        return super().train(mode)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            ValueError: the weights come from a quantized checkpoint and were rearranged while loading; no file format
                stores that layout.
        """
        rearranged = getattr(getattr(self, "hf_quantizer", None), "pre_quantized", False) or any(
            isinstance(module, GPTQLinear) for module in self.modules()
        )
        if rearranged and is_gptq(self.config) and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "This model cannot be saved: its GPTQ weights were rearranged while loading. "
                f"Copy {self.config.name_or_path} instead; its weights are the same. Adapters can be saved."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: "LoadStateDictConfig",
        *args: Any,
        **kwargs: Any,
    ) -> "tuple[LoadStateDictInfo, dict]":
        """As in transformers, but all-zero biases without a parameter are not reported as unexpected: published GPTQ
        files have one for every layer.

        Raises:
            OSError: the tensors do not match the GPTQ layers of this network, which would compute with random ones.
        """
        files = checkpoint_files or []
        gptq_layers = getattr(model.config, "gptq_layers", None)
        with contextlib.ExitStack() as stack:
            if gptq_layers is not None:
                replace_linear_layers(model, gptq_layers, kept=model.get_output_embeddings())
                if state_dict is None and all(str(path).endswith(".safetensors") for path in files):
                    state_dict = {}
                    for path in files:
                        file = stack.enter_context(safe_open(path, "pt", backend="pread"))
                        names = file.keys()
                        state_dict |= {name: LazyTensor(file, name, load_config.dtype) for name in names}
            loaded = PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, *args, **kwargs
            )
        report = loaded[0]
        report.unexpected_keys -= zero_biases(report.unexpected_keys, files)
        if gptq_layers is not None or is_gptq(model.config):
            if missing := sorted(name for name in report.missing_keys if name.endswith(GPTQ_SUFFIXES)):
                raise OSError(
                    f"The weight files lack {len(missing)} GPTQ tensors, for example {missing[0]}: the "
                    "checkpoint is incomplete. Download all of it again."
                )
            if biases := sorted(name for name in report.unexpected_keys if name.endswith(".bias")):
                raise OSError(
                    f"The weight files have {len(biases)} biases that are not zero and that config.json rules out, "
                    f'for example {biases[0]}. Set "no_bias": false in config.json.'
                )
        return loaded


def load_in_torch(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config with which `GPTQMixin.from_pretrained` creates `GPTQLinear` layers.

    The quantization is hidden from transformers, whose quantizer needs GPTQModel, until the weights are loaded.
    """
    config = copy.deepcopy(config)
    config.gptq_layers = quantization_of(config)
    del config.quantization_config
    return config


class LazyTensor:
    """A tensor of a file, read when transformers wants it (`[...]`), and converted in its own memory.

    transformers would map the file, and keep the tensors in the types of the file beside the converted ones. Slices of
    safetensors that are read instead take twice their size for a moment.
    """

    def __init__(self, file: safe_open, name: str, dtype: torch.dtype | None):
        """`dtype` is for weights and biases; scales, and what is packed, keep their types."""
        self.file, self.name = file, name
        self.dtype = None if name.endswith(GPTQ_SUFFIXES) else dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self.file.get_tensor(self.name)
        if self.dtype is not None and tensor.itemsize == self.dtype.itemsize:
            converted = tensor.view(self.dtype)
            for source, target in zip(tensor.flatten().split(2**24), converted.flatten().split(2**24), strict=True):
                target.copy_(source.to(self.dtype))
            tensor = converted
        return tensor[index]


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
