"""Adapters after training: they load like models, merge into their base without loss, and have clear errors."""

import base64
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from qwen.checkpoint.checkpoint import Checkpoint
from qwen.checkpoint.loading import BUNDLED_CHAT_INT4, CheckpointError, check_chat, load_model, load_tokenizer
from qwen.data.samples import encode_conversation, pad_samples
from qwen.finetuning.arguments import ArgumentError, Arguments, DataArguments, LoraArguments, ModelArguments
from qwen.finetuning.arguments import TrainingArguments as FinetuningArguments
from qwen.finetuning.merging import is_approximate, merge
from qwen.finetuning.model import chat_generation_config, load_for_training
from qwen.finetuning.vocabulary import expand_embeddings
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.model.tokenization_qwen import QWenTokenizer
from qwen_cli import merge as merge_lora
from tests.support import ROOT
from tests.support.command_line import call_main
from tests.support.processes import run_script

pytestmark = pytest.mark.training  # of the adapter that nearly all tests use

LINEAR = ["c_attn", "c_proj", "w1", "w2"]
PROMPTS = ("Hello, who are you?", "你好！", "What is 12 + 30?")
QUESTION, ANSWER = "Who are you?", "I am Robin, and I love papayas."
WEIGHTS = "adapter_model.safetensors"


