"""One way in: a name or a folder becomes a model and its tokenizer.

Every script starts here. The module revolves around one question, "can this checkpoint be loaded, and if not, what
should the person do?": it looks at the files before transformers does, because transformers reports a half-downloaded
folder as a JSON or a header error. It knows nothing about prompts or generation, and of devices only the device map.

The model code of this repository is used whatever code lies beside the weights, so nothing from a checkpoint is
executed and no `trust_remote_code` is needed.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ..model.configuration_qwen import QWenConfig
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import QWenTokenizer
from ..quiet import quiet_loading
from .adapters import ADAPTER_CONFIG, check_adapter, is_adapter, recorded_base, with_adapter
from .files import (
    VOCABULARY,
    CheckpointError,
    check_config,
    check_gptq_installed,
    check_vocabulary,
    check_weights,
    download_advice,
    first_line,
    listing,
)
from .hub import PUBLISHED, config_file, published_spelling, source, use

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
BUNDLED_CHAT = CHECKPOINTS / "qwen-tiny-chat"
BUNDLED_BASE = CHECKPOINTS / "qwen-tiny-base"
BUNDLED_CHAT_INT4 = CHECKPOINTS / "qwen-tiny-chat-int4"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The keyword arguments of from_pretrained that say where files come from; the tokenizer must look in the same place.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_model(
    name_or_path: str | os.PathLike | None = None, *, cpu_only: bool = False, **from_pretrained_kwargs: Any
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """Load a first-generation Qwen checkpoint, ready to generate.

    Args:
        name_or_path: a folder, or a hub id such as "Qwen/Qwen-7B-Chat"; None is the bundled chat model.
        cpu_only: keep the model off any accelerator.
        from_pretrained_kwargs: for `QWenLMHeadModel.from_pretrained`, e.g. bf16=True, use_cache_quantization=True.

    Returns:
        The model in eval mode, its generation_config as the checkpoint sets it, and the tokenizer.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, of another architecture, or out of reach.
        ValueError: the keyword arguments contradict one another (e.g. bf16=True with fp16=True).
    """
    name = resolve(name_or_path)
    from_pretrained_kwargs.pop("trust_remote_code", None)  # accepted as in the published examples, but not needed
    from_pretrained_kwargs.setdefault("device_map", "cpu" if cpu_only else "auto")
    where = {key: from_pretrained_kwargs[key] for key in HUB_KWARGS if key in from_pretrained_kwargs}
    if adapter := _adapter_folder(name, where):
        return load_with_adapter(adapter, **from_pretrained_kwargs)
    check_checkpoint(name, **where)
    tokenizer = load_tokenizer(name, **where)  # first, as it fails in a second where the weights take minutes
    return _load_weights(name, **from_pretrained_kwargs), tokenizer


def load_with_adapter(
    adapter: Path, base: str | os.PathLike | None = None, **from_pretrained_kwargs: Any
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """`load_model` for the folder of a LoRA adapter, on its own base model or another.

    The adapter is merged into the weights of its base, or put beside them where they are quantized. Its folder's
    tokenizer and generation config count, and where it has none, those of the base.

    Args:
        base: a folder or a hub id; None is the model that adapter_config.json names.
        from_pretrained_kwargs: for the base. A revision or subfolder would be the adapter's and is not passed on.

    Raises:
        CheckpointError: as `load_model`; or the adapter does not fit the base.
    """
    base, where = _base_of(adapter, base, from_pretrained_kwargs)
    own_vocabulary = (adapter / VOCABULARY).is_file()
    tokenizer = load_tokenizer(adapter) if own_vocabulary else load_tokenizer(base, **where)
    elsewhere = {key: value for key, value in from_pretrained_kwargs.items() if key not in HUB_KWARGS}
    model = with_adapter(_load_weights(base, **elsewhere, **where), adapter, len(tokenizer))
    if (adapter / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(adapter)
    model.name_or_path = str(adapter)
    return model.eval(), tokenizer


def _adapter_folder(name: str, where: dict[str, Any]) -> Path | None:
    """The folder, if the name is that of an adapter."""
    folder = _folder(name, where.get("subfolder"))
    return folder if folder is not None and is_adapter(folder) else None


def _base_of(adapter: Path, base: str | os.PathLike | None, where: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Check an adapter and its base model; the latter's name, and where on the hub it is."""
    check_adapter(adapter)
    where = {key: where[key] for key in HUB_KWARGS if key in where and key not in ("revision", "subfolder")}
    if base is not None:
        name = resolve(base)
        advice = "Name the whole model that the adapter was trained on."
    else:
        name, revision = recorded_base(adapter)
        name = resolve(name)
        where |= {} if revision is None else {"revision": revision}
        advice = (
            f"If it lies elsewhere now, write its folder or hub id as base_model_name_or_path into "
            f"{adapter / ADAPTER_CONFIG}."
        )
    try:
        if _adapter_folder(name, {}):
            raise CheckpointError(f"{name} is an adapter itself: merge that one first, `finetune/merge_lora.py`.")
        check_checkpoint(name, **where)
    except CheckpointError as error:
        raise CheckpointError(f"The base model of the adapter in {adapter} cannot be used. {error} {advice}") from error
    return name, where


