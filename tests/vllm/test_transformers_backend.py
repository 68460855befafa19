"""vLLM's Transformers backend runs the code beside the weights, without this package's plugin: its replies equal the
library's up to the trained length, and beyond it the model is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import MAX_TOKENS, TRAINED_LENGTH, assert_same
from tests.vllm.library import answers
from tests.vllm.test_replies import SEVERAL, SEVERAL_VARIABLES

BACKEND = {"model_impl": "transformers", "trust_remote_code": True}
WITHOUT_PLUGIN = {"VLLM_PLUGINS": ""}


@pytest.fixture
def ask(ask_vllm):
    def function(model, prompts, variables=None, **engine):
        return ask_vllm(model, prompts, variables=WITHOUT_PLUGIN | (variables or {}), **BACKEND | engine)

    return function


def changed(source: Path, folder: Path, **settings: Any) -> Path:
    """Copy a checkpoint, and change its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_up_to_the_trained_length(ask, bundled_chat, chats, expected, eager):
    found = ask(bundled_chat, chats, enforce_eager=eager)
    assert_same(found.replies, expected[: len(chats)], tolerance=1e-5)
    assert found.max_model_len == TRAINED_LENGTH


def test_tensor_parallel(ask, bundled_chat, chats, expected):
    found = ask(bundled_chat, chats, variables=SEVERAL_VARIABLES, tensor_parallel_size=2, **SEVERAL)
    assert_same(found.replies, expected[: len(chats)], tolerance=1e-5)
    assert "c_attn (attn: QWenAttention) -> QKVParallelLinear" in found.log


def test_quantized(ask, bundled_chat, chats):
    """vLLM computes with these weights in half precision."""
    folder = bundled_chat.with_name("qwen-tiny-chat-int4")
    wanted = answers(folder, chats, MAX_TOKENS)
    assert_same(ask(folder, chats, dtype="bfloat16").replies, wanted, tolerance=0.3)


@pytest.mark.parametrize(
    ("settings", "engine", "message"),
    [
        (
            {},
            {"max_model_len": 8 * TRAINED_LENGTH},
            "vLLM's Transformers backend cannot compute dynamic NTK, which this model needs beyond seq_length=1024, "
            "and was started for 8192 tokens",
        ),
        ({"use_window_attn": True}, {}, "vLLM's Transformers backend cannot compute windows"),
    ],
    ids=["long", "windows"],
)
def test_refused(ask, bundled_chat, tmp_path, chats, settings, engine, message):
    folder = changed(bundled_chat, tmp_path / "copy", **settings)
    with pytest.raises(AssertionError, match=message):
        ask(folder, chats[:1], variables={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}, **engine)


def test_logn_beyond_the_trained_length(ask, bundled_chat, tmp_path, long_prompts):
    """It depends on positions, which the backend passes for each token."""
    folder = changed(bundled_chat, tmp_path / "copy", use_dynamic_ntk=False)
    prompts = long_prompts[:2]
    variables = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    found = ask(folder, prompts, variables=variables, max_model_len=2 * TRAINED_LENGTH)
    assert_same(found.replies, answers(folder, prompts, MAX_TOKENS))