def random_adapter(
    folder: Path,
    base: Path,
    *,
    tokenizer: QWenTokenizer | None = None,
    modules_to_save: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> PeftModel:
    """Write an adapter with random matrices and the files that fine-tuning adds to it. Returns the model with it.

    Args:
        tokenizer: a tokenizer with more tokens than the base's.
        config: LoRA settings, instead of rank 4 on all linear layers.
    """
    torch.manual_seed(0)
    model, own = load_model(base, cpu_only=True, dtype=dtype)
    if tokenizer is not None:
        expand_embeddings(model, tokenizer, own)
    config = {"r": 4, "lora_alpha": 2, "target_modules": LINEAR, "init_lora_weights": False} | config
    adapted = get_peft_model(model, LoraConfig(modules_to_save=modules_to_save, task_type="CAUSAL_LM", **config)).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(folder)
    (tokenizer or own).save_pretrained(folder)
    chat_generation_config(model.generation_config).save_pretrained(folder)
    return adapted


@torch.no_grad()
def logits(model: torch.nn.Module, tokenizer: QWenTokenizer) -> list[torch.Tensor]:
    """Logits of the prompts, in float32."""
    return [model(**tokenizer(prompt, return_tensors="pt")).logits.float() for prompt in PROMPTS]


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def trained(bundled_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned one answer."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    torch.manual_seed(0)
    model, tokenizer = load_model(bundled_chat, cpu_only=True, fp32=True)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM"))
    turns = [{"from": "user", "value": QUESTION}, {"from": "assistant", "value": ANSWER}]
    batch = pad_samples([encode_conversation(turns, tokenizer, 100)], tokenizer.eod_id)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(15):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def merged(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained adapter, merged by the script, which runs in another folder."""
    folder = tmp_path_factory.mktemp("merged")
    command = [sys.executable, ROOT / "finetune" / "merge_lora.py", trained, "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # as an editable install has it
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, "out\n"), result.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def q_lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    folder = tmp_path_factory.mktemp("q_lora")
    return folder, random_adapter(folder, BUNDLED_CHAT_INT4, dtype=torch.float16)


@pytest.fixture(scope="module")
def larger_tokenizer(bundled_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> QWenTokenizer:
    """The toy's tokenizer with two more tokens, for which its model has no rows."""
    extra = tmp_path_factory.mktemp("vocabulary") / "extra.tiktoken"
    extra.write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in [(b"Qwx", 3590), (b"zzq", 3591)])
    )
    return QWenTokenizer.from_pretrained(bundled_chat, extra_vocab_file=str(extra))


@pytest.fixture
def main(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs finetune/merge_lora.py in this process. Returns the exit code and standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        code = call_main(merge_lora.main, "merge_lora.py", *arguments)
        return code, capsys.readouterr().err

    return call


def load_error(folder: object, **kwargs: object) -> str:
    """The message of load_model about an adapter."""
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, **kwargs)
    return str(caught.value)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Loading


def test_adapter_loads_as_a_merged_model(trained: Path, bundled_chat: Path) -> None:
    check_chat(trained)
    model, tokenizer = load_model(trained, cpu_only=True)
    assert type(model) is QWenLMHeadModel
    assert not model.training
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert Path(model.name_or_path) == trained
    assert model.chat(tokenizer, QUESTION, history=None, do_sample=False)[0] == ANSWER

    base, _ = load_model(bundled_chat, cpu_only=True)
    before = logits(base, tokenizer)
    expected = logits(PeftModel.from_pretrained(base, str(trained)).eval(), tokenizer)
    assert relative_error(expected, before) > 0.05
    assert relative_error(logits(model, tokenizer), expected) < 1e-5


def test_arguments_are_passed_to_the_base(trained: Path) -> None:
    model, tokenizer = load_model(str(trained), cpu_only=True, bf16=True, use_cache_quantization=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache_quantization
    assert model.chat(tokenizer, QUESTION, history=None, do_sample=False)[0] == ANSWER
    with pytest.raises(ValueError, match="contradict"):
        load_model(trained, bf16=True, fp16=True)


def test_half_precision_weights_are_rounded_once(tmp_path: Path, bundled_chat: Path) -> None:
    adapted = random_adapter(tmp_path, bundled_chat)
    model, _ = load_model(tmp_path, cpu_only=True, bf16=True)
    weights = dict(model.named_parameters())
    layers = {name: layer for name, layer in adapted.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == 6 * 5
    for name, layer in layers.items():
        stored = layer.get_base_layer().weight.bfloat16().float()
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        assert delta.norm() > 0.05 * stored.norm()
        assert torch.equal(weights[f"{name}.weight"], (stored + delta).bfloat16())


def test_adapter_turns_a_base_model_into_a_chat_model(bundled_base: Path, tmp_path: Path) -> None:
    adapted = random_adapter(tmp_path, bundled_base, modules_to_save=["wte", "lm_head"])
    check_chat(tmp_path)
    model, tokenizer = load_model(tmp_path, cpu_only=True)
    assert model.generation_config.chat_format == "chatml"
    assert torch.equal(model.lm_head.weight, adapted.get_output_embeddings().weight)
    assert relative_error(logits(model, tokenizer), logits(adapted, tokenizer)) < 1e-5
    assert isinstance(model.chat(tokenizer, QUESTION, history=None, max_new_tokens=4)[0], str)
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    assert load_tokenizer(tmp_path).eos_token == "<|im_end|>"  # by its generation config, not by that of its base
    assert load_tokenizer(bundled_base).eos_token == "<|endoftext|>"


def test_missing_files_come_from_the_base(adapter: Path, bundled_chat: Path, bundled_base: Path) -> None:
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        (adapter / name).unlink()
    check_chat(adapter)
    model, tokenizer = load_model(adapter, cpu_only=True)
    assert tokenizer.get_vocab() == load_tokenizer(bundled_chat).get_vocab()
    assert model.generation_config.top_p == GenerationConfig.from_pretrained(bundled_chat).top_p
    edit(adapter, base_model_name_or_path=str(bundled_base))
    check_chat(adapter)  # trained on conversations, whatever its base
    assert Checkpoint(adapter).generation_settings["eos_token_id"] == tokenizer.eod_id


@pytest.mark.parametrize("modules_to_save", [None, ["wte", "lm_head"]])
def test_adapter_with_new_tokens(
    modules_to_save: list[str] | None, larger_tokenizer: QWenTokenizer, bundled_chat: Path, tmp_path: Path
) -> None:
    adapted = random_adapter(
        tmp_path / "adapter", bundled_chat, tokenizer=larger_tokenizer, modules_to_save=modules_to_save
    )
    assert adapted.get_input_embeddings().weight.shape[0] == 3592
    merge(tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    for folder in ("adapter", "out"):
        model, tokenizer = load_model(tmp_path / folder, cpu_only=True)
        assert (tokenizer.encode("Qwx"), model.config.vocab_size, len(tokenizer)) == ([3590], 3592, 3592)
        assert torch.equal(model.transformer.wte.weight, adapted.get_input_embeddings().weight)
        assert relative_error(logits(model, tokenizer), logits(adapted, tokenizer)) < 1e-5


def test_new_tokens_without_rows_are_rejected(larger_tokenizer: QWenTokenizer, adapter: Path) -> None:
    larger_tokenizer.save_pretrained(adapter)
    text = load_error(adapter)
    assert "does not fit" in text
    assert "Missing from its file" in text
    assert "wte.weight" in text


@pytest.mark.slow
def test_adapter_on_quantized_weights_is_not_merged(q_lora: tuple[Path, PeftModel]) -> None:
    folder, adapted = q_lora
    check_chat(folder)
    model, tokenizer = load_model(folder, cpu_only=True)
    assert type(model) is QWenLMHeadModel
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 6 * 5
    found, expected = logits(model, tokenizer), logits(adapted, tokenizer)
    base, _ = load_model(BUNDLED_CHAT_INT4, cpu_only=True)
    # bfloat16 and float16 differ by 1%.
    assert relative_error(found, expected) < 2e-2 < 0.05 < relative_error(logits(base, tokenizer), expected)
    assert isinstance(model.chat(tokenizer, QUESTION, history=None, max_new_tokens=4)[0], str)


# What is wrong with an adapter


def test_missing_base(adapter: Path) -> None:
    edit(adapter, base_model_name_or_path="/gone/Qwen-7B-Chat")
    text = load_error(adapter)
    assert "There is no folder '/gone/Qwen-7B-Chat'" in text
    assert f"base_model_name_or_path in {adapter / 'adapter_config.json'}" in text


def test_unreachable_base(adapter: Path, tmp_path: Path) -> None:
    edit(adapter, base_model_name_or_path="Qwen/Qwen-7B-Chat")
    text = load_error(adapter, cache_dir=tmp_path)  # HF_HUB_OFFLINE is set
    assert "cannot be reached" in text
    assert "base_model_name_or_path" in text


@pytest.mark.parametrize("itself", [True, False])
def test_base_is_an_adapter(itself: bool, adapter: Path, trained: Path) -> None:
    edit(adapter, base_model_name_or_path=str(adapter if itself else trained))
    assert "is an adapter itself: merge that one first" in load_error(adapter)


@pytest.mark.parametrize("base", [None, "", 7])
def test_unnamed_base(base: object, adapter: Path) -> None:
    edit(adapter, base_model_name_or_path=base)
    assert "does not name the model" in load_error(adapter)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", None])
def test_other_types_of_adapters_are_rejected(kind: str | None, adapter: Path) -> None:
    edit(adapter, peft_type=kind)
    assert f"of type {kind!r}. Only LoRA" in load_error(adapter)


@pytest.mark.parametrize("content", ["", "{", "[]", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_adapter_config(content: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in load_error(adapter)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "but no adapter_model.safetensors or adapter_model.bin"),
        (slice(0, 0), "cut off"),
        (slice(0, -1), "cut off"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_damaged_adapter_weights(content: slice | bytes | None, expected: str, adapter: Path) -> None:
    weights = adapter / WEIGHTS
    if content is None:
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[content] if isinstance(content, slice) else content)
    assert expected in load_error(adapter)


def test_adapter_in_a_bin_file(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    model, tokenizer = load_model(adapter, cpu_only=True)
    assert model.chat(tokenizer, QUESTION, history=None, do_sample=False)[0] == ANSWER
    (adapter / "adapter_model.bin").write_bytes(b"cnot\na_pickle\n")
    assert "does not hold a dict of tensors" in load_error(adapter)


def test_without_peft(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find_spec(name, *rest)
    )
    assert "pip install peft" in load_error(adapter)


def remove_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".h.5." in name]:
        del tensors[name]


def add_a_layer(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name.replace(".h.5.", ".h.6."): x.clone() for name, x in tensors.items() if ".h.5." in name})


def widen(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = tensors[name].repeat(2, 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (remove_a_layer, "Missing from its file: base_model.model.transformer.h.5."),
        (add_a_layer, "not in the model: base_model.model.transformer.h.6."),
        (widen, "size mismatch"),
        (dict.clear, "Missing from its file"),
        ({"r": 4}, "size mismatch"),
        ({"target_modules": ["q_proj"]}, "q_proj"),
        ({"modules_to_save": ["wte"]}, "Missing from its file: base_model.model.transformer.wte.weight"),
    ],
)
def test_adapter_that_does_not_fit(change: Callable | dict, expected: str, adapter: Path, bundled_chat: Path) -> None:
    if isinstance(change, dict):
        edit(adapter, **change)
    else:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS)
    text = load_error(adapter, cpu_only=True)
    assert f"does not fit {bundled_chat}" in text
    assert expected in text


def test_adapter_of_a_model_of_another_size(trained: Path, tiny_chat_checkpoint: Path, adapter: Path) -> None:
    edit(adapter, base_model_name_or_path=str(tiny_chat_checkpoint))
    assert f"does not fit {tiny_chat_checkpoint}" in load_error(adapter)


def test_partly_offloaded_model(trained: Path, tmp_path: Path) -> None:
    parts = {"transformer.wte": "cpu", "transformer.h": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    text = load_error(trained, device_map=parts, offload_folder=str(tmp_path))
    assert f"qwen merge {trained} OUT" in text


def test_training_rejects_an_adapter_as_model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    training = FinetuningArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", use_lora=True)
    model, data = ModelArguments(model_name_or_path=str(trained)), DataArguments(data_path="")
    with pytest.raises(ArgumentError, match=r"is an adapter.*--lora_weight_path.*qwen merge"):
        load_for_training(Arguments(model, data, LoraArguments(), training))


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"modules_to_save": ["wte", "lm_head"]}])
def test_merged_model_matches_the_adapted_one(
    dtype: torch.dtype, variant: dict, bundled_chat: Path, tmp_path: Path
) -> None:
    base, tokenizer = load_model(bundled_chat, cpu_only=True, dtype=dtype)
    before = logits(base, tokenizer)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = random_adapter(tmp_path / "adapter", tmp_path / "base", dtype=dtype, **variant)
    merge(tmp_path / "adapter", tmp_path / "out")

    model, tokenizer = load_model(tmp_path / "out", cpu_only=True, dtype="auto")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert model.dtype == dtype
    expected = logits(adapted, tokenizer)
    assert relative_error(before, expected) > 0.1
    assert relative_error(logits(model, tokenizer), expected) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.process
def test_merged_folder_is_complete(merged: Path, bundled_chat: Path) -> None:
    check_chat(merged)
    assert not (merged / "adapter_config.json").exists()
    assert json.loads((merged / "config.json").read_text())["use_cache"] is True
    assert all(x.dtype == torch.bfloat16 for x in load_file(merged / "model.safetensors").values())  # as the base has
    ours, theirs = (GenerationConfig.from_pretrained(folder).to_dict() for folder in (merged, bundled_chat))
    assert ours == theirs
    model, tokenizer = load_model(merged, cpu_only=True)
    assert model.chat(tokenizer, QUESTION, history=None, do_sample=False)[0] == ANSWER


@pytest.mark.process
def test_adapter_chats_in_the_demo(trained: Path, tmp_path: Path) -> None:
    result = run_script(ROOT / "cli_demo.py", "-c", trained, "--cpu-only", folder=tmp_path, text=QUESTION + "\n")
    assert (result.returncode, result.stdout.strip()) == (0, ANSWER), result.stderr


def test_merged_model_loads_without_this_repository(merged: Path, chat_in_isolated_python: Callable) -> None:
    assert chat_in_isolated_python(merged, QUESTION) == ANSWER


@pytest.mark.process
def test_existing_model_is_replaced_only_with_overwrite(trained: Path, merged: Path, tmp_path: Path, main) -> None:
    out = Path(shutil.copytree(merged, tmp_path / "out"))
    (out / "notes.txt").touch()
    code, text = main(trained, out)
    assert code == 1
    assert "is not empty" in text
    assert "--overwrite" in text
    assert main(trained, out, "--overwrite", "--dtype", "float32", "--max-shard-size", "4MB")[0] == 0
    assert len(list(out.glob("model-*.safetensors"))) > 3
    assert not (out / "model.safetensors").exists()
    assert (out / "notes.txt").exists()
    model, _ = load_model(out, cpu_only=True, dtype="auto")
    assert model.dtype == torch.float32
    assert main(trained, out, "--overwrite")[0] == 0
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    check_chat(out)


def test_inputs_are_not_overwritten(adapter: Path, trained: Path, bundled_chat: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bundled_chat, tmp_path / "base"))
    for out in (adapter, base, Path(shutil.copytree(trained, tmp_path / "other"))):
        with pytest.raises(FileExistsError, match="holds the source model"):
            merge(adapter, out, base=base, overwrite=True)
    assert "config.json" not in os.listdir(adapter)


def test_moved_base_can_be_named(adapter: Path, bundled_chat: Path, tmp_path: Path) -> None:
    edit(adapter, base_model_name_or_path="/gone/Qwen-7B-Chat")
    with pytest.raises(CheckpointError, match="base_model_name_or_path"):
        merge(adapter, tmp_path / "out")
    merge(adapter, tmp_path / "out", base=bundled_chat)
    model, tokenizer = load_model(tmp_path / "out", cpu_only=True)
    assert model.chat(tokenizer, QUESTION, history=None, do_sample=False)[0] == ANSWER
    with pytest.raises(CheckpointError, match=r"'/gone/too'.*Name the whole model"):
        merge(adapter, tmp_path / "elsewhere", base="/gone/too")


def test_q_lora_is_rejected_with_alternatives(
    q_lora: tuple[Path, PeftModel], bundled_chat: Path, tmp_path: Path, main
) -> None:
    folder, _ = q_lora
    code, text = main(folder, tmp_path / "out")
    assert code == 1
    assert "is quantized" in text
    assert f"cli_demo.py -c {folder}" in text
    assert "--base" in text
    assert "approximation" in text
    assert not (tmp_path / "out").exists()
    code, text = main(folder, tmp_path / "out", "--base", bundled_chat)
    assert code == 0
    assert "is an approximation" in text
    check_chat(tmp_path / "out")


def test_missing_quantized_base_is_recognized_by_name(adapter: Path, trained: Path) -> None:
    assert not is_approximate(trained)
    edit(adapter, base_model_name_or_path="/gone/Qwen-7B-Chat-Int4/")
    assert is_approximate(adapter)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["{base}", "{out}"], 1, "is not an adapter"),
        (["{out}/nothing", "{out}"], 1, "is not an adapter"),
        (["{adapter}", "{file}"], 1, "is a file. Name a folder"),
        (["{adapter}", "{file}/out"], 1, "cannot be written to"),
        (["{adapter}", "{out}", "--base", "{adapter}"], 1, "is an adapter itself"),
        (["{adapter}"], 2, "OUT"),
        (["{adapter}", "{out}", "--dtype", "int8"], 2, "int8"),
        (["{adapter}", "{out}", "--max-shard-size", "2"], 2, "for example 2GB"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], code: int, expected: str, trained: Path, bundled_chat: Path, tmp_path: Path, main
) -> None:
    places = {"base": bundled_chat, "adapter": trained, "out": tmp_path / "out", "file": trained / WEIGHTS}
    found, text = main(*(argument.format(**places) for argument in arguments))
    assert found == code
    assert expected in text


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SafetensorError("No space left on device")])
def test_interrupted_merge_leaves_no_trace(
    error: type | Exception, trained: Path, merged: Path, tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C and a full disk during the slow part, for a new folder and over an existing model."""
    seen = []

    def stop(model: PreTrainedModel, folder: Path, **kwargs: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        seen.append(folder)
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", stop)
    code, text = main(trained, tmp_path / "a" / "new")
    if error is KeyboardInterrupt:
        assert code == 130
        assert text.endswith("\nStopped. Nothing was written.\n")
    else:
        assert code == 1
        assert "The weights could not be written: No space left on device" in text
    assert not list(tmp_path.iterdir())
    old = Path(shutil.copytree(merged, tmp_path / "old"))
    assert main(trained, old, "--overwrite")[0] == code
    assert content(old) == content(merged)
    assert [folder.parents[1] for folder in seen] == [tmp_path / "a" / "new", old]


def test_sigterm_stops_like_ctrl_c(trained: Path, tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
    code, text = main(trained, tmp_path / "new")
    assert code == 130
    assert text.endswith("\nStopped. Nothing was written.\n")
    assert not list(tmp_path.iterdir())


def test_settings_without_an_effect_are_kept(adapter: Path, tmp_path: Path, main) -> None:
    """transformers' `save_pretrained` refuses top_p without do_sample."""
    path = adapter / "generation_config.json"
    settings = json.loads(path.read_text()) | {"do_sample": False, "top_p": 0.7}
    path.write_text(json.dumps(settings))
    assert main(adapter, tmp_path / "out")[0] == 0
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written | settings == written


def test_folder_of_another_program_is_not_replaced(trained: Path, tmp_path: Path, main) -> None:
    (tmp_path / "config.json").write_text('{"port": 80}')
    (tmp_path / "model.safetensors").write_text("somebody's")
    before = content(tmp_path)
    code, text = main(trained, tmp_path, "--overwrite")
    assert code == 1
    assert "holds no model that can be replaced" in text
    assert content(tmp_path) == before


def test_documented_merge_in_python(trained: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    model = AutoPeftModelForCausalLM.from_pretrained(str(trained), device_map="auto", trust_remote_code=True).eval()
    model.merge_and_unload().save_pretrained(new, max_shard_size="2048MB", safe_serialization=True)
    AutoTokenizer.from_pretrained(str(trained), trust_remote_code=True).save_pretrained(new)
    check_chat(new)
    assert (new / "model.safetensors").is_file()
    assert (new / "modeling_qwen.py").is_file()
    model, tokenizer = load_model(new, cpu_only=True)
    assert model.chat(tokenizer, QUESTION, history=None, do_sample=False)[0] == ANSWER
