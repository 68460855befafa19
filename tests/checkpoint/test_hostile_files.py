"""Checkpoint files that are damaged, or made to harm: one line says what is wrong; nothing is executed or exhausted.

The numbers are those of the attack log (H: checkpoints).
"""

import json
import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen import Checkpoint, CheckpointError, QWenConfig, QWenLMHeadModel, QWenTokenizer
from qwen.checkpoint.adapters import check_pattern, check_settings
from qwen.checkpoint.bundled import BUNDLED_CHAT_INT4
from qwen.checkpoint.files import read_json
from qwen.export.qwen2 import export_qwen2
from qwen.model.json_qwen import MAX_JSON_BYTES, read_json_object

DEEP = "[" * 100_000 + "]" * 100_000
JSON_TEXTS = {
    "deep": DEEP,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "70 levels": '{"model_type": "qwen", "a": ' + "[" * 70 + "]" * 70 + "}",
    "list": "[]",
    "infinite": '{"model_type": "qwen", "vocab_size": 1e400}',
    "NaN": '{"model_type": "qwen", "vocab_size": NaN}',
    "digits": '{"model_type": "qwen", "vocab_size": ' + "9" * 5000 + "}",
    "NUL": "\0",
    "large": '{"a": "' + "x" * MAX_JSON_BYTES + '"}',
}


