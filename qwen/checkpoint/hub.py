"""Where the files of a model come from that is named by an id: the Hugging Face hub, or ModelScope.

Revolves around an id, a hub and what people are told when the one is not to be had from the other. What the files mean
it does not know. QWEN_HUB in the environment names the hub, so that a process and all that it starts agree on it.
"""

import argparse
import contextlib
import difflib
import fnmatch
import io
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import CONFIG_NAME
from transformers.utils.logging import is_progress_bar_enabled

from .files import CheckpointError, first_line

if TYPE_CHECKING:
    from modelscope_hub import FileInfo, HubApi

HUBS = ("huggingface", "modelscope")
VARIABLE = "QWEN_HUB"

PUBLISHED = tuple(
    f"Qwen/Qwen-{size}{kind}"
    for size in ("1_8B", "7B", "14B", "72B")
    for kind in ("", "-Chat", "-Chat-Int4", "-Chat-Int8")
)
"""Hub ids of the published checkpoints: every size as base, chat, and chat quantized to 4 and 8 bits."""

_SMALL = ("*.json", "*.tiktoken")  # all of a model but its weights and its code, which is not used
_LOOK_SECONDS = 60  # so long one look at ModelScope serves: loading a model asks for its files in several steps


def add_hub_argument(parser: argparse.ArgumentParser) -> None:
    """--hub, for scripts that can wait for this module; what it says goes to `use`."""
    parser.add_argument("--hub", choices=HUBS, help=f"where ids come from (default: {VARIABLE}, or {HUBS[0]})")


def use(hub: str | None) -> None:
    """Fetch from this hub from now on, in this process and those that it starts; None changes nothing.

    Raises:
        CheckpointError: there is no such hub.
    """
    if hub is not None:
        os.environ[VARIABLE] = hub
        current()


def current() -> str:
    """One of HUBS.

    Raises:
        CheckpointError: the environment names another.
    """
    hub = os.environ.get(VARIABLE) or HUBS[0]
    if hub not in HUBS:
        raise CheckpointError(f"{VARIABLE} is {hub!r}: it must be {' or '.join(HUBS)}.")
    return hub


def published_spelling(name: str) -> str:
    """A published id as it was published, however its letters are written; any other name as it is.

    ModelScope takes them in capitals or not, and texts about it have qwen/Qwen-7B-Chat and QWen/qwen-7b-chat.
    """
    return next((known for known in PUBLISHED if known.lower() == name.lower()), name)


def config_file(name: str, **where: Any) -> Path:
    """Fetch config.json alone, so that a wrong name or model is known before gigabytes are downloaded.

    Args:
        name: a hub id.
        where: keyword arguments of from_pretrained that say where the files come from.

    Raises:
        CheckpointError: it is not to be had; says why and what to do.
    """
    if current() == "huggingface":
        return _config_from_hugging_face(name, **where)
    path = _from_modelscope(name, (CONFIG_NAME,), **where) / (where.get("subfolder") or "") / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{name} is on ModelScope but has no config.json: it is no model. If it is an adapter (LoRA), fetch it "
            f"with `modelscope download --model {name} --local_dir FOLDER` and name that folder."
        )
    return path


