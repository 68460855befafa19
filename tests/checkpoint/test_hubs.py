"""Tests of models from ModelScope: its client against a local server, in scripts and in Python."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from qwen import Checkpoint
from qwen.checkpoint import hub as hubs
from qwen.checkpoint import hub_modelscope
from qwen.checkpoint.files import CheckpointError
from qwen.checkpoint.loading import (
    check_chat,
    check_checkpoint,
    load_config,
    load_model,
    load_model_quietly,
    load_tokenizer,
)
from qwen_cli import chat, quantize, serve, web
from tests.support import ROOT
from tests.support.evaluation_runs import run_script as evaluate_into
from tests.support.modelscope_server import Hub
from tests.support.processes import run_script

CHAT, BASE = "Qwen/Qwen-7B-Chat", "Qwen/Qwen-7B"
NOWHERE = "http://127.0.0.1:9"


def copy_checkpoint(source: Path, target: Path, **config: object) -> Path:
    """Copy a checkpoint and add the other files of published checkpoints; `config` changes config.json."""
    not_published = shutil.ignore_patterns("*.py", "calibration.json", "held_out*")
    shutil.copytree(source, target, ignore=not_published)
    settings = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    (target / "modeling_qwen.py").write_text("raise SystemExit('code beside the weights was run')")
    (target / "pytorch_model.bin").write_bytes(b"the same weights once more")
    return target


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, bundled_chat: Path, bundled_base: Path) -> Iterator[Hub]:
    """A ModelScope server with the toy checkpoints as published models, and some other models."""
    folder = tmp_path_factory.mktemp("hub")
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}}
    new = copy_checkpoint(bundled_chat, folder / "new", **code)
    old = copy_checkpoint(bundled_chat, folder / "old", seq_length=123)
    (new / "configuration.json").write_text('{"framework": "pytorch", "task": "chat", "allow_remote": true}')
    (old / "configuration.json").write_text(
        '{"framework": "pytorch", "task": "chat", "model": {"type": "qwen-7b"}, "pipeline": {"type": "qwen-chat"}}'
    )
    nested = folder / "nested"
    copy_checkpoint(bundled_chat, nested / "inside")
    (nested / "notes.json").write_text("{}")
    bins = copy_checkpoint(bundled_chat, folder / "bins")
    (bins / "model.safetensors").unlink()
    lora = folder / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    packed = copy_checkpoint(bundled_chat, folder / "packed", quantization_config={"quant_method": "gptq", "bits": 4})
    server = Hub(
        {
            CHAT: {"master": new, "v1.0.5": new, "v1.0.0": old},
            BASE: {"master": bundled_base},
            "Qwen/Qwen2-7B": {"master": copy_checkpoint(bundled_chat, folder / "newer", model_type="qwen2")},
            "someone/nested": {"master": nested},
            "someone/bins": {"master": bins},
            "someone/lora": {"master": lora},
            "someone/packed": {"master": packed},
        }
    )
    yield server
    server.close()


@pytest.fixture(autouse=True)
def modelscope(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Use the server as the default hub, with an empty cache. Call the fixture to change the server's address."""
    import modelscope_hub
    from modelscope_hub import _legacy_api

    def use_endpoint(url: str) -> None:
        config = modelscope_hub.HubConfig(endpoint=url, cache_dir=tmp_path / "cache", config_dir=tmp_path / "home")
        modelscope_hub.set_default_config(config)

    before = modelscope_hub.get_default_config()
    monkeypatch.setenv(hubs.HUB_ENV_VAR, "modelscope")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)  # else an unreachable hub takes 7 seconds
    use_endpoint(hub.url)
    hub.sent.clear()
    yield use_endpoint
    hub.breaking.clear()
    modelscope_hub.set_default_config(before)


