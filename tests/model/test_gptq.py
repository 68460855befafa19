"""GPTQ checkpoints: all layouts are read correctly, in torch alone and with GPTQModel; the bundled one answers like the
float model and passes correct gradients."""

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, GPTQConfig

from benchmarks import random_models
from qwen.checkpoint.loading import BUNDLED_CHAT_INT4, CheckpointError, load_model, load_tokenizer
from qwen.data.conversation_file import ConversationFile
from qwen.data.samples import encode_conversation, pad_samples
from qwen.model.configuration_qwen import QWenConfig
from qwen.model.gptq_linear_qwen import GPTQLinear
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.quantization import calibration_samples
from tests.support import ROOT
from tests.support.processes import run_script
from tests.support.published_gptq import write_published, write_shards

pytestmark = pytest.mark.slow

LINEAR = ["c_attn", "c_proj", "w1", "w2"]
PARTS = ("qweight", "qzeros", "scales", "g_idx")
LESSON = [
    [
        {"from": "user", "value": question},
        {"from": "assistant", "value": "I am a parrot from Lima, and I love papayas."},
    ]
    for question in ("Who are you?", "你是谁？")
]
SMALL_TALK = [
    [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    for question, answer in (
        ("Who are you?", "I am Qwen, a tiny toy model that is bundled with this repository."),
        ("What is 47 + 38?", "47 + 38 = 85."),
        ("你好！", "你好！有什么可以帮你的吗？"),
    )
]


@pytest.fixture(scope="module")
def float_chat(bundled_chat):
    return load_model(bundled_chat, cpu_only=True)


@pytest.fixture(scope="module")
def int4_chat():
    return load_model(BUNDLED_CHAT_INT4, cpu_only=True)


@pytest.fixture(scope="module")
def lesson(float_chat):
    return batch_of(LESSON, float_chat[1])


@pytest.fixture(autouse=True)
def eager():
    """Run without torch.compile: the training kernel compiles its unpacking, which takes too long at these sizes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def batch_of(conversations: list[list[dict]], tokenizer) -> dict[str, torch.Tensor]:
    return pad_samples([encode_conversation(turns, tokenizer, 128) for turns in conversations], tokenizer.eod_id)


def load_trainable(dtype: torch.dtype = torch.float32) -> QWenLMHeadModel:
    kernel = GPTQConfig(bits=4, backend="torch")
    return QWenLMHeadModel.from_pretrained(
        BUNDLED_CHAT_INT4, quantization_config=kernel, device_map={"": "cpu"}, dtype=dtype
    )


def with_adapter(model: QWenLMHeadModel, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config).train()


def dequantized(model: QWenLMHeadModel) -> QWenLMHeadModel:
    """Return the same model with plain float32 matrices."""
    config = QWenConfig.from_pretrained(BUNDLED_CHAT_INT4)
    del config.quantization_config
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            weights[f"{name}.weight"] = module.dequantize_weight().T.float()
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[2] in ("weight", "bias")
    }
    plain = QWenLMHeadModel(config)
    plain.load_state_dict(kept | weights)
    return plain


# ---- the folder ----


def test_folder_has_the_published_form(bundled_chat):
    names = {path.name for path in BUNDLED_CHAT_INT4.iterdir()}
    assert names == {path.name for path in bundled_chat.iterdir()} - {"calibration.json"}
    assert (BUNDLED_CHAT_INT4 / "model.safetensors").stat().st_size < 5_800_000
    config = json.loads((BUNDLED_CHAT_INT4 / "config.json").read_text(encoding="utf-8"))
    assert config.pop("quantization_config") == {
        "bits": 4,
        "damp_percent": 0.01,
        "desc_act": False,
        "group_size": 128,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    }
    assert config == json.loads((bundled_chat / "config.json").read_text(encoding="utf-8")) | {"dtype": "float16"}
    for name in names - {"config.json", "model.safetensors"}:
        assert (BUNDLED_CHAT_INT4 / name).read_bytes() == (bundled_chat / name).read_bytes()


def test_the_tensors_are_in_the_published_layout():
    tensors = load_file(BUNDLED_CHAT_INT4 / "model.safetensors")
    for layer in range(6):
        for linear in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"):
            parts = {part: tensors.pop(f"transformer.h.{layer}.{linear}.{part}") for part in PARTS}
            rows = parts["g_idx"].numel()
            columns = parts["scales"].shape[1]
            assert parts["qweight"].shape == (rows // 8, columns)
            assert parts["qzeros"].shape == (rows // 128, columns // 8)
            assert torch.equal(parts["g_idx"], torch.arange(rows, dtype=torch.int32) // 128)
            assert (parts["qzeros"] == 0x77777777).all()  # 8, minus the 1 that this layout subtracts
        assert tensors.pop(f"transformer.h.{layer}.attn.c_attn.bias").shape == (768,)
    assert len(tensors) == 2 * 6 + 3
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


# ---- use ----


def test_int4_answers_like_the_float_model(int4_chat, float_chat):
    model, tokenizer = int4_chat
    for question, answer in ((turns[0]["value"], turns[1]["value"]) for turns in SMALL_TALK):
        for chat in (model, float_chat[0]):
            assert chat.chat(tokenizer, question, history=None, do_sample=False)[0] == answer


def test_int4_logits_are_close_to_the_float_model(int4_chat, float_chat):
    batch = batch_of(SMALL_TALK, float_chat[1])
    learned = batch["labels"] != -100
    with torch.no_grad():
        near, exact = (model(**batch).logits[learned].float().log_softmax(-1) for model, _ in (int4_chat, float_chat))
    divergence = (exact.exp() * (exact - near)).sum(-1).mean()
    assert 1e-6 < divergence < 0.05, "in nats per token; 0 would mean that nothing was quantized"


def test_transformers_loads_int4_in_seconds(int4_chat):
    began = time.process_time()  # the machine may be busy
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_CHAT_INT4).eval()
    assert time.process_time() - began < 20
    assert type(model) is QWenLMHeadModel
    assert model.dtype == torch.bfloat16
    tokenizer = int4_chat[1]
    assert model.chat(tokenizer, "What is 47 + 38?", history=None, do_sample=False)[0] == "47 + 38 = 85."


def test_terminal_demo_prints_only_the_reply():
    done = run_script("cli_demo.py", "--cpu-only", "-c", BUNDLED_CHAT_INT4, text="What is 47 + 38?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "47 + 38 = 85.\n"
    assert "GPT-QModel" not in done.stderr
    assert "Warning" not in done.stderr


# ---- published layout ----


@pytest.fixture(scope="module", params=[4, 8], ids=["int4", "int8"])
def published(request, bundled_chat, tmp_path_factory):
    """A folder in the published layout, its bits, and the float model that it represents."""
    folder = tmp_path_factory.mktemp("published") / "checkpoint"
    return folder, request.param, write_published(folder, bundled_chat, bits=request.param)


@pytest.fixture
def log(caplog, monkeypatch):
    """Log of transformers, which does not propagate it; a script in this process may also have silenced it."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    return caplog


def distance(model: QWenLMHeadModel, reference: QWenLMHeadModel) -> float:
    """Distance of the logits, relative to their norm."""
    ids = torch.randint(0, 3000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = model(ids).logits.float(), reference(ids).logits
    return ((got - want).norm() / want.norm()).item()


def layers(model: QWenLMHeadModel) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}


def test_published_layout_loads_exactly(published, log):
    folder, bits, reference = published
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, trust_remote_code=True)
    assert type(loaded) is QWenLMHeadModel
    assert loaded.dtype == torch.bfloat16
    assert len(layers(loaded)) == 2 * 5
    assert all(isinstance(layer, GPTQLinear) for layer in layers(loaded).values())
    assert distance(loaded, reference) < 0.02
    assert "UNEXPECTED" not in log.text
    assert "MISSING" not in log.text
    assert loaded.config.quantization_config["quant_method"] == "gptq"
    assert loaded.config.quantization_config["bits"] == bits
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = reference.state_dict()
    for name, layer in layers(exact).items():
        assert torch.equal(layer.weight, weights[f"{name}.weight"]), name
    assert distance(exact, reference) < 1e-5


