"""One way in: a name or a folder becomes a model and its tokenizer.

Every script starts here. The module revolves around one question, "can this checkpoint be loaded, and if not, what
should the person do?": it looks at the files before transformers does, because transformers reports a half-downloaded
folder as a JSON or a header error. It knows nothing about prompts or generation, and of devices only the device map.

The model code of this repository is used whatever code lies beside the weights, so nothing from a checkpoint is
executed and no `trust_remote_code` is needed.
"""

import difflib
import importlib.util
import json
import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from .configuration_qwen import QWenConfig
from .modeling_qwen import QWenLMHeadModel
from .tokenization_qwen import QWenTokenizer

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
BUNDLED_CHAT = CHECKPOINTS / "qwen-tiny-chat"
BUNDLED_BASE = CHECKPOINTS / "qwen-tiny-base"

PUBLISHED = tuple(
    f"Qwen/Qwen-{size}{kind}"
    for size in ("1_8B", "7B", "14B", "72B")
    for kind in ("", "-Chat", "-Chat-Int4", "-Chat-Int8")
)
"""Hub ids of the published checkpoints: every size as base, chat, and chat quantized to 4 and 8 bits."""

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
VOCABULARY = "qwen.tiktoken"
LFS_POINTER = b"version https://git-lfs"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The keyword arguments of from_pretrained that say where files come from; the tokenizer must look in the same place.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class CheckpointError(OSError):
    """A checkpoint cannot be loaded. The text is for people: what is wrong, where, and what to do."""