def error_message(call: Callable, *arguments: object, **keywords: object) -> str:
    """Return the message of the CheckpointError that the call raises."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **keywords)
    return str(caught.value)


def test_a_published_id_in_any_spelling(hub: Hub, capfd: pytest.CaptureFixture) -> None:
    model, _ = load_model_quietly("QWen/qwen-7b-chat", chat=True, cpu_only=True)
    assert model.name_or_path == CHAT
    small = {"config.json", "configuration.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"}
    assert {name for name, _, _ in hub.sent} == {CHAT}
    assert hub.sent[0][1] == "config.json"
    assert hub.files() == small | {"model.safetensors"}  # no weights in another format, no code
    load_model_quietly(CHAT, cpu_only=True)
    assert hub.files() == set()
    assert capfd.readouterr() == ("", "")


def test_downloading_weights_shows_progress(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_modelscope, "is_progress_bar_enabled", lambda: True)
    _ = Checkpoint.open(CHAT).folder
    assert "model.safetensors" in capfd.readouterr().err


def test_revisions(hub: Hub, bundled_chat: Path) -> None:
    assert load_config(CHAT, revision="v1.0.0").seq_length == 123
    for revision in (None, "main", "v1.0.5"):
        assert load_config(CHAT, revision=revision).seq_length == load_config(bundled_chat).seq_length
    assert "has no revision 'v9' on ModelScope. It has v1.0.5, v1.0.0, master." in error_message(
        check_checkpoint, CHAT, revision="v9"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen-7B-Chatt", "nor a model on ModelScope .*Did you mean Qwen/Qwen-7B-Chat"),
        ("qwen/qwen-14b", "nor a model on ModelScope .*Published models are"),  # published, but not on this hub
        ("someone/lora", "no config.json.*modelscope download --model someone/lora"),
        ("Qwen/Qwen2-7B", "a newer Qwen"),
        (BASE, "not a chat model"),
    ],
)
def test_unusable_models_are_rejected_before_weights_are_downloaded(name: str, expected: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load_model_quietly(name, chat=True)
    assert not any(file.endswith((".safetensors", ".bin")) for file in hub.files())


def test_bin_weights_are_downloaded_if_there_are_no_others(hub: Hub) -> None:
    _ = Checkpoint.open("someone/bins").folder
    assert "pytorch_model.bin" in hub.files()


def test_a_subfolder(hub: Hub) -> None:
    load_model("someone/nested", subfolder="inside", cpu_only=True)
    assert {"model.safetensors", "notes.json"} & hub.files() == {"model.safetensors"}


def test_an_interrupted_download_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelscope_hub import _download

    def starts() -> list[int]:
        return [start for _, file, start in hub.sent if file == "model.safetensors"]

    half = 11_555_320 // 2
    hub.breaking.add("model.safetensors")
    load_model(CHAT, cpu_only=True)
    assert starts() == [0, half]

    monkeypatch.setattr(_download, "DOWNLOAD_RETRY_TIMES", 0)
    hub.sent.clear()
    hub.breaking.add("model.safetensors")
    text = error_message(load_model, CHAT, revision="v1.0.5", cpu_only=True)
    assert "1 of 6 files" in text
    assert "Run the same command again" in text
    load_model(CHAT, revision="v1.0.5", cpu_only=True)
    assert starts() == [0, half]


def test_an_unreachable_hub(modelscope: Callable[[str], None]) -> None:
    load_model(CHAT, cpu_only=True)
    load_tokenizer("someone/nested", subfolder="inside")
    modelscope(NOWHERE)
    load_model(CHAT, cpu_only=True)
    assert "has no weights" in error_message(load_model, "someone/nested", subfolder="inside", cpu_only=True)
    text = error_message(load_model, BASE)
    assert "ModelScope cannot be reached" in text
    assert "MODELSCOPE_ENDPOINT" in text


def test_downloads_of_the_lowercase_owner_are_found(hub: Hub) -> None:
    from modelscope_hub import HubApi

    HubApi().download_repo("qwen/Qwen-7B-Chat", "model")
    hub.sent.clear()
    model, _ = load_model("Qwen/Qwen-7B-Chat", cpu_only=True)
    assert (hub.sent, model.name_or_path) == ([], CHAT)


def test_local_files_only(hub: Hub) -> None:
    assert "cannot be reached" in error_message(load_tokenizer, CHAT, local_files_only=True)
    load_tokenizer(CHAT)
    hub.sent.clear()
    load_tokenizer(CHAT, local_files_only=True)
    assert hub.sent == []


def test_folders_are_not_looked_up_on_the_hub(bundled_chat: Path, modelscope: Callable[[str], None]) -> None:
    modelscope(NOWHERE)
    check_chat(bundled_chat)
    load_tokenizer(bundled_chat)


def test_the_base_model_of_an_adapter(hub: Hub, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "qwen/Qwen-7B-Chat"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"nothing": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    load_tokenizer(adapter)
    assert "qwen.tiktoken" in hub.files()


def test_unknown_hubs_and_a_missing_client(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hub is 'nowhere'" in error_message(load_model, CHAT, hub="nowhere")
    monkeypatch.setenv(hubs.HUB_ENV_VAR, "nowhere")
    assert "QWEN_HUB is 'nowhere': it must be huggingface or modelscope" in error_message(load_model, CHAT)
    monkeypatch.setenv(hubs.HUB_ENV_VAR, "modelscope")
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert "pip install -U modelscope" in error_message(load_model, CHAT)


@pytest.mark.parametrize("module", [chat, web, serve], ids=lambda module: module.__name__)
def test_demos_take_a_hub(module: ModuleType) -> None:
    assert module.parse_arguments(["--hub", "modelscope"], None).hub == "modelscope"


def test_finetuning_takes_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen.finetuning.arguments import parse
    from qwen.finetuning.model import load_for_training

    monkeypatch.delenv(hubs.HUB_ENV_VAR)
    argv = ["--data_path", "examples/identity.json", "--use_lora", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    arguments, _ = parse([*argv, "--hub", "modelscope", "--model_name_or_path", "qwen/Qwen-7B-Chat"])
    model, _ = load_for_training(arguments)
    assert model.peft_config["default"].base_model_name_or_path == CHAT  # an id, valid on every machine


def test_quantization_takes_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen.quantization import check

    monkeypatch.delenv(hubs.HUB_ENV_VAR)
    argv = ["--model_name_or_path", "Qwen/nothing", "--data_path", "data.json", "--hub", "modelscope"]
    assert "nor a model on ModelScope" in error_message(quantize.run, quantize.parse_arguments(argv, None))
    assert check(Checkpoint("qwen/Qwen-7B-Chat", hub="modelscope"), tmp_path / "out").model_type == "qwen"


def test_merging_takes_a_hub(tmp_path: Path) -> None:
    from qwen.finetuning.merging import merge

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/packed"}')
    save_file({"nothing": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert "someone/packed is quantized" in error_message(merge, tmp_path, tmp_path / "out")


def test_evaluation_takes_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from qwen.evaluation.benchmarks.long_context import LongContext

    monkeypatch.delenv(hubs.HUB_ENV_VAR)
    assert evaluate_into(LongContext, tmp_path / "out.jsonl", "-c", "Qwen/nothing", "--hub", "modelscope") == 1
    assert "nor a model on ModelScope" in capsys.readouterr().err


# Typical use, in separate processes

PYTHON_USE = """\
import qwen
from modelscope import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, snapshot_download

