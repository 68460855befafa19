"""`from_pretrained` of the Qwen models.

It accepts the fields of `QWenConfig` as keyword arguments, and chooses precision, attention and GPTQ kernel for the
device that the model is loaded to.
"""

import dataclasses
import os
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig

from .configuration_qwen import QWenConfig
from .gptq_qwen import is_gptq, with_kernel
from .loading_options_qwen import PRECISIONS, check_arguments, choose_attention, choose_dtype, target_device


class LoadingMixin:
    """`from_pretrained` for a PreTrainedModel with a `QWenConfig`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: QWenConfig | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `from_pretrained`, which also accepts the fields of `QWenConfig` as keyword arguments.

        Without a dtype, the precision depends on the flags (`bf16=True` …) and the device, not on the stored weights;
        see `choose_dtype`.

        Raises:
            ValueError: two arguments contradict each other.
            OSError: files are missing or damaged.
        """
        check_arguments(kwargs)
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", torch_dtype)
        kwargs.pop("resume_download", None)
        # transformers merges it with that of the file, but only if QWenConfig does not consume it.
        quantization_config = kwargs.pop("quantization_config", None)
        if isinstance(config, PreTrainedConfig):
            config = config.overridden(kwargs)
            fields = {field.name for field in dataclasses.fields(QWenConfig)}
            kwargs = {name: value for name, value in kwargs.items() if name not in fields}
        else:
            names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
            hub_kwargs = {name: kwargs[name] for name in names if name in kwargs}
            named = {} if dtype is None else {"dtype": dtype}
            config, kwargs = QWenConfig.from_pretrained(
                config or pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs, **named
            )
            kwargs |= hub_kwargs

        device_map = kwargs.get("device_map")
        # Without a device_map, transformers loads GPTQ weights on the CPU.
        device = target_device("cpu" if device_map is None and is_gptq(config) else device_map)
        flagged = any(getattr(config, name) for name in PRECISIONS)
        if dtype is None or (dtype == "auto" and (flagged or is_gptq(config))):
            dtype = choose_dtype(config, device)
        config, quantization_config = with_kernel(config, quantization_config, dtype, device)
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        requested = kwargs.get("attn_implementation", config._attn_implementation)
        kwargs["attn_implementation"] = choose_attention(config, dtype, device, requested)
        try:
            return super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, dtype=dtype, **kwargs
            )
        except (SafetensorError, FileNotFoundError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_damaged_weight_file(error):
                raise
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} cannot be read ({error}): the download stopped early "
                "or left pointer files behind. Delete the weight files there and download them again."
            ) from error


def is_damaged_weight_file(error: BaseException) -> bool:
    """Return whether the error comes from a truncated .bin weight file.

    torch 2.13: RuntimeError "PytorchStreamReader failed reading zip archive: failed finding central directory …".
    """
    return isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error)
