"""Arguments of from_pretrained, and both formats of config.json."""

import copy
import json
import logging
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.utils import cpp_extension
from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from qwen import QWenConfig, QWenLMHeadModel
from qwen.model import loading_options_qwen
from qwen.model.gptq_qwen import choose_kernel
from qwen.model.loading_options_qwen import (
    attention_devices,
    check_devices,
    choose_attention,
    choose_dtype,
    needs_gptqmodel,
    target_device,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A copy of the golden checkpoint whose config.json a test may change."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden / name, tmp_path)
    return tmp_path


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


LOADERS = [QWenLMHeadModel.from_pretrained, AutoModelForCausalLM.from_pretrained]


@pytest.mark.parametrize("load", LOADERS)
def test_precision_flags(checkpoint, load):
    assert load(checkpoint).dtype is torch.float32  # fp32 in the file
    assert load(checkpoint, bf16=True).dtype is torch.bfloat16  # the caller wins over the file
    assert load(checkpoint, fp16=True).dtype is torch.float16
    assert load(checkpoint, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert load(checkpoint, dtype="bfloat16").dtype is torch.bfloat16
    assert load(checkpoint, dtype="auto").dtype is torch.float32
    assert load(checkpoint, bf16=True, dtype="auto").dtype is torch.bfloat16
    assert load(checkpoint, bf16=True, dtype=torch.bfloat16).dtype is torch.bfloat16
    edit_config(checkpoint, fp32=False, dtype="bfloat16")
    assert load(checkpoint, device_map="cpu").dtype is torch.float32  # exact on the CPU, independent of the file
    edit_config(checkpoint, bf16=True)
    assert load(checkpoint).dtype is torch.bfloat16


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bf16": True, "fp16": True}, "pass one of"),
        ({"bf16": True, "dtype": torch.float16}, "only one of the two"),
        ({"fp32": True, "dtype": "bfloat16"}, "only one of the two"),
        ({"dtype": torch.float16, "torch_dtype": torch.float32}, "contradict"),
        ({"load_in_8bit": True}, r"quantization_config=BitsAndBytesConfig\(load_in_8bit=True\)"),
        ({"load_in_4bit": True}, r"quantization_config=BitsAndBytesConfig\(load_in_4bit=True\)"),
        ({"dtype": torch.float32, "use_flash_attn": True}, "half precision"),
        ({"fp32": True, "attn_implementation": "flash_attention_2"}, "half precision"),
        ({"use_cache_kernel": True}, "use_cache_quantization=True"),
        ({"dtype": "bfloat17"}, "not a torch dtype|dtype"),
        ({"use_flash_attn": True, "attn_implementation": "eager"}, "one of the two"),
        ({"use_flash_attn": False, "attn_implementation": "flash_attention_2"}, "one of the two"),
        ({"use_flash_attn": True, "fp32": True}, "half precision"),
        ({"use_cache_kernel": True, "use_cache_quantization": False}, "use_cache_quantization=True"),
        ({"use_flash_attn": "always"}, "auto"),
    ],
)
def test_contradictions_say_what_to_pass(checkpoint, load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(checkpoint, **arguments)


@pytest.mark.parametrize("load", LOADERS)
def test_switches_reach_the_model(checkpoint, load):
    model = load(
        checkpoint,
        use_dynamic_ntk=False,
        use_logn_attn=False,
        use_cache_quantization=True,
        use_cache_kernel=True,
        use_flash_attn=False,
        pad_token_id=7,
        resume_download=True,
        trust_remote_code=True,
    )
    config = model.config
    assert not config.use_dynamic_ntk
    assert not config.use_logn_attn
    assert config.use_cache_quantization
    assert config.use_cache_kernel
    assert config.pad_token_id == 7
    assert config._attn_implementation == "sdpa"
    assert load(checkpoint, attn_implementation="eager").config._attn_implementation == "eager"


def test_arguments_override_a_config_object(checkpoint):
    config = QWenConfig.from_pretrained(checkpoint)
    model = QWenLMHeadModel.from_pretrained(checkpoint, config=config, use_logn_attn=False, bf16=True)
    assert not model.config.use_logn_attn
    assert config.use_logn_attn
    assert model.dtype is torch.bfloat16
    model = QWenLMHeadModel.from_pretrained(checkpoint, config=model.config, fp16=True)
    assert model.dtype is torch.float16
    assert not model.config.bf16
    with pytest.raises(ValueError, match="use_flash_attn"):
        QWenLMHeadModel.from_pretrained(checkpoint, config=config, use_flash_attn="always")


def test_flash_attention_is_switched_off_with_a_reason(caplog, monkeypatch):
    config = QWenConfig(use_flash_attn=True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("qwen"), "propagate", True)
    assert choose_attention(config, torch.float32, [CPU]) == "sdpa"
    assert choose_attention(config, torch.float32, [GPU]) == "sdpa"
    config.use_cache_quantization = True
    assert choose_attention(config, torch.bfloat16, [GPU], "flash_attention_2") == "sdpa"
    assert choose_attention(config, torch.bfloat16, [GPU], "eager") == "eager"
    reasons = " ".join(record.getMessage() for record in caplog.records)
    assert "does not run on cpu" in reasons
    assert "float32" in reasons
    assert "8 bits" in reasons
    # On a machine with the package and GPUs of different generations.
    monkeypatch.setattr(loading_options_qwen, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for capability, expected in (((7, 5), "sdpa"), ((8, 0), "flash_attention_2"), ((9, 0), "flash_attention_2")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        config = QWenConfig()
        assert choose_attention(config, torch.bfloat16, [GPU]) == expected
    # An A100 and a T4 in one machine.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(8, 0), (7, 5)][device.index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pretend_gpus(monkeypatch, 2)
    for device_map, expected in (
        ("auto", "sdpa"),
        ({"a": "cuda:0", "b": 1}, "sdpa"),
        ("cuda:0", "flash_attention_2"),
        ({"a": 0, "b": "cpu"}, "flash_attention_2"),  # b is copied to the GPU for each forward
        (None, "sdpa"),  # the weights stay on the CPU
        ("cpu", "sdpa"),
    ):
        assert choose_attention(config, torch.bfloat16, attention_devices(device_map)) == expected, device_map


def pretend_gpus(monkeypatch, count: int) -> None:
    """Let torch say that there are GPUs. tests/pretend_gpu has ones that compute."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: GPU)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


@pytest.fixture
def seen(monkeypatch):
    """The arguments that transformers' from_pretrained was last called with; it loads nothing."""
    arguments = {}

    def from_pretrained(cls, *args, config, **kwargs):
        arguments.clear()
        arguments.update(kwargs, config=copy.deepcopy(config))
        return SimpleNamespace(config=config, named_modules=list)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    return arguments


def test_transformers_merges_the_quantization_config(checkpoint, seen):
    edit_config(
        checkpoint,
        fp32=False,
        quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True},
    )
    QWenLMHeadModel.from_pretrained(checkpoint, quantization_config=GPTQConfig(bits=4, backend="torch"))
    assert seen["config"].quantization_config["group_size"] == 64
    assert seen["quantization_config"].backend == "torch"
    assert seen["dtype"] == torch.bfloat16


@pytest.mark.parametrize(
    ("quantization", "device", "kernel"),
    [
        ({"bits": 4, "group_size": 128}, CPU, "torch"),
        ({"bits": 3, "group_size": 128}, CPU, "torch"),
        ({"bits": 8, "group_size": 128, "sym": True}, GPU, "gptq_marlin"),
        ({"bits": 4, "group_size": -1}, GPU, "gptq_marlin"),
        ({"bits": 4, "group_size": 256}, GPU, "auto"),
        ({"bits": 3, "group_size": 128}, GPU, "auto"),
        ({"bits": 4, "group_size": 128, "sym": False}, GPU, "auto"),
    ],
    ids=str,
)
def test_fastest_kernel_of_each_device(quantization, device, kernel, monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 0)][index])
    assert choose_kernel(quantization, device) == kernel


