"""Opens and loads checkpoints.

Files are checked before transformers reads them, because transformers reports an incomplete folder as a JSON or header
error. Code in a checkpoint folder is never executed: this package's model code is used, without `trust_remote_code`.
"""

import copy
import functools
import os
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..library_errors import is_gpu_memory_full, is_main_memory_full, is_shape_mismatch
from ..model.chat_qwen import explain_format, set_chat_format
from ..model.configuration_qwen import QWenConfig
from ..model.json_qwen import MAX_INDEX_BYTES
from ..model.loading_options_qwen import needs_gptqmodel
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import IM_END, QWenTokenizer
from ..model.weight_files_qwen import check_layers, files_of_index
from . import bundled
from .adapters import ADAPTER_CONFIG, check_adapter, is_adapter, load_adapter, recorded_base
from .files import (
    BIN_INDEX,
    SAFETENSORS_INDEX,
    VOCABULARY,
    CheckpointError,
    JSONObject,
    check_architecture,
    check_gptq_installed,
    check_vocabulary,
    check_weights,
    first_line,
    read_json,
)
from .generation_settings import check_generation_settings
from .hub import Files, HubOptions, canonical_hub_id
from .locate import LocalFiles, find
from .weights import Weights


class Checkpoint:
    """A first-generation Qwen checkpoint: a folder, a hub id, or the folder of a LoRA adapter.

    Small files are read on first use, once; weights are read only by `load` and `weights`. `open` also checks that the
    checkpoint is complete.

    Args:
        name_or_path: a folder, or a hub id, e.g. "Qwen/Qwen-7B-Chat"; None is the bundled chat model.
        base: for an adapter, the folder or hub id of its base model. None is the model that it was trained on.
        hub: "huggingface" or "modelscope"; None is $QWEN_HUB, or the Hugging Face Hub.
        revision, subfolder, cache_dir, token, local_files_only, force_download: download options of
            `from_pretrained`.

    Attributes:
        name: the name as a string, with ~ expanded and published ids in canonical spelling.

    Raises:
        CheckpointError: the name is neither a folder nor a hub id. Any member raises it if a file is missing, damaged
            or cannot be downloaded.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike | None = None,
        *,
        base: str | os.PathLike | None = None,
        hub: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ):
        self.name = resolve(name_or_path)
        self._options = HubOptions(hub, revision, subfolder, cache_dir, token, local_files_only, force_download)
        self._files: Files = find(self.name, self._options)
        if base is not None and not self.is_adapter:
            raise CheckpointError(f"{self.name} is not the folder of a LoRA adapter: omit `base`.")
        self._base_name = base
        self._vocabulary_checked = False

    @classmethod
    def open(
        cls,
        name_or_path: str | os.PathLike | None = None,
        *,
        base: str | os.PathLike | None = None,
        hub: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "Checkpoint":
        """Open a checkpoint and check it without reading weights. See the class for the arguments.

        Raises:
            CheckpointError: it is missing, incomplete, of another architecture, or cannot be downloaded.
            ValueError: values in config.json are invalid.
        """
        checkpoint = cls(
            name_or_path,
            base=base,
            hub=hub,
            revision=revision,
            subfolder=subfolder,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        checkpoint.check()
        return checkpoint

    def check(self) -> None:
        """Raise CheckpointError unless this is a complete first-generation Qwen checkpoint.

        Reads config.json, the index and the headers of local weight files, never the weights. For a hub id, only
        config.json is downloaded.
        """
        if self.is_adapter:
            _ = self.base  # checks the adapter and its base
            return
        _ = self.config
        if isinstance(self._files, LocalFiles):
            check_weights(self._files.path)
            self._check_vocabulary(self._files.path)

    @property
    def is_adapter(self) -> bool:
        """Whether this is the folder of a LoRA adapter."""
        return isinstance(self._files, LocalFiles) and is_adapter(self._files.path)

    @functools.cached_property
    def adapter_config(self) -> JSONObject:
        """The content of adapter_config.json."""
        folder = self._files.folder()
        return read_json(folder / ADAPTER_CONFIG, folder)

    @functools.cached_property
    def base(self) -> "Checkpoint | None":
        """The base model of an adapter, checked; None for other checkpoints."""
        if not self.is_adapter:
            return None
        folder = self._files.folder()
        check_adapter(folder, self.adapter_config)
        # These options describe the adapter, not its base.
        options = vars(self._options) | {"revision": None, "subfolder": None}
        if self._base_name is not None:
            name = self._base_name
            advice = "Name the whole model that the adapter was trained on."
        else:
            name, options["revision"] = recorded_base(folder, self.adapter_config)
            advice = f"If it moved, set base_model_name_or_path in {folder / ADAPTER_CONFIG} to its folder or hub id."
        try:
            base = Checkpoint(name, **options)
            if base.is_adapter:
                raise CheckpointError(f"{base.name} is an adapter itself: merge that one first, `qwen merge`.")
            base.check()
        except CheckpointError as error:
            raise CheckpointError(
                f"The base model of the adapter in {folder} cannot be used. {error} {advice}"
            ) from error
        return base

    def find(self, name: str) -> Path | None:
        """Return the path of a small file, downloading it if needed; None if the checkpoint does not have it."""
        return self._files.find(name)

    @property
    def folder(self) -> Path:
        """The local folder with the small files and the weights, downloaded if needed."""
        return self._files.folder()

    @functools.cached_property
    def config_json(self) -> JSONObject:
        """The content of config.json; for an adapter, that of its base."""
        if self.base is not None:
            return self.base.config_json
        content = read_json(self._files.config(), self.name)
        check_architecture(content, self.name)
        return content

    @functools.cached_property
    def config(self) -> QWenConfig:
        """The config in config.json; for an adapter, that of its base.

        Raises:
            ValueError: values in config.json are invalid.
        """
        return QWenConfig.from_dict(copy.deepcopy(self.config_json))

    @functools.cached_property
    def generation_settings(self) -> JSONObject:
        """The content of generation_config.json; an empty dict if missing.

        An adapter without the file has that of its base, as a chat model's: adapters are trained on conversations.
        """
        try:
            path = self._files.find(GENERATION_CONFIG_NAME)
        except CheckpointError:
            raise
        except OSError:  # the Hugging Face Hub cannot be reached, and the file is not cached
            path = None
        if path is not None:
            return read_json(path, self.name)
        if self.base is None:
            return {}
        settings = copy.deepcopy(self.base.generation_settings)
        set_chat_format(settings)
        return settings

    def check_generation_settings(self) -> "Checkpoint":
        """Return this checkpoint.

        Raises:
            CheckpointError: a value in its generation_config.json is invalid.
        """
        check_generation_settings(self.generation_settings, self.name)
        return self

    @property
    def generation_config(self) -> GenerationConfig:
        """The checkpoint's generation config, or transformers' defaults if it has none."""
        return GenerationConfig.from_dict(copy.deepcopy(self.generation_settings))

    @property
    def chat_format(self) -> str | None:
        """The prompt format: "chatml" for a chat model, "raw" for a base model; None if no file specifies it."""
        return self.generation_settings.get("chat_format")

    @property
    def is_chat(self) -> bool:
        """Whether this is a chat model."""
        return self.chat_format == "chatml"

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are quantized, as in the published Int4 and Int8 checkpoints."""
        return getattr(self.config, "quantization_config", None) is not None

    def require_chat(self) -> "Checkpoint":
        """Return this checkpoint.

        Raises:
            CheckpointError: it is not a chat model.
        """
        if not self.is_chat:
            raise CheckpointError(f"{self.name} is not a chat model: {explain_format(self.chat_format)}")
        return self

    def tokenizer(self, **from_pretrained_kwargs: object) -> QWenTokenizer:
        """Load the tokenizer; for an adapter without a vocabulary, that of its base.

        Args:
            from_pretrained_kwargs: for `QWenTokenizer.from_pretrained`, e.g. extra_vocab_file="plants.tiktoken".
        """
        if self.base is not None and self._files.find(VOCABULARY) is None:
            if self.is_chat and not self.base.is_chat:
                from_pretrained_kwargs = {"eos_token": IM_END} | from_pretrained_kwargs
            return self.base.tokenizer(**from_pretrained_kwargs)
        if isinstance(self._files, LocalFiles):
            self._check_vocabulary(self._files.path)
        name_or_path, download_kwargs = self._files.from_pretrained_args()
        try:
            return QWenTokenizer.from_pretrained(name_or_path, **from_pretrained_kwargs, **download_kwargs)
        except OSError as error:
            raise CheckpointError(f"The tokenizer of {self.name} could not be loaded. {error}") from error

    def load(
        self, *, cpu_only: bool = False, int8_cache: bool = False, **from_pretrained_kwargs: object
    ) -> tuple[QWenLMHeadModel, QWenTokenizer]:
        """Load the model, ready to generate, and its tokenizer.

        An adapter is merged into the weights of its base, or kept separate if they are quantized. The adapter's own
        tokenizer and generation config take precedence over those of the base.

        Args:
            cpu_only: do not use an accelerator.
            int8_cache: keep the key/value cache in 8 bits and decode directly from it; False uses config.json.
            from_pretrained_kwargs: for `QWenLMHeadModel.from_pretrained`, e.g. bf16=True.

        Returns:
            The model in eval mode, with the checkpoint's generation_config, and the tokenizer.

        Raises:
            CheckpointError: the checkpoint cannot be loaded, or the adapter does not fit its base.
            ValueError: keyword arguments contradict each other (e.g. bf16=True with fp16=True).
        """
        kwargs = dict(from_pretrained_kwargs)
        kwargs.pop("trust_remote_code", None)  # in the published examples, but not needed
        kwargs.setdefault("device_map", "cpu" if cpu_only else "auto")
        if int8_cache:
            kwargs |= {"use_cache_quantization": True, "use_cache_kernel": True}
        self.check_generation_settings()
        tokenizer = self.tokenizer()  # first, because it fails within a second, while weights take minutes
        if self.base is None:
            self.check_vocabulary_size(tokenizer)
            return self.load_without_adapter(**kwargs), tokenizer
        folder = self._files.folder()
        model = load_adapter(self.load_without_adapter(**kwargs), folder, len(tokenizer))
        model.generation_config = self.generation_config
        model.name_or_path = str(folder)
        return model.eval(), tokenizer

    def weights(self) -> Weights:
        """Return a mapping of tensors that are read on access. Weights are downloaded first if needed."""
        return Weights(self.folder)

    def load_without_adapter(self, **from_pretrained_kwargs: Any) -> QWenLMHeadModel:
        """Load only the model, in eval mode; for an adapter, its base model.

        Args:
            from_pretrained_kwargs: for `QWenLMHeadModel.from_pretrained`.

        Raises:
            CheckpointError: files are missing, damaged or inconsistent, or the memory is too small.
        """
        if self.base is not None:
            return self.base.load_without_adapter(**from_pretrained_kwargs)
        chosen = from_pretrained_kwargs.get("quantization_config"), from_pretrained_kwargs.get("device_map")
        if self.is_quantized and needs_gptqmodel(self.config, *chosen):
            check_gptq_installed(self.name)  # before weights are downloaded
        self._check_layers_of_index()
        name_or_path, download_kwargs = self._files.from_pretrained_args(weights=True)
        if not isinstance(self._files, LocalFiles) and os.path.isdir(name_or_path):
            check_weights(Path(name_or_path))  # the download may have been cut off
        kwargs = dict(from_pretrained_kwargs)
        config = kwargs.pop("config", None)
        if config is None:
            # from_dict would consume these, but from_pretrained needs them; it merges quantization_config itself.
            kept = {name: kwargs.pop(name) for name in ("quantization_config",) if name in kwargs}
            kept |= {name: kwargs[name] for name in ("dtype", "torch_dtype", "attn_implementation") if name in kwargs}
            config, kwargs = QWenConfig.from_dict(copy.deepcopy(self.config_json), return_unused_kwargs=True, **kwargs)
            kwargs |= kept
        try:
            loaded = QWenLMHeadModel.from_pretrained(
                name_or_path, config=config, output_loading_info=True, **download_kwargs, **kwargs
            )
        except ImportError as error:  # a quantized checkpoint without its library
            raise CheckpointError(f"{self.name} needs a package that is not installed. {error}") from error
        except (MemoryError, RuntimeError) as error:
            if is_main_memory_full(error):
                raise CheckpointError(
                    f"{self.name} does not fit into main memory: end other programs, load 16 bits per weight "
                    "(bf16=True in Python), or use a smaller model."
                ) from error
            if is_gpu_memory_full(error):
                raise CheckpointError(
                    f"{self.name} does not fit into the memory of the GPU: end other programs that use it, load an "
                    "-Int4 checkpoint or a smaller model, or use the CPU (--cpu-only with the commands). "
                    f"({first_line(error)})"
                ) from error
            if not is_shape_mismatch(error):
                raise
            raise CheckpointError(
                f"The weights in {self.name} do not have the shapes given in its {CONFIG_NAME}: the two come from "
                f"different models. Download the whole checkpoint again. ({first_line(error)})"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{self.name} could not be loaded. {error}") from error
        model, report = cast(tuple[QWenLMHeadModel, dict], loaded)  # as output_loading_info=True asks for
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"{len(missing)} tensors are missing from the weight files of {self.name}, for example {missing[0]}: "
                f"the checkpoint is incomplete, or its {CONFIG_NAME} belongs to another model. Download the whole "
                "checkpoint again."
            )
        model.name_or_path = self.name  # adapters record it as their base, and the server uses it as the model name
        return model.eval()

    def _check_layers_of_index(self) -> None:
        """Compare the layers in the index of a sharded checkpoint on a hub with the config, before its weights are
        downloaded. Those of a local folder are compared when it is loaded.

        Raises:
            CheckpointError: the index is invalid or has fewer layers.
        """
        if isinstance(self._files, LocalFiles):
            return
        path = self._files.find(SAFETENSORS_INDEX) or self._files.find(BIN_INDEX)
        if path is None:
            return
        try:
            names = files_of_index(read_json(path, self.name, max_bytes=MAX_INDEX_BYTES), path)
            check_layers(names, self.config, f"{path.name} of {self.name} has")
        except (OSError, ValueError) as error:
            raise CheckpointError(str(error)) from error

    def check_vocabulary_size(self, tokenizer: QWenTokenizer) -> None:
        """Raise CheckpointError if the tokenizer has ids for which the embedding has no row."""
        if len(tokenizer) > self.config.vocab_size:
            raise CheckpointError(
                f"The vocabulary of {self.name} has {len(tokenizer)} tokens, but vocab_size in its {CONFIG_NAME} is "
                f"{self.config.vocab_size}: they belong to different models. Download {VOCABULARY} again."
            )

    def _check_vocabulary(self, folder: Path) -> None:
        if not self._vocabulary_checked:
            check_vocabulary(folder)
            self._vocabulary_checked = True


def resolve(name_or_path: str | os.PathLike | None) -> str:
    """Return the name as a string, with ~ expanded and published ids in canonical spelling.

    Args:
        name_or_path: a folder or a hub id; None is the bundled chat model.

    Raises:
        CheckpointError: the bundled model is missing.
    """
    name = os.path.expanduser(os.fspath(bundled.BUNDLED_CHAT if name_or_path is None else name_or_path))
    if os.path.exists(name):
        return name
    if name_or_path is None or Path(name).parent == bundled.CHECKPOINTS:
        raise CheckpointError(
            f"The bundled model was not found ({name}): it comes with the repository, not with the installed package. "
            "Name another model: a folder, or a hub id, e.g. Qwen/Qwen-1_8B-Chat."
        )
    return canonical_hub_id(name)