def source(name: str, *, weights: bool = False, **where: Any) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for a name, and its keyword arguments that say where the files come from.

    A folder is itself; so is an id on the Hugging Face hub, where from_pretrained fetches what it needs. On ModelScope
    it is the folder that the files have come into.

    Args:
        weights: whether they are needed.

    Raises:
        CheckpointError: the files are not to be had; says why and what to do.
    """
    if os.path.isdir(name) or current() == "huggingface":
        return name, where
    folder = _from_modelscope(name, _SMALL, weights=weights, **where)
    return str(folder), {key: where[key] for key in ("subfolder",) if key in where}


def _no_such_model(name: str, hub: str, advice: str) -> str:
    near = difflib.get_close_matches(published_spelling(name), PUBLISHED, n=1, cutoff=0.75)
    examples = "Published are, for example, Qwen/Qwen-1_8B-Chat and Qwen/Qwen-7B."
    return f"{name!r} is neither a folder here nor a model on {hub} ({advice}). " + (
        f"Did you mean {near[0]}?" if near and near[0] != name else examples
    )


def _out_of_reach(name: str, hub: str, advice: str) -> str:
    return (
        f"There is no folder {name!r} here, and {hub} cannot be reached to look for a model of that name. Check the "
        f"connection and proxy ({advice}), or download the model elsewhere and name its folder."
    )


def _config_from_hugging_face(name: str, **where: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = "the Hugging Face hub"
    unreachable = _out_of_reach(name, hub, "or set HF_ENDPOINT to a mirror, or take ModelScope: QWEN_HUB=modelscope")
    # The order matters: the later classes are parents of some of the earlier ones.
    try:
        return Path(hf_hub_download(name, CONFIG_NAME, **where))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(unreachable) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"Access to {name} must be granted: log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(_no_such_model(name, hub, "a private one needs HF_TOKEN")) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {where.get('revision')!r} on {hub}.") from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is on {hub} but has no config.json: it is no model. If it is an adapter (LoRA), "
            f"fetch it with `hf download {name} --local-dir FOLDER` and name that folder."
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"The Hugging Face hub refused {name}: {first_line(error)}") from error
    except OSError as error:  # connection, proxy and TLS errors of the HTTP client
        raise CheckpointError(unreachable) from error


def _from_modelscope(
    name: str,
    patterns: Sequence[str],
    *,
    weights: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
) -> Path:
    """The folder in ModelScope's cache with the files of a model that match, as far as it has such files.

    Files that are there are compared with the hub's checksums and only fetched if they differ, so that there is no need
    to force it. Where the hub is out of reach, what is there has to do.
    """
    try:
        from modelscope_hub import CacheNotFound, FileDownloadError, HubApi
    except ImportError as error:
        raise CheckpointError(
            f"Fetching {name} from ModelScope needs a package that is missing: `pip install -U modelscope`."
        ) from error

    if "MODELSCOPE_LOG_LEVEL" not in os.environ:  # what it logs, errors are made of here
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
    api = HubApi(token=token if isinstance(token, str) else None)
    revision = None if revision == "main" else revision  # the name of the default on the other hub
    place = {"revision": revision, "cache_dir": cache_dir}
    name = _cached_spelling(api, name, place)
    inside = (subfolder or "").strip("/")
    files = None if local_files_only else _files(api, name, revision)
    if files is None:
        with contextlib.suppress(CacheNotFound):
            folder = api.download_repo(name, "model", local_files_only=True, **place)
            if (folder / inside / CONFIG_NAME).is_file():
                return folder
        raise CheckpointError(_out_of_reach(name, "ModelScope", "MODELSCOPE_ENDPOINT names another address"))
    beside = {os.path.basename(file.path): file for file in files if os.path.dirname(file.path) == inside}
    if weights:
        # Many models have them in both formats; transformers prefers the first.
        patterns = (*patterns, "*.safetensors" if fnmatch.filter(beside, "*.safetensors") else "*.bin")
    wanted = [
        {"Path": file.path, "Size": file.size or None, "Sha256": file.sha256}
        for base, file in beside.items()
        if any(fnmatch.fnmatch(base, pattern) for pattern in patterns)
    ]
    # The client always draws its bars, on standard error.
    shown = weights and is_progress_bar_enabled()
    try:
        with contextlib.nullcontext() if shown else contextlib.redirect_stderr(io.StringIO()):
            return api.download_repo(name, "model", file_list=wanted, **place)
    except FileDownloadError as error:
        file, reason = next(iter(error.failed_files.items()))
        raise CheckpointError(
            f"{len(error.failed_files)} of {error.total} files of {name} could not be fetched from ModelScope. The "
            f"same command goes on from where it stopped. ({file}: {first_line(reason)})"
        ) from error


def _cached_spelling(api: "HubApi", name: str, place: dict[str, Any]) -> str:
    """An id as it was written when it was downloaded: the hub takes Qwen/ and qwen/, but its cache has a folder for
    each."""
    from modelscope_hub import CacheNotFound

    for spelling in (name, name.replace("Qwen/", "qwen/", 1)):
        with contextlib.suppress(CacheNotFound):
            api.download_repo(spelling, "model", local_files_only=True, **place)
            return spelling
    return name


_looks: dict[tuple[str, ...], tuple[float, "list[FileInfo] | None"]] = {}


def _files(api: "HubApi", name: str, revision: str | None) -> "list[FileInfo] | None":
    """What ModelScope has of a model; None where it is out of reach."""
    key = (api.legacy.endpoint, str(api.legacy.token), name, str(revision))
    if key not in _looks or time.monotonic() - _looks[key][0] > _LOOK_SECONDS:
        files = _listed(api, name, revision)
        _looks[key] = (time.monotonic(), files)
    return _looks[key][1]


def _listed(api: "HubApi", name: str, revision: str | None) -> "list[FileInfo] | None":
    from modelscope_hub import AuthenticationError, HubError, NotExistError, PermissionDeniedError

    try:
        return [file for file in api.list_repo_files(name, "model", revision=revision) if not file.is_dir]
    except NotExistError as error:
        raise CheckpointError(_missing_on_modelscope(api, name, revision)) from error
    except (AuthenticationError, PermissionDeniedError) as error:
        raise CheckpointError(
            f"Access to {name} must be granted: log in with `modelscope login` or set MODELSCOPE_API_TOKEN."
        ) from error
    except HubError as error:
        if error.retryable:  # no connection, or a server that is out of order
            return None
        raise CheckpointError(f"ModelScope refused {name}: {first_line(error)}") from error


def _missing_on_modelscope(api: "HubApi", name: str, revision: str | None) -> str:
    """What is missing, a model or a revision: a listing of files is refused in the same way for both."""
    from modelscope_hub import HubError

    try:
        known = [found["Revision"] for found in api.list_repo_revisions(name, "model")]
    except HubError:
        return _no_such_model(name, "ModelScope", "a private one needs MODELSCOPE_API_TOKEN")
    return f"{name} has no revision {revision or 'master'!r} on ModelScope. It has {', '.join(known) or 'none'}."