def test_marlin_is_for_all_gpus_of_a_machine_and_announced(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("qwen"), "propagate", True)
    logging.Logger.warning_once.cache_clear()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for second, kernel in (((7, 5), "auto"), ((8, 6), "gptq_marlin")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, second=second: [(9, 0), second][index])
        assert "Marlin" not in caplog.text
        assert choose_kernel({"bits": 4, "sym": True}, GPU) == kernel
    assert "Marlin. GPTQModel compiles it with nvcc at the first load" in caplog.text


def test_kernel_without_nvcc(monkeypatch):
    """Most users have torch from a wheel and no CUDA toolkit; GPTQModel's automatic choice then fails at loading."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "hip", None)
    for bits in (4, 8):
        assert choose_kernel({"bits": bits}, GPU) == "gptq_triton"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_kernel({"bits": 4}, GPU) == "auto"


def test_precision_with_quantized_weights():
    quantization = {"quant_method": "gptq", "bits": 4}
    chosen = [
        choose_dtype(QWenConfig(quantization_config=quantization, **flag), device)
        for flag in ({}, {"fp16": True}, {"bf16": True}, {"fp32": True})
        for device in (CPU, GPU)
    ]
    half, bfloat, full = torch.float16, torch.bfloat16, torch.float32
    assert chosen == [bfloat, "auto", half, half, bfloat, bfloat, full, full]


@pytest.mark.parametrize("load", LOADERS)
def test_chosen_kernel_is_passed_to_transformers(checkpoint, load, seen, monkeypatch):
    quantization = {"quant_method": "gptq", "bits": 8, "group_size": 128, "backend": "of another machine"}
    edit_config(checkpoint, fp32=False, fp16=True, quantization_config=quantization)
    for device_map in (None, "cpu", {"": "cpu"}):
        load(checkpoint, device_map=device_map)
        assert not hasattr(seen["config"], "quantization_config")  # with it, transformers would use GPTQModel
        assert seen["config"].gptq_layers == quantization
        assert seen["device_map"] == "cpu"
        assert seen["dtype"] == torch.bfloat16
    load(checkpoint, fp16=True)  # the caller's flag counts, unlike the one in the file
    assert seen["dtype"] == torch.float16
    asked = GPTQConfig(bits=8, disable_exllama=True)
    load(checkpoint, quantization_config=asked)
    assert seen["quantization_config"].backend == "torch"
    assert seen["config"].quantization_config["backend"] == "torch"
    assert asked.backend == "auto"
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    for device_map in ("auto", {"": 0}):
        load(checkpoint, device_map=device_map)
        assert seen["config"].quantization_config["backend"] == "gptq_marlin"
        assert seen["dtype"] == "auto"


@pytest.mark.parametrize(
    ("bits", "quantization_config", "device_map", "gpus", "needed"),
    [
        (4, None, None, 0, False),
        (8, None, None, 1, False),  # without a device_map, GPTQ weights are loaded on the CPU
        (4, None, "cpu", 1, False),
        (4, None, "auto", 0, False),
        (4, None, {"": "cpu"}, 1, False),
        (4, None, {"transformer": "cpu", "lm_head": "disk"}, 0, True),
        (4, None, "auto", 1, True),
        (4, None, {"transformer": 0, "lm_head": "cpu"}, 1, True),
        (3, None, "cpu", 0, True),
        (4, {"bits": 4, "backend": "torch"}, "cpu", 0, True),
        (None, None, "cpu", 0, False),
        (None, {"bits": 4}, "cpu", 0, True),
    ],
)
def test_gptqmodel_is_needed_on_gpus_and_where_it_is_asked_for(
    bits, quantization_config, device_map, gpus, needed, monkeypatch
):
    pretend_gpus(monkeypatch, gpus)
    config = QWenConfig() if bits is None else QWenConfig(quantization_config={"quant_method": "gptq", "bits": bits})
    asked = quantization_config and GPTQConfig(**quantization_config)
    assert needs_gptqmodel(config, asked, device_map) is needed


def test_device_and_dtype_choice():
    config = QWenConfig()
    assert choose_dtype(config, CPU) is torch.float32
    assert target_device("cpu") == target_device({"": "cpu"}) == target_device({"a": "cpu", "b": "disk"}) == CPU
    config.fp16 = True
    assert choose_dtype(config, CPU) is torch.float16


def test_first_release_format_gives_the_same_model(checkpoint, golden):
    shape = json.loads((golden / "config.json").read_text())
    edit_config(
        checkpoint,
        **dict.fromkeys(
            [
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
                "intermediate_size",
                "emb_dropout_prob",
                "attn_dropout_prob",
                "use_dynamic_ntk",
                "use_logn_attn",
                "layer_norm_epsilon",
            ],
            "absent",
        ),
        n_embd=shape["hidden_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_positions=shape["max_position_embeddings"],
        ffn_hidden_size=shape["intermediate_size"],
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.1,
        vocab_size=500,
        padded_vocab_size=512,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    config = model.config
    assert not config.use_dynamic_ntk
    assert not config.use_logn_attn
    assert config.layer_norm_epsilon == 1e-5
    assert config.vocab_size == 512
    reference = AutoModelForCausalLM.from_pretrained(
        golden, use_dynamic_ntk=False, use_logn_attn=False, layer_norm_epsilon=1e-5
    ).eval()
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
    named = AutoModelForCausalLM.from_pretrained(checkpoint, use_dynamic_ntk=True)
    assert named.config.use_dynamic_ntk


def test_unused_fields_survive_a_round_trip(checkpoint, tmp_path):
    edit_config(checkpoint, onnx_safe=None, padded_vocab_size=512, tokenizer_type="QWenTokenizer", my_own={"a": 1})
    config = AutoConfig.from_pretrained(checkpoint)
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["padded_vocab_size"] == 512
    assert again["tokenizer_type"] == "QWenTokenizer"
    assert again["my_own"] == {"a": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"seq_length": 1},
        {"rotary_pct": 1.5},
        {"rotary_pct": 0.0},
        {"num_attention_heads": "four"},
        {"rotary_emb_base": 0},
        {"bf16": True, "fp16": True, "fp32": False},
    ],
)
def test_invalid_config_names_the_field(checkpoint, changes):
    edit_config(checkpoint, **changes)
    with pytest.raises(ValueError, match=next(iter(changes))):
        QWenConfig.from_pretrained(checkpoint)


@pytest.mark.parametrize("damage", ["half", "pointer", "half bin", "missing shard"])
def test_damaged_weights_name_the_remedy(checkpoint, damage):
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    if damage == "half":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif damage == "half bin":
        torch.save(load_file(path), checkpoint / "pytorch_model.bin")
        path.unlink()
        whole = (checkpoint / "pytorch_model.bin").read_bytes()
        (checkpoint / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    else:
        QWenLMHeadModel.from_pretrained(checkpoint).save_pretrained(checkpoint, max_shard_size="100KB")
        path.unlink(missing_ok=True)
        next(checkpoint.glob("model-00002-*")).unlink()
    with pytest.raises(OSError, match=r"download (it|them) again"):
        QWenLMHeadModel.from_pretrained(checkpoint)


def test_sharded_and_old_weights(checkpoint, golden, tmp_path):
    model = QWenLMHeadModel.from_pretrained(golden)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    weights = load_file(golden / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    for folder in (tmp_path / "shards", checkpoint):
        loaded = QWenLMHeadModel.from_pretrained(folder).state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_code_next_to_the_weights_is_not_used(checkpoint):
    edit_config(checkpoint, auto_map={"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"})
    (checkpoint / "modeling_qwen.py").write_text("raise RuntimeError('the published code was run')\n")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model) is QWenLMHeadModel


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "device_map", ["cuda", "cuda:1", "mps", "xpu", 0, {"": 0}, {"transformer": "cpu", "lm_head": "cuda"}]
)
def test_a_missing_device_is_explained(golden, load, device_map, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'device_map=.* names .* no GPU .*Pass device_map="auto"'):
        load(golden, device_map=device_map)


def test_devices_are_counted(monkeypatch):
    pretend_gpus(monkeypatch, 2)
    for present in (None, "auto", "cpu", "cuda", "cuda:1", 1, GPU, {"": 0, "lm_head": "disk"}):
        check_devices(present)
    for missing in ("cuda:2", 2, "mps", {"": "cuda:2"}):
        with pytest.raises(ValueError, match="this machine has 2 of type 'cuda'"):
            check_devices(missing)


@pytest.mark.parametrize("device_map", ["auto", "cuda", {"": 0}])
def test_an_old_driver_is_explained(golden, device_map, monkeypatch):
    """torch then says that there is no GPU, and only its initialization says why."""
    text = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by …"

    def init():
        raise RuntimeError(text)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ValueError, match=r"too old for this build of torch \(CUDA 13.0\): update .*--cpu-only"):
        QWenLMHeadModel.from_pretrained(golden, device_map=device_map)
    assert QWenLMHeadModel.from_pretrained(golden, device_map="cpu").device == CPU
    text = "Found no NVIDIA driver on your system."
    if device_map == "auto":
        assert QWenLMHeadModel.from_pretrained(golden, device_map=device_map).device == CPU
    else:
        with pytest.raises(ValueError, match="no GPU that this torch can use"):
            QWenLMHeadModel.from_pretrained(golden, device_map=device_map)


def test_a_config_of_another_model_is_explained(golden, checkpoint):
    with pytest.raises(ValueError, match=r"LlamaConfig.*'llama'.*QWenConfig.*'qwen'"):
        QWenLMHeadModel.from_pretrained(golden, config=LlamaConfig())
    edit_config(checkpoint, model_type="llama")
    for arguments in ({"config": checkpoint}, {}):
        with pytest.raises(ValueError, match=r"config.json .*'llama'.*QWenConfig"):
            QWenLMHeadModel.from_pretrained(checkpoint, **arguments)


def test_a_config_of_the_published_code_is_taken(golden):
    class Published(PreTrainedConfig):
        model_type = "qwen"

    config = Published.from_pretrained(golden)
    assert type(QWenLMHeadModel.from_pretrained(golden, config=config).config) is QWenConfig


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_saved_weights_are_as_readable_as_other_files(golden, tmp_path, mask):
    model = QWenLMHeadModel.from_pretrained(golden)
    before = os.umask(mask)
    try:
        model.save_pretrained(tmp_path, max_shard_size="300KB")
        model.add_adapter(LoraConfig(target_modules=["c_attn"]))
        model.save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*") if path.suffix != ".py"}
    assert {"model.safetensors.index.json", "adapter_model.safetensors"} <= modes.keys()
    assert set(modes.values()) == {0o666 & ~mask}


def test_configs_have_an_auto_map_to_read(checkpoint):
    """TRL reads it, in the reference model of DPO too."""
    edit_config(checkpoint, auto_map="absent")
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.auto_map == {}
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)) is QWenLMHeadModel
    config.save_pretrained(checkpoint)
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_qwen.QWenConfig"
    }
    assert QWenConfig.from_dict({"auto_map": {"AutoConfig": "a.B"}}).auto_map == {"AutoConfig": "a.B"}


def test_names_that_published_code_imports_from_the_model():
    from qwen.modeling_qwen import dequantize_cache_torch, quantize_cache_v

    values = torch.randn(1, 2, 3, 8)
    step = (values.amax() - values.amin()) / 255
    assert (dequantize_cache_torch(*quantize_cache_v(values)) - values).abs().max() <= step
