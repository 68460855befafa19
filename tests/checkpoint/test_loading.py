"""Tests of qwen.checkpoint: valid checkpoints load, and each kind of damage gives an actionable error."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen.checkpoint import bundled, loading
from qwen.checkpoint import checkpoint as opened
from qwen.checkpoint.loading import CheckpointError, check_chat, check_checkpoint, load_model, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


@pytest.fixture
def checkpoint(tiny_chat_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that tests may damage."""
    return Path(shutil.copytree(tiny_chat_checkpoint, tmp_path / "model"))


def error_message(name: object, **kwargs: object) -> str:
    """Return the message of the CheckpointError that load_model raises."""
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


def test_a_missing_bundled_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundled, "BUNDLED_CHAT", tmp_path / "site-packages" / "checkpoints" / "qwen-tiny-chat")
    assert "The bundled model was not found" in error_message(None)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../a/b/c", "~/nothing-here", ""])
def test_no_such_folder(name: str) -> None:
    assert "There is no folder" in error_message(name)


def test_a_model_name_without_owner_gets_a_suggestion() -> None:
    assert "Did you mean Qwen/Qwen-7B-Chat?" in error_message("Qwen-7B-Chat")
    assert "Did you mean Qwen/Qwen-1_8B-Chat?" in error_message("Qwen-1.8B-Chat")


def test_a_file_instead_of_a_folder(checkpoint: Path) -> None:
    assert "is a file" in error_message(checkpoint / "config.json")


def test_unreachable_hub(tmp_path: Path) -> None:
    text = error_message("Qwen/Qwen-7B-Chat", cache_dir=tmp_path)  # HF_HUB_OFFLINE is set
    assert "cannot be reached" in text
    assert "name its folder" in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("RepositoryNotFoundError", "neither a local folder nor a model on the Hugging Face hub"),
        ("GatedRepoError", "hf auth login"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("EntryNotFoundError", "no config.json"),
        ("HfHubHTTPError", "refused"),
    ],
)
def test_errors_of_the_hub(error: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*args: object, **kwargs: object) -> None:
        kind = getattr(errors, error)
        raise kind.__new__(kind, "the hub's own words")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert expected in error_message("Qwen/Qwen-7B-Chat", revision="v9")


