import sys
from pathlib import Path

from qwen._moved import redirect
from qwen.checkpoint.files import check_architecture, read_json

redirect(__name__)


def check_config(path: Path, name: str | Path) -> None:
    """Raise CheckpointError unless the config.json at `path` is of a first-generation Qwen that can be loaded here."""
    check_architecture(read_json(path, name), name)


# A name that exists only under the old path.
sys.modules[__name__].__dict__["check_config"] = check_config
