"""Downloads checkpoints from ModelScope, with actionable errors."""

import contextlib
import fnmatch
import functools
import io
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from transformers.utils import CONFIG_NAME
from transformers.utils.logging import is_progress_bar_enabled

from .files import CheckpointError, first_line
from .hub import (
    DownloadOptions,
    HubOptions,
    explain_unusable_proxy,
    hub_unreachable_message,
    model_not_found_message,
)

if TYPE_CHECKING:
    from modelscope_hub import FileInfo

_SMALL_FILE_PATTERNS = ("*.json", "*.tiktoken")  # all files of a model except weights, and code, which is not used


class _DownloadKwargs(TypedDict):
    """Keyword arguments of `HubApi.download_repo`."""

    revision: str | None
    cache_dir: str | Path | None


class ModelScopeFiles:
    """A checkpoint on ModelScope, downloaded into the cache of ModelScope's client.

    Cached files are compared with the hub's checksums and downloaded only if they differ, so `force_download` is
    ignored. If the hub cannot be reached, the cached files are used. The list of files is requested once.

    Raises:
        CheckpointError: by all methods, if files cannot be downloaded.
    """

    def __init__(self, name: str, options: HubOptions):
        try:
            from modelscope_hub import HubApi
        except ImportError as error:
            raise CheckpointError(
                f"Downloading {name} from ModelScope needs a missing package: `pip install -U modelscope`."
            ) from error
        if "MODELSCOPE_LOG_LEVEL" not in os.environ:  # CheckpointError reports what the client logs
            logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
        self._api: HubApi = HubApi(token=options.token if isinstance(options.token, str) else None)
        # "main" is the default revision of the Hugging Face Hub.
        self._revision = None if options.revision == "main" else options.revision
        self._download_kwargs: _DownloadKwargs = {
            "revision": self._revision,
            "cache_dir": cast("str | Path | None", options.cache_dir),
        }
        self._subfolder = (options.subfolder or "").strip("/")
        self._local_only = options.local_files_only
        self._name = self._cached_id(name)

    def find(self, name: str) -> Path | None:
        path = self._small_files / self._subfolder / name
        return path if path.is_file() else None

    def config(self) -> Path:
        path = self._fetch(CONFIG_NAME) / self._subfolder / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{self._name} is on ModelScope but has no config.json: it is not a model. If it is an adapter (LoRA), "
                f"download it with `modelscope download --model {self._name} --local_dir FOLDER` and name that folder."
            )
        return path

    def from_pretrained_args(self, *, weights: bool = False) -> tuple[str, DownloadOptions]:
        return str(self.folder() if weights else self._small_files / self._subfolder), {}

    def folder(self) -> Path:
        return self._all_files / self._subfolder

    @functools.cached_property
    def _small_files(self) -> Path:
        return self._fetch(*_SMALL_FILE_PATTERNS)

    @functools.cached_property
    def _all_files(self) -> Path:
        return self._fetch(*_SMALL_FILE_PATTERNS, weights=True)

    def _fetch(self, *patterns: str, weights: bool = False) -> Path:
        """Download the files that match a pattern, if there are any; return their folder in the cache."""
        from modelscope_hub import CacheNotFound, FileDownloadError

        if self._files is None:
            with contextlib.suppress(CacheNotFound):
                folder = self._api.download_repo(self._name, "model", local_files_only=True, **self._download_kwargs)
                if (folder / self._subfolder / CONFIG_NAME).is_file():
                    return folder
            raise CheckpointError(
                hub_unreachable_message(self._name, "ModelScope", "MODELSCOPE_ENDPOINT sets another address")
            )
        available = {
            os.path.basename(file.path): file for file in self._files if os.path.dirname(file.path) == self._subfolder
        }
        if weights:
            # Many models have both formats; transformers prefers safetensors.
            patterns = (*patterns, "*.safetensors" if fnmatch.filter(available, "*.safetensors") else "*.bin")
        file_list = [
            {"Path": file.path, "Size": file.size or None, "Sha256": file.sha256}
            for name, file in available.items()
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        ]
        # The client always shows progress bars on standard error.
        show_progress = weights and is_progress_bar_enabled()
        try:
            with contextlib.nullcontext() if show_progress else contextlib.redirect_stderr(io.StringIO()):
                return self._api.download_repo(self._name, "model", file_list=file_list, **self._download_kwargs)
        except FileDownloadError as error:
            file, reason = next(iter(error.failed_files.items()))
            raise CheckpointError(
                f"{len(error.failed_files)} of {error.total} files of {self._name} could not be downloaded from "
                f"ModelScope. Run the same command again to resume. ({file}: {first_line(reason)})"
            ) from error

    def _cached_id(self, name: str) -> str:
        """Return the spelling of an id that is cached: the hub accepts Qwen/ and qwen/, but caches them separately."""
        from modelscope_hub import CacheNotFound

        for model_id in (name, name.replace("Qwen/", "qwen/", 1)):
            with contextlib.suppress(CacheNotFound):
                self._api.download_repo(model_id, "model", local_files_only=True, **self._download_kwargs)
                return model_id
        return name

    @functools.cached_property
    def _files(self) -> "list[FileInfo] | None":
        """The files that the hub lists; None if it cannot be reached, or with `local_files_only`."""
        from modelscope_hub import AuthenticationError, HubError, NotExistError, PermissionDeniedError

        if self._local_only:
            return None
        try:
            with explain_unusable_proxy(self._name):
                listed = self._api.list_repo_files(self._name, "model", revision=self._revision)
            return [file for file in listed if not file.is_dir]
        except NotExistError as error:
            raise CheckpointError(self._not_found_message()) from error
        except (AuthenticationError, PermissionDeniedError) as error:
            raise CheckpointError(
                f"Access to {self._name} must be granted: log in with `modelscope login` or set MODELSCOPE_API_TOKEN."
            ) from error
        except HubError as error:
            if error.retryable:  # no connection, or a server error
                return None
            raise CheckpointError(f"ModelScope refused {self._name}: {first_line(error)}") from error

    def _not_found_message(self) -> str:
        """Describe what is missing, the model or the revision: the hub gives the same error for both."""
        from modelscope_hub import HubError

        try:
            revisions = [found["Revision"] for found in self._api.list_repo_revisions(self._name, "model")]
        except HubError:
            return model_not_found_message(self._name, "ModelScope", "a private one needs MODELSCOPE_API_TOKEN")
        return (
            f"{self._name} has no revision {self._revision or 'master'!r} on ModelScope. It has "
            f"{', '.join(revisions) or 'none'}."
        )
