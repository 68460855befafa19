"""Registers these models with ModelScope's `pipeline(task=Tasks.chat, model=…)`, as programs of 2023 call it.

ModelScope's own chat pipelines need transformers 4. Importing this module registers a replacement:

    import qwen.integrations.modelscope
    from modelscope.pipelines import pipeline
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from modelscope.hub.file_download import model_file_download
from modelscope.pipelines import builder
from modelscope.utils.config import Config
from modelscope.utils.constant import Tasks
from modelscope.utils.import_utils import LazyImportModule

from ..checkpoint.checkpoint import Checkpoint
from ..model.configuration_qwen import QWenConfig
from ..model.json_qwen import read_json_object
from ..model.qwen_generation_utils import History

TYPE = "qwen-chat"  # in configuration.json beside published weights, and in modelscope's registry


class _Question(TypedDict):
    """A query with the earlier turns."""

    text: str
    history: NotRequired[Sequence[tuple[str, str]] | None]


@builder.PIPELINES.register_module(Tasks.chat, module_name=TYPE, force=True)
class QwenChat:
    """The chat pipeline that `pipeline(task=Tasks.chat, model=FOLDER)` returns.

    Args:
        model: a folder; modelscope downloads ids first.
        device: "gpu", "gpu:1" or "cpu"; "gpu" uses the CPU if there is no GPU.
        device_map: `device_map` of from_pretrained, instead of `device`.
        kwargs: for from_pretrained, e.g. bf16=True.

    Raises:
        CheckpointError: the model is not a chat model, or cannot be loaded.
    """

    def __init__(self, model: str, device: str = "gpu", device_map: object = None, **kwargs: Any):
        if device_map is None:
            device_map = "auto" if device in ("gpu", "cuda") else device.replace("gpu", "cuda")
        self.model, self.tokenizer = Checkpoint.open(model).require_chat().load(device_map=device_map, **kwargs)

    def __call__(
        self, input: str | _Question, history: Sequence[tuple[str, str]] | None = None, **kwargs: Any
    ) -> dict[str, str | History]:
        """Answer one query.

        Args:
            input: the query, or {"text": query, "history": earlier turns}.
            history: earlier turns as (query, response) pairs.
            kwargs: for `model.chat`, e.g. system="…".

        Returns:
            A dict of "response", and "history" including this turn.
        """
        if isinstance(input, dict):
            query, history = input["text"], input.get("history", history)
        else:
            query = input
        response, history = self.model.chat(self.tokenizer, query, history=history, **kwargs)
        return {"response": response, "history": history}


def _register() -> None:
    """Patch the functions that `pipeline` calls to inspect a model; programs may have imported `pipeline` already."""
    is_official, read = builder.is_official_hub_path, builder.read_config

    def is_official_hub_path(path: object, revision: str | None = None) -> bool:
        return _is_qwen(path, revision) or is_official(path, revision)

    def read_config(path: object, revision: str | None = None) -> Config:
        if not _is_qwen(path, revision):
            return read(path, revision)
        return Config({"framework": "pytorch", "task": "chat", "pipeline": {"type": TYPE}})

    builder.is_official_hub_path, builder.read_config = is_official_hub_path, read_config
    # The registry looks up the module of a pipeline type here; otherwise it would import its own.
    LazyImportModule.get_ast_index()["index"]["PIPELINES", "chat", TYPE] = {"module": __name__}


def _is_qwen(path: object, revision: str | None) -> bool:
    """Whether this is a folder or a ModelScope id of a first-generation Qwen model."""
    if not isinstance(path, str):
        return False
    config = Path(path, "config.json")
    try:
        if not Path(path).is_dir():
            config = Path(model_file_download(path, config.name, revision=revision))
        return read_json_object(config).get("model_type") == QWenConfig.model_type
    except (OSError, ValueError):  # modelscope reports the error
        return False


_register()
