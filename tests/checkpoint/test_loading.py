"""qwen.checkpoint: good checkpoints load; what can be broken in one is named in a sentence with a remedy."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from qwen.checkpoint import bundled, loading
from qwen.checkpoint import checkpoint as opened
from qwen.checkpoint.loading import CheckpointError, check_chat, check_checkpoint, load_model, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


@pytest.fixture
def checkpoint(tiny_chat_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_chat_checkpoint, tmp_path / "model"))


def complaint(name: object, **kwargs: object) -> str:
    """What load_model says about a checkpoint that it cannot load."""
    with pytest.raises(CheckpointError) as caught:
        load_model(name, **kwargs)
    return str(caught.value)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not None}
    path.write_text(json.dumps(config))


def test_a_folder_loads_ready_to_generate(checkpoint: Path) -> None:
    model, tokenizer = load_model(checkpoint)
    assert not model.training
    assert model.generation_config.chat_format == "chatml"
    assert model.generation_config.top_p == 0.8
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_arguments_reach_from_pretrained(checkpoint: Path) -> None:
    model, _ = load_model(str(checkpoint), cpu_only=True, bf16=True, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"


def test_contradicting_arguments_are_a_value_error(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="contradict"):
        load_model(checkpoint, bf16=True, fp16=True)


def test_sharded_and_bin_checkpoints_load(checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(checkpoint, cpu_only=True)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="100KB")
    tokenizer.save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    for folder in (sharded, checkpoint):
        again, _ = load_model(folder, cpu_only=True)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_the_bundled_model_is_the_default(bundled_chat: Path) -> None:
    model, _ = load_model(cpu_only=True)
    assert Path(model.name_or_path) == bundled_chat


def test_the_bundled_base_model_loads(bundled_base: Path) -> None:
    model, _ = load_model(bundled_base, cpu_only=True)
    assert model.generation_config.chat_format == "raw"


def test_without_the_bundled_model_another_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundled, "BUNDLED_CHAT", tmp_path / "site-packages" / "checkpoints" / "qwen-tiny-chat")
    assert "The bundled model is not here" in complaint(None)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../a/b/c", "~/nothing-here", ""])
def test_no_such_folder(name: str) -> None:
    assert "There is no folder" in complaint(name)


def test_a_bare_model_name_gets_its_owner() -> None:
    assert "Did you mean Qwen/Qwen-7B-Chat?" in complaint("Qwen-7B-Chat")
    assert "Did you mean Qwen/Qwen-1_8B-Chat?" in complaint("Qwen-1.8B-Chat")


def test_a_file_is_no_folder(checkpoint: Path) -> None:
    assert "is a file" in complaint(checkpoint / "config.json")


def test_hub_out_of_reach(tmp_path: Path) -> None:
    text = complaint("Qwen/Qwen-7B-Chat", cache_dir=tmp_path)  # HF_HUB_OFFLINE is set
    assert "cannot be reached" in text
    assert "name its folder" in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("RepositoryNotFoundError", "neither a folder here nor a model on the Hugging Face hub"),
        ("GatedRepoError", "hf auth login"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("EntryNotFoundError", "no config.json"),
        ("HfHubHTTPError", "refused"),
    ],
)
def test_answers_of_the_hub(error: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*args: object, **kwargs: object) -> None:
        kind = getattr(errors, error)
        raise kind.__new__(kind, "the hub's own words")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert expected in complaint("Qwen/Qwen-7B-Chat", revision="v9")


def test_a_hub_model_of_another_architecture_is_refused_before_its_weights_are_fetched(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    edit_config(checkpoint, model_type="qwen2")
    fetched = []

    def download(name: str, file: str, **kwargs: object) -> str:
        fetched.append(file)
        return str(checkpoint / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert "a newer Qwen" in complaint("Qwen/Qwen2-7B")
    assert fetched == ["config.json"]


def test_empty_folder(tmp_path: Path) -> None:
    text = complaint(tmp_path)
    assert "no config.json" in text
    assert "hf download" in text


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("qwen2", "a newer Qwen"), ("llama", "another architecture"), (None, 'add `"model_type": "qwen"`')],
)
def test_config_of_another_model(checkpoint: Path, model_type: str | None, expected: str) -> None:
    edit_config(checkpoint, model_type=model_type)
    assert expected in complaint(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", POINTER])
def test_damaged_config(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    text = complaint(checkpoint)
    assert "config.json" in text
    assert "JSON" in text or "git lfs pull" in text


def test_config_that_does_not_fit_the_weights(checkpoint: Path) -> None:
    edit_config(checkpoint, intermediate_size=128)
    assert "shapes" in complaint(checkpoint)


def test_config_with_more_layers_than_weights(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=3)
    text = complaint(checkpoint)
    assert "in none of the weight files" in text
    assert "transformer.h.2." in text


def test_quantized_checkpoint_names_what_it_needs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without(name, *rest):
        return None if name == "gptqmodel" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "pip install gptqmodel optimum" in complaint(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "gptq_model-4bit-128g.safetensors")
    text = complaint(checkpoint)
    assert "has no weights" in text
    assert "gptq_model-4bit-128g.safetensors" in text


def test_missing_shards_are_listed(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint, cpu_only=True)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="100KB")
    shards = sorted(checkpoint.glob("*.safetensors"))
    shards[1].unlink()
    text = complaint(checkpoint)
    assert f"1 of its {len(shards)} weight files are missing" in text
    assert shards[1].name in text


@pytest.mark.parametrize("index", ["{", "{}", POINTER])
def test_damaged_index(checkpoint: Path, index: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in complaint(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "qwen.tiktoken"])
def test_git_lfs_pointers(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text(POINTER)
    text = complaint(checkpoint)
    assert name in text
    assert "git lfs pull" in text


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_cut_off_safetensors(checkpoint: Path, kept: int) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    text = complaint(checkpoint)
    assert "model.safetensors is cut off" in text
    assert "download again" in text


@pytest.mark.parametrize("kept", [0, 1000, -1000])
def test_cut_off_bin(checkpoint: Path, kept: int) -> None:
    model, _ = load_model(checkpoint, cpu_only=True)
    (checkpoint / "model.safetensors").unlink()
    weights = checkpoint / "pytorch_model.bin"
    torch.save(model.state_dict(), weights)
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "pytorch_model.bin is cut off" in complaint(checkpoint)


def test_no_vocabulary(checkpoint: Path) -> None:
    (checkpoint / "qwen.tiktoken").unlink()
    assert "no qwen.tiktoken" in complaint(checkpoint)
    with pytest.raises(CheckpointError, match=r"qwen.tiktoken"):
        load_tokenizer(checkpoint)


def test_checking_alone_reads_no_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "QWenLMHeadModel", None)
    check_checkpoint(checkpoint)


def test_published_names() -> None:
    assert len(loading.PUBLISHED) == 16
    assert all(re.fullmatch(loading.HUB_ID, name) for name in loading.PUBLISHED)


def test_a_base_model_is_no_chat_model(bundled_base, bundled_chat, tmp_path):
    check_chat(bundled_chat)
    with pytest.raises(CheckpointError, match=r"no chat model.*'raw'"):
        check_chat(bundled_base)
    bare = tmp_path / "bare"
    shutil.copytree(bundled_chat, bare)
    (bare / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config.json is missing"):
        check_chat(bare)


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(bundled_chat, tmp_path, monkeypatch):
    monkeypatch.chdir(bundled_chat.parent.parent)
    with pytest.raises(CheckpointError, match=r"no folder 'checkpoints/qwen-tony-chat'.*qwen-tiny-chat"):
        load_model("checkpoints/qwen-tony-chat")
    (tmp_path / "Qwen" / "mine").mkdir(parents=True)
    (tmp_path / "Qwen" / "mine" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="Hugging Face hub"):  # which tests cannot reach
        load_model("Qwen/Qwen-7B-Chat")
