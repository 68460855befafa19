"""The command `qwen`: help texts, argument errors, start-up time, and the scripts that do the same."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qwen_cli
from qwen_cli.__main__ import COMMANDS, main
from qwen_cli.arguments import SCRIPTS
from qwen_cli.evaluate import list_benchmarks
from qwen_cli.finetune_options import OPTIONS, REQUIRED
from tests.support import ROOT

SLOW = ("torch", "transformers", "qwen", "gradio", "fastapi", "numpy")
SECONDS = 5  # half a second on an idle machine
HELP = [("--help",), *((command, "--help") for command in COMMANDS), ("eval",), ("--version",)]


def run(*words: object, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # like an editable install
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_is_fast_and_imports_no_libraries(words: tuple[str, ...]) -> None:
    start = time.monotonic()
    result = run("-X", "importtime", "-m", "qwen_cli", *words)
    assert time.monotonic() - start < SECONDS
    assert result.returncode == 0
    assert result.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "qwen_cli" in imported
    assert not imported & {*SLOW}


@pytest.mark.parametrize("module", sorted(path for path in Path(qwen_cli.__file__).parent.rglob("*.py")), ids=str)
def test_modules_import_only_the_standard_library(module: Path) -> None:
    allowed = sys.stdlib_module_names | {"qwen_cli"}
    for statement in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import):
            assert {name.name.partition(".")[0] for name in statement.names} <= allowed
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            assert statement.module.partition(".")[0] in allowed


def test_help_lists_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command, (_, what) in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(what)}$", shown, re.MULTILINE)
    assert main([]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serv"], "Unknown command serv. Did you mean `qwen serve`?"),
        (["xyzzy"], "Unknown command xyzzy. `qwen --help` lists all."),
        (["--verbose"], "Unknown option --verbose."),
        (["eval", "mmul"], "Unknown benchmark mmul. Did you mean mmlu?"),
        (["eval", "xyzzy"], "Unknown benchmark xyzzy. `qwen eval` lists all."),
    ],
)
def test_unknown_commands_and_benchmarks(words: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(says)
    assert not captured.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chat", "--seed", "-1"], "qwen chat: error: argument -s/--seed: The seed must be a whole number"),
        (
            ["serve", "--server-port", "65536"],
            "qwen serve: error: argument --server-port: must be a whole number from 0",
        ),
        (
            ["web", "--server-port", "0"],
            "qwen web: error: argument --server-port: must be a whole number from 1 to 65535",
        ),
        (["web", "--auth", "anna"], "qwen web: error: argument --auth: must be USER:PASS"),
        (
            ["merge", "a", "b", "--max-shard-size", "2"],
            "qwen merge: error: argument --max-shard-size: invalid size '2'",
        ),
        (["quantize", "--model_name_or_path", "x"], "qwen quantize: error: --data_path is missing"),
        (["export", "--type", "q8_0"], "qwen export: error: --type is for GGUF"),
        (["chat", "--hub", "github"], "qwen chat: error: argument --hub: invalid choice: 'github'"),
    ],
)
def test_wrong_arguments_are_reported_early(words: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_version_matches_the_package(capsys: pytest.CaptureFixture) -> None:
    from qwen._version import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qwen {__version__}\n"


def test_hubs_match_the_library() -> None:
    from qwen.checkpoint.hub import HUBS
    from qwen_cli import arguments

    assert arguments.HUBS == HUBS


@pytest.mark.parametrize(("command", "script"), SCRIPTS.items())
def test_scripts_have_the_same_help_as_their_command(command: str, script: str) -> None:
    ours, theirs = run("-m", "qwen_cli", command, "--help").stdout, run(script, "--help").stdout
    for other, path in SCRIPTS.items():  # descriptions may mention other commands
        ours = re.sub(rf"\bqwen {other}\b", Path(path).name, ours)
        theirs = theirs.replace(f"python {path}", Path(path).name)
    assert theirs.split() == ours.split()
    assert "usage:" in theirs


def scripts_in_folders() -> list[Path]:
    return [*(ROOT / "eval").glob("*.py"), ROOT / "finetune" / "merge_lora.py"]


@pytest.mark.parametrize("script", scripts_in_folders(), ids=lambda script: script.name)
def test_scripts_in_folders_say_how_to_install(script: Path, tmp_path: Path) -> None:
    result = run("-I", "-S", script, folder=tmp_path)  # no site-packages, no PYTHONPATH
    assert result.returncode == 1
    assert result.stderr.startswith("No module named 'qwen_cli'. ")
    assert "pip install -e ." in result.stderr
    assert len(result.stderr.splitlines()) == 1


# Benchmarks


def test_every_benchmark_is_listed_and_has_a_script(capsys: pytest.CaptureFixture) -> None:
    known = list_benchmarks()
    assert main(["eval"]) == 0
    shown = capsys.readouterr().out
    for name, line in known.items():
        assert line.endswith((".", "?"))
        assert re.search(rf"^  {name} +{re.escape(line)}$", shown, re.MULTILINE)
    scripts = {script.stem.removeprefix("evaluate_"): script for script in (ROOT / "eval").glob("*.py")}
    assert scripts.keys() == known.keys()
    for name, script in scripts.items():
        assert f'main(["{name}", *sys.argv[1:]])' in script.read_text(encoding="utf-8")


def test_every_benchmark_has_one_task() -> None:
    from qwen_cli.evaluate import load_task

    assert {name: load_task(name).name for name in list_benchmarks()} == {name: name for name in list_benchmarks()}


@pytest.mark.parametrize("name", ["mmlu", "needle"])
def test_a_benchmark_has_its_own_help(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eval", name, "--help"])
    shown = capsys.readouterr().out
    assert not left.value.code
    assert shown.startswith(f"usage: qwen eval {name} ")
    assert f"    qwen eval {name} " in shown
    assert "--max-seq-len" in shown


# Fine-tuning


@pytest.fixture(scope="module")
def real_options() -> dict:
    """Options of the parser used for training."""
    from qwen.finetuning.arguments import make_parser

    return {option: action for action in make_parser()._actions for option in action.option_strings}


def test_short_help_matches_the_parser(real_options: dict) -> None:
    for group in OPTIONS.values():
        for option in group:
            real = real_options[f"--{option.name}"]
            assert real.required == (option.default is REQUIRED), option.name
            assert option.default in (REQUIRED, real.default), option.name
            if option.choices:
                assert list(option.choices) == list(real.choices), option.name


def test_short_help_has_our_options_and_those_of_the_scripts(real_options: dict) -> None:
    from qwen.finetuning import arguments

    names = {option.name for group in OPTIONS.values() for option in group}
    for ours in (arguments.ModelArguments, arguments.DataArguments, arguments.LoraArguments):
        assert {field.name for field in dataclasses.fields(ours)} <= names
    assert {*arguments.TrainingArguments.__annotations__} <= names
    for script in (ROOT / "finetune").glob("finetune_*.sh"):
        used = re.findall(r"--(\w+)", script.read_text(encoding="utf-8").partition("launch \\\n")[2])
        assert len(used) > 10, script.name
        assert {*used} <= names, script.name


def test_help_all_shows_everything(real_options: dict, capsys: pytest.CaptureFixture) -> None:
    assert main(["finetune", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: qwen finetune ")
    assert [option for option in real_options if option not in shown] == []


# Errors


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chat"], "Stopped while loading."),
        (["serve", "--server-port", "0"], "Stopped while loading."),
        (["merge", "a", "b"], "Stopped. Nothing was written."),
        (["export"], "Stopped. Nothing was written."),
        (["quantize"], "Stopped. Nothing was written."),
        (["eval", "mmlu", "-d", "x"], "Stopped. Run the same command to resume."),
    ],
)
def test_ctrl_c_while_libraries_are_imported(words: list[str], says: str, tmp_path: Path) -> None:
    # Fake packages that raise KeyboardInterrupt when a command imports them.
    for package in ("qwen", "torch"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise KeyboardInterrupt")
    (tmp_path / "qwen" / "evaluation" / "benchmarks").mkdir(parents=True)
    (tmp_path / "qwen" / "evaluation" / "benchmarks" / "mmlu.py").write_text('"""A benchmark."""')
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; from qwen_cli.__main__ import main; "
    result = run("-c", f"{code} sys.exit(main({words!r}))", folder=tmp_path)
    assert result.returncode == 130
    assert result.stderr.rstrip().endswith(says)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (OSError("no such thing"), 1, "no such thing\n"),
        (ValueError("wrong"), 1, "wrong\n"),
        (MemoryError(), 1, "The main memory is full.\n"),
        (ModuleNotFoundError("No module named 'x'"), 1, "No module named 'x'. Install it.\n"),
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (None, 0, ""),
    ],
)
def test_errors_become_messages(error: BaseException | None, status: int, says: str, capsys) -> None:
    from qwen_cli.console import explain_errors

    with explain_errors(install_hint="Install it.") as result:
        if error is not None:
            raise error
    assert (result.status, capsys.readouterr().err) == (status, says)


def test_bugs_keep_their_traceback() -> None:
    from qwen_cli.console import explain_errors

    with pytest.raises(KeyError), explain_errors(install_hint=""):
        raise KeyError("a bug")
