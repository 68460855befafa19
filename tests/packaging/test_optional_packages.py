"""Tests of servers and training without optional packages."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT
from tests.support.processes import IsolatedPython
from tests.support.server_process import ServerProcess

INT4 = ROOT / "checkpoints" / "qwen-tiny-chat-int4"
HI = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "any", "schema": {"type": "object"}}}


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """A function that returns environment variables for a Python process in which packages cannot be imported."""

    def variables(*packages: str) -> dict[str, str]:
        folder = tmp_path / "blocked"
        folder.mkdir()
        blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in packages)
        (folder / "sitecustomize.py").write_text(f"import sys\n{blocked}", encoding="utf-8")
        return {"PYTHONPATH": str(folder)}

    return variables


# The server


@pytest.fixture
def bare_server(start_server: Callable[..., ServerProcess], without: Callable, bundled_chat: Path) -> ServerProcess:
    """A server that has only fastapi, uvicorn, pydantic and sse-starlette."""
    return start_server("-c", str(bundled_chat), python=True, **without("prometheus_client", "llguidance"))


def test_a_server_without_metrics_and_grammars(bare_server: ServerProcess) -> None:
    output = bare_server.output()
    assert output.count("prometheus-client is not installed") == 1
    assert output.count("pip install llguidance") == 1
    assert "Traceback" not in output

    def ask(**fields: object) -> httpx.Response:
        return httpx.post(f"{bare_server.url}/v1/chat/completions", json={"messages": HI, **fields}, timeout=60)

    answer = ask(max_tokens=8)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"]
    assert "data: [DONE]" in ask(max_tokens=8, stream=True).text
    assert ask(max_tokens=8, tools=TOOLS).status_code == 200
    assert ask(max_tokens=8, response_format={"type": "text"}).status_code == 200
    for param, fields in {
        "response_format": {"response_format": {"type": "json_object"}},
        "response_format.json_schema.schema": {"response_format": SCHEMA},
        "tools": {"tools": TOOLS, "tool_choice": "required"},
        "functions": {"functions": [FUNCTION], "function_call": {"name": "look"}},
    }.items():
        for stream in (False, True):
            refusal = ask(stream=stream, **fields)
            assert refusal.status_code == 400, fields
            error = refusal.json()["error"]
            assert error["param"] == param
            assert "`pip install llguidance`, or the extra `serve`" in error["message"]
    strict = [{"type": "function", "function": FUNCTION | {"strict": True}}]
    assert ask(tools=strict).status_code == 400
    missing = httpx.get(f"{bare_server.url}/metrics")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "unknown_url"
    assert "/metrics" not in httpx.get(f"{bare_server.url}/openapi.json").json()["paths"]
    assert "Traceback" not in bare_server.output()


def test_a_server_with_all_packages_logs_nothing_about_them(server: ServerProcess) -> None:
    assert "prometheus" not in server.output()
    assert "llguidance" not in server.output()


# Training


def train(folder: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    question = {"from": "user", "value": "Who are you?"}
    sample = {"id": "0", "conversations": [question, {"from": "assistant", "value": "I am Robin."}]}
    (folder / "data.json").write_text(json.dumps([sample] * 4), encoding="utf-8")
    words = ["--data_path", folder / "data.json", "--output_dir", folder / "out", "--model_max_length", "64"]
    words += ["--max_steps", "2", "--save_strategy", "no", "--use_lora", *arguments]
    return subprocess.run(
        [sys.executable, ROOT / "finetune.py", *words],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.process
def test_training_without_plots(tmp_path: Path, without: Callable) -> None:
    done = train(tmp_path, without("matplotlib", "tensorboard", "tensorboardX"))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert sum("TensorBoard" in line and "`pip install tensorboard`" in line for line in lines) == 1
    assert sum("loss.png is not drawn" in line and "`pip install matplotlib`" in line for line in lines) == 1
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "out").rglob("*.png"))
    assert not list((tmp_path / "out").rglob("events.out.*"))


@pytest.mark.process
def test_training_without_a_required_package(tmp_path: Path, without: Callable) -> None:
    done = train(tmp_path, without("peft"))
    assert done.returncode == 2
    assert "`pip install peft`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# Quantized weights


@pytest.mark.process
def test_the_terminal_demo_answers_from_int4_on_a_cpu(without: Callable) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "cli_demo.py", "--cpu-only", "-c", INT4],
        input="What is 47 + 38?\n",
        env={**os.environ, **without("gptqmodel", "optimum", "torchao")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "47 + 38 = 85.\n"), done.stderr


CHAT_WITHOUT = """
    import sys
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig
    folder, *missing = sys.argv[1:]
    sys.modules.update(dict.fromkeys(missing))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", trust_remote_code=True)
    print(model.chat(tokenizer, "What is 47 + 38?", history=None, do_sample=False)[0])
    config = GPTQConfig(bits=4, backend="torch")
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, quantization_config=config)
    except ImportError as error:
        print(" ".join(str(error).splitlines()))
"""


@pytest.mark.parametrize("missing", [("gptqmodel",), ("optimum",), ("gptqmodel", "optimum")])
def test_quantized_weights_without_their_packages(missing: tuple[str, ...], isolated_python: IsolatedPython) -> None:
    """They are only needed for training, and on GPUs. Without them, optimum raised a NameError."""
    printed = isolated_python(CHAT_WITHOUT, INT4, *missing)
    assert printed[-2] == "47 + 38 = 85."
    assert "`pip install gptqmodel optimum`" in printed[-1]