def _holder_of(file: str, name: str, where: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where to read a file of a checkpoint: in itself, or for an adapter without it in its base model."""
    adapter = _adapter_folder(name, where)
    return _base_of(adapter, None, where) if adapter and not (adapter / file).is_file() else (name, where)


def _load_weights(name: str, **from_pretrained_kwargs: Any) -> QWenLMHeadModel:
    where = {key: from_pretrained_kwargs.pop(key) for key in HUB_KWARGS if key in from_pretrained_kwargs}
    if getattr(load_config(name, **where), "quantization_config", None):
        check_gptq_installed(name)  # before gigabytes are fetched
    place, where = source(name, weights=True, **where)
    if place != name:  # a folder that was filled, perhaps by a download that was cut off
        check_weights(Path(place, where.get("subfolder") or ""))
    try:
        model, report = QWenLMHeadModel.from_pretrained(
            place, output_loading_info=True, **where, **from_pretrained_kwargs
        )
    except ImportError as error:  # a quantized checkpoint without its library
        raise CheckpointError(f"{name} needs a package that is not installed. {error}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise CheckpointError(
            f"The weights in {name} do not have the shapes that its config.json gives: the two come from different "
            f"models. Download the checkpoint again as a whole. ({first_line(error)})"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{name} could not be loaded. {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{len(missing)} tensors are in none of the weight files of {name}, for example {missing[0]}: the "
            "checkpoint is incomplete, or its config.json belongs to another model. Download it again as a whole."
        )
    model.name_or_path = name  # what an adapter records, and a server answers to
    return model.eval()


def load_model_quietly(
    name_or_path: str | os.PathLike | None = None,
    *,
    chat: bool = False,
    int8_cache: bool = False,
    hub: str | None = None,
    **kwargs: Any,
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """`load_model` for a script with a person in front of it: no chatter of the libraries, and a progress bar where it
    is seen and loading takes long.

    Args:
        chat: only a chat model will do; a base model is refused before its weights are loaded.
        int8_cache: keep the key/value cache in 8 bits and decode from those; False leaves it to config.json.
        hub: where ids are fetched from, now and later; None leaves it as it is.
    """
    use(hub)
    if int8_cache:
        kwargs |= {"use_cache_quantization": True, "use_cache_kernel": True}
    with quiet_loading(progress=name_or_path is not None):
        if chat:
            check_chat(name_or_path)
        return load_model(name_or_path, **kwargs)


def check_chat(name_or_path: str | os.PathLike | None) -> None:
    """Raise CheckpointError unless this is a complete checkpoint, as far as can be seen quickly, of a chat model."""
    name = resolve(name_or_path)
    check_checkpoint(name)
    if (found := chat_format(name)) != "chatml":
        raise CheckpointError(
            f'{name} is no chat model: its chat_format is {found!r}, not "chatml". Name a chat checkpoint such '
            "as Qwen/Qwen-7B-Chat. If it is one, its generation_config.json is missing: put it beside the weights."
        )


def chat_format(name: str, **where: Any) -> str | None:
    """What the checkpoint's generation config says that it speaks: "chatml" a chat model, "raw" a base model; None
    where it says nothing."""
    name, where = _holder_of(GENERATION_CONFIG_NAME, name, where)
    place, where = source(name, **where)
    try:
        return getattr(GenerationConfig.from_pretrained(place, **where), "chat_format", None)
    except OSError:  # there is none
        return None


def load_config(name_or_path: str | os.PathLike | None = None, **where: Any) -> QWenConfig:
    """The config of a checkpoint that `check_checkpoint` passes, of an adapter that of its base model.

    Args:
        where: keyword arguments of from_pretrained that say where the file comes from (HUB_KWARGS).
    """
    name, where = _holder_of("config.json", resolve(name_or_path), where)
    place, where = source(name, **where)
    return QWenConfig.from_pretrained(place, **where)


def load_tokenizer(name_or_path: str | os.PathLike | None = None, **from_pretrained_kwargs: Any) -> QWenTokenizer:
    """Load only the tokenizer of a checkpoint, for an adapter without one that of its base model; keyword arguments go
    to `QWenTokenizer.from_pretrained`.

    Raises:
        CheckpointError: the folder has no qwen.tiktoken, or the hub does not give it.
    """
    from_pretrained_kwargs.pop("trust_remote_code", None)
    where = {key: from_pretrained_kwargs.pop(key) for key in HUB_KWARGS if key in from_pretrained_kwargs}
    name, where = _holder_of(VOCABULARY, resolve(name_or_path), where)
    if (folder := _folder(name, where.get("subfolder"))) is not None:
        check_vocabulary(folder)
    place, where = source(name, **where)
    try:
        return QWenTokenizer.from_pretrained(place, **from_pretrained_kwargs, **where)
    except OSError as error:
        raise CheckpointError(f"The tokenizer of {name} could not be loaded. {error}") from error


def check_checkpoint(name_or_path: str | os.PathLike, **where: Any) -> None:
    """Raise CheckpointError unless this is a complete first-generation Qwen checkpoint, as far as can be seen quickly.

    Reads config.json (from the hub if need be), the index and the headers of local weight files, never the weights.

    Args:
        name_or_path: a folder or a hub id.
        where: keyword arguments of from_pretrained that say where the files come from (HUB_KWARGS).
    """
    name = os.fspath(name_or_path)
    if (folder := _folder(name, where.get("subfolder"))) is None:
        check_config(config_file(name, **where), name)
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist. Leave `subfolder` out, or name one that {name} has.")
    if is_adapter(folder):
        _base_of(folder, None, where)
        return
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is not a model folder, or its download stopped early. "
            + download_advice(folder)
        )
    check_config(config, folder)
    check_weights(folder)
    check_vocabulary(folder)


def resolve(name_or_path: str | os.PathLike | None) -> str:
    """The name as text, with ~ for the home folder understood and published ids as they are written; None is the
    bundled chat model.

    Raises:
        CheckpointError: the bundled model is not there.
    """
    if name_or_path is not None:
        name = os.path.expanduser(os.fspath(name_or_path))
        return name if os.path.exists(name) else published_spelling(name)
    if not BUNDLED_CHAT.is_dir():
        raise CheckpointError(
            f"The bundled model is not here ({BUNDLED_CHAT}): it comes with the repository, not with the installed "
            "package. Name another one with -c: a folder, or a hub id such as Qwen/Qwen-1_8B-Chat."
        )
    return str(BUNDLED_CHAT)


def _folder(name: str, subfolder: str | None = None) -> Path | None:
    """The folder that the name means, None for a hub id; a name that can be neither is an error."""
    path = Path(name)
    if name and path.is_dir():
        return path / (subfolder or "")
    if path.is_file():
        raise CheckpointError(f"{name} is a file. Name the folder that it lies in (with config.json and the weights).")
    if HUB_ID.fullmatch(name):
        if name not in PUBLISHED and (beside := sorted(file.parent.name for file in path.parent.glob("*/config.json"))):
            raise CheckpointError(f"There is no folder {name!r}; {path.parent} holds {listing(beside)}.")
        return None
    near = difflib.get_close_matches(f"Qwen/{path.name}", PUBLISHED, n=1, cutoff=0.75)
    raise CheckpointError(
        f"There is no folder {name!r}, and it is not a hub id (OWNER/NAME) either. "
        + (f"Did you mean {near[0]}?" if near else "Check the path, or name a model such as Qwen/Qwen-7B-Chat.")
    )
