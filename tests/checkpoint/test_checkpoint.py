"""Tests of qwen.Checkpoint: properties, options, adapters, and how often small files are read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qwen import Checkpoint, CheckpointError, load_model
from qwen.checkpoint.bundled import BUNDLED_CHAT_INT4
from qwen.checkpoint.weights import Weights
from tests.support.processes import run_script

# Weight files are not counted: their library may open them any number of times.
COUNT = """\
import collections, json, os, sys

opened = collections.Counter()
folders = [os.path.realpath(folder) for folder in sys.argv[1:]]


def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if os.path.dirname(path) in folders and not path.endswith((".safetensors", ".bin")):
            opened[path] += 1


sys.addaudithook(watch)
import qwen

model, tokenizer = qwen.Checkpoint.open(sys.argv[1]).require_chat().load(cpu_only=True)
reply, _ = model.chat(tokenizer, "What is 47 + 38?")
print(json.dumps([reply, opened]))
"""


def count_opens(script: Path, *folders: Path) -> tuple[str, dict[str, int]]:
    """Chat with the first folder; return the reply and how often each small file of the folders was opened."""
    script.write_text(COUNT)
    done = run_script(script, *folders)
    assert done.returncode == 0, done.stderr
    reply, opened = json.loads(done.stdout.splitlines()[-1])
    return reply, opened


@pytest.mark.process
def test_a_chat_opens_each_small_file_a_few_times(bundled_chat: Path, tmp_path: Path) -> None:
    reply, opened = count_opens(tmp_path / "chat.py", bundled_chat)
    assert reply == "47 + 38 = 85."
    names = {"config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"}
    assert names <= {os.path.basename(path) for path in opened}
    # The checkpoint, the model and the tokenizer read it, and the model checks it before transformers reads it.
    assert opened.pop(str(bundled_chat / "generation_config.json")) <= 4
    assert opened.pop(str(bundled_chat / "tokenizer_config.json")) <= 3  # the tokenizer checks it, too
    assert {path: times for path, times in opened.items() if times > 2} == {}


@pytest.mark.process
def test_a_chat_with_an_adapter_opens_each_small_file_a_few_times(bundled_chat: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = Path(shutil.copytree(bundled_chat, tmp_path / "base"))
    model, tokenizer = load_model(base, cpu_only=True)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    model.generation_config.save_pretrained(adapter)
    reply, opened = count_opens(tmp_path / "chat.py", adapter, base)
    assert reply == "47 + 38 = 85."  # a new adapter changes nothing
    assert str(adapter / "adapter_config.json") in opened
    assert str(base / "config.json") in opened
    assert opened.pop(str(adapter / "tokenizer_config.json")) <= 3
    assert {path: times for path, times in opened.items() if times > 2} == {}


def test_properties_of_an_opened_checkpoint(bundled_chat: Path, bundled_base: Path) -> None:
    chat = Checkpoint.open()
    assert (chat.name, chat.folder) == (str(bundled_chat), bundled_chat)
    assert chat.is_chat
    assert not chat.is_quantized
    assert not chat.is_adapter
    assert chat.base is None
    assert chat.generation_config.top_p == chat.generation_settings["top_p"]
    assert chat.require_chat() is chat
    base = Checkpoint.open(bundled_base)
    assert (base.chat_format, base.is_chat) == ("raw", False)
    with pytest.raises(CheckpointError, match="not a chat model"):
        base.require_chat()
    assert Checkpoint.open(BUNDLED_CHAT_INT4).is_quantized


def test_loading_does_not_change_the_config_of_the_checkpoint(bundled_chat: Path) -> None:
    checkpoint = Checkpoint.open(bundled_chat)
    model, _ = checkpoint.load(cpu_only=True, bf16=True, use_cache_quantization=True)
    assert model.config.bf16
    assert model.config.use_cache_quantization
    assert not checkpoint.config.bf16
    assert not checkpoint.config.use_cache_quantization
    again, _ = checkpoint.load(cpu_only=True)
    assert (again.dtype, again.config.use_cache_quantization) == (torch.float32, False)


def test_int8_cache_sets_both_switches(bundled_chat: Path) -> None:
    model, _ = load_model(bundled_chat, cpu_only=True, int8_cache=True)
    assert model.config.use_cache_quantization
    assert model.config.use_cache_kernel


def test_config_arguments_of_from_pretrained_reach_the_config(bundled_chat: Path) -> None:
    model, _ = load_model(bundled_chat, cpu_only=True, output_attentions=True, num_labels=3)
    assert model.config.output_attentions
    assert model.config.num_labels == 3
    config = Checkpoint.open(bundled_chat).config
    config.use_logn_attn = False
    assert not load_model(bundled_chat, cpu_only=True, config=config)[0].config.use_logn_attn


def test_base_is_rejected_for_other_checkpoints_than_adapters(bundled_chat: Path, bundled_base: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a LoRA adapter"):
        load_model(bundled_chat, base=bundled_base)


def test_a_full_disk_is_not_reported_as_missing_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(OSError, match="No space left"):
        _ = Checkpoint("Qwen/Qwen-7B-Chat").folder


def test_weights_are_a_mapping_of_tensors(bundled_chat: Path) -> None:
    weights = Checkpoint.open(bundled_chat).weights()
    model, _ = load_model(bundled_chat, cpu_only=True)
    assert isinstance(weights, Weights)
    assert set(weights) == set(model.state_dict())
    assert torch.equal(weights["transformer.ln_f.weight"], model.transformer.ln_f.weight)


def test_an_adapter_with_its_recorded_or_a_given_base(bundled_chat: Path, bundled_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(bundled_chat)})
    )
    save_file({"nothing": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    adapter = Checkpoint.open(tmp_path)
    assert adapter.is_adapter
    assert adapter.base.name == str(bundled_chat)
    assert adapter.is_chat
    assert len(adapter.tokenizer()) == len(adapter.base.tokenizer())
    assert Checkpoint.open(tmp_path, base=bundled_base).base.name == str(bundled_base)
    with pytest.raises(CheckpointError, match=r"cannot be used.*is an adapter itself"):
        Checkpoint.open(tmp_path, base=tmp_path)
    with pytest.raises(CheckpointError, match="does not fit"):
        adapter.load(cpu_only=True)


def test_hub_is_passed_on_without_changing_the_environment(bundled_chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN_HUB", raising=False)
    load_model(bundled_chat, hub="modelscope", cpu_only=True)
    assert "QWEN_HUB" not in os.environ
    with pytest.raises(CheckpointError, match="hub is 'nowhere'"):
        Checkpoint.open("Qwen/Qwen-7B", hub="nowhere")
    with pytest.raises(CheckpointError, match="hub is 'nowhere'"):
        load_model(bundled_chat, hub="nowhere")
    with pytest.raises(TypeError, match="revison"):  # a misspelt option is rejected
        Checkpoint.open(bundled_chat, revison="v1.0.5")