def load_model(
    name_or_path: str | os.PathLike | None = None, *, cpu_only: bool = False, **from_pretrained_kwargs: Any
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """Load a first-generation Qwen checkpoint, ready to generate.

    Args:
        name_or_path: a folder, or a Hugging Face hub id such as "Qwen/Qwen-7B-Chat"; None is the bundled chat model.
        cpu_only: keep the model off any accelerator.
        from_pretrained_kwargs: for `QWenLMHeadModel.from_pretrained`, e.g. bf16=True, use_cache_quantization=True.

    Returns:
        The model in eval mode, its generation_config as the checkpoint sets it, and the tokenizer.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, of another architecture, or out of reach.
        ValueError: the keyword arguments contradict one another (e.g. bf16=True with fp16=True).
    """
    name = _resolve(name_or_path)
    from_pretrained_kwargs.pop("trust_remote_code", None)  # accepted as in the published examples, but not needed
    where = {key: from_pretrained_kwargs[key] for key in HUB_KWARGS if key in from_pretrained_kwargs}
    check_checkpoint(name, **where)
    tokenizer = load_tokenizer(name, **where)  # first, as it fails in a second where the weights take minutes
    from_pretrained_kwargs.setdefault("device_map", "cpu" if cpu_only else "auto")
    try:
        model, report = QWenLMHeadModel.from_pretrained(name, output_loading_info=True, **from_pretrained_kwargs)
    except ImportError as error:  # a quantized checkpoint without its library
        raise CheckpointError(f"{name} needs a package that is not installed. {error}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise CheckpointError(
            f"The weights in {name} do not have the shapes that its config.json gives: the two come from different "
            f"models. Download the checkpoint again as a whole. ({_first_line(error)})"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{name} could not be loaded. {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{len(missing)} tensors are in none of the weight files of {name}, for example {missing[0]}: the "
            "checkpoint is incomplete, or its config.json belongs to another model. Download it again as a whole."
        )
    return model.eval(), tokenizer


def load_model_quietly(
    name_or_path: str | os.PathLike | None = None, *, chat: bool = False, **kwargs: Any
) -> tuple[QWenLMHeadModel, QWenTokenizer]:
    """`load_model` for a script with a person in front of it: no chatter of the libraries, and a progress bar where it
    is seen and loading takes long.

    Args:
        chat: only a chat model will do; a base model is refused before its weights are loaded.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
    if name_or_path is None or not sys.stderr.isatty():
        logging.disable_progress_bar()
    if chat:
        check_chat(name_or_path)
    return load_model(name_or_path, **kwargs)


def check_chat(name_or_path: str | os.PathLike | None) -> None:
    """Raise CheckpointError unless this is a complete checkpoint, as far as can be seen quickly, of a chat model."""
    name = _resolve(name_or_path)
    check_checkpoint(name)
    try:
        chat_format = getattr(GenerationConfig.from_pretrained(name), "chat_format", None)
    except OSError:  # there is none
        chat_format = None
    if chat_format != "chatml":
        raise CheckpointError(
            f'{name} is no chat model: its chat_format is {chat_format!r}, not "chatml". Name a chat checkpoint such '
            "as Qwen/Qwen-7B-Chat. If it is one, its generation_config.json is missing: put it beside the weights."
        )


def load_tokenizer(name_or_path: str | os.PathLike | None = None, **from_pretrained_kwargs: Any) -> QWenTokenizer:
    """Load only the tokenizer of a checkpoint; keyword arguments go to `QWenTokenizer.from_pretrained`.

    Raises:
        CheckpointError: the folder has no qwen.tiktoken, or the hub does not give it.
    """
    name = _resolve(name_or_path)
    from_pretrained_kwargs.pop("trust_remote_code", None)
    if (folder := _folder(name, from_pretrained_kwargs.get("subfolder"))) is not None:
        _check_vocabulary(folder)
    try:
        return QWenTokenizer.from_pretrained(name, **from_pretrained_kwargs)
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
        _check_config(_config_from_hub(name, **where), name)
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist. Leave `subfolder` out, or name one that {name} has.")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter (LoRA), not a whole model. In Python: `import qwen`, then "
            f'`peft.AutoPeftModelForCausalLM.from_pretrained("{folder}")` loads it together with its base model; a '
            "LoRA (not a Q-LoRA) becomes a folder that loads here with "
            "`.merge_and_unload().save_pretrained(NEW_FOLDER)`, the tokenizer saved beside it."
        )
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{folder} has no config.json: it is not a model folder, or its download stopped early. {_download(folder)}"
        )
    _check_config(config, folder)
    _check_weights(folder)
    _check_vocabulary(folder)


def _resolve(name_or_path: str | os.PathLike | None) -> str:
    if name_or_path is not None:
        return os.path.expanduser(os.fspath(name_or_path))
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
            raise CheckpointError(f"There is no folder {name!r}; {path.parent} holds {_some(beside)}.")
        return None
    near = difflib.get_close_matches(f"Qwen/{path.name}", PUBLISHED, n=1, cutoff=0.75)
    raise CheckpointError(
        f"There is no folder {name!r}, and it is not a hub id (OWNER/NAME) either. "
        + (f"Did you mean {near[0]}?" if near else "Check the path, or name a model such as Qwen/Qwen-7B-Chat.")
    )


def _config_from_hub(name: str, **where: Any) -> Path:
    """Fetch config.json alone, so that a wrong name or model is known before gigabytes are downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable = (
        f"There is no folder {name!r} here, and the Hugging Face hub cannot be reached to look for a model of that "
        "name. Check the connection and proxy (or set HF_ENDPOINT to a mirror), or download the model elsewhere and "
        "name its folder."
    )
    # The order matters: the later classes are parents of some of the earlier ones.
    try:
        return Path(hf_hub_download(name, "config.json", **where))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(unreachable) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"Access to {name} must be granted: log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        near = difflib.get_close_matches(name, PUBLISHED, n=1, cutoff=0.75)
        raise CheckpointError(
            f"{name!r} is neither a folder here nor a model on the Hugging Face hub (a private one needs HF_TOKEN). "
            + (
                f"Did you mean {near[0]}?"
                if near
                else "Published are, for example, Qwen/Qwen-1_8B-Chat and Qwen/Qwen-7B."
            )
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {where.get('revision')!r} on the Hugging Face hub.") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{name} is on the Hugging Face hub but has no config.json: it is no model.") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"The Hugging Face hub refused {name}: {_first_line(error)}") from error
    except OSError as error:  # connection, proxy and TLS errors of the HTTP client
        raise CheckpointError(unreachable) from error


def _check_config(path: Path, name: str | Path) -> None:
    config = _read_json(path, name)
    model_type = config.get("model_type")
    if model_type == QWenConfig.model_type:
        if config.get("quantization_config") and importlib.util.find_spec("gptqmodel") is None:
            raise CheckpointError(
                f"{name} is quantized (GPTQ), which needs two more packages: `pip install gptqmodel optimum`. "
                "Or take the same model without -Int4 or -Int8."
            )
        return
    if model_type is None:
        raise CheckpointError(
            f"config.json of {name} names no model_type, so it is not known which model this is. If it is a "
            'first-generation Qwen, add `"model_type": "qwen"`.'
        )
    newer = str(model_type).startswith("qwen")
    raise CheckpointError(
        f"{name} is a model of type {model_type!r}, "
        + ("a newer Qwen" if newer else "another architecture")
        + ' than the first-generation Qwen (type "qwen") that this code is for. '
        "transformers loads it by itself: AutoModelForCausalLM.from_pretrained."
    )


def _check_weights(folder: Path) -> None:
    """Find what interrupted downloads and copies leave behind: missing shards, git-lfs pointers, cut-off files."""
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (BIN, BIN_INDEX)):  # in transformers' order of preference
        if (folder / single).is_file():
            shards = [single]
        elif (folder / index).is_file():
            weight_map = _read_json(folder / index, folder).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{folder / index} has no weight_map. {_download(folder)}")
            shards = sorted(set(weight_map.values()))
        else:
            continue
        break
    else:
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".gguf")
        )
        raise CheckpointError(
            f"{folder} has no weights: neither {SAFETENSORS} nor {BIN} nor the index of a sharded checkpoint. "
            + (f"It does have {_some(others)}, which are not looked for under such names. " if others else "")
            + _download(folder)
        )
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder} is half downloaded: {len(missing)} of its {len(shards)} weight files are missing "
            f"({_some(missing)}). {_download(folder)}"
        )
    if pointers := [shard for shard in shards if _is_lfs_pointer(folder / shard)]:
        raise CheckpointError(_pointer_text(folder, pointers))
    if broken := [shard for shard in shards if not _is_complete(folder / shard)]:
        raise CheckpointError(
            f"{folder} is half downloaded: {_some(broken)} {'is' if len(broken) == 1 else 'are'} cut off or damaged. "
            f"Delete {'it' if len(broken) == 1 else 'them'} and download again. {_download(folder)}"
        )


