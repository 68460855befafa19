"""Tests of `import qwen`, which has no side effects except registering classes, and of aliases of old module paths."""

import ast
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import qwen
from qwen._moved import MOVED
from tests.support.processes import run_script

NAMES = json.loads(Path(__file__).with_name("public_names.json").read_text(encoding="utf-8"))
PERMANENT = {
    "qwen.configuration_qwen": "qwen.model.configuration_qwen",
    "qwen.loading": "qwen.checkpoint.loading",
    "qwen.modeling_qwen": "qwen.model.modeling_qwen",
    "qwen.qwen_generation_utils": "qwen.model.qwen_generation_utils",
    "qwen.tokenization_qwen": "qwen.model.tokenization_qwen",
}

STATE = """\
import json, logging, os, sys


def state():
    loggers = {name: (logger.level, len(logger.handlers), logger.disabled, logger.propagate)
               for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    return {
        "sys.meta_path": [repr(finder) for finder in sys.meta_path],
        "sys.path_hooks": [repr(hook) for hook in sys.path_hooks],
        "sys.path": list(sys.path),
        "os.environ": dict(os.environ),
        "root logger": (logging.root.level, len(logging.root.handlers)),
        "loggers": loggers,
    }


from transformers import GenerationMixin, PreTrainedModel
before = state()
import qwen
print(json.dumps([before, state()]))
"""


@pytest.fixture(scope="module")
def states() -> tuple[dict, dict]:
    """The state of a Python process before and after `import qwen`."""
    done = subprocess.run([sys.executable, "-c", STATE], capture_output=True, text=True, check=True, timeout=300)
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


@pytest.mark.process
def test_importing_changes_nothing_in_the_process(states: tuple[dict, dict]) -> None:
    before, after = states
    for what, value in before.items():
        now = after[what]
        # Modules that qwen imports may create loggers; only existing loggers must not change.
        assert ({name: now[name] for name in value} if what == "loggers" else now) == value, what


@pytest.mark.process
def test_importing_does_not_set_the_level_of_new_loggers(states: tuple[dict, dict]) -> None:
    before, after = (state["loggers"] for state in states)
    assert [name for name, (level, *_) in after.items() if level and name not in before] == []


@pytest.mark.parametrize(("old", "new"), PERMANENT.items())
def test_published_paths_are_aliases_without_a_warning(old: str, new: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sys.modules.pop(old, None)
        assert importlib.import_module(old) is importlib.import_module(new)


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_moved_paths_are_aliases_with_a_warning(old: str, new: str) -> None:
    parent = old.rpartition(".")[0]
    first = parent if parent in MOVED else old  # imported first, so this one warns
    for name in [name for name in sys.modules if name == first or name.startswith(f"{first}.")]:
        del sys.modules[name]
    with pytest.warns(FutureWarning, match=f"{first} has moved: import {MOVED[first]}"):
        assert importlib.import_module(old) is importlib.import_module(new)


@pytest.mark.process
def test_a_moved_package_has_its_submodules(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    code = "from qwen.react import format\nimport qwen.react.reply as reply\nimport qwen.react.messages\n"
    code += "print(format.STOP_WORD, reply.Reply.__name__, qwen.react.messages.parse_messages.__name__)"
    script.write_text(code)
    assert run_script(script).stdout.split() == ["Observation:", "Reply", "parse_messages"]


def test_old_functions_still_work(bundled_chat: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint_files, hubs = map(importlib.import_module, ("qwen.checkpoint_files", "qwen.hubs"))
    checkpoint_files.check_config(bundled_chat / "config.json", bundled_chat)
    assert hubs.config_file(str(bundled_chat)) == bundled_chat / "config.json"
    assert hubs.source(str(bundled_chat)) == (str(bundled_chat), {})
    hubs.use(None)
    with pytest.raises(ValueError, match="pass hub='modelscope' to load_model"):
        hubs.use("modelscope")


@pytest.mark.parametrize("module", NAMES)
@pytest.mark.filterwarnings("ignore:.*has moved", "ignore:.*is now")
def test_all_public_names_of_the_last_release_exist(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("qwen.checkpoint.adapters", "put_on", "attach_adapter"),
        ("qwen.checkpoint.files", "let_others_read", "apply_umask"),
        ("qwen.checkpoint.files", "shards_of", "shard_files"),
        ("qwen.checkpoint.hub", "VARIABLE", "HUB_ENV_VAR"),
        ("qwen.checkpoint.hub", "published_spelling", "canonical_hub_id"),
        ("qwen.checkpoint.staging", "filled_at_the_end", "staged_directory"),
        ("qwen.quantization", "Loss", "LayerError"),
        ("qwen.serving.api.metrics", "available", "is_available"),
        ("qwen.serving.engine", "SchedulerClosed", "EngineClosed"),
        ("qwen.serving.engine.grammar", "available", "is_available"),
        ("qwen.serving.engine.sampler", "Constraint", "qwen.serving.engine.sequence.Constraint"),
        ("qwen.serving.engine.sampler", "SamplingParams", "qwen.serving.engine.sampling_params.SamplingParams"),
        ("qwen.serving.engine.scheduler", "EndReason", "qwen.serving.engine.sequence.FinishReason"),
        ("qwen.serving.engine.scheduler", "GenerationSequence", "qwen.serving.engine.sequence.Sequence"),
        ("qwen.serving.engine.scheduler", "Load", "qwen.serving.engine.engine.Load"),
        ("qwen.serving.engine.scheduler", "QueueFull", "qwen.serving.engine.engine.QueueFull"),
        ("qwen.serving.engine.scheduler", "SchedulerClosed", "qwen.serving.engine.engine.EngineClosed"),
        ("qwen.tools.code_interpreter", "solve", "run_conversation"),
    ],
)
def test_old_names_are_aliases_with_a_warning(module: str, old: str, new: str) -> None:
    found = importlib.import_module(module)
    place, _, name = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now {new}"):
        assert getattr(found, old) is getattr(importlib.import_module(place or module), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = found.nothing


@pytest.mark.process
def test_the_warning_names_the_importing_line(tmp_path: Path) -> None:
    script = tmp_path / "notebook.py"
    script.write_text("x = 1\nfrom qwen.react import parse_response\n")
    done = run_script(script)
    assert f"{script}:2: FutureWarning: qwen.react has moved: import qwen.tools" in done.stderr


def test_a_patch_through_an_old_path_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen.checkpoint import loading

    monkeypatch.setattr("qwen.loading.quiet_loading", None)
    assert loading.quiet_loading is None


def test_each_alias_is_listed_and_each_listed_module_exists() -> None:
    folder = Path(qwen.__file__).parent / "_moved"
    aliases = {
        "qwen." + ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if path.name != "__init__.py"
    }
    below = {old for old in MOVED if old.rpartition(".")[0] in MOVED}  # registered with their parent
    assert aliases == set(MOVED) - below
    for path in folder.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"))
