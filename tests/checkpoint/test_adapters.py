"""Adapters on a base model make it a chat model, whichever library loads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import qwen

GREEDY = {"do_sample": False, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, bundled_base: Path) -> Path:
    """An adapter on the base model, with the files that the published training script leaves."""
    folder = tmp_path_factory.mktemp("adapter")
    model, tokenizer = qwen.load_model(bundled_base, cpu_only=True)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert not (folder / "generation_config.json").exists()
    return folder


def load_into_base(base: Path, adapter: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    return model


LOADERS: dict[str, Callable[[Path, Path], Any]] = {
    "AutoPeftModel": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    "load_adapter": load_into_base,
    "AutoModel": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    "load_model": lambda base, adapter: qwen.load_model(adapter, cpu_only=True)[0],
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=list(LOADERS))
def test_a_base_model_with_an_adapter_chats(bundled_base: Path, adapter: Path, load: Callable[[Path, Path], Any]):
    model, tokenizer = load(bundled_base, adapter), qwen.QWenTokenizer.from_pretrained(adapter)
    reply, history = model.chat(tokenizer, "Who are you?", **GREEDY)
    assert history == [("Who are you?", reply)]
    assert model.end_token_ids() == [tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id]


def test_merged_by_peft_it_is_saved_as_a_chat_model(adapter: Path, tmp_path: Path) -> None:
    AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["chat_format"] == "chatml"
    assert "stop_words_ids" not in generation


def test_a_checkpoint_of_an_adapter_is_a_chat_model(adapter: Path, bundled_base: Path, tmp_path: Path) -> None:
    settings = qwen.Checkpoint(adapter).require_chat().generation_settings
    base_settings = qwen.Checkpoint(bundled_base).generation_settings
    assert {**settings, "chat_format": "raw", "stop_words_ids": [[3376]]} == base_settings
    declared = shutil.copytree(adapter, tmp_path / "raw")
    shutil.copy(bundled_base / "generation_config.json", declared)
    assert not qwen.Checkpoint(declared).is_chat  # its own file counts


@pytest.mark.parametrize("remove", [False, True], ids=["raw", "missing"])
def test_a_base_model_says_why_it_does_not_chat(bundled_base: Path, tmp_path: Path, remove: bool) -> None:
    base = shutil.copytree(bundled_base, tmp_path / "base")
    if remove:
        (base / "generation_config.json").unlink()
    reason = r"generation_config.json is missing" if remove else r'generation_config.json says "chat_format": "raw"'
    model, tokenizer = qwen.load_model(base, cpu_only=True)
    with pytest.raises(ValueError, match=reason):
        model.chat(tokenizer, "hi")
    with pytest.raises(qwen.CheckpointError, match=reason):
        qwen.Checkpoint(base).require_chat()
