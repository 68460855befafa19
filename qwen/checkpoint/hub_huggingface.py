"""Downloads checkpoints from the Hugging Face Hub, with actionable errors."""

from pathlib import Path

from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from .files import BIN, BIN_INDEX, SAFETENSORS, SAFETENSORS_INDEX, CheckpointError, first_line
from .hub import (
    DownloadOptions,
    HubOptions,
    explain_unusable_proxy,
    hub_unreachable_message,
    model_not_found_message,
)


class HuggingFaceFiles:
    """A checkpoint on the Hugging Face Hub. `from_pretrained` downloads its files itself."""

    def __init__(self, name: str, options: HubOptions):
        self._name, self._download_kwargs = name, options.download_kwargs()

    def find(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            with explain_unusable_proxy(self._name):
                return Path(hf_hub_download(self._name, name, **self._download_kwargs))
        except EntryNotFoundError:  # also raised if the hub cannot be reached and the file is not cached
            return None

    def config(self) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        name, hub = self._name, "the Hugging Face hub"
        unreachable = hub_unreachable_message(
            name, hub, "or set HF_ENDPOINT to a mirror, or use ModelScope: QWEN_HUB=modelscope"
        )
        # Order matters: some of the later classes are base classes of earlier ones.
        try:
            with explain_unusable_proxy(name):
                return Path(hf_hub_download(name, CONFIG_NAME, **self._download_kwargs))
        except CheckpointError:  # also an OSError, see below
            raise
        except LocalEntryNotFoundError as error:
            raise CheckpointError(unreachable) from error
        except GatedRepoError as error:
            raise CheckpointError(
                f"Access to {name} must be granted: log in with `hf auth login` or set HF_TOKEN."
            ) from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(model_not_found_message(name, hub, "a private one needs HF_TOKEN")) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(
                f"{name} has no revision {self._download_kwargs.get('revision')!r} on {hub}."
            ) from error
        except EntryNotFoundError as error:
            raise CheckpointError(
                f"{name} is on {hub} but has no config.json: it is not a model. If it is an adapter (LoRA), "
                f"download it with `hf download {name} --local-dir FOLDER` and name that folder."
            ) from error
        except HfHubHTTPError as error:
            raise CheckpointError(f"The Hugging Face hub refused {name}: {first_line(error)}") from error
        except OSError as error:  # connection, proxy and TLS errors of the HTTP client
            raise CheckpointError(unreachable) from error

    def from_pretrained_args(self, *, weights: bool = False) -> tuple[str, DownloadOptions]:
        return self._name, self._download_kwargs

    def folder(self) -> Path:
        """See `Files`. If there are two weight formats, the one that transformers prefers is downloaded."""
        self.find(GENERATION_CONFIG_NAME)
        for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (BIN, BIN_INDEX)):
            if found := self.find(single):
                return found.parent
            if found := self.find(index):
                get_checkpoint_shard_files(self._name, str(found), **self._download_kwargs)
                return found.parent
        raise CheckpointError(
            f"{self._name} has no weights on the hub, or the hub cannot be reached and they are not cached: neither "
            f"{SAFETENSORS} nor {BIN} nor an index of either."
        )
