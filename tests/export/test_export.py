"""Exported checkpoints give the same results in transformers' Qwen2 and in llama.cpp."""

import json
import math
import random
import shutil
import subprocess
import sys
import unicodedata
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig, Qwen2ForCausalLM

from qwen import QWenConfig, QWenLMHeadModel
from qwen.checkpoint.files import CheckpointError
from qwen.checkpoint.loading import BUNDLED_CHAT_INT4, load_model, load_tokenizer
from qwen.export import export_gguf, export_qwen2
from qwen.export.tokenizer_json import fast_tokenizer
from qwen.model.tokenization_qwen import QWenTokenizer
from qwen_cli import export
from tests.support import ROOT
from tests.support.published_gptq import write_published, write_shards

QUESTIONS = [
    "What is 47 + 38?",
    "你好，你是谁？",
    "My name is Alice. Please remember it.",
    "Tell me about this repository.",
]
SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module")
def chat():
    return load_model(cpu_only=True, fp32=True)


@pytest.fixture(scope="module")
def replies(chat) -> list[str]:
    """Greedy replies of the original model."""
    model, tokenizer = chat
    return [model.chat(tokenizer, question, do_sample=False)[0] for question in QUESTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled chat model, exported as Qwen2."""
    folder = tmp_path_factory.mktemp("export") / "qwen2"
    export_qwen2(None, folder)
    return folder


def as_qwen2(folder: Path) -> Qwen2ForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model) is Qwen2ForCausalLM
    return model


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


# ---- Qwen2 ----


@pytest.mark.slow
def test_qwen2_gives_the_same_logits_and_replies(chat, folder: Path, replies: list[str]) -> None:
    model, tokenizer = chat
    qwen2, fast = as_qwen2(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(0, len(tokenizer), (2, 1024), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(qwen2, ids), logits(model, ids), atol=1e-4, rtol=0)
    for question, reply in zip(QUESTIONS, replies, strict=True):
        prompt = fast.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        ids = torch.tensor([prompt["input_ids"]])
        output = qwen2.generate(ids, do_sample=False, top_p=None, top_k=None)[0, ids.shape[1] :]
        assert fast.decode(output, skip_special_tokens=True) == reply
        assert output[-1] == tokenizer.im_end_id  # from generation_config.json


def test_files_and_settings_of_an_export(chat, folder: Path, tmp_path: Path, bundled_base: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    assert config["torch_dtype"] == "bfloat16"
    tokenizer = chat[1]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {
        "eos_token_id": [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id],
        "pad_token_id": tokenizer.eod_id,
        "max_window_size": 768,
        "max_new_tokens": 256,
        "do_sample": True,
        "top_k": 3584,
        "top_p": 0.5,
    }
    notes = export_qwen2(bundled_base, tmp_path / "base")
    assert notes == [
        "Exact up to 256 tokens, the maximum length of the export: other engines do not support dynamic NTK "
        "and LogN attention. For longer prompts, scale the rotary embedding with --max-length."
    ]
    assert not (tmp_path / "base" / "chat_template.jinja").exists()
    fast = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (fast.eos_token, fast.pad_token, fast.chat_template) == ("<|endoftext|>", "<|endoftext|>", None)


def test_chat_template_gives_the_prompt_of_chat(chat, folder: Path) -> None:
    from qwen import make_context

    fast, tokenizer = AutoTokenizer.from_pretrained(folder), chat[1]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    messages.append({"role": "user", "content": "1 + 1?"})
    for system in (SYSTEM, "Speak like a pirate."):
        given = messages if system == SYSTEM else [{"role": "system", "content": system}, *messages]
        ids = make_context(tokenizer, "1 + 1?", [("Hi", "Hello!")], system=system)[1]
        assert fast.apply_chat_template(given, add_generation_prompt=True)["input_ids"] == ids
    with pytest.raises(Exception, match="ReAct"):
        fast.apply_chat_template(messages, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


SHAPES = {  # a sixteenth of the published widths, at which one layer takes up to 1.7 GB
    "1.8B": {"num_attention_heads": 1, "intermediate_size": 688},
    "7B": {"num_attention_heads": 2, "intermediate_size": 1376, "max_position_embeddings": 32768},
    "7B, first release": {"num_attention_heads": 2, "intermediate_size": 1376, "seq_length": 2048},
    "14B": {"num_attention_heads": 5, "intermediate_size": 1712, "seq_length": 2048},
    "72B": {"num_attention_heads": 4, "intermediate_size": 3072, "max_position_embeddings": 32768}
    | {"rotary_emb_base": 1e6, "use_dynamic_ntk": False, "use_logn_attn": False},
}


@pytest.mark.parametrize("size", SHAPES)
def test_published_configurations(size: str, tmp_path: Path, bundled_chat: Path) -> None:
    """benchmarks/export.py tests the real widths."""
    fields = {"max_position_embeddings": 8192, "seq_length": 8192, "num_hidden_layers": 2} | SHAPES[size]
    config = QWenConfig(hidden_size=128 * fields["num_attention_heads"], vocab_size=3600, dtype="bfloat16", **fields)
    torch.manual_seed(0)
    model = QWenLMHeadModel(config).bfloat16().eval()
    model.save_pretrained(tmp_path / "source", max_shard_size="1MB")
    shutil.copyfile(bundled_chat / "qwen.tiktoken", tmp_path / "source" / "qwen.tiktoken")
    export_qwen2(tmp_path / "source", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    qwen2 = as_qwen2(tmp_path / "out")
    assert qwen2.config.max_position_embeddings == (32768 if size == "72B" else fields["seq_length"])
    ids = torch.randint(0, 3500, (1, 300), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(qwen2, ids), logits(model.float(), ids), atol=1e-4, rtol=0)


def test_max_length_scales_the_rotary_embedding(bundled_base: Path, tmp_path: Path) -> None:
    notes = export_qwen2(bundled_base, tmp_path / "out", max_length=1000)
    assert "scaled for prompts of up to 1000 tokens" in notes[0]
    assert "LogN attention is left out" in notes[0]
    model, tokenizer = load_model(bundled_base, cpu_only=True, fp32=True, use_logn_attn=False)
    qwen2 = as_qwen2(tmp_path / "out")
    assert qwen2.config.max_position_embeddings == 1000
    ids = torch.randint(0, len(tokenizer), (1, 1000), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(qwen2, ids), logits(model, ids), atol=1e-3, rtol=0)


# ---- quantized ----


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "desc_act"), [(4, False), (4, True), (8, False)])
def test_gptq(bits: int, desc_act: bool, bundled_chat: Path, tmp_path: Path) -> None:
    """The parts of a matrix are in different shards, and there are zero biases, as in published files."""
    import gguf

    original = write_published(tmp_path / "gptq", bundled_chat, bits=bits, desc_act=desc_act)
    export_qwen2(tmp_path / "gptq", tmp_path / "out")
    # The reference kernel; faster ones round.
    exact = GPTQConfig(bits=bits, backend="torch")
    qwen2 = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=exact)
    ids = torch.randint(0, 3000, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = logits(original, ids)
    # The kernel multiplies in half precision.
    torch.testing.assert_close(logits(qwen2.eval(), ids), expected, atol=3e-3 * expected.abs().max().item(), rtol=0)
    export_gguf(tmp_path / "gptq", tmp_path / "out.gguf", kind="f32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    for ours, theirs in (("attn.c_attn", "attn_qkv"), ("mlp.c_proj", "ffn_down"), ("mlp.w1", "ffn_up")):
        weight = original.get_submodule(f"transformer.h.1.{ours}").weight
        torch.testing.assert_close(torch.tensor(tensors[f"blk.1.{theirs}.weight"]), weight, atol=1e-6, rtol=1e-6)


def test_bundled_int4_gives_the_same_answer(tmp_path: Path) -> None:
    export_qwen2(BUNDLED_CHAT_INT4, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4
    assert config["torch_dtype"] == "float16"
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = fast.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = as_qwen2(tmp_path / "out").generate(**prompt, do_sample=False, top_p=None, top_k=None)
    assert fast.decode(output[0], skip_special_tokens=True).endswith("47 + 38 = 85.")


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def fast(real_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The published vocabulary, saved to tokenizer.json and loaded again."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    fast_tokenizer(real_tokenizer).save(str(path))
    return Tokenizer.from_file(str(path))


@pytest.mark.slow
def test_golden_token_ids(fast: Tokenizer, golden: Path) -> None:
    for case in json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))["cases"]:
        assert fast.encode(case["text"]).ids == case["ids"], case["text"]
        assert fast.decode(case["ids"], skip_special_tokens=False) == case["decoded"], case["text"]


def random_texts(count: int) -> list[str]:
    """Texts in common scripts and of arbitrary characters, half each, with control tokens in both."""
    rng = random.Random(0)
    pieces = [" ", "  ", "\n", "\r\n\r\n", "\t", "'s", "'LL", "\u3000", "\u00a0", "\x85", "<|im_end|>", "<|extra_7|>"]
    common = [(32, 126), (0x300, 0x36F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3)]
    any_ = [(0, 0x2FFF), (0, 0x2FFFF), (0, 0x10FFFF)]
    texts = []
    for number in range(count):
        ranges, text = common if number % 2 else any_, []
        for _ in range(rng.randint(1, 30)):
            code = rng.randint(*rng.choice(ranges))
            text.append(rng.choice(pieces) if rng.random() < 0.15 or 0xD800 <= code < 0xE000 else chr(code))
        texts.append("".join(text))
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_same_ids_for_random_texts(count: int, fast: Tokenizer, real_tokenizer: QWenTokenizer) -> None:
    """Only texts that `tokenizers` normalizes differently may differ: its NFC table is from an older Unicode."""
    texts = random_texts(count)
    theirs = [encoding.ids for encoding in fast.encode_batch(texts)]
    different = [text for text, ids in zip(texts, theirs, strict=True) if real_tokenizer(text)["input_ids"] != ids]
    nfc = normalizers.NFC()
    unexplained = [text for text in different if nfc.normalize_str(text) == unicodedata.normalize("NFC", text)]
    assert not unexplained, unexplained[:3]
    print(f"{len(different)} differ: {different}")
    assert len(different) < 50


def test_expanded_vocabulary(bundled_chat: Path, tmp_path: Path) -> None:
    """New words get ids after those of the control tokens, which keep theirs."""
    import base64

    tokenizer = load_tokenizer(bundled_chat)
    first = max(tokenizer.decoder) + 1
    extra = tmp_path / "extra.tiktoken"
    merged = [b"xq", b"xqz", b"xqzxqz"]
    extra.write_text("".join(f"{base64.b64encode(word).decode()} {first + i}\n" for i, word in enumerate(merged)))
    expanded = QWenTokenizer(bundled_chat / "qwen.tiktoken", extra_vocab_file=extra)
    fast = fast_tokenizer(expanded)
    for text in ("xq xqz xqzxqz<|im_end|>xqzxq", "<|im_start|>user\nHello<|im_end|>", " xqzxqzxqz"):
        ids = expanded(text)["input_ids"]
        assert fast.encode(text).ids == ids
        assert (max(ids) >= first) == ("x" in text)


# ---- GGUF ----


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory):
    """llama.cpp's server running the bundled chat model."""
    import xllamacpp

    path = tmp_path_factory.mktemp("gguf") / "chat.gguf"
    export_gguf(None, path, kind="f32")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 1024
    parameters.cpuparams.n_threads = 1
    return xllamacpp.Server(parameters)


def test_llama_cpp_gives_the_same_replies(llama, replies: list[str]) -> None:
    for question, reply in zip(QUESTIONS, replies, strict=True):
        messages = [{"role": "user", "content": question}]
        answer = llama.handle_chat_completions({"messages": messages, "temperature": 0, "max_tokens": 256})
        choice = answer["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (reply, "stop")


def test_llama_cpp_gives_the_same_tokens_and_prompt(llama, chat) -> None:
    def post(path: str, body: dict) -> dict:
        request = urllib.request.Request(f"{llama.listening_address}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    tokenizer = chat[1]
    texts = [text for text in random_texts(300) if unicodedata.is_normalized("NFC", text) and "\x00" not in text]
    texts = [text for text in texts if all(unicodedata.category(letter) != "Cn" for letter in text)]
    assert len(texts) > 30
    for text in texts:
        assert post("/tokenize", {"content": text, "parse_special": True})["tokens"] == tokenizer(text)["input_ids"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert post("/apply-template", {"messages": messages})["prompt"] == expected


@pytest.mark.parametrize(("kind", "bits"), [("f32", 32), ("f16", 16), ("bf16", 16), ("q8_0", 8.5), ("q4_0", 5.85)])
def test_gguf_weight_types(kind: str, bits: float, chat, tmp_path: Path) -> None:
    import gguf
    from gguf.quants import dequantize

    export_gguf(None, tmp_path / "x.GGUF", kind=kind)
    size = (tmp_path / "x.GGUF").stat().st_size
    parameters = sum(parameter.numel() for parameter in chat[0].parameters())
    assert math.isclose(size, parameters * bits / 8, rel_tol=0.06)
    for tensor in gguf.GGUFReader(tmp_path / "x.GGUF").tensors:
        if tensor.name in ("output.weight", "blk.2.attn_qkv.weight"):
            name = {"output.weight": "lm_head", "blk.2.attn_qkv.weight": "transformer.h.2.attn.c_attn"}[tensor.name]
            weight = chat[0].get_submodule(name).weight.detach()
            error = (torch.tensor(dequantize(tensor.data, tensor.tensor_type)) - weight).norm() / weight.norm()
            assert error < {"f32": 1e-9, "f16": 1e-3, "bf16": 1e-9, "q8_0": 0.01, "q4_0": 0.12}[kind]


# ---- input checkpoints ----


@pytest.fixture
def source(tiny_chat_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_chat_checkpoint, tmp_path / "source")


def test_pickled_weights(source: Path, tmp_path: Path) -> None:
    """Early checkpoints have .bin files, which may contain tables that follow from the config."""
    export_qwen2(source, tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    torch.save(tensors | {"transformer.rotary_emb.inv_freq": torch.ones(16)}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    export_qwen2(source, tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.process
def test_export_needs_less_memory_than_two_files(tmp_path: Path, source: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 4, "intermediate_size": 65536}
    (source / "config.json").write_text(json.dumps(config))
    model = QWenLMHeadModel(QWenConfig(**config)).float()
    (source / "model.safetensors").unlink()
    write_shards(source, model.state_dict(), count=4)
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert largest > 25e6
    script = """if True:
        import resource, sys
        from qwen.export import export_gguf, export_qwen2
        export_qwen2(sys.argv[1], sys.argv[2] + "/warm")
        peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
        before = peak()
        export_qwen2(sys.argv[3], sys.argv[2] + "/out")
        between = peak()
        export_gguf(sys.argv[3], sys.argv[2] + "/out.gguf", kind="f16")
        print(between - before, peak() - before)
    """
    warm_up = str(ROOT / "checkpoints" / "qwen-tiny-base")
    command = [sys.executable, "-c", script, warm_up, str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1000:]
    assert all(int(number) < 2 * largest for number in done.stdout.split()), (done.stdout, largest)


def change_config(source: Path, **fields) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | fields))


def test_unsupported_and_inconsistent_checkpoints(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    name = "transformer.h.1.mlp.c_proj.bias"
    save_file(tensors | {name: torch.ones(64)}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is not zero"):
        export_qwen2(source, out)
    save_file({k: v for k, v in tensors.items() if "h.1.mlp.w2" not in k}, source / "model.safetensors")
    for write in (lambda: export_qwen2(source, out), lambda: export_gguf(source, tmp_path / "o.gguf")):
        with pytest.raises(CheckpointError, match=r"transformer.h.1.mlp.w2.weight is missing from the weight files"):
            write()
    save_file(tensors, source / "model.safetensors")
    for fields, usual, text in (
        ({"rotary_pct": 0.5}, {"rotary_pct": 1.0}, "rotate all channels"),
        ({"scale_attn_weights": False}, {"scale_attn_weights": True}, "scale_attn_weights false"),
        ({"intermediate_size": 128}, {"intermediate_size": 256}, "h.0.mlp.w1.weight has the shape"),
        ({"vocab_size": 600}, {"vocab_size": 512}, "wte.weight has the shape"),
        ({"vocab_size": 300}, {"vocab_size": 512}, "has 474 tokens, but vocab_size in its config.json is 300"),
        ({"num_hidden_layers": 1}, {"num_hidden_layers": 2}, "have 2 layers, but config.json has num_hidden_layers 1"),
    ):
        change_config(source, **fields)
        for write in (lambda: export_qwen2(source, out), lambda: export_gguf(source, tmp_path / "o.gguf")):
            with pytest.raises((ValueError, CheckpointError), match=text):
                write()
        change_config(source, **usual)
    change_config(source, use_dynamic_ntk=False)
    with pytest.raises(ValueError, match="100000 tokens exceed the 64"):
        export_gguf(source, tmp_path / "o.gguf", max_length=100000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_malicious_weight_files(source: Path, tmp_path: Path) -> None:
    """An index that points outside the folder, and a pickle that contains more than tensors."""
    (source / "model.safetensors").unlink()
    for weight_map in ({"x": "/etc/passwd"}, {"x": "../model.safetensors"}, {"x": 5}, {"x": ["a"]}, [], {}):
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="does not list weight files in its folder"):
            export_qwen2(source, tmp_path / "out")
    (source / "model.safetensors.index.json").unlink()
    torch.save({"x": Path("/")}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not hold a dict of tensors"):
        export_qwen2(source, tmp_path / "out")


def test_large_weight_files_are_split(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qwen.export.qwen2 as qwen2

    export_qwen2(source, tmp_path / "whole")
    monkeypatch.setattr(qwen2, "_MAX_SHARD_BYTES", 100_000)
    export_qwen2(source, tmp_path / "split")
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert all((tmp_path / "split" / file).stat().st_size < 250_000 for file in files)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    split = {name: tensor for file in files for name, tensor in load_file(tmp_path / "split" / file).items()}
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_base_model_replaces_a_chat_model(source: Path, bundled_base: Path, tmp_path: Path) -> None:
    export_qwen2(source, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").touch()
    export_qwen2(bundled_base, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert (tmp_path / "out" / "notes.txt").exists()
    (source / "generation_config.json").unlink()
    assert "Exported as a base model" in export_qwen2(source, tmp_path / "unknown")[1]


def test_window_attention_and_config_of_the_first_release(source: Path, tmp_path: Path) -> None:
    change_config(source, use_window_attn=True)
    assert "Exact up to 32 tokens" in (notes := export_qwen2(source, tmp_path / "windows"))[0]
    assert "Window attention, enabled in config.json, is left out." in notes
    old = {"n_embd": 64, "n_layer": 2, "n_head": 2, "kv_channels": 32, "ffn_hidden_size": 256, "n_positions": 128}
    old |= {"model_type": "qwen", "seq_length": 64, "padded_vocab_size": 512, "vocab_size": 474}
    (source / "config.json").write_text(json.dumps(old))
    assert export_qwen2(source, tmp_path / "old")[0].startswith("Exact up to 128 tokens: this model uses neither")
    ids = torch.randint(0, 400, (1, 100), generator=torch.Generator().manual_seed(0))
    ours = load_model(source, cpu_only=True, fp32=True)[0]
    torch.testing.assert_close(logits(as_qwen2(tmp_path / "old"), ids), logits(ours, ids), atol=1e-4, rtol=0)


def test_tied_embeddings(source: Path, tmp_path: Path) -> None:
    import gguf

    change_config(source, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export_qwen2(source, tmp_path / "out")
    qwen2 = as_qwen2(tmp_path / "out")
    assert torch.equal(qwen2.lm_head.weight, tensors["transformer.wte.weight"])
    export_gguf(source, tmp_path / "out.gguf", kind="f32")
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert (written["output.weight"] == written["token_embd.weight"]).all()


# ---- the command ----


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        try:
            code = export.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_command(run, source: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    code, stdout, stderr = run("-c", source, "-o", out)
    assert (code, stdout) == (0, f"{out}\n")
    assert stderr.startswith("Exact up to 64 tokens")
    code, stdout, stderr = run("-c", source, "-o", out)
    assert (code, stdout) == (1, "")
    assert f"{out} is not empty" in stderr
    assert "--overwrite" in stderr
    assert run("-c", source, "-o", out, "--overwrite", "--max-length", 200)[0] == 0
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 200
    assert run("-c", source, "-o", file, "--type", "q8_0")[:2] == (0, f"{file}\n")
    assert "already exists" in run("-c", source, "-o", file)[2]
    assert run("-c", source, "-o", file, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "{tmp}/nowhere"], "There is no folder '{tmp}/nowhere'"),
        (["-c", "{tmp}/adapter", "-o", "{tmp}/out"], "python finetune/merge_lora.py {tmp}/adapter MERGED"),
        (["-o", "{tmp}/out", "--type", "q8_0"], "--type is for GGUF"),
        (["-o", "{tmp}/x.gguf", "--type", "q9"], "Unknown GGUF weight type 'q9': use one of f32, f16"),
        (["-o", "{tmp}/out", "--max-length", "9999999999"], "Invalid length 9999999999"),
        (["-o", "{tmp}/folder.gguf"], "{tmp}/folder.gguf is a folder. Give the path of a file."),
        (["-o", "{tmp}/no/x.gguf"], "Cannot write x.gguf: the folder {tmp}/no does not exist."),
        (["-o", "{tmp}/out", "--max-length", "-5"], "Invalid length -5"),
        (["-c", "{source}", "-o", "{source}"], "holds the source model"),
        (["-o", "{tmp}/file"], "{tmp}/file is a file"),
    ],
)
def test_command_errors(arguments: list[str], message: str, run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    base = {"base_model_name_or_path": str(source), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / "file").touch()
    (tmp_path / "folder.gguf").mkdir()
    before = sorted(tmp_path.rglob("*"))
    paths = {"tmp": tmp_path, "source": source}
    code, stdout, stderr = run(*(argument.format(**paths) for argument in arguments))
    assert code in (1, 2)
    assert not stdout
    assert message.format(**paths) in stderr
    assert "Traceback" not in stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_ctrl_c_leaves_nothing(out: str, run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qwen.checkpoint.weights as weights

    def interrupted(self, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.Weights, "__getitem__", interrupted)
    code, stdout, stderr = run("-c", source, "-o", tmp_path / out)
    assert (code, stdout, stderr.strip()) == (130, "", "Stopped. Nothing was written.")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