def test_a_hub_model_of_another_architecture_is_rejected_before_its_weights_are_downloaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    edit_config(checkpoint, model_type="qwen2")
    downloaded = []

    def download(name: str, file: str, **kwargs: object) -> str:
        downloaded.append(file)
        return str(checkpoint / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert "a newer Qwen" in error_message("Qwen/Qwen2-7B")
    assert downloaded == ["config.json"]


def test_layers_of_a_hub_model_are_compared_before_its_weights_are_downloaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    names = dict.fromkeys(load_file(checkpoint / "model.safetensors"), "model-00001-of-00001.safetensors")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    edit_config(checkpoint, num_hidden_layers=3)

    def download(name: str, file: str, **kwargs: object) -> str:
        assert not file.endswith((".safetensors", ".bin")), "weights are downloaded"
        if not (checkpoint / file).exists():
            raise EntryNotFoundError.__new__(EntryNotFoundError, file)
        return str(checkpoint / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError) as caught:
        opened.Checkpoint("Qwen/Qwen-7B-Chat").load_without_adapter()
    assert "num_hidden_layers is 3 in the config, but model.safetensors.index.json of Qwen/Qwen-7B-Chat has 2" in str(
        caught.value
    )


def test_empty_folder(tmp_path: Path) -> None:
    text = error_message(tmp_path)
    assert "no config.json" in text
    assert "hf download" in text


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("qwen2", "a newer Qwen"), ("llama", "another architecture"), (None, 'add `"model_type": "qwen"`')],
)
def test_config_of_another_model(checkpoint: Path, model_type: str | None, expected: str) -> None:
    edit_config(checkpoint, model_type=model_type)
    assert expected in error_message(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", POINTER])
def test_damaged_config(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    text = error_message(checkpoint)
    assert "config.json" in text
    assert "JSON" in text or "git lfs pull" in text


def test_config_that_does_not_match_the_weights(checkpoint: Path) -> None:
    edit_config(checkpoint, intermediate_size=128)
    assert "intermediate_size / 2 is 64 in the config, but" in error_message(checkpoint)


def test_shapes_that_do_not_match_the_config(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = "transformer.h.1.mlp.c_proj.weight"
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, checkpoint / "model.safetensors")
    assert "do not have the shapes given in its config.json" in error_message(checkpoint)


def test_config_with_more_layers_than_weights(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=3)
    text = error_message(checkpoint)
    assert "num_hidden_layers is 3 in the config, but the weight files in" in text
    assert "have 2 layers" in text


def test_quantized_checkpoint_without_gptqmodel(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without(name, *rest):
        return None if name == "gptqmodel" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    edit_config(checkpoint, quantization_config={"quant_method": "gptq", "bits": 3})
    assert "other than 4 or 8 bits: `pip install gptqmodel optimum`" in error_message(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "gptq_model-4bit-128g.safetensors")
    text = error_message(checkpoint)
    assert "has no weights" in text
    assert "gptq_model-4bit-128g.safetensors" in text


def test_missing_shards_are_listed(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint, cpu_only=True)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="100KB")
    shards = sorted(checkpoint.glob("*.safetensors"))
    shards[1].unlink()
    text = error_message(checkpoint)
    assert f"1 of its {len(shards)} weight files are missing" in text
    assert shards[1].name in text


@pytest.mark.parametrize("index", ["{", "{}", POINTER])
def test_damaged_index(checkpoint: Path, index: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in error_message(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "qwen.tiktoken"])
def test_git_lfs_pointers(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text(POINTER)
    text = error_message(checkpoint)
    assert name in text
    assert "git lfs pull" in text


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_cut_off_safetensors(checkpoint: Path, kept: int) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    text = error_message(checkpoint)
    assert "model.safetensors is cut off" in text
    assert "download again" in text


@pytest.mark.parametrize("kept", [0, 1000, -1000])
def test_cut_off_bin(checkpoint: Path, kept: int) -> None:
    model, _ = load_model(checkpoint, cpu_only=True)
    (checkpoint / "model.safetensors").unlink()
    weights = checkpoint / "pytorch_model.bin"
    torch.save(model.state_dict(), weights)
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "pytorch_model.bin is cut off" in error_message(checkpoint)


def test_no_vocabulary(checkpoint: Path) -> None:
    (checkpoint / "qwen.tiktoken").unlink()
    assert "no qwen.tiktoken" in error_message(checkpoint)
    with pytest.raises(CheckpointError, match=r"qwen.tiktoken"):
        load_tokenizer(checkpoint)


def test_checking_reads_no_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "QWenLMHeadModel", None)
    check_checkpoint(checkpoint)


def test_published_names() -> None:
    assert len(loading.PUBLISHED) == 16
    assert all(re.fullmatch(loading.HUB_ID, name) for name in loading.PUBLISHED)


def test_a_base_model_is_not_a_chat_model(bundled_base, bundled_chat, tmp_path):
    check_chat(bundled_chat)
    with pytest.raises(CheckpointError, match=r"not a chat model.*raw"):
        check_chat(bundled_base)
    bare = tmp_path / "bare"
    shutil.copytree(bundled_chat, bare)
    (bare / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config.json is missing"):
        check_chat(bare)


def test_a_mistyped_folder_is_not_looked_up_on_the_hub(bundled_chat, tmp_path, monkeypatch):
    monkeypatch.chdir(bundled_chat.parent.parent)
    with pytest.raises(CheckpointError, match=r"no folder 'checkpoints/qwen-tony-chat'.*qwen-tiny-chat"):
        load_model("checkpoints/qwen-tony-chat")
    (tmp_path / "Qwen" / "mine").mkdir(parents=True)
    (tmp_path / "Qwen" / "mine" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="Hugging Face hub"):  # tests cannot reach it
        load_model("Qwen/Qwen-7B-Chat")


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (MemoryError(), "does not fit into main memory: .*bf16=True"),
        ("DefaultCPUAllocator", "does not fit into main memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
            "of the GPU: .*-Int4.*--cpu-only.*8.00",
        ),
    ],
    ids=["Python", "torch", "CUDA"],
)
def test_too_little_memory_is_explained(checkpoint: Path, cause: object, message: str, monkeypatch) -> None:
    def from_pretrained(*args: object, **kwargs: object) -> None:
        if isinstance(cause, BaseException):
            raise cause
        torch.empty(1 << 46)

    monkeypatch.setattr(opened.QWenLMHeadModel, "from_pretrained", from_pretrained)
    assert re.search(message, error_message(checkpoint))