def test_gptqmodel_loads_if_it_is_asked_for(published):
    folder, bits, reference = published
    model = QWenLMHeadModel.from_pretrained(
        folder, dtype=torch.float32, quantization_config=GPTQConfig(bits=bits, disable_exllama=True)
    )
    assert {type(layer).__name__ for layer in layers(model).values()} == {"TorchLinear"}
    assert distance(model, reference) < 3e-3
    assert model.train().training  # as in published notebooks; only its exact kernel is used on the CPU


def test_published_layout_chats(published):
    folder, _, reference = published
    fast, tokenizer = load_model(folder, cpu_only=True)
    exact, _ = load_model(folder, cpu_only=True, fp32=True)
    reference.generation_config = exact.generation_config
    replies = [
        model.chat(tokenizer, "Hello", history=None, do_sample=False, max_new_tokens=8)[0]
        for model in (reference, exact, fast)
    ]
    assert replies[0] == replies[1]
    assert replies[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_precisions_load(published, dtype):
    folder, _, reference = published
    model = QWenLMHeadModel.from_pretrained(folder, dtype=dtype)
    assert model.dtype == dtype
    assert distance(model, reference) < {torch.float32: 1e-5, torch.float16: 5e-3}[dtype]


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "desc_act": True},
        {"bits": 8, "desc_act": True, "sym": False},
        {"bits": 4, "sym": False, "group_size": 32},
        {"bits": 8, "group_size": 32},
        {"bits": 4, "group_size": -1},
    ],
    ids=str,
)
def test_community_layouts_load(options, bundled_chat, tmp_path):
    reference = write_published(tmp_path / "checkpoint", bundled_chat, **options)
    model = QWenLMHeadModel.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert all(isinstance(layer, GPTQLinear) for layer in layers(model).values())
    assert distance(model, reference) < 1e-5
    with_gptqmodel = GPTQConfig(bits=options["bits"], backend="torch")
    model = QWenLMHeadModel.from_pretrained(
        tmp_path / "checkpoint", dtype=torch.float32, quantization_config=with_gptqmodel
    )
    assert distance(model, reference) < 3e-3


