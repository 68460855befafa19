"""Tests that the Makefile targets run the scripts in the first block of the README, which is itself run nightly."""

import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.support import ROOT
from tests.support.markdown import Document

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

COMMANDS = {
    "chat": "cli_demo.py",
    "web": "web_demo.py",
    "serve": "openai_api.py",
    "quantize": "run_gptq.py --overwrite",
    "evaluate": "eval/long_context.py --lengths 256 1024 4096 --tokens 4096",
    "export": "export.py --overwrite",
}


def recipe(*words: str) -> list[str]:
    """Return the commands that `make WORDS` would run, without those that create the environment."""
    own = ("MAKEFLAGS", "MAKELEVEL", "ARGS", "EVAL", "OUT", "WHEELS", "MINUTES")
    env = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        ["make", "-n", "PYTHON=python3", "VENV=.venv", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [
        line.removeprefix(".venv/bin/python ").rstrip()
        for line in lines
        if " -m pip " not in line and " -m venv " not in line
    ]


def test_the_first_block_of_the_readme_has_these_targets() -> None:
    (block,) = (block for block in Document("README.md").blocks if block.code.startswith("make chat "))
    assert block.nightly
    assert {*re.findall(r"^make (\w+)", block.code, re.MULTILINE)} == {*COMMANDS, "finetune"}


@pytest.mark.parametrize(("target", "command"), COMMANDS.items())
def test_a_target_runs_its_script(target: str, command: str) -> None:
    assert recipe(target)[-1] == command
    assert (ROOT / command.split()[0]).is_file()


@pytest.mark.parametrize("target", COMMANDS)
def test_arguments_are_passed_on(target: str) -> None:
    assert recipe(target, "ARGS=-c elsewhere")[-1] == f"{COMMANDS[target].split()[0]} -c elsewhere"


def test_finetune_runs_the_command_of_the_readme() -> None:
    (block,) = (block for block in Document("README.md").blocks if block.code.startswith("python finetune.py"))
    assert shlex.split(recipe("finetune")[-1]) == shlex.split(block.code.replace("\\\n", " "))[1:]


def test_eval_selects_another_benchmark() -> None:
    assert recipe("evaluate", "EVAL=mmlu", "ARGS=-d data")[-1] == "eval/evaluate_mmlu.py -d data"


def test_the_tiers_differ_by_their_markers() -> None:
    check, everything, nightly = (recipe(target)[-1] for target in ("check", "test", "test-nightly"))
    assert 'not (process or browser or training or docs or slow or nightly)"' in check
    assert " -m " not in everything.removeprefix("-m pytest")
    assert nightly == "-m pytest -rs -m nightly"


def test_the_vllm_target_has_an_environment_for_each_version() -> None:
    commands = recipe("test-vllm", "VLLM=0.30.0", "ARGS=-k server")
    assert commands[-1] == ".venv-vllm/0.30.0/bin/python -m pytest -rs tests/vllm -k server"
    assert ".venv-vllm/0.32.0/bin/python -m pytest -rs tests/vllm" in " ".join(recipe("test-vllm"))


def test_the_gpu_target_installs_nothing() -> None:
    arguments = "-m tests.on_gpu --out gpu_results"
    assert recipe("test-gpu", "PYTHON=python3")[1:] == [f"python3 {arguments}"]
    assert recipe("test-gpu", "OUT=there", "WHEELS=wheels", "ARGS=--only speed")[1:] == [
        "python3 -m tests.on_gpu --out there --wheels wheels --only speed"
    ]


def test_fuzz_takes_minutes() -> None:
    assert recipe("fuzz", "MINUTES=5", "ARGS=--seed 1")[-1] == "-m tests.fuzzing --minutes 5 --seed 1"
