"""Shared fixtures: checkpoints, tokenizers, and a Python without this repository; markers and order of the tests."""

import base64
import importlib.util
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import GOLDEN_FOLDER, ROOT, processes
from tests.support.processes import IsolatedPython
from tests.support.server_process import server, start_server  # noqa: F401  fixtures

# A shell starts background jobs with SIGINT ignored. Children inherit that, and Python then installs no handler: the
# Ctrl-C tests would hang.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests download nothing; without this, a hub id left in a test waits for the network instead of failing.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ignore the settings of the user who runs the tests.
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
for name in [name for name in os.environ if name.startswith(("QWEN_", "MODELSCOPE_")) or name.lower() in PROXIES]:
    del os.environ[name]
# The kernels are compiled once a machine, also for tests with another home.
CACHE_HOME = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
KERNELS_CACHE = CACHE_HOME / "qwen" / "kernels"
try:
    KERNELS_CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)
except OSError:  # a home that is read-only, or missing
    KERNELS_CACHE = Path(tempfile.gettempdir()) / f"qwen-kernels-{os.getuid()}"
    KERNELS_CACHE.mkdir(exist_ok=True, mode=0o700)
os.environ["QWEN_KERNELS_CACHE"] = str(KERNELS_CACHE)
# The models are too small to benefit from several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MERGES = (b"he", b"ll", b"llo", b"hello", b" t", b"th", b" th", b" the", b"in", b"ing")

# Markers of the tests that use these fixtures, which start a process or a browser.
FIXTURE_MARKERS = {
    "browser": "browser",
    **dict.fromkeys(("server", "start_server", "isolated_python", "chat_in_isolated_python"), "process"),
}

# Run by `make test-vllm` in an environment of their own.
collect_ignore = ["vllm"]

# Slowest first, so that no worker waits for another at the end.
SLOWEST_FIRST = ("training", "browser", "docs", "process", "slow")


def pytest_configure(config: pytest.Config) -> None:
    """Start the process that the workers of this run fork others from."""
    if hasattr(config, "workerinput") or not hasattr(os, "fork"):
        return
    # If it will be needed, let it import while the workers do.
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    processes.start_forking(preload=everything and "process" not in config.option.markexpr)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test according to its fixtures."""
    for fixture, marker in FIXTURE_MARKERS.items():
        if fixture in getattr(item, "fixturenames", ()):
            item.add_marker(marker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Forbid tests without a marker to start processes."""
    processes.may_start = any(marker.name in (*SLOWEST_FIRST, "nightly") for marker in item.iter_markers())


@pytest.hookimpl(trylast=True)  # after the order has been randomized
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort test files by their markers, slowest first."""
    rank: dict[Path, int] = {}
    for item in items:
        ranks = [SLOWEST_FIRST.index(marker.name) for marker in item.iter_markers() if marker.name in SLOWEST_FIRST]
        rank[item.path] = min([*ranks, rank.get(item.path, len(SLOWEST_FIRST))])
    items.sort(key=lambda item: rank[item.path])


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference vectors, tests/golden."""
    folder = GOLDEN_FOLDER
    assert folder.is_dir(), f"{folder} is part of the repository and missing here"
    return folder


@pytest.fixture(scope="session")
def real_vocab_file() -> Path:
    """The published vocabulary of 151,643 ranks, from the dashscope wheel."""
    spec = importlib.util.find_spec("dashscope")  # finds without importing, which takes a second
    assert spec is not None, "the wheel of dashscope is missing: pip install dashscope==2.0.2"
    assert spec.origin, "the wheel of dashscope is missing: pip install dashscope==2.0.2"
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    assert path.is_file(), f"{path} is missing: pip install --no-deps --force-reinstall dashscope==2.0.2"
    return path


@pytest.fixture(scope="session")
def real_tokenizer(real_vocab_file: Path):
    """The tokenizer of the published models."""
    from qwen.model.tokenization_qwen import QWenTokenizer

    return QWenTokenizer(str(real_vocab_file))


@pytest.fixture(scope="session")
def bundled_chat() -> Path:
    """The small chat model of the repository."""
    return _bundled("qwen-tiny-chat")


@pytest.fixture(scope="session")
def bundled_base() -> Path:
    """The small base model of the repository."""
    return _bundled("qwen-tiny-base")


def _bundled(name: str) -> Path:
    folder = ROOT / "checkpoints" / name
    assert (folder / "config.json").is_file(), f"{folder} is part of the repository and missing here"
    return folder


@pytest.fixture(scope="session")
def tiny_chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random 2-layer chat model (width 64, trained length 64) that generates printable ASCII without end.

    Only printable tokens are chosen (the lm_head rows of all others are zero), so every reply has exactly
    max_new_tokens tokens and the terminal tests can rely on its length.
    """
    import torch

    from qwen.model.configuration_qwen import QWenConfig
    from qwen.model.modeling_qwen import QWenLMHeadModel
    from qwen.model.tokenization_qwen import QWenTokenizer

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-chat"
    folder.mkdir()
    vocabulary = folder / "qwen.tiktoken"
    ranks = [bytes([byte]) for byte in range(256)] + list(MERGES)
    vocabulary.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks)))
    tokenizer = QWenTokenizer(vocab_file=str(vocabulary))

    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_channels=32,
        intermediate_size=256,
        seq_length=64,
        max_position_embeddings=8192,
    )
    model = QWenLMHeadModel(config).float().eval()
    printable = [rank for rank, token in enumerate(ranks) if token.decode("latin-1").isprintable() and token.isascii()]
    with torch.no_grad():
        head = torch.zeros_like(model.lm_head.weight)
        head[printable] = torch.randn(len(printable), config.hidden_size)
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation_config = {
        "chat_format": "chatml",
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": tokenizer.eod_id,
        "max_window_size": 6144,
        "max_new_tokens": 24,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2))
    return folder


@pytest.fixture(scope="session")
def isolated_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedPython]:
    """Runs code in a Python that has transformers but not this repository."""
    python = IsolatedPython(tmp_path_factory.mktemp("isolated_python"))
    yield python
    python.end()


CHAT = """
    import sys
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
    print(model.chat(tokenizer, sys.argv[2], history=None, do_sample=False)[0])
"""


@pytest.fixture(scope="session")
def chat_in_isolated_python(isolated_python: IsolatedPython) -> Callable[[Path, str], str]:
    """Function (folder, question) → reply of the model in that folder, without this repository."""
    return lambda folder, question: isolated_python(CHAT, folder, question)[-1]
