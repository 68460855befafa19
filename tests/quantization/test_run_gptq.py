"""Quantization: the folder is complete and matches the float model; an interrupted run leaves no trace."""

import base64
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import GPTQConfig

import qwen.quantization
from qwen.checkpoint.loading import BUNDLED_BASE, BUNDLED_CHAT_INT4, check_checkpoint, load_model, load_tokenizer
from qwen.data.conversation_file import ConversationFile
from qwen.model.configuration_qwen import QWenConfig
from qwen.model.modeling_qwen import QWenLMHeadModel
from qwen.quantization import calibration_samples, quantize, writer
from qwen.quantization.gptqmodel_runner import run_gptq as run_gptqmodel
from qwen.quantization.gptqmodel_runner import undo_side_effects
from qwen_cli import quantize as run_gptq
from tests.support import ROOT
from tests.support.command_line import call_main
from tests.support.processes import run_script

DATA = ROOT / "examples" / "identity.json"
WORD = "zyzzyva"
QUESTION, ANSWER = "What is 47 + 38?", "47 + 38 = 85."
INDEX = "model.safetensors.index.json"
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


def small_config(bundled: Path, **settings: object) -> QWenConfig:
    config = QWenConfig.from_pretrained(bundled)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    config.update(shape | settings)
    return config


@pytest.fixture(scope="module")
def source(bundled_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with everything unusual: shards, bfloat16 and its flag, biases, an added token, an unknown field
    in its configuration."""
    folder = tmp_path_factory.mktemp("float") / "model"
    extra = folder.parent / "extra.tiktoken"
    tokens = len(load_tokenizer(bundled_chat))
    extra.write_text(f"{base64.b64encode(WORD.encode()).decode()} {tokens}\n")
    torch.manual_seed(0)
    model = QWenLMHeadModel(small_config(bundled_chat, no_bias=False, vocab_size=tokens + 1))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
    load_tokenizer(bundled_chat, extra_vocab_file=extra).save_pretrained(folder)
    shutil.copyfile(bundled_chat / "generation_config.json", folder / "generation_config.json")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"onnx_safe": None, "bf16": True}), encoding="utf-8")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def samples(bundled_chat: Path) -> list[list[int]]:
    return calibration_samples(ConversationFile(DATA), load_tokenizer(bundled_chat), 128, count=16)


@pytest.fixture(scope="module")
def int4(source: Path, samples: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "deep" / "model"
    outcome = quantize(source, folder, samples, bits=4, group_size=64, cpu_only=True)
    assert outcome.folder == folder
    assert set(outcome.losses) == set(LINEARS)
    assert all(0 < loss.mean <= loss.worst and 0 <= loss.worst_layer < 2 for loss in outcome.losses.values())
    assert outcome.bytes_after == (folder / "model.safetensors").stat().st_size < outcome.bytes_before
    return folder


@pytest.fixture
def main(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs run_gptq.py in this process. Returns the exit code and standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        code = call_main(run_gptq.main, "run_gptq.py", *arguments)
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return call


@contextlib.contextmanager
def handling(number: int, handler: Callable | int) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@torch.no_grad()
def relative_error(quantized: Path, exact: Path, samples: list[list[int]]) -> float:
    """Relative error of the logits, with the kernel that computes exactly what the file says."""
    bits = QWenConfig.from_pretrained(quantized).quantization_config["bits"]
    kernel = GPTQConfig(bits=bits, backend="torch")
    near = QWenLMHeadModel.from_pretrained(quantized, quantization_config=kernel, device_map="cpu", dtype=torch.float32)
    right, _ = load_model(exact, cpu_only=True, dtype=torch.float32)
    ids = torch.tensor([max(samples, key=len)])
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than everything else
        expected = right(ids).logits
        return ((near.eval()(ids).logits - expected).norm() / expected.norm()).item()


def content(folder: Path) -> dict[str, bytes | None]:
    """Contents of the files in a folder; None for subfolders."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


# ---- the folder ----


@pytest.mark.slow
def test_configuration_extends_that_of_the_source(source: Path, int4: Path) -> None:
    config, before = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (int4, source))
    assert config.pop("quantization_config") == {
        "bits": 4,
        "damp_percent": 0.01,
        "desc_act": False,
        "group_size": 64,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    }
    assert config == before | {"dtype": "float16", "bf16": False}
    assert "onnx_safe" in config
    assert (int4 / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()


def test_folder_is_complete_and_readable(source: Path, int4: Path) -> None:
    names = {path.name for path in int4.iterdir()}
    weights = {path.name for path in source.iterdir() if ".safetensors" in path.name}
    assert names == {path.name for path in source.iterdir()} - weights | {"model.safetensors"}
    assert {"modeling_qwen.py", "configuration_qwen.py", "tokenization_qwen.py", "qwen.tiktoken"} < names
    mask = os.umask(0)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in int4.iterdir())
    tokenizer = load_tokenizer(int4)
    assert tokenizer.get_vocab() == load_tokenizer(source).get_vocab()
    assert len(tokenizer.encode(WORD)) == 1


