"""Configuration of a Qwen model: its shape and the options of `from_pretrained`.

Both published formats of `config.json` load into the same class.
"""

import copy
import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Optional, TypeAlias, TypeVar, cast

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .json_qwen import first_line
from .loading_options_qwen import PRECISIONS, as_dtype, check_arguments

# Field names of the very first release and their current names.
FIRST_RELEASE_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "embd_pdrop": "emb_dropout_prob",
    "attn_pdrop": "attn_dropout_prob",
}

# How to split the layers over several devices; parallel_qwen.py registers the styles with "qwen" in their name.
TENSOR_PARALLEL_PLAN = {
    "wte": "embedding_rowwise",
    "h.*.attn.c_attn": "qwen_qkv",
    "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.w1": "colwise",
    "h.*.mlp.w2": "colwise",
    "h.*.mlp.c_proj": "rowwise",
    "h.*.attn": "qwen_heads",  # last: vLLM takes the first pattern that the name of a module begins with
}

MAX_NUMBER = 2**31 - 1
# Settings of transformers for models made of several, of unequal layers, or split among processes.
UNSUPPORTED = {"text_config", "decoder", "encoder", "generator", "text_encoder", "per_layer_config"}
UNSUPPORTED |= {"base_model_tp_plan", "base_model_ep_plan"}
QUANTIZATION_TYPES = {"bits": int, "group_size": int, "desc_act": bool, "sym": bool}
MAX_LABELS = 65536  # transformers names each of them; these models have none

T = TypeVar("T")
UNSET: Any = None  # default of a field that `__post_init__` sets
if TYPE_CHECKING:
    SetLater: TypeAlias = Annotated[T, "set by __post_init__"]
else:
    SetLater = Optional  # `@strict` also checks the default


class ConfigError(ValueError):
    """A value in a config is invalid. The message names the field."""


def check_model_type(model_type: object, name: str) -> None:
    """Check that this is the model type of `QWenConfig`.

    Args:
        name: what has the type, for the error message.

    Raises:
        ValueError: it is another one.
    """
    if model_type != QWenConfig.model_type:
        raise ValueError(
            f"{name} is of a model of type {model_type!r}, and QWenConfig is of type {QWenConfig.model_type!r}: load "
            "that model with transformers' AutoModelForCausalLM, or leave `config` out to use the checkpoint's own."
        )


def check_size(name: str, value: object) -> None:
    """Raise ValueError if a number is not finite, or larger than any that a tensor can have as a size or a token as id.

    Args:
        name: of the field, for the error message.
        value: of the field; other types than numbers are ignored.
    """
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not abs(number) <= MAX_NUMBER:  # NaN is not, either
            raise ConfigError(f"config: {name} must be a number up to {MAX_NUMBER}, not {str(number)[:40]}.")


def check_extra_settings(settings: Mapping[str, object]) -> None:
    """Check the settings of a config.json that are not fields of `QWenConfig`: transformers makes them attributes.

    Raises:
        ValueError: one would replace a method or property, or is invalid.
    """
    for name, value in settings.items():
        attribute = inspect.getattr_static(QWenConfig, name, None)
        is_read_only = isinstance(attribute, property) and attribute.fset is None
        is_of_class = callable(attribute) or isinstance(attribute, (classmethod, staticmethod, dict)) or is_read_only
        if name.startswith("__") or name in UNSUPPORTED or is_of_class:
            raise ConfigError(f"config: {name[:60]!r} is not a setting. Delete it from config.json.")
        check_size(name, value)
    labels = settings.get("num_labels", 2)
    if type(labels) is not int or not 0 <= labels <= MAX_LABELS:
        raise ConfigError(f"config: num_labels must be 0 to {MAX_LABELS}, not {str(labels)[:40]}.")
    for name in ("attn_implementation", "_attn_implementation"):
        if not isinstance(settings.get(name), (str, NoneType)):
            raise ConfigError(f"config: {name} must be a text, for example sdpa, not {str(settings[name])[:40]}.")
    quantization = settings.get("quantization_config")
    if isinstance(quantization, (str, int, float, list)):
        raise ConfigError(f"config: quantization_config must be an object, not {str(quantization)[:40]!r}.")
    settings_of_quantization = quantization if isinstance(quantization, dict) else {}
    for name, kind in QUANTIZATION_TYPES.items():
        value = settings_of_quantization.get(name)
        if value is not None and type(value) is not kind:
            wanted = "true or false" if kind is bool else "a whole number"
            raise ConfigError(f"config: {name} in quantization_config must be {wanted}, not {str(value)[:40]!r}.")


