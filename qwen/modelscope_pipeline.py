"""ModelScope's `pipeline(task=Tasks.chat, model=...)` for these models, as programs of 2023 call it.

Revolves around the moment at which modelscope.pipelines is imported: before this package, after it, or never, which is
why nothing here imports modelscope by itself. Its own chat pipelines want transformers 4, and it must not take them for
a model of type "qwen". What is built instead stands in modelscope_chat.py.
"""

import importlib.machinery
import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

BUILDER = "modelscope.pipelines.builder"
TYPE = "qwen-chat"  # in configuration.json beside published weights, and in modelscope's registry


def teach_modelscope() -> None:
    """Have ModelScope's pipelines know these models: at once, or as soon as they are imported."""
    if BUILDER in sys.modules:
        _teach(sys.modules[BUILDER])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the builder where it lies anyway, and has it taught when it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _teach(module)

            spec.loader.exec_module = exec_module
        return spec


def _teach(builder: ModuleType) -> None:
    """Replace what `pipeline` asks about a model; `pipeline` itself people may have imported already."""
    is_known, read = builder.is_official_hub_path, builder.read_config

    def is_official_hub_path(path: Any, revision: str | None = None) -> bool:
        return _is_qwen(path, revision) or is_known(path, revision)

    def read_config(path: Any, revision: str | None = None) -> Any:
        if not _is_qwen(path, revision):
            return read(path, revision)
        from modelscope.utils.config import Config
        from modelscope.utils.import_utils import LazyImportModule

        # Where the registry looks for the module that registers this type.
        LazyImportModule.get_ast_index()["index"]["PIPELINES", "chat", TYPE] = {"module": "qwen.modelscope_chat"}
        return Config({"framework": "pytorch", "task": "chat", "pipeline": {"type": TYPE}})

    builder.is_official_hub_path, builder.read_config = is_official_hub_path, read_config


def _is_qwen(path: Any, revision: str | None) -> bool:
    """Whether it is a folder or a ModelScope id of a first-generation Qwen model."""
    if not isinstance(path, str):
        return False
    config = Path(path, "config.json")
    try:
        if not Path(path).is_dir():
            from modelscope.hub.file_download import model_file_download

            config = Path(model_file_download(path, config.name, revision=revision))
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "qwen"
    except (OSError, ValueError, AttributeError):  # modelscope says what is wrong with it
        return False