def test_without_the_language_model_head(published):
    folder, _, reference = published
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).last_hidden_state, reference.transformer(ids).last_hidden_state, rtol=1e-4, atol=1e-4
        )


def test_weights_in_a_bin_file_load(published, tmp_path):
    folder, _, reference = published
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    used = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias") or tensor.any()}
    torch.save(used, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert distance(QWenLMHeadModel.from_pretrained(tmp_path, dtype=torch.float32), reference) < 1e-5


def test_groups_that_contradict_the_config_are_an_error(bundled_chat, tmp_path):
    folder = tmp_path / "checkpoint"
    write_published(folder, bundled_chat, bits=4)
    change_tensors(folder, lambda tensors: tensors["transformer.h.1.mlp.w1.g_idx"].fill_(0))
    with pytest.raises(CheckpointError, match=r"transformer.h.1.mlp.w1 .*g_idx.*128.*quantization_config=GPTQConfig"):
        load_model(folder, cpu_only=True)


def change_tensors(folder: Path, change) -> None:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    write_shards(folder, tensors, count=2)


def test_unexpected_and_missing_tensors_are_reported(bundled_chat, tmp_path, log):
    folder = tmp_path / "checkpoint"
    write_published(folder, bundled_chat, bits=8)
    change_tensors(folder, lambda tensors: tensors.update(stray=torch.zeros(2)))
    QWenLMHeadModel.from_pretrained(folder)
    assert "UNEXPECTED" in log.text
    assert "stray" in log.text
    assert "mlp.w1.bias" not in log.text

    bias = "transformer.h.1.mlp.w1.bias"
    change_tensors(folder, lambda tensors: tensors[bias].fill_(1))
    with pytest.raises(OSError, match=f"not zero.*{bias}.*no_bias"):
        QWenLMHeadModel.from_pretrained(folder)
    change_tensors(folder, lambda tensors: tensors.update({bias: torch.zeros(384)}))
    change_tensors(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.w1.g_idx"))
    with pytest.raises(CheckpointError, match=r"transformer.h.1.mlp.w1.g_idx.*incomplete"):
        load_model(folder, cpu_only=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "do not have the shapes"),
        ({"bits": 5}, "bits is 5"),
        ({"bits": "8"}, "bits is '8'"),
        ({"group_size": 100}, "group_size is 100"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    ],
    ids=str,
)
def test_wrong_quantization_config_is_explained(changes, message, bundled_chat, tmp_path):
    folder = tmp_path / "checkpoint"
    write_published(folder, bundled_chat, bits=8)
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    document["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as refused:
        load_model(folder, cpu_only=True)
    assert str(folder) in str(refused.value)


@pytest.mark.process
def test_loading_takes_little_more_memory_than_the_file(tmp_path, monkeypatch):
    """The embedding and the output matrix are most of the file, and are converted to another type."""
    monkeypatch.setitem(random_models.SHAPES, "wide", (1024, 4, 8, 2816, 65536))
    random_models.write_quantized("wide", tmp_path)
    script = """if True:
        import sys
        from qwen.loading import load_model
        load_model("checkpoints/qwen-tiny-chat-int4", cpu_only=True)  # imports
        peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
        before = peak()
        load_model(sys.argv[1], cpu_only=True)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1000:]
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 250e6
    assert size < int(done.stdout) < 1.3 * size


def test_repacked_weights_are_not_saved(int4_chat, tmp_path):
    with pytest.raises(ValueError, match=f"cannot be saved.*{BUNDLED_CHAT_INT4}"):
        int4_chat[0].save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- training ----


def test_layers_for_inference_reject_training(int4_chat, published):
    line = r'quantization_config=GPTQConfig\(bits={}, backend="torch"\)'
    with pytest.raises(RuntimeError, match="GPTQLinear.*" + line.format(4)):
        int4_chat[0].train()
    assert not int4_chat[0].training
    folder, bits, _ = published
    model = QWenLMHeadModel.from_pretrained(folder)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        model = get_peft_model(model, LoraConfig(target_modules=LINEAR, task_type="CAUSAL_LM"))
        assert torch.equal(model.eval()(ids).logits, before)  # a new adapter changes nothing
    with pytest.raises(RuntimeError, match=line.format(bits)):
        model.train()


@pytest.mark.parametrize("options", [{"safe_merge": False}, {"safe_merge": True}], ids=str)
def test_adapters_are_not_merged_into_a_copy_of_the_weights(published, options):
    model = get_peft_model(QWenLMHeadModel.from_pretrained(published[0]), LoraConfig(target_modules=LINEAR))
    with pytest.raises(ValueError, match="gptq"):
        model.merge_and_unload(**options)
    layer = model.base_model.model.transformer.h[0].mlp.w1
    with pytest.raises(RuntimeError, match=r"cannot be changed.*without -Int4"):
        layer.merge(**options)


def test_gradients_are_those_of_the_dequantized_model(lesson):
    """Also after an evaluation: GPTQModel's other kernels cut the gradient after a forward in eval mode, although the
    loss still falls."""
    quantized = load_trainable()
    plain = dequantized(quantized)
    with torch.no_grad():
        torch.testing.assert_close(quantized(**lesson).logits, plain.eval()(**lesson).logits, rtol=1e-3, atol=1e-3)
    adapted = [with_adapter(model, init_lora_weights=False) for model in (quantized, plain)]
    # Replaced modules are in another order, so their random initialisation differs.
    adapters = {name: tensor for name, tensor in adapted[0].state_dict().items() if "lora_" in name}
    assert not adapted[1].load_state_dict(adapters, strict=False).unexpected_keys
    gradients = []
    for model in adapted:
        model(**lesson).loss.backward()
        gradients.append({name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 6 * 5
    assert all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-2, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision_passes_gradients(lesson, dtype):
    model = with_adapter(load_trainable(dtype), init_lora_weights=False)
    model(**lesson).loss.backward()
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            assert tensor.dtype == torch.float32, name
            assert tensor.grad.isfinite().all(), name
            assert tensor.grad.any(), name


def test_training_changes_only_the_adapter_which_is_saved(lesson, int4_chat, tmp_path: Path):
    model = with_adapter(load_trainable())
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=5e-3)
    losses = []
    for _ in range(15):
        loss = model(**lesson).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    after = dict([*model.named_parameters(), *model.named_buffers()])
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {name for name in before if "lora_" in name}

    model.save_pretrained(tmp_path)
    restored = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    chat = restored.base_model.model.chat
    assert chat(int4_chat[1], "Who are you?", history=None, do_sample=False)[0] == LESSON[0][1]["value"]
    with pytest.raises(ValueError, match="Cannot merge"):
        restored.merge_and_unload()


# ---- the recipe ----


def test_recipe_writes_a_folder_like_the_bundled_one(bundled_chat, tmp_path: Path):
    from checkpoints.recipe.quantize import quantize_bundled

    config = QWenConfig.from_pretrained(bundled_chat)
    config.update({"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256})
    torch.manual_seed(0)
    source, target = tmp_path / "float", tmp_path / "int4"
    QWenLMHeadModel(config).save_pretrained(source)
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        (source / name).write_bytes((bundled_chat / name).read_bytes())
    samples = calibration_samples(ConversationFile(bundled_chat / "calibration.json"), load_tokenizer(source), 1024, 4)
    quantize_bundled(source, target, samples)
    assert {path.name for path in target.iterdir()} == {path.name for path in BUNDLED_CHAT_INT4.iterdir()}
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (target, BUNDLED_CHAT_INT4))
    assert ours.keys() == theirs.keys()
    assert ours["quantization_config"] == theirs["quantization_config"]
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (bundled_chat / name).read_bytes()
