"""Tests of library_errors: each real library error is provoked, and recognised by one predicate.

If a test fails after an upgrade of a library, its message has changed: update the predicate.
"""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import requests
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from qwen import QWenLMHeadModel, library_errors
from qwen.library_errors import (
    is_damaged_weight_file,
    is_deepspeed_mismatch,
    is_gpu_memory_full,
    is_main_memory_full,
    is_memory_full,
    is_nan_in_gptq,
    is_shape_mismatch,
    is_unusable_proxy,
)
from qwen_cli.chat.session import describe_error

Predicate = Callable[[BaseException], bool]
PREDICATES: tuple[Predicate, ...] = tuple(getattr(library_errors, name) for name in library_errors.__all__)


def recognised_by(error: BaseException) -> set[Predicate]:
    return {predicate for predicate in PREDICATES if predicate(error)}


def raised(action: Callable[[], object], kind: type[Exception] | tuple[type[Exception], ...]) -> Exception:
    with pytest.raises(kind) as caught:
        action()
    return caught.value


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.fixture
def checkpoint(bundled_chat: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled_chat, tmp_path / "model"))


# ---- memory ----


def test_main_memory_is_full_in_python() -> None:
    error = raised(lambda: bytearray(1 << 62), MemoryError)
    assert recognised_by(error) == {is_main_memory_full, is_memory_full}


@pytest.mark.parametrize("size", [1 << 50, 1 << 60])
def test_main_memory_is_full_in_torch(size: int) -> None:
    error = raised(lambda: torch.empty(size, dtype=torch.uint8), RuntimeError)
    assert recognised_by(error) == {is_main_memory_full, is_memory_full}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_is_full() -> None:
    error = raised(lambda: torch.empty(1 << 50, dtype=torch.uint8, device="cuda"), RuntimeError)
    assert recognised_by(error) == {is_gpu_memory_full, is_memory_full}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_gpu_memory_is_full_by_message(error: Exception) -> None:
    """Recorded messages, because these errors cannot be provoked without a GPU."""
    assert recognised_by(error) == {is_gpu_memory_full, is_memory_full}


def test_chat_explains_full_memory() -> None:
    error = raised(lambda: torch.empty(1 << 60, dtype=torch.uint8), RuntimeError)
    assert describe_error(error).startswith("Out of memory. Shorten the conversation (:clear-his)")
    assert describe_error(MemoryError()).startswith("Out of memory.")
    message = describe_error(RuntimeError("the sizes differ"))
    assert message.startswith("The model failed (RuntimeError: the sizes differ)")


# ---- weight files ----


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_truncated_weight_file(checkpoint: Path, share: float) -> None:
    file = checkpoint / "pytorch_model.bin"
    torch.save(QWenLMHeadModel.from_pretrained(checkpoint).state_dict(), file)
    (checkpoint / "model.safetensors").unlink()
    cut(file, share)
    error = raised(lambda: torch.load(file, weights_only=True), RuntimeError)
    assert recognised_by(error) == {is_damaged_weight_file}
    with pytest.raises(OSError, match="download stopped early"):
        QWenLMHeadModel.from_pretrained(checkpoint)


def test_shape_mismatch_in_transformers(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "transformer.h.1.mlp.c_proj.weight"
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, checkpoint / "model.safetensors")
    error = raised(lambda: QWenLMHeadModel.from_pretrained(checkpoint), RuntimeError)
    assert recognised_by(error) == {is_shape_mismatch}


def test_shape_mismatch_in_torch() -> None:
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    error = raised(lambda: small.load_state_dict(large.state_dict()), RuntimeError)
    assert recognised_by(error) == {is_shape_mismatch}


# ---- proxies ----


@pytest.mark.parametrize("address", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9"])
def test_an_unusable_proxy(address: str) -> None:
    """Neither httpx nor requests is installed with its extra for SOCKS, as for most users."""
    errors = (
        raised(lambda: httpx.Client(proxy=address), (ImportError, ValueError)),
        raised(lambda: requests.get("http://127.0.0.1", proxies={"http": address}), ValueError),
    )
    for error in errors:
        assert recognised_by(error) == {is_unusable_proxy}


# ---- training and quantizing ----


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_config_contradicts_the_arguments(tmp_path: Path) -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none")
    config = HfTrainerDeepSpeedConfig({"train_micro_batch_size_per_gpu": 7})
    config.trainer_config_process(arguments)
    error = raised(lambda: config.trainer_config_finalize(arguments, torch.nn.Linear(2, 2), 10), ValueError)
    assert recognised_by(error) == {is_deepspeed_mismatch}


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs gptqmodel")
def test_gptq_finds_nan() -> None:
    """Runs GPTQ in this thread: in its own workers, GPTQModel 7.6 ends the process after any error."""
    from qwen.quantization.gptqmodel_runner import PUBLISHED_SETTINGS, undo_side_effects

    linear = torch.nn.Linear(128, 128)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with undo_side_effects():
        from gptqmodel import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ

        settings = QuantizeConfig(bits=4, group_size=64, device="cpu", fallback=None, **PUBLISHED_SETTINGS)
        gptq = GPTQ(linear, settings)
        gptq.quantizer.configure(perchannel=True)
        gptq.add_batch(torch.randn(1, 64, 128), torch.randn(1, 64, 128))
        error = raised(gptq.quantize, ValueError)
    assert recognised_by(error) == {is_nan_in_gptq}


# ---- other errors ----


@pytest.mark.parametrize(
    "action",
    [
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: torch.empty(1 << 62, dtype=torch.float64),  # an integer overflow, not a lack of memory
        lambda: torch.nn.Linear(2, 2).load_state_dict({}),
        lambda: torch.load(__file__, weights_only=True),
        lambda: Path("/nonexistent/file").read_bytes(),
        lambda: int("NaN"[:0]),
        lambda: {}["key"],
    ],
)
def test_other_errors_are_not_recognised(action: Callable[[], object]) -> None:
    assert recognised_by(raised(action, Exception)) == set()


def test_messages_of_other_error_classes_are_not_recognised() -> None:
    for message in ("DefaultCPUAllocator", "out of memory", "PytorchStreamReader", "size mismatch"):
        assert recognised_by(ValueError(message)) == set()
    for message in ("NaN", "DeepSpeed config values"):
        assert recognised_by(RuntimeError(message)) == set()
