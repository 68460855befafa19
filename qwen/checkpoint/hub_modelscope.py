"""Downloads checkpoints from ModelScope, with errors that say what to do."""

import contextlib
import fnmatch
import functools
import io
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import CONFIG_NAME
from transformers.utils.logging import is_progress_bar_enabled

from .files import CheckpointError, first_line
from .hub import HubOptions, no_such_model, out_of_reach

if TYPE_CHECKING:
    from modelscope_hub import FileInfo

_SMALL = ("*.json", "*.tiktoken")  # all of a model but its weights and its code, which is not used


class ModelScopeFiles:
    """A checkpoint on ModelScope; its files come into the cache of ModelScope's client.

    Files that are there are compared with the hub's checksums and only fetched if they differ, so that there is no need
    to force it. Where the hub is out of reach, what is there has to do. The hub is asked for its list of files once.

    Raises:
        CheckpointError: by all methods: the files cannot be fetched; says why and what to do.
    """

    def __init__(self, name: str, options: HubOptions):
        try:
            from modelscope_hub import HubApi
        except ImportError as error:
            raise CheckpointError(
                f"Fetching {name} from ModelScope needs a package that is missing: `pip install -U modelscope`."
            ) from error
        if "MODELSCOPE_LOG_LEVEL" not in os.environ:  # what it logs, errors are made of here
            logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)
        self._api: HubApi = HubApi(token=options.token if isinstance(options.token, str) else None)
        # "main" is the name of the default on the other hub.
        self._revision = None if options.revision == "main" else options.revision
        self._place: dict[str, Any] = {"revision": self._revision, "cache_dir": options.cache_dir}
        self._inside = (options.subfolder or "").strip("/")
        self._local_only = options.local_files_only
        self._name = self._cached_spelling(name)

    def find(self, name: str) -> Path | None:
        path = self._small_files / self._inside / name
        return path if path.is_file() else None

    def config(self) -> Path:
        path = self._fetch(CONFIG_NAME) / self._inside / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{self._name} is on ModelScope but has no config.json: it is no model. If it is an adapter (LoRA), "
                f"fetch it with `modelscope download --model {self._name} --local_dir FOLDER` and name that folder."
            )
        return path

    def source(self, *, weights: bool = False) -> tuple[str, dict[str, Any]]:
        return str(self.folder() if weights else self._small_files / self._inside), {}

    def folder(self) -> Path:
        return self._with_weights / self._inside

    @functools.cached_property
    def _small_files(self) -> Path:
        return self._fetch(*_SMALL)

    @functools.cached_property
    def _with_weights(self) -> Path:
        return self._fetch(*_SMALL, weights=True)

    def _fetch(self, *patterns: str, weights: bool = False) -> Path:
        """The folder in the cache with the files that match, as far as the hub has such files."""
        from modelscope_hub import CacheNotFound, FileDownloadError

        if self._files is None:
            with contextlib.suppress(CacheNotFound):
                folder = self._api.download_repo(self._name, "model", local_files_only=True, **self._place)
                if (folder / self._inside / CONFIG_NAME).is_file():
                    return folder
            raise CheckpointError(out_of_reach(self._name, "ModelScope", "MODELSCOPE_ENDPOINT names another address"))
        beside = {
            os.path.basename(file.path): file for file in self._files if os.path.dirname(file.path) == self._inside
        }
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
                return self._api.download_repo(self._name, "model", file_list=wanted, **self._place)
        except FileDownloadError as error:
            file, reason = next(iter(error.failed_files.items()))
            raise CheckpointError(
                f"{len(error.failed_files)} of {error.total} files of {self._name} could not be fetched from "
                f"ModelScope. The same command goes on from where it stopped. ({file}: {first_line(reason)})"
            ) from error

    def _cached_spelling(self, name: str) -> str:
        """An id as it was written when it was downloaded: the hub takes Qwen/ and qwen/, but its cache has a folder
        for each."""
        from modelscope_hub import CacheNotFound

        for spelling in (name, name.replace("Qwen/", "qwen/", 1)):
            with contextlib.suppress(CacheNotFound):
                self._api.download_repo(spelling, "model", local_files_only=True, **self._place)
                return spelling
        return name

    @functools.cached_property
    def _files(self) -> "list[FileInfo] | None":
        """What the hub has of the model; None where it is out of reach or not to be asked."""
        from modelscope_hub import AuthenticationError, HubError, NotExistError, PermissionDeniedError

        if self._local_only:
            return None
        try:
            listed = self._api.list_repo_files(self._name, "model", revision=self._revision)
            return [file for file in listed if not file.is_dir]
        except NotExistError as error:
            raise CheckpointError(self._missing()) from error
        except (AuthenticationError, PermissionDeniedError) as error:
            raise CheckpointError(
                f"Access to {self._name} must be granted: log in with `modelscope login` or set MODELSCOPE_API_TOKEN."
            ) from error
        except HubError as error:
            if error.retryable:  # no connection, or a server that is out of order
                return None
            raise CheckpointError(f"ModelScope refused {self._name}: {first_line(error)}") from error

    def _missing(self) -> str:
        """What is missing, a model or a revision: a listing of files is refused in the same way for both."""
        from modelscope_hub import HubError

        try:
            known = [found["Revision"] for found in self._api.list_repo_revisions(self._name, "model")]
        except HubError:
            return no_such_model(self._name, "ModelScope", "a private one needs MODELSCOPE_API_TOKEN")
        return (
            f"{self._name} has no revision {self._revision or 'master'!r} on ModelScope. It has "
            f"{', '.join(known) or 'none'}."
        )