def _check_vocabulary(folder: Path) -> None:
    vocabulary = folder / VOCABULARY
    if not vocabulary.is_file():
        raise CheckpointError(
            f"{folder} has no {VOCABULARY}, the tokenizer's vocabulary. Copy it from the checkpoint that this one was "
            "made from, or download it from any published one of the same family."
        )
    if _is_lfs_pointer(vocabulary):
        raise CheckpointError(_pointer_text(folder, [VOCABULARY]))


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _is_complete(path: Path) -> bool:
    """Whether a weight file is as long as its own directory of tensors says."""
    if path.suffix != ".safetensors":
        # A .bin file is a zip archive with its directory at the end; torch < 1.6 wrote bare pickles: let them through.
        with path.open("rb") as file:
            return file.read(2) not in (b"PK", b"") or zipfile.is_zipfile(path)
    # https://github.com/huggingface/safetensors#format: 8 bytes N (little endian), N bytes of JSON, the tensors.
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            return False
        try:
            tensors = json.loads(file.read(header_size))
            end = max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, LookupError, AttributeError):
            return False
    return size == 8 + header_size + end


def _read_json(path: Path, name: str | Path) -> dict[str, Any]:
    if _is_lfs_pointer(path):
        raise CheckpointError(_pointer_text(path.parent, [path.name]))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} of {name} is not valid JSON ({_first_line(error)}). Mend it, or download it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} of {name} is not a JSON object. Mend it, or download it again.")
    return content


def _pointer_text(folder: Path, files: list[str]) -> str:
    return (
        f"{folder} was cloned without its large files: {_some(files)} {'is a' if len(files) == 1 else 'are'} git-lfs "
        f"{'pointer' if len(files) == 1 else 'pointers'}. Run `git lfs install` and `git lfs pull` in that folder."
    )


def _download(folder: Path) -> str:
    return f"To fetch what is missing: `hf download Qwen/MODEL --local-dir {folder}`."


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