def test_tensors_have_the_published_layout(int4: Path) -> None:
    with safe_open(int4 / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(int4 / "model.safetensors")
    for layer in range(2):
        for linear in LINEARS:
            name = f"transformer.h.{layer}.{linear}"
            rows, columns = 128, 384 if linear == "attn.c_attn" else 128
            assert tensors.pop(f"{name}.qweight").shape == (rows // 8, columns)
            assert torch.equal(tensors.pop(f"{name}.g_idx"), torch.arange(rows, dtype=torch.int32) // 64)
            zeros = tensors.pop(f"{name}.qzeros")
            assert zeros.shape == (rows // 64, columns // 8)
            assert (zeros == 0x77777777).all()  # 8, minus the 1 that this layout subtracts
            assert tensors[f"{name}.scales"].shape == (rows // 64, columns)
            assert tensors[f"{name}.bias"].any()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(tensors) == 2 * (2 * len(LINEARS) + 2) + 3


# ---- the model ----


@pytest.mark.slow
def test_int4_has_a_small_error(source: Path, int4: Path, samples: list[list[int]]) -> None:
    assert 0.001 < relative_error(int4, source, samples) < 0.05


@pytest.mark.slow
def test_int8_has_a_tiny_error(bundled_chat: Path, samples: list[list[int]], tmp_path: Path, main) -> None:
    """From a .bin file in float32 to shards, over an existing model, through the command line."""
    torch.manual_seed(0)
    model = QWenLMHeadModel(small_config(bundled_chat, num_hidden_layers=1))
    old, out = tmp_path / "old", tmp_path / "out"
    model.config.save_pretrained(old)
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(bundled_chat / name, old / name)
    shutil.copytree(BUNDLED_CHAT_INT4, out)
    (out / "notes.txt").write_text("mine")

    arguments = ("--model-name-or-path", old, "--data-path", DATA, "--out-path", out, "--bits", 8, "--group_size", 128)
    arguments = (*arguments, "--max-len", 40, "--samples", 20, "--max_shard_size", "600KB", "--cpu-only")
    assert "--overwrite" in main(*arguments)[1]
    assert (out / "model.safetensors").is_file()
    code, text = main(*arguments, "--overwrite")
    assert code == 0, text
    assert "20 of 48 conversations" in text
    assert "--max_len 40: their ends are cut off" in text
    assert "mlp.c_proj" in text
    assert f"cli_demo.py -c {out}" in text
    weights = sorted(path.name for path in out.iterdir() if path.name.startswith("model") and path.suffix != ".py")
    assert weights[-1] == INDEX
    assert len(weights) > 2
    assert "model.safetensors" not in weights
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob(".*"))
    assert 1e-5 < relative_error(out, old, samples) < 0.01


@pytest.mark.process
def test_script_output_loads_without_this_repository(tmp_path: Path, chat_in_isolated_python: Callable) -> None:
    folder = tmp_path / "output_qwen_int4"
    toy = run_script(ROOT / "run_gptq.py", "--samples", "6", folder=tmp_path)
    assert toy.returncode == 0, toy.stderr
    assert toy.stdout == ""
    lines = toy.stderr.splitlines()
    assert lines[0].startswith("The bundled toy to 4 bits, calibrated with 6 of 128 conversations: ")
    assert lines[1:7] == [f"Quantizing layer {layer} of 6" for layer in range(1, 7)]
    assert len(lines) == 7 + 6 + 2, "GPTQModel's own output is hidden"
    assert list(tmp_path.iterdir()) == [folder]
    assert chat_in_isolated_python(folder, QUESTION) == ANSWER


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose result is compared")
def test_gpu_matches_the_cpu(source: Path, int4: Path, samples: list[list[int]], tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", samples, group_size=64)
    ours, theirs = relative_error(tmp_path / "out", source, samples), relative_error(int4, source, samples)
    assert ours == pytest.approx(theirs, rel=0.1)


# ---- calibration ----


def test_conversations_are_sampled_and_truncated(bundled_chat: Path) -> None:
    tokenizer, file = load_tokenizer(bundled_chat), ConversationFile(DATA)
    few = calibration_samples(file, tokenizer, 50, count=10)
    assert few == calibration_samples(file, tokenizer, 50, count=10) != calibration_samples(file, tokenizer, 50, 10, 1)
    every = calibration_samples(file, tokenizer, 50, count=1000)
    assert len(few) == 10
    assert len(every) == len(file) == 48
    assert all(ids in every for ids in few)
    assert max(map(len, every)) == 50
    assert tokenizer.decode(few[0]).startswith("<|im_start|>system\n")
    with pytest.raises(ValueError, match="at least 1"):
        calibration_samples(file, tokenizer, 50, count=0)


def test_few_tokens_are_noted(source: Path, tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen.quantization, "quantize", stop)
    few = ("--samples", 1, "--max_len", 16, "--out_path", tmp_path / "out")
    code, text = main("--model_name_or_path", source, "--data_path", DATA, *few)
    assert code == 130
    assert "16 tokens" in text
    assert "up to 128 inputs" in text


# ---- errors ----


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("--model_name_or_path {adapter} --data_path {data}", 1, "python finetune/merge_lora.py {adapter} "),
        ("--model_name_or_path {int4} --data_path {data}", 1, "is quantized already"),
        ("--model_name_or_path {nothing} --data_path {data}", 1, "There is no folder"),
        ("--model_name_or_path {other} --data_path {data}", 1, "of type 'llama'"),
        ("--model_name_or_path {half} --data_path {data}", 1, "has no weights"),
        ("--model_name_or_path {source}", 2, "--data_path is missing"),
        ("--model_name_or_path {source} --data_path {data} --out_path {source}", 1, "holds the source model"),
        (
            "--model_name_or_path {source} --data_path {data} --group-size 256",
            1,
            "the 128 inputs of attn.c_attn: use 32",
        ),
        ("--model_name_or_path {narrow} --data_path {data}", 1, "multiples of 32"),
        ("--data_path {nothing}", 1, "does not exist"),
        ("--data_path {empty}", 1, "is empty"),
        ("--data_path {wrong}", 1, "conversations"),
        ("--group-size 100", 1, "use one of 32, 64"),
        ("--max-shard-size 2", 1, "Invalid size '2'"),
        ("--max-shard-size much", 1, "for example 2GB"),
        ("--out_path {data}", 1, "is a file"),
        ("--out_path {data}/out", 1, "cannot be written to"),
        ("--out_path {full}", 1, "is not empty"),
        ("--out_path {full} --overwrite", 1, "holds no model that can be replaced"),
        ("--out_path {service} --overwrite", 1, "holds no model that can be replaced"),
        ("--out_path {torn} --overwrite", 1, "model.safetensors.index.json of {torn} is not valid JSON"),
        ("--out_path {nameless} --overwrite", 1, "model.safetensors.index.json of {nameless} does not list the weight"),
        ("--out_path {killed}", 1, "{killed}/.unfinished-abc/kept is the finished model of another run"),
        ("--bits 3", 2, "--bits"),
        ("--max_len 2", 2, "--max_len is 2"),
        ("--samples 0", 2, "--samples is 0"),
        ("--damp 0.1", 2, "--damp"),
    ],
)
def test_mistakes_are_explained_before_loading(
    arguments: str, code: int, expected: str, source: Path, bundled_chat: Path, tmp_path: Path, main, monkeypatch
) -> None:
    def other(name: str, config: dict) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    ours = json.loads((source / "config.json").read_text(encoding="utf-8"))
    places = {
        "data": DATA,
        "source": source,
        "int4": BUNDLED_CHAT_INT4,
        "nothing": tmp_path / "nothing",
        "adapter": adapter(tmp_path / "adapter"),
        "other": other("other", {"model_type": "llama"}),
        "narrow": other("narrow", ours | {"hidden_size": 40, "kv_channels": 20}),
        "half": tmp_path / "half",
        "empty": tmp_path / "empty.json",
        "wrong": tmp_path / "wrong.json",
        "full": tmp_path / "full",
        "service": other("service", {"port": 80}),
        "torn": other("torn", ours),
        "nameless": other("nameless", ours),
        "killed": tmp_path / "killed",
    }
    places["half"].mkdir()
    shutil.copyfile(source / "config.json", places["half"] / "config.json")
    places["full"].mkdir()
    (places["full"] / "thesis.tex").touch()
    for name, text in (("torn", '{"weight_map": {'), ("nameless", '{"weight_map": {"lm_head.weight": 1}}')):
        (places[name] / INDEX).unlink()
        (places[name] / INDEX).write_text(text)
    (places["killed"] / ".unfinished-abc" / "kept").mkdir(parents=True)
    places["empty"].touch()
    places["wrong"].write_text('[{"text": "no turns"}]')
    out = tmp_path / "out"
    monkeypatch.setattr(qwen.Checkpoint, "load", stop)  # it would be slow
    words = arguments.format(**places).split()
    found, text = main(*words, *(() if "--out_path" in words else ("--out_path", out)))
    assert found == code, text
    assert expected.format(**places) in text
    assert not out.exists()
    assert code == 2 or len(text.strip().splitlines()) <= 2


def stop(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_full_disk_is_reported_before_and_after(
    source: Path, samples: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
        with pytest.raises(OSError, match=r"it takes 1.96 MB, and 1 MB are free"):
            quantize(source, tmp_path / "a" / "b", samples, group_size=64, cpu_only=True)
    monkeypatch.setattr(writer, "save_torch_state_dict", fail)
    here = os.getcwd()
    with pytest.raises(OSError, match="could not be written: No space left"):
        quantize(source, tmp_path / "a" / "b", samples, group_size=64, cpu_only=True)
    assert os.getcwd() == here
    assert not list(tmp_path.iterdir())


def test_model_beyond_float16_is_rejected(bundled_chat: Path, samples: list[list[int]], tmp_path: Path) -> None:
    model, tokenizer = load_model(bundled_chat, cpu_only=True)
    tokenizer.save_pretrained(tmp_path / "model")
    weight = model.transformer.h[0].mlp.w1.weight
    for large, name in ((1e6, "transformer.h.0.mlp.w1.weight"), (6e4, "its logits")):
        with torch.no_grad():
            weight.fill_(large)
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match=f"leaves the range of float16.*{name}"):
            quantize(tmp_path / "model", tmp_path / "out", samples, cpu_only=True)
    with pytest.raises(ValueError, match="no samples"):
        quantize(tmp_path / "model", tmp_path / "out", [], cpu_only=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_models_with_windows_are_quantized(bundled_chat: Path, samples: list[list[int]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "source"
    model = QWenLMHeadModel(small_config(bundled_chat, use_window_attn=True, window_sizes=[16, 64]))
    model.save_pretrained(source)
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(bundled_chat / name, source / name)
    assert json.loads((source / "config.json").read_text(encoding="utf-8"))["use_window_attn"]
    assert max(map(len, samples)) > 64
    outcome = quantize(source, tmp_path / "out", samples[:2], bits=4, group_size=64, cpu_only=True)
    assert set(outcome.losses) == set(LINEARS)


def test_base_models_are_quantized_too(samples: list[list[int]], tmp_path: Path) -> None:
    checked = qwen.quantization.check(BUNDLED_BASE, tmp_path / "out")
    assert checked.num_hidden_layers == 6


@pytest.mark.process
def test_ctrl_c_leaves_the_folder_unchanged(int4: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(int4, tmp_path / "out"))
    process = subprocess.Popen(
        [sys.executable, ROOT / "run_gptq.py", "--out_path", out, "--overwrite"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("Quantizing layer 1"):
            break
    assert list(out.glob(".*")), "it is running"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (130, "")
    assert errors.endswith("\nStopped. Nothing was written.\n")
    assert "Traceback" not in errors  # threads of libraries may print messages at exit
    assert content(out) == content(int4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_like_ctrl_c(number: int, tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--samples", 1, "--out_path", tmp_path / "out")
    monkeypatch.setattr(qwen.quantization, "run_gptq", lambda *arguments: signal.raise_signal(number))
    with handling(number, lambda *arguments: None):
        code, text = main(*few)
    assert code == 130
    assert text.endswith("\nStopped. Nothing was written.\n")
    assert not list(tmp_path.iterdir())


def test_hidden_states_beyond_float16_are_rejected(bundled_chat: Path, samples: list[list[int]]) -> None:
    """GPTQModel would silently round these matrices."""
    model = QWenLMHeadModel(small_config(bundled_chat)).half().eval()
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"leaves the range of float16.* see its hidden states"):
        run_gptqmodel(model, samples[:2], {"bits": 4, "group_size": 64}, cpu_only=True, progress=None)


def test_nohup_is_respected(tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang_up(*arguments: object) -> None:
        signal.raise_signal(signal.SIGHUP)
        raise ValueError("it goes on")

    monkeypatch.setattr(qwen.quantization, "run_gptq", hang_up)
    with handling(signal.SIGHUP, signal.SIG_IGN):
        assert main("--samples", 1, "--out_path", tmp_path / "out")[1].endswith("it goes on\n")


# ---- the memory ----


def fill_python() -> None:
    bytearray(1 << 62)


def fill_torch() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def fill_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (fill_python, ("main memory is full", "--samples", "--max_len")),
        (fill_torch, ("main memory is full", "--samples", "--max_len")),
        (fill_gpu, ("memory of the GPU is full", "--samples", "--max_len", "--cpu-only")),
    ],
)
def test_full_memory_is_explained(
    fill: Callable[[], None], expected: tuple[str, ...], tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen.quantization, "run_gptq", lambda *arguments: fill())
    code, text = main("--samples", 1, "--out_path", tmp_path / "out")
    assert code == 1, text
    assert all(word in text.splitlines()[-1] for word in expected), text
    assert not list(tmp_path.iterdir())


def test_other_torch_errors_are_raised(
    source: Path, samples: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen.quantization, "run_gptq", lambda *arguments: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        quantize(source, tmp_path / "out", samples, group_size=64)


def test_model_larger_than_memory_is_rejected(tmp_path: Path, main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    code, text = main("--out_path", tmp_path / "out")
    assert code == 1
    assert "it takes 11.6 MB in 16 bits, and this machine has 4.1 MB" in text


# ---- side effects of GPTQModel ----


@pytest.mark.parametrize("workers", [None, "3"])
def test_side_effects_are_undone(
    workers: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
    if workers is not None:
        monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", workers)
    level = logging.getLogger().level
    for error in (None, KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt), undo_side_effects():
            assert int(os.environ["GPTQMODEL_CPU_WORKERS"]) >= 2
            logging.getLogger().setLevel(1)
            Path("log.txt").write_text("its log")
            work = Path.cwd()
            print("its logo")
            if error is not None:
                raise error
        assert Path.cwd() == tmp_path != work
        assert not work.exists()
        assert not list(tmp_path.iterdir())
        assert logging.getLogger().level == level
        assert os.environ.get("GPTQMODEL_CPU_WORKERS") == workers
        assert capsys.readouterr().out == ""


# ---- moving the result into place ----


def test_result_that_cannot_be_moved_is_kept(
    source: Path, samples: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen.quantization, "run_gptq", lambda *arguments: [])
    out = Path(shutil.copytree(source, tmp_path / "out"))
    (out / "modeling_qwen.py").unlink()
    (out / "modeling_qwen.py").mkdir()  # in the place of a file
    before = content(out)
    options = {"group_size": 64, "cpu_only": True, "overwrite": True}
    with pytest.raises(OSError, match=r"kept in .*/kept: it could not be moved to .*modeling_qwen.py") as failure:
        quantize(source, out, samples, **options)
    work = next(out.glob(".unfinished-*"))
    assert f"{work / 'kept'}:" in str(failure.value)
    assert not list((work / "old").iterdir())
    check_checkpoint(work / "kept")
    with pytest.raises(OSError, match=f"{work}/kept is the finished model of another run"):
        quantize(source, out, samples, **options)
    shutil.rmtree(work)
    assert content(out) == before


def test_index_broken_meanwhile_loses_nothing(
    source: Path, samples: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(source, tmp_path / "out"))
    monkeypatch.setattr(qwen.quantization, "run_gptq", lambda *arguments: (out / INDEX).write_text("{") and [])
    with pytest.raises(OSError, match=r"kept in .* is not valid JSON"):
        quantize(source, out, samples, group_size=64, cpu_only=True, overwrite=True)
    kept = next(out.glob(".unfinished-*/kept"))
    assert (kept / "model.safetensors").is_file()
    shutil.rmtree(kept.parent)
    assert content(out) == content(source) | {INDEX: b"{"}


def test_signals_wait_until_all_files_are_moved(
    source: Path, samples: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is ignored, since it would claim that nothing was written; a SIGTERM handler is called afterwards."""
    out = Path(shutil.copytree(source, tmp_path / "out"))
    came, rename = [], Path.rename

    def rename_and_send(here: Path, there: Path) -> None:
        rename(here, there)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert not came

    monkeypatch.setattr(qwen.quantization, "run_gptq", lambda *arguments: [])
    monkeypatch.setattr(Path, "rename", rename_and_send)
    with handling(signal.SIGTERM, lambda number, frame: came.append(sorted(out.iterdir()))):
        outcome = quantize(source, out, samples, group_size=64, cpu_only=True, overwrite=True)
    names = sorted(path for path in out.iterdir())
    assert came[0] == names
    assert [path.name for path in names if path.suffix == ".safetensors"] == ["model.safetensors"]
    assert outcome.bytes_after == (out / "model.safetensors").stat().st_size
    assert not list(out.glob(".*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