@pytest.fixture
def folder(bundled_chat: Path, tmp_path: Path) -> Path:
    """A copy of the bundled model without code."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in bundled_chat.iterdir():
        if file.suffix in (".json", ".tiktoken", ".safetensors") and file.name != "calibration.json":
            shutil.copyfile(file, copy / file.name)
    return copy


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def load_all(folder: Path) -> None:
    Checkpoint.open(folder).load(cpu_only=True)


WAYS = {
    "checkpoint": load_all,
    "model": QWenLMHeadModel.from_pretrained,
    "tokenizer": QWenTokenizer.from_pretrained,
}


def refusal(action: Callable[..., object], *arguments: object) -> str:
    """Return the one line with which something is refused."""
    with pytest.raises((OSError, ValueError)) as failure:
        action(*arguments)
    text = str(failure.value)
    assert text
    assert "\n" not in text
    assert "weights_only" not in text
    return text


# ---- JSON (H4 to H9) ----


@pytest.mark.parametrize("text", JSON_TEXTS)
@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("config.json", ["checkpoint", "model"]),
        ("generation_config.json", ["checkpoint", "model"]),
        ("tokenizer_config.json", ["checkpoint", "tokenizer"]),
        ("special_tokens_map.json", ["checkpoint", "tokenizer"]),
        ("added_tokens.json", ["checkpoint", "tokenizer"]),
    ],
)
def test_json_that_is_not_an_object_within_limits(name: str, ways: list[str], text: str, folder: Path) -> None:
    (folder / name).write_text(JSON_TEXTS[text])
    for way in ways:
        assert name in refusal(WAYS[way], folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "qwen.tiktoken", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_not_read(name: str, kind: str, folder: Path) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    if name == "generation_config.json":  # it may be missing: what is no file is not there
        assert Checkpoint(folder).generation_settings == {}
    else:
        assert name in refusal(load_all, folder)
    with pytest.raises(ValueError, match="not a regular file"):
        read_json_object(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_json(path, folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 10**30) for field in ("vocab_size", "hidden_size", "num_hidden_layers", "seq_length", "kv_channels")),
        *(("max_position_embeddings", value) for value in (-1, 0, "x", None, 2**31, [1])),
        ("rotary_pct", 1e308),
        ("rotary_emb_base", 10**400),
        ("emb_dropout_prob", 5),
        ("num_labels", 10**9),
        ("dtype", "evil"),
        ("torch_dtype", "load"),
        *((name, 1) for name in ("check", "to_dict", "from_dict", "__class__", "max_context_length", "rotary_dim")),
        ("attn_implementation", 1),
        ("attn_implementation", "evil/kernels"),
        ("_attn_implementation", "paged|evil/kernels"),
        ("output_hidden_states", "evil"),
        ("quantization_config", "evil"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4, "desc_act": "evil"}),
        ("per_layer_config", {"a": "b"}),
        ("text_config", {}),
        ("base_model_tp_plan", 1),
        ("window_sizes", [10**30] * 6),
    ],
)
def test_hostile_values_in_the_config(field: str, value: object, folder: Path) -> None:
    edit(folder / "config.json", **{field: value})
    start = time.process_time()
    text = refusal(load_all, folder)
    assert time.process_time() - start < 20  # 31 s and all memory for num_labels before
    assert field in text or "config.json" in text


def test_config_without_a_file_is_checked_too() -> None:
    with pytest.raises(ValueError, match="seq_length must be a number up to"):
        QWenConfig(seq_length=10**30)


def test_largest_context_that_a_config_may_have(folder: Path) -> None:
    edit(folder / "config.json", seq_length=2**31 - 1, max_position_embeddings=2**31 - 1)
    model, tokenizer = Checkpoint(folder).load(cpu_only=True)
    assert model.chat(tokenizer, "What is 47 + 38?")[0] == "47 + 38 = 85."


@pytest.mark.parametrize("layers", [7, 2000, 100_000, 10**9])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_more_layers_than_in_the_weight_files(layers: int, kind: str, folder: Path) -> None:
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif kind == "sharded":
        shard(folder)
    edit(folder / "config.json", num_hidden_layers=layers)
    start = time.process_time()
    for way in ("checkpoint", "model"):
        assert f"num_hidden_layers is {layers}" in refusal(WAYS[way], folder)
    assert time.process_time() - start < 10  # minutes and gigabytes if the layers are built


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**6},
        {"hidden_size": 10**6},
        {"num_attention_heads": 10**5},
        {"kv_channels": 10**6},
        {"intermediate_size": 2 * 10**8},
        {"num_attention_heads": 1, "kv_channels": 10**6, "hidden_size": 10**6},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_other_sizes_than_in_the_weight_files(changes: dict, kind: str, folder: Path) -> None:
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif kind == "sharded":
        shard(folder)
    edit(folder / "config.json", **changes)
    start = time.process_time()
    for way in ("checkpoint", "model"):
        assert "in the config, but" in refusal(WAYS[way], folder)
    assert time.process_time() - start < 10  # minutes and gigabytes if the layers are built


def test_other_sizes_than_in_quantized_weight_files(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUNDLED_CHAT_INT4, tmp_path / "model"))
    edit(folder / "config.json", intermediate_size=2 * 10**8)
    assert "intermediate_size / 2 is 100000000 in the config, but" in refusal(load_all, folder)


def shard(folder: Path, **changes: object) -> None:
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    edit(folder / "model.safetensors.index.json", **(index | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": None},
        {"metadata": []},
        {"weight_map": {"x": "../../etc/passwd"}},
        {"weight_map": {"x": "a\0b"}},
        {"weight_map": {"x": "a\nb"}},
        {"weight_map": {"x": "\x1b[31mred"}},
        {"weight_map": {"x": "\ud800"}},
        {"weight_map": {"x": "x" * 5000}},
        {"weight_map": {"x": ["a"]}},
        {"weight_map": []},
    ],
)
def test_hostile_index(changes: dict, folder: Path) -> None:
    shard(folder, **changes)
    for way in ("checkpoint", "model"):
        assert "index.json" in refusal(WAYS[way], folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None), lambda path: os.symlink("/dev/zero", path)])
def test_shards_that_are_no_files(make: Callable[[Path], None], folder: Path) -> None:
    shard(folder)
    file = "model-00002-of-00002.safetensors"
    index = folder / "model.safetensors.index.json"
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"lm_head.weight": file})
    make(folder / file)
    for way in ("checkpoint", "model"):
        assert file in refusal(WAYS[way], folder)


@pytest.mark.parametrize(
    "header", [DEEP, '{"__metadata__": {"a": ' + DEEP + "}}", '{"a": {"data_offsets": "x"}}', "[]", "{}"]
)
def test_hostile_safetensors_header(header: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    for way in ("checkpoint", "model"):
        refusal(WAYS[way], folder)


def test_tensors_that_the_model_does_not_have_are_ignored(folder: Path, tmp_path: Path) -> None:
    names = ("evil", "transformer.h", "transformer.h.1", "transformer.h.1.evil", ".")
    tensors = load_file(folder / "model.safetensors") | {name: torch.zeros(1) for name in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_all(folder)
    export_qwen2(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


# ---- pickles (H1, H2) ----


class Bomb:
    """A pickle of it executes code."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000_000))


