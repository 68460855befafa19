"""`from_pretrained` and `save_pretrained` of the Qwen models.

`from_pretrained` accepts the fields of `QWenConfig` as keyword arguments, and chooses precision, attention and GPTQ
kernel for the device that the model is loaded to.
"""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig

from .configuration_qwen import QWenConfig, check_model_type
from .gptq_qwen import configure_kernel, explain_missing_packages, is_gptq, load_in_torch, missing_packages
from .json_qwen import check_json_files, first_line, local_folder, read_json_object
from .loading_options_qwen import (
    PRECISIONS,
    attention_devices,
    check_arguments,
    check_devices,
    choose_attention,
    choose_dtype,
    needs_gptqmodel,
    prefer_one_gpu,
    target_device,
)
from .parallel_qwen import check_distribution
from .weight_files_qwen import check_weight_files, damaged

if TYPE_CHECKING:  # what the mixin expects of the class that it is mixed into
    from transformers import PreTrainedModel as MixinBase
else:
    MixinBase = object


HUB_ARGUMENTS = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
USUAL_ARGUMENTS = HUB_ARGUMENTS | {
    *PRECISIONS,
    "device_map",
    "dtype",
    "max_memory",
    "output_loading_info",
    "torch_dtype",
}
"""Arguments of `from_pretrained` that are checked before files are read."""


class LoadingMixin(MixinBase):
    """`from_pretrained` and `save_pretrained` for a PreTrainedModel with a `QWenConfig`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Self:
        """transformers' `from_pretrained`, which also accepts the fields of `QWenConfig` as keyword arguments.

        Without a dtype, the precision depends on the flags (`bf16=True` …) and the device, not on the stored weights;
        see `choose_dtype`. With `device_map="auto"`, a model that fits on one GPU is not spread over several, unless
        `max_memory` is given; "balanced" spreads it.

        Raises:
            ValueError: two arguments contradict each other, `config` is of another model, `device_map` names a device
                that this machine does not have, or the driver of the GPU is too old for torch.
            ImportError: the weights are quantized, and packages that they need for this device are missing.
            OSError: files are missing or damaged.
        """
        check_arguments(kwargs)
        by_caller = set(kwargs)
        folder = local_folder(pretrained_model_name_or_path, kwargs.get("subfolder"))
        if folder is not None:
            check_json_files(folder, ("config.json",))
            check_generation_config(folder)
        check_devices(kwargs.get("device_map"))
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", torch_dtype)
        kwargs.pop("resume_download", None)
        # transformers merges it with that of the file, but only if QWenConfig does not consume it.
        quantization_config = kwargs.pop("quantization_config", None)
        if isinstance(config, PreTrainedConfig):
            model_config: PreTrainedConfig = as_qwen_config(config).with_overrides(kwargs)
            fields = {field.name for field in dataclasses.fields(QWenConfig)}
            kwargs = {name: value for name, value in kwargs.items() if name not in fields}
        else:
            hub_kwargs = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            dtype_kwargs = {} if dtype is None else {"dtype": dtype}
            name_or_path = cast(str | os.PathLike, config or pretrained_model_name_or_path)
            loaded = QWenConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs, **dtype_kwargs)
            model_config, kwargs = cast(tuple[QWenConfig, dict], loaded)  # as return_unused_kwargs=True asks for
            kwargs |= hub_kwargs

        check_distribution(kwargs, is_gptq(model_config))
        device_map = kwargs.get("device_map")
        with_gptqmodel = needs_gptqmodel(model_config, quantization_config, device_map)
        if with_gptqmodel and missing_packages():
            # transformers fails with a NameError if only gptqmodel is missing
            raise ImportError(explain_missing_packages(cast(str, pretrained_model_name_or_path)))
        # Without a device_map, transformers loads GPTQ weights on the CPU.
        device = target_device("cpu" if device_map is None and is_gptq(model_config) else device_map)
        has_precision_flag = any(getattr(model_config, name) for name in PRECISIONS)
        if dtype is None or (dtype == "auto" and (has_precision_flag or is_gptq(model_config))):
            dtype = choose_dtype(model_config, device)
        if is_gptq(model_config) and not with_gptqmodel:
            model_config = load_in_torch(model_config)
            kwargs["device_map"] = device_map = "cpu"
        else:
            model_config, quantization_config = configure_kernel(model_config, quantization_config, device)
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        if device_map == "auto" and kwargs.get("max_memory") is None:
            kwargs["device_map"] = device_map = prefer_one_gpu(model_config, dtype)
        requested = kwargs.get("attn_implementation", model_config._attn_implementation)
        # A caller that asks for flash attention without a device_map moves the model to the GPU.
        moves_later = device_map is None and model_config.use_flash_attn is True
        devices = attention_devices("auto" if moves_later else device_map)
        kwargs["attn_implementation"] = choose_attention(model_config, dtype, devices, requested)
        other_weights = ("variant", "gguf_file", "state_dict", "ignore_mismatched_sizes")
        if folder is not None and not any(kwargs.get(name) for name in other_weights):
            check_weight_files(folder, model_config)
        try:
            return super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=model_config, dtype=dtype, **kwargs
            )
        except (SafetensorError, FileNotFoundError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_damaged_weight_file(error):
                raise
            raise damaged(f"A weight file of {pretrained_model_name_or_path}", error) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if not by_caller <= USUAL_ARGUMENTS:  # perhaps an error of the caller's
                raise
            reason = (first_line(error) or type(error).__name__)[:200]
            raise ValueError(
                f"{pretrained_model_name_or_path} could not be loaded: its config.json or a weight file has an invalid "
                f"value ({reason}). Correct it or download it again."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but the weight files get the permissions of other new files.

        safetensors makes them readable by their owner only. `auto_map` names the base model too, which engines build
        by `AutoModel`; transformers adds only the class of the model that is saved.
        """
        if self._auto_class is not None:
            base = type(self.base_model)
            self.config.auto_map["AutoModel"] = f"{base.__module__.rpartition('.')[2]}.{base.__name__}"
        super().save_pretrained(save_directory, *args, **kwargs)
        mask = os.umask(0)
        os.umask(mask)
        for pattern in ("model*.safetensors", "adapter_model*.safetensors"):
            for path in Path(save_directory).glob(pattern):
                with contextlib.suppress(PermissionError):  # another user's, from before
                    path.chmod(0o666 & ~mask)


def check_generation_config(folder: Path) -> None:
    """Raise ValueError if transformers could not read the generation_config.json of a folder, if it has one."""
    path = folder / "generation_config.json"
    try:
        if path.exists():
            GenerationConfig.from_dict(read_json_object(path))
    except Exception as error:  # of any type, for example AttributeError for a missing method
        reason = first_line(error)[:200]
        raise ValueError(f"{path} has an invalid value ({reason}). Correct it or download it again.") from error


def as_qwen_config(config: PreTrainedConfig) -> QWenConfig:
    """Return the config as a QWenConfig of this file's module: a published checkpoint's code has its own class.

    Raises:
        ValueError: it is the config of another model.
    """
    check_model_type(config.model_type, f"config, a {type(config).__name__},")
    return config if isinstance(config, QWenConfig) else QWenConfig.from_dict(config.to_dict())


def is_damaged_weight_file(error: BaseException) -> bool:
    """Return whether the error comes from a truncated .bin weight file.

    torch 2.13: RuntimeError "PytorchStreamReader failed reading zip archive: failed finding central directory …".
    """
    return isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)