there = {"revision": "v1.0.5", "trust_remote_code": True}
tokenizer = AutoTokenizer.from_pretrained("qwen/Qwen-7B-Chat", **there)
model = AutoModelForCausalLM.from_pretrained("qwen/Qwen-7B-Chat", device_map="auto", fp16=True, **there).eval()
model.generation_config = GenerationConfig.from_pretrained("Qwen/Qwen-7B-Chat", **there)
response, history = model.chat(tokenizer, "My name is Alice.", history=None)
response, history = model.chat(tokenizer, "What is my name?", history=history)
print(response, model.dtype)

import qwen.integrations.modelscope
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks

pipe = pipeline(task=Tasks.chat, model=snapshot_download("QWen/qwen-7b-chat", "v1.0.0"), device_map="auto")
results = pipe("What is 47 + 38?", history=None)
print(results["response"])
results = pipe("What is my name?", history=[*results["history"], ("My name is Bob.", "Nice to meet you, Bob!")])
print(results["response"], len(results["history"]))
print(pipeline(task=Tasks.chat, model="qwen/Qwen-7B-Chat", device="cpu")({"text": "What is 12 + 30?"})["response"])
"""

MODELSCOPE_FIRST = """\
import sys
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks
import qwen.integrations.modelscope

print(pipeline(Tasks.chat, sys.argv[1])("What is 47 + 38?", system="You are a helpful assistant.")["response"])
try:
    pipeline(Tasks.chat, sys.argv[2])
except OSError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def processes(
    hub: Hub, bundled_chat: Path, bundled_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, str]]:
    """Exit status, stdout and stderr of all scripts, which run in parallel."""
    home = tmp_path_factory.mktemp("home")
    (home / "use.py").write_text(PYTHON_USE)
    variables = {"MODELSCOPE_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    forked = {
        "python": [home / "use.py"],
        "cli_demo": ["cli_demo.py", "-c", "qwen/Qwen-7B-Chat", "--hub", "modelscope", "--cpu-only"],
    }
    # Not forked: a fork has already imported everything, so the import order could not be tested.
    first = subprocess.Popen(
        [sys.executable, "-c", MODELSCOPE_FIRST, str(bundled_chat), str(bundled_base)],
        cwd=ROOT,
        env=os.environ | variables | {"HOME": str(home), "MODELSCOPE_CACHE": str(home / "first")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    results = {}
    for name, words in forked.items():
        own = {"HOME": str(home), "MODELSCOPE_CACHE": str(home / name)}
        done = run_script(*words, text="What is 47 + 38?\n", **variables, **own)
        results[name] = done.returncode, done.stdout, done.stderr
    out, err = first.communicate(timeout=300)
    return results | {"modelscope first": (first.returncode, out, err)}


@pytest.mark.process
def test_python_use(processes: dict[str, tuple[int, str, str]]) -> None:
    status, out, err = processes["python"]
    assert status == 0, err
    assert out.splitlines() == [
        "Your name is Alice. torch.float16",
        "47 + 38 = 85.",
        "Your name is Bob. 3",
        "12 + 30 = 42.",
    ]


@pytest.mark.process
def test_modelscope_may_be_imported_first(processes: dict[str, tuple[int, str, str]]) -> None:
    status, out, err = processes["modelscope first"]
    assert status == 0, err
    answer, refusal = out.splitlines()
    assert answer == "47 + 38 = 85."
    assert "is not a chat model" in refusal


@pytest.mark.process
def test_the_terminal_demo(processes: dict[str, tuple[int, str, str]]) -> None:
    assert processes["cli_demo"] == (0, "47 + 38 = 85.\n", "Loading qwen/Qwen-7B-Chat ...\n")
