"""The bundled checkpoint in 4 bits: made like a published one, answers like the float model, passes right gradients."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPTQConfig

from qwen.chat_data import encode_conversation, pad_samples
from qwen.configuration_qwen import QWenConfig
from qwen.loading import BUNDLED_CHAT_INT4, load_model
from qwen.modeling_qwen import QWenLMHeadModel

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
    """The training kernel compiles its unpacking; for these sizes that takes longer than all else."""
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
    """The same function in plain float32 matrices."""
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


def test_the_folder_is_like_a_published_one(bundled_chat):
    names = {path.name for path in BUNDLED_CHAT_INT4.iterdir()}
    assert names == {path.name for path in bundled_chat.iterdir()}
    assert sum(path.stat().st_size for path in BUNDLED_CHAT_INT4.iterdir()) < 6_000_000
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
    with safe_open(BUNDLED_CHAT_INT4 / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    for layer in range(6):
        for linear in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"):
            parts = {part: tensors.pop(f"transformer.h.{layer}.{linear}.{part}") for part in PARTS}
            rows = parts["g_idx"].numel()
            columns = parts["scales"].shape[1]
            assert parts["qweight"].shape == (rows // 8, columns)
            assert parts["qzeros"].shape == (rows // 128, columns // 8)
            assert torch.equal(parts["g_idx"], torch.arange(rows, dtype=torch.int32) // 128)
            assert (parts["qzeros"] == 0x77777777).all()  # 8, less the one that this layout subtracts
        assert tensors.pop(f"transformer.h.{layer}.attn.c_attn.bias").shape == (768,)
    assert len(tensors) == 2 * 6 + 3 and {tensor.dtype for tensor in tensors.values()} == {torch.float16}


# ---- use ----


def test_it_answers_like_the_float_model(int4_chat, float_chat):
    model, tokenizer = int4_chat
    for question, answer in ((turns[0]["value"], turns[1]["value"]) for turns in SMALL_TALK):
        for chat in (model, float_chat[0]):
            assert chat.chat(tokenizer, question, history=None, do_sample=False)[0] == answer


def test_its_logits_are_near_the_float_models(int4_chat, float_chat):
    batch = batch_of(SMALL_TALK, float_chat[1])
    learned = batch["labels"] != -100
    with torch.no_grad():
        near, exact = (model(**batch).logits[learned].float().log_softmax(-1) for model, _ in (int4_chat, float_chat))
    divergence = (exact.exp() * (exact - near)).sum(-1).mean()
    assert 1e-6 < divergence < 0.05, "in nats a token; 0 would mean that nothing was quantized"


def test_transformers_loads_it_in_seconds(int4_chat):
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_CHAT_INT4).eval()
    assert time.perf_counter() - began < 20
    assert type(model) is QWenLMHeadModel and model.dtype == torch.float16
    tokenizer = int4_chat[1]
    assert model.chat(tokenizer, "What is 47 + 38?", history=None, do_sample=False)[0] == "47 + 38 = 85."


def test_the_terminal_demo_prints_the_reply_alone():
    asked = subprocess.run(
        [sys.executable, "cli_demo.py", "--cpu-only", "-c", str(BUNDLED_CHAT_INT4)],
        input="What is 47 + 38?\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == "47 + 38 = 85.\n"
    assert "GPT-QModel" not in asked.stderr and "Warning" not in asked.stderr


# ---- training ----


def test_gradients_are_those_of_the_dequantized_model(lesson):
    """Also after an evaluation: GPTQModel's other kernels cut the gradient once they have computed in eval mode, and
    the loss falls nevertheless."""
    quantized = load_trainable()
    plain = dequantized(quantized)
    with torch.no_grad():
        torch.testing.assert_close(quantized(**lesson).logits, plain.eval()(**lesson).logits, rtol=1e-3, atol=1e-3)
    adapted = [with_adapter(model, init_lora_weights=False) for model in (quantized, plain)]
    # Modules come in another order where they were replaced, so the random numbers go elsewhere.
    adapters = {name: tensor for name, tensor in adapted[0].state_dict().items() if "lora_" in name}
    assert not adapted[1].load_state_dict(adapters, strict=False).unexpected_keys
    gradients = []
    for model in adapted:
        model(**lesson).loss.backward()
        gradients.append({name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 6 * 5
    assert all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-2, atol=1e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_precision_passes_gradients(lesson, dtype):
    model = with_adapter(load_trainable(dtype), init_lora_weights=False)
    model(**lesson).loss.backward()
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            assert tensor.dtype == torch.float32 and tensor.grad.isfinite().all() and tensor.grad.any(), name


def test_training_changes_the_adapter_alone_and_it_is_saved(lesson, int4_chat, tmp_path: Path):
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


def test_the_recipe_quantizes_a_model(bundled_chat, tmp_path: Path):
    from checkpoints.recipe.quantize import calibration, quantize

    config = QWenConfig.from_pretrained(bundled_chat)
    config.update({"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256})
    torch.manual_seed(0)
    source, target = tmp_path / "float", tmp_path / "int4"
    QWenLMHeadModel(config).save_pretrained(source)
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        (source / name).write_bytes((bundled_chat / name).read_bytes())
    samples = calibration(source, count=4)
    assert samples == calibration(source, count=4) and len(samples) == 4
    quantize(source, target, samples)
    for path in target.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "/tmp" not in text and "rope_parameters" not in text and "gptqmodel" not in text
    quantized, tokenizer = load_model(target, cpu_only=True)
    exact, _ = load_model(source, cpu_only=True)
    batch = batch_of(SMALL_TALK, tokenizer)
    with torch.no_grad():
        near, exact = (model(**batch).logits.float() for model in (quantized, exact))
    assert 0 < (near - exact).norm() < 0.2 * exact.norm()
