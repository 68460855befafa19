"""Tests of vLLM's plugin without vLLM, or with one that is too old or changed. tests/vllm has those with vLLM."""

import importlib
import logging
import sys
import tomllib
import types
from collections.abc import Callable

import pytest

from qwen.integrations.vllm.versions import NEWEST, OLDEST, release_of
from tests.support import ROOT

GROUP = "vllm.general_plugins"
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The function that vLLM calls, imported anew where vLLM cannot be imported."""
    for name in [name for name in sys.modules if name.startswith("qwen.integrations.vllm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    module, _, function = ENTRY_POINTS[GROUP]["qwen"].partition(":")
    return getattr(importlib.import_module(module), function)


def pretend(monkeypatch: pytest.MonkeyPatch, version: str) -> types.ModuleType:
    """Make `import vllm` give a package that has nothing but a registry and a version."""
    package, module = types.ModuleType("vllm"), types.ModuleType("vllm.version")
    package.ModelRegistry, package.__path__, module.__version__ = types.SimpleNamespace(), [], version
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.version", module)
    return package


def the_message(caplog: pytest.LogCaptureFixture) -> tuple[int, str]:
    """Return the level and the text of the only message."""
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert record.name.startswith("vllm.")  # vLLM's settings apply
    assert record.exc_info is None
    return record.levelno, record.getMessage()


def test_without_vllm_an_error_is_logged(register, caplog):
    register()
    level, message = the_message(caplog)
    assert level == logging.ERROR
    assert message.startswith("First-generation Qwen models cannot be served, other models can: ")
    assert "vllm" in message


def test_a_vllm_that_is_too_old_is_named(register, monkeypatch, caplog):
    pretend(monkeypatch, f"{OLDEST[0]}.{OLDEST[1] - 1}.3")
    register()
    level, message = the_message(caplog)
    assert level == logging.WARNING
    assert f"need vLLM {OLDEST[0]}.{OLDEST[1]} or newer, and this is {OLDEST[0]}.{OLDEST[1] - 1}.3" in message


@pytest.mark.parametrize("version", [f"{NEWEST[0]}.{NEWEST[1]}.0", "1.0.0", "0.1.dev1+g0123456"])
def test_missing_interfaces_are_logged(register, monkeypatch, caplog, version):
    pretend(monkeypatch, version)
    register()
    level, message = the_message(caplog)
    assert level == logging.ERROR
    assert "No module named 'vllm.model_executor'" in message


@pytest.mark.parametrize(
    ("version", "release"),
    [("0.32.0", (0, 32)), ("0.33.1rc2.dev7+cpu", (0, 33)), ("1.2", (1, 2)), ("0.1.dev5", None), ("dev", None)],
)
def test_releases(version, release):
    assert release_of(version) == release
