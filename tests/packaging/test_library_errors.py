"""Errors that are told apart by their sentences: each is provoked for real, and recognised by one predicate.

A test that fails here after an upgrade means that the library says it in other words: change the predicate.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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
)
from qwen_cli.chat.session import explain

Predicate = Callable[[BaseException], bool]
PREDICATES: tuple[Predicate, ...] = tuple(getattr(library_errors, name) for name in library_errors.__all__)


def recognised_by(error: BaseException) -> set[Predicate]:
    return {predicate for predicate in PREDICATES if predicate(error)}


def raised(action: Callable[[], object], kind: type[Exception]) -> Exception:
    with pytest.raises(kind) as caught:
        action()
    return caught.value


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.fixture
def checkpoint(bundled_chat: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundled_chat, tmp_path / "model"))


# ---- the memory ----


def test_the_main_memory_is_full_for_python() -> None:
    error = raised(lambda: bytearray(1 << 62), MemoryError)
    assert recognised_by(error) == {is_main_memory_full, is_memory_full}


@pytest.mark.parametrize("size", [1 << 50, 1 << 60])
def test_the_main_memory_is_full_for_torch(size: int) -> None:
    error = raised(lambda: torch.empty(size, dtype=torch.uint8), RuntimeError)
    assert recognised_by(error) == {is_main_memory_full, is_memory_full}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory is asked for")
def test_the_memory_of_the_gpu_is_full() -> None:
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
def test_the_memory_of_a_gpu_that_is_not_here_is_full(error: Exception) -> None:
    """These cannot be provoked without one: the sentences are those that were seen."""
    assert recognised_by(error) == {is_gpu_memory_full, is_memory_full}


def test_chat_says_what_to_do_about_a_full_memory() -> None:
    error = raised(lambda: torch.empty(1 << 60, dtype=torch.uint8), RuntimeError)
    assert explain(error).startswith("Out of memory. Shorten the conversation (:clear-his)")
    assert explain(MemoryError()).startswith("Out of memory.")
    assert explain(RuntimeError("the sizes differ")).startswith("The model failed (RuntimeError: the sizes differ)")


# ---- files of weights ----


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_file_of_weights_is_cut_off(checkpoint: Path, share: float) -> None:
    file = checkpoint / "pytorch_model.bin"
    torch.save(QWenLMHeadModel.from_pretrained(checkpoint).state_dict(), file)
    (checkpoint / "model.safetensors").unlink()
    cut(file, share)
    error = raised(lambda: torch.load(file, weights_only=True), RuntimeError)
    assert recognised_by(error) == {is_damaged_weight_file}
    with pytest.raises(OSError, match="the download stopped early"):
        QWenLMHeadModel.from_pretrained(checkpoint)


def test_the_weights_have_other_shapes_for_transformers(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] *= 2
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    error = raised(lambda: QWenLMHeadModel.from_pretrained(checkpoint), RuntimeError)
    assert recognised_by(error) == {is_shape_mismatch}


def test_the_weights_have_other_shapes_for_torch() -> None:
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    error = raised(lambda: small.load_state_dict(large.state_dict()), RuntimeError)
    assert recognised_by(error) == {is_shape_mismatch}


# ---- training and quantizing ----


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_contradicts_the_arguments(tmp_path: Path) -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none")
    config = HfTrainerDeepSpeedConfig({"train_micro_batch_size_per_gpu": 7})
    config.trainer_config_process(arguments)
    error = raised(lambda: config.trainer_config_finalize(arguments, torch.nn.Linear(2, 2), 10), ValueError)
    assert recognised_by(error) == {is_deepspeed_mismatch}


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs gptqmodel")
def test_gptq_meets_nan() -> None:
    """In the thread that asks. In a worker of its own GPTQModel 7.6 ends the process after any error."""
    from qwen.quantization.gptqmodel_runner import PUBLISHED_SETTINGS, contained

    linear = torch.nn.Linear(128, 128)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with contained():
        from gptqmodel import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ

        settings = QuantizeConfig(bits=4, group_size=64, device="cpu", fallback=None, **PUBLISHED_SETTINGS)
        gptq = GPTQ(linear, settings)
        gptq.quantizer.configure(perchannel=True)
        gptq.add_batch(torch.randn(1, 64, 128), torch.randn(1, 64, 128))
        error = raised(gptq.quantize, ValueError)
    assert recognised_by(error) == {is_nan_in_gptq}


# ---- what is none of these ----


@pytest.mark.parametrize(
    "action",
    [
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: torch.empty(1 << 62, dtype=torch.float64),  # a number that is too large, not a memory that is too small
        lambda: torch.nn.Linear(2, 2).load_state_dict({}),
        lambda: torch.load(__file__, weights_only=True),
        lambda: Path("/nonexistent/file").read_bytes(),
        lambda: int("NaN"[:0]),
        lambda: {}["key"],
    ],
)
def test_other_errors_are_not_taken_for_these(action: Callable[[], object]) -> None:
    assert recognised_by(raised(action, Exception)) == set()


def test_a_sentence_in_an_error_of_another_kind_is_not_recognised() -> None:
    for sentence in ("DefaultCPUAllocator", "out of memory", "PytorchStreamReader", "size mismatch"):
        assert recognised_by(ValueError(sentence)) == set()
    for sentence in ("NaN", "DeepSpeed config values"):
        assert recognised_by(RuntimeError(sentence)) == set()