BIN_FILES: dict[str, Callable[[Path], object]] = {
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(), 2)),
    "torch": lambda path: torch.save({"a": Bomb()}, path),
    "torch before 1.6": lambda path: torch.save({"a": Bomb()}, path, _use_new_zipfile_serialization=False),
    "newer pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(), 4)),
    "TorchScript": lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)),
    "module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "list": lambda path: torch.save([1], path),
    "text": lambda path: path.write_bytes(b"hello"),
    "compressed": compressed,
}


@pytest.mark.parametrize("kind", BIN_FILES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.filterwarnings("error:.*(torch.load|pickle protocol)", "ignore:.*jit.script")  # a refusal is one line
def test_bin_files_are_refused_in_one_line(
    kind: str, sharded: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    file = folder / ("pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin")
    BIN_FILES[kind](file)
    if sharded:
        edit(folder / "pytorch_model.bin.index.json", metadata={}, weight_map=dict.fromkeys(names, file.name))
    for action in (load_all, QWenLMHeadModel.from_pretrained, lambda folder: export_qwen2(folder, tmp_path / "out")):
        assert file.name in refusal(action, folder)
    assert not Path("executed").exists()


# ---- vocabulary and tokenizer (H9, H10) ----


def test_vocabulary_larger_than_the_matrix(folder: Path) -> None:
    with (folder / "qwen.tiktoken").open("ab") as file:
        file.write(b"IHp6 3590\nIHp6cXE= 3591\n")
    assert "3592 tokens, but vocab_size in its config.json is 3584" in refusal(load_all, folder)
    model, tokenizer = QWenLMHeadModel.from_pretrained(folder), QWenTokenizer.from_pretrained(folder)
    assert "the token id 3591" in refusal(model.chat, tokenizer, "a zzqq b")


@pytest.mark.parametrize("value", ["/etc/passwd", "../secret", 5, ["a"]])
def test_extra_vocabulary_is_taken_from_the_caller_only(value: object, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    edit(folder / "tokenizer_config.json", extra_vocab_file=value)
    assert len(Checkpoint(folder).tokenizer()) == len(QWenTokenizer.from_pretrained(folder))
    with pytest.raises(ValueError, match="secret, line 1"):
        Checkpoint(folder).tokenizer(extra_vocab_file=tmp_path / "secret")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("errors", "evil"),
        ("errors", 5),
        ("model_max_length", "x"),
        ("model_max_length", -1),
        ("chat_template", 5),
        ("added_tokens_decoder", None),
        ("model_input_names", None),
        ("eos_token", {"a": 1}),
        ("extra_special_tokens", 5),
        ("padding_side", 5),
    ],
)
def test_hostile_tokenizer_settings(field: str, value: object, folder: Path) -> None:
    edit(folder / "tokenizer_config.json", **{field: value})
    for way in ("checkpoint", "tokenizer"):
        text = refusal(WAYS[way], folder)
        assert field in text or field.partition("_")[0] in text.lower()


# ---- adapters (H13) ----

ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_attn"]}
PATTERNS = ["(.+)+X", "(a|a)*X", "(.*)*", "((a+)?)+X", "(.?){99}X", ".*.*.*.*.*.*X", "(.|.)" * 30 + "X", r"(.+)\1X"]
PATTERNS += ["[", "*", "(?=(.+)+X)", "(?:.+)+X", ".?" * 40 + "X", "[]a]+" * 9 + "X", "x" * 5000]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_that_could_match_for_hours(pattern: str, field: str) -> None:
    value = {pattern: 2} if field.endswith("_pattern") else pattern
    assert f"adapter_config.json: {field}" in refusal(
        check_settings, ADAPTER | {field: value}, Path("adapter_config.json")
    )


@pytest.mark.parametrize("field", ["modules_to_save", "layers_pattern"])
def test_lists_that_peft_makes_patterns_of(field: str) -> None:
    assert field in refusal(check_settings, ADAPTER | {field: ["(.+)+X"]}, Path("adapter_config.json"))


@pytest.mark.parametrize("pattern", [r".*\.(c_attn|c_proj|w1|w2)", r".*\.h\.\d+\.attn\.c_attn", "all-linear", "w[12]"])
def test_usual_patterns_are_accepted(pattern: str) -> None:
    check_settings(ADAPTER | {"target_modules": pattern, "rank_pattern": {"c_attn": 4}}, Path("adapter_config.json"))


def test_accepted_patterns_match_quickly() -> None:
    """The slowest ones that are accepted, on the longest name of a module."""
    start = time.process_time()
    for pattern in (".*.*X", "(.*|.)(.|.)X", "(.|.*|.|.|.|.|.|.)(.*|.|.|.|.|.|.|.)X"):
        check_pattern(pattern, "", 2)
        for _ in range(100):
            re.fullmatch(pattern, "base_model.model.transformer.h.31.attn.c_attn")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", 10**400),
        ("lora_alpha", "x"),
        ("r", 10**9),
        ("r", True),
        ("r", 0),
        ("lora_dropout", 5),
        ("rank_pattern", {"c_attn": 10**9}),
        ("alpha_pattern", [1]),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("layer_replication", [[0, 6]] * 1000),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa_niter_1000000000"),
    ],
)
def test_hostile_adapter_settings(field: str, value: object) -> None:
    assert field in refusal(check_settings, ADAPTER | {field: value}, Path("adapter_config.json"))