@strict
class QWenConfig(PreTrainedConfig):
    """Shape and options of a first-generation Qwen model.

    The defaults are the published ones. Four depend on the file and are None in the class: `seq_length` defaults to
    `max_position_embeddings`; `use_dynamic_ntk`, `use_logn_attn` and `layer_norm_epsilon` to true, true and 1e-6, or
    to false, false and 1e-5 in a file of the very first release (the one with `n_embd`).

    Args:
        vocab_size: rows of the embedding and of the output matrix; at least the tokenizer's length.
        hidden_size: C, the width of the residual stream.
        intermediate_size: twice the width of the MLP.
        kv_channels: D, the size of one attention head; also readable as `head_dim`.
        seq_length: trained length in tokens; dynamic NTK and LogN act beyond it.
        max_position_embeddings: longest supported sequence in tokens.
        rotary_pct: fraction of the channels of a head that RoPE rotates.
        rotary_emb_base: base of the RoPE frequencies.
        use_dynamic_ntk: enlarge the RoPE base for prompts longer than `seq_length` (inference only).
        use_logn_attn: scale queries beyond `seq_length` by the logarithm of their position (inference only).
        use_window_attn: limit how far back each layer attends; lower layers have smaller windows (inference only).
        window_sizes: window of each layer in tokens. None: grows from half of `seq_length` in the lowest layer to four
            times `seq_length`, the longest context claimed for the models, in the highest.
        no_bias: no bias in the linear layers except `c_attn`, which always has one.
        bf16, fp16, fp32: precision to load in; at most one may be true.
        use_flash_attn: "auto", True or False.
        use_cache_quantization: keep the key/value cache in 8 bits.
        use_cache_kernel: decode from the 8-bit cache with a fused kernel where one is available.

    Raises:
        ValueError: the numbers do not describe a valid network, or options contradict one another.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    # Names in transformers: engines read the base of RoPE under it.
    attribute_map: ClassVar[dict[str, str]] = {"head_dim": "kv_channels", "rope_theta": "rotary_emb_base"}
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        "wte": "free_full_weight",
        "h.*": "free_full_weight",
        "ln_f": "keep_full_weight",
    }
    base_model_pp_plan: ClassVar[dict[str, Sequence[list[str]]] | None] = {  # modules, their inputs and outputs
        "wte": (["input_ids"], ["inputs_embeds"]),
        "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 22016
    kv_channels: int = 128
    seq_length: SetLater[int] = UNSET
    max_position_embeddings: int = 8192
    rotary_pct: float | int = 1.0
    rotary_emb_base: float | int = 10000
    use_dynamic_ntk: SetLater[bool] = UNSET
    use_logn_attn: SetLater[bool] = UNSET
    use_window_attn: bool = False
    window_sizes: list[int] | None = None
    emb_dropout_prob: float | int = 0.0
    attn_dropout_prob: float | int = 0.0
    layer_norm_epsilon: SetLater[float | int] = UNSET
    initializer_range: float | int = 0.02
    scale_attn_weights: bool = True
    softmax_in_fp32: bool = False
    no_bias: bool = True
    use_cache: bool = True
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    use_flash_attn: str | bool = "auto"
    use_cache_quantization: bool = False
    use_cache_kernel: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: object):
        first_release = any(name in kwargs for name in FIRST_RELEASE_NAMES)
        if first_release:
            for name, new_name in FIRST_RELEASE_NAMES.items():
                if name in kwargs:
                    setattr(self, new_name, kwargs.pop(name))
            # In this format vocab_size is the tokenizer's length; the matrices have padded_vocab_size rows.
            self.vocab_size = cast(int, kwargs.pop("padded_vocab_size", self.vocab_size))
        if self.use_dynamic_ntk is None:
            self.use_dynamic_ntk = not first_release
        if self.use_logn_attn is None:
            self.use_logn_attn = not first_release
        if self.layer_norm_epsilon is None:
            self.layer_norm_epsilon = 1e-5 if first_release else 1e-6
        if self.seq_length is None:
            self.seq_length = self.max_position_embeddings
        check_extra_settings(kwargs)
        if not isinstance(self.output_hidden_states, (bool, NoneType)):
            raise ConfigError(f"config: output_hidden_states must be true or false, not {self.output_hidden_states!r}.")
        for dtype in (self.dtype, kwargs.get("torch_dtype")):
            if isinstance(dtype, str):
                as_dtype(dtype)
        self.auto_map: dict[str, str] = {}  # TRL reads it, also where config.json has none
        super().__post_init__(**kwargs)
        self.check()

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]  # a class attribute in transformers
        """How to split the network over several devices. Empty for SGLang's Transformers backend, which then refuses
        several: it would split `c_attn` in contiguous pieces."""
        return {} if self._attn_implementation == "sglang" else TENSOR_PARALLEL_PLAN

    @property
    def rotary_dim(self) -> int:
        """R: number of channels of a head that RoPE rotates."""
        return int(self.rotary_pct * self.kv_channels)

    @property
    def max_context_length(self) -> int:
        """Longest supported sequence in tokens, prompt and reply together."""
        return max(self.max_position_embeddings, self.seq_length)

    @property
    def layer_window_sizes(self) -> list[int]:
        """Number of tokens that each layer sees with `use_window_attn`, including the new one."""
        if self.window_sizes is not None:
            return list(self.window_sizes)
        low, high, steps = self.seq_length / 2, 4 * self.seq_length, max(1, self.num_hidden_layers - 1)
        return [round(low + (high - low) * layer / steps) for layer in range(self.num_hidden_layers)]

    def check(self) -> None:
        """Check that the values describe a valid network; types were checked when they were set.

        Raises:
            ValueError: a field is invalid; the message names it.
        """
        positive = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*positive, "kv_channels", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} must be at least 1, not {getattr(self, name)}.")
        for field in dataclasses.fields(self):
            check_size(field.name, getattr(self, field.name))
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.kv_channels:
            raise ConfigError(
                f"config: rotary_pct · kv_channels = {self.rotary_pct} · {self.kv_channels} must be an even number of "
                f"channels between 2 and {self.kv_channels}."
            )
        if self.use_dynamic_ntk and self.rotary_dim == 2:
            raise ConfigError("config: dynamic NTK needs more than 2 rotary channels; set use_dynamic_ntk to false.")
        for name in ("rotary_emb_base", "layer_norm_epsilon"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"config: {name} must be above 0, not {getattr(self, name)}.")
        for name in ("emb_dropout_prob", "attn_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"config: {name} must be at least 0 and below 1, not {getattr(self, name)}.")
        if self.seq_length < 2:
            raise ConfigError(f"config: seq_length (trained length in tokens) must be above 1, not {self.seq_length}.")
        if self.window_sizes is not None and (
            len(self.window_sizes) != self.num_hidden_layers or min(self.window_sizes) < 1
        ):
            raise ConfigError(
                f"config: window_sizes needs a number of tokens above 0 for each of the {self.num_hidden_layers} "
                f"layers, not {self.window_sizes}."
            )
        if self.use_flash_attn not in ("auto", True, False):
            raise ConfigError(f'config: use_flash_attn must be "auto", true or false, not {self.use_flash_attn!r}.')
        flags = [name for name in PRECISIONS if getattr(self, name)]
        if len(flags) > 1:
            raise ConfigError(f"config: {' and '.join(flags)} are both true; set one of bf16, fp16, fp32, or none.")

    def with_overrides(self, overrides: Mapping[str, object]) -> "QWenConfig":
        """Return a copy with the fields in `overrides` set as `from_dict` would; other names are ignored.

        Raises:
            ValueError: a value has the wrong type or is invalid.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        changes = {name: value for name, value in overrides.items() if name in fields}
        if any(name in changes for name in PRECISIONS):
            changes = dict.fromkeys(PRECISIONS, False) | changes
        config = copy.deepcopy(self)
        try:
            for name, value in changes.items():
                setattr(config, name, value)
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error
        config.check()
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], **kwargs: object) -> Any:
        """transformers' `from_dict`; keyword arguments take precedence over the file.

        Returns:
            The config; with return_unused_kwargs=True a tuple of the config and the arguments that are not fields.

        Raises:
            ValueError: two arguments contradict each other, or this is the config of another model.
        """
        check_model_type(config_dict.get("model_type", cls.model_type), "config.json")
        for name in ("attn_implementation", "_attn_implementation"):
            if "/" in str(config_dict.get(name)):  # transformers would download and execute it
                raise ConfigError(f"config: {name} names code on a hub, {str(config_dict[name])[:60]!r}. Delete it.")
        kwargs.pop("resume_download", None)  # the published examples pass it; downloads now always resume
        check_arguments(kwargs)
        sets_dtype = any(name in kwargs for name in (*PRECISIONS, "dtype", "torch_dtype"))
        # Published quantized checkpoints set the precision of the GPU kernels of their time; ignore it.
        if sets_dtype or config_dict.get("quantization_config"):
            config_dict = {name: value for name, value in config_dict.items() if name not in PRECISIONS}
        for name in ("dtype", "torch_dtype"):
            if kwargs.get(name) == "auto":  # use the file's; transformers would store the string as the dtype
                kwargs.pop(name)
        try:
            result = super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(
                f"config.json: {' '.join(str(error).split())[:500]} Correct that field, or download the file again."
            ) from error
        except ConfigError as error:
            raise ConfigError(str(error).replace("config:", "config.json:", 1)) from error
        except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
            reason = (first_line(error) or type(error).__name__)[:200]
            raise ValueError(f"config.json has an invalid value ({reason}). Correct or download it again.") from error
        config = result[0] if isinstance(result, tuple) else result
        config.check()  # transformers sets the arguments after __post_init__
        if kwargs.get("window_sizes") and not config.use_window_attn:
            raise ValueError("window_sizes=[…] without use_window_attn=True would do nothing: pass both.")
        if kwargs.get("use_cache_kernel") and not config.use_cache_quantization:
            raise ValueError("use_cache_kernel=True reads the 8-bit cache: pass use_cache_quantization=True too.")
        return result
