"""Commands and snippets of the published documents that end in a message naming their replacement."""

import os
import shlex
import subprocess
import sys

import pytest

from qwen.finetuning.arguments import ArgumentError, parse
from qwen.model.loading_options_qwen import check_arguments
from qwen_cli.arguments import make_parser
from tests.support import ROOT
from tests.support.markdown import Document

TABLES = {tuple(table[0]): table[1:] for table in Document("docs/migration.md").tables}
ROWS = [[cell.strip("`") for cell in row] for row in TABLES["old command", "message"]]
# finetune.py imports torch, which takes seconds.
COMMANDS, TRAINING = (
    [row for row in ROWS if row[0].startswith("python finetune.py") == slow] for slow in (False, True)
)


@pytest.mark.parametrize(("command", "message"), COMMANDS)
def test_command_names_its_replacement(command: str, message: str) -> None:
    program, *words = shlex.split(command)
    program = sys.executable if program == "python" else program
    done = subprocess.run(
        [program, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert not done.stdout
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("command", "message"), TRAINING)
def test_training_names_the_argument_of_a_script_option(command: str, message: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        parse(shlex.split(command)[2:])
    assert str(raised.value) == message


@pytest.mark.parametrize(("arguments", "message"), [(["--gpus", "2"], "GPUS_PER_NODE"), (["--num_gpus=2"], "_ds.sh")])
def test_training_says_how_to_use_several_gpus(arguments: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse([*arguments, "--data_path", "data.json"])


def test_loading_says_how_to_use_several_gpus() -> None:
    with pytest.raises(ValueError, match='device_map="auto" uses all visible GPUs'):
        check_arguments({"num_gpus": 2})


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        (["--seed"], ["--sed", "1"], "unrecognized arguments: --sed 1; --sed: did you mean --seed?"),
        (["--seed"], ["--xyz=1", "word"], "unrecognized arguments: --xyz=1 word"),
        (["--data_path"], ["--data-path=x"], "unrecognized arguments: --data-path=x; --data-path: use --data_path"),
        # Without this option, a note says that all visible GPUs are used.
        (
            ["--tensor-parallel-size"],
            ["--gpus", "2"],
            "unrecognized arguments: --gpus 2; --gpus: use --tensor-parallel-size",
        ),
    ],
)
@pytest.mark.parametrize("prog", [None, "qwen chat"])
def test_unknown_options(
    options: list[str], words: list[str], message: str, prog: str | None, capsys: pytest.CaptureFixture
) -> None:
    parser = make_parser("", prog, allow_abbrev=False)
    for option in options:
        parser.add_argument(option)
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert capsys.readouterr().err.rstrip().endswith(f"error: {message}")


@pytest.mark.parametrize(("prog", "name"), [(None, "python run_gptq.py"), ("qwen serve", "qwen quantize")])
def test_messages_name_the_script_or_the_command(prog: str | None, name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        make_parser("", prog).parse_args(["--quantization", "gptq"])
    assert f"`{name}`" in capsys.readouterr().err