@pytest.fixture
def adapter(bundled_chat: Path, tmp_path: Path) -> Path:
    """An adapter on the bundled model."""
    model = QWenLMHeadModel.from_pretrained(bundled_chat)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(bundled_chat))
    return tmp_path / "adapter"


def test_adapters_are_checked_when_they_are_loaded(adapter: Path, bundled_chat: Path) -> None:
    config = adapter / "adapter_config.json"
    good = config.read_text()
    load_all(adapter)
    for text in (DEEP, good.replace('"lora_alpha": 2', '"lora_alpha": 1e400'), good.replace('"r": 2', '"r": NaN')):
        config.write_text(text)
        assert "adapter_config.json" in refusal(load_all, adapter)
    for changes in ({"target_modules": "(.+)+X"}, {"r": 60_000}, {"target_modules": ["evil"]}, {"revision": 5}):
        config.write_text(good)
        edit(config, **changes)
        refusal(load_all, adapter)
    config.write_text(good)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": Bomb()}, adapter / "adapter_model.bin")
    assert "adapter_model.bin does not hold a dict of tensors" in refusal(load_all, adapter)
    # A vocabulary of its own for which the embedding would be enlarged to gigabytes.
    (adapter / "adapter_model.bin").unlink()
    save_file(weights, adapter / "adapter_model.safetensors")
    shutil.copyfile(bundled_chat / "qwen.tiktoken", adapter / "qwen.tiktoken")
    with (adapter / "qwen.tiktoken").open("ab") as file:
        file.write(b"IHp6cXE= 2000000000\n")
    assert "its vocabulary has 2000000001 tokens" in refusal(load_all, adapter)
