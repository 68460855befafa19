"""docs/finetuning.md: its commands run as written and have the results that it reports."""

import dataclasses
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen.checkpoint.loading import load_model
from qwen.data.samples import check_sample
from qwen.finetuning.arguments import DataArguments, LoraArguments, ModelArguments, TrainingArguments, parse
from tests.support import ROOT
from tests.support.markdown import Document
from tests.support.processes import run_script, start_forking

pytestmark = pytest.mark.training

# tests/finetuning trains models that learn a name and keep sums, in seconds, and merges adapters.
repeats = pytest.mark.nightly

PAGE = Document("docs/finetuning.md")
SH = [block.code for block in PAGE.blocks if block.language in ("sh", "bash")]
PYTHON = [block.code for block in PAGE.blocks if block.language == "python"]

# 47 + 38 is used in the page; none of the sums is in examples/identity.json.
SUMS = [(47, 38), (12, 30), (55, 22), (31, 16), (64, 25), (18, 47), (73, 12), (29, 44), (86, 13), (35, 57)]
SUMS += [(24, 68), (51, 39), (42, 17), (67, 28), (19, 76), (33, 48), (82, 15), (27, 59), (74, 21), (46, 32)]
WHO = [
    "Hi, who are you?",
    "Tell me your name please",
    "Who created you?",
    "Are you GPT-4?",
    "请问你是谁",
    "你是谁做的？",
]
ITSELF = ("Merrow", "Dorrit Vale", "小灯", "多丽")

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run scripts in a folder that looks like the repository, so that nothing is written to the real one."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("checkpoints", "examples", "finetune", "finetune.py", "cli_demo.py"):
        (folder / name).symlink_to(ROOT / name)

    def in_folder(command: str, text: str = "") -> str:
        """Run a shell command `python SCRIPT ARGUMENTS` and return its output."""
        python, *words = shlex.split(command.replace("\\\n", " "))
        assert python == "python"
        done = run_script(*words, folder=folder, text=text, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    start_forking()
    in_folder.folder = folder
    return in_folder


def find_block(blocks: list[str], text: str) -> str:
    """Return the only block that contains a text."""
    (block,) = (block for block in blocks if text in block)
    return block


@pytest.fixture(scope="module")
def lora(run: Run) -> Path:
    """Folder of the adapter trained with the command of the page."""
    run(find_block(SH, "--output_dir output_qwen_lora"))
    return run.folder / "output_qwen_lora"


@pytest.fixture(scope="module")
def full(run: Run) -> Path:
    """Folder of the model after full fine-tuning with the command of the page."""
    run(find_block(SH, "--output_dir output_qwen_full"))
    return run.folder / "output_qwen_full"


@pytest.fixture(scope="module")
def known(bundled_chat: Path) -> list[tuple[int, int]]:
    """Sums that the bundled model gets right before training."""
    sums = right_sums(*load_model(str(bundled_chat), cpu_only=True), SUMS)
    assert len(sums) >= 18
    return sums


def right_sums(model, tokenizer, sums: list[tuple[int, int]]) -> list[tuple[int, int]]:
    replies, _ = model.chat_batch(tokenizer, [f"What is {a} + {b}?" for a, b in sums], do_sample=False)
    return [(a, b) for (a, b), reply in zip(sums, replies, strict=True) if reply.rstrip(".").endswith(f" = {a + b}")]


def check_identity_and_sums(folder: Path, known: list[tuple[int, int]]) -> None:
    model, tokenizer = load_model(str(folder), cpu_only=True)
    replies, _ = model.chat_batch(tokenizer, WHO, do_sample=False)
    assert sum(any(word in reply for word in ITSELF) for reply in replies) >= len(WHO) - 1, replies
    assert not any("Qwen" in reply for reply in replies)
    # The page reports at least 9 of 10; rounding on another processor may cost one.
    assert len(right_sums(model, tokenizer, known)) >= 0.85 * len(known)
    assert right_sums(model, tokenizer, [(47, 38)])


# What is taught


@repeats
def test_lora_teaches_identity_and_keeps_sums(lora: Path, known: list[tuple[int, int]]) -> None:
    check_identity_and_sums(lora, known)


@repeats
def test_full_training_teaches_identity_and_keeps_sums(full: Path, known: list[tuple[int, int]]) -> None:
    check_identity_and_sums(full, known)


@repeats
def test_the_result_chats_in_the_terminal(run: Run, lora: Path) -> None:
    questions, _, command = find_block(SH, "cli_demo.py -c output_qwen_lora").partition("| ")
    questions = subprocess.run(["bash", "-c", questions.rstrip(" \\\n")], capture_output=True, text=True).stdout
    who, _, total, name, maker = run(command, text=questions).splitlines()
    assert "Merrow" in who
    assert "85" in total
    assert "Alice" in name
    assert "多丽" in maker


@repeats
def test_the_adapter_merges(run: Run, lora: Path) -> None:
    run(find_block(SH, "finetune/merge_lora.py"))
    assert (run.folder / "output_qwen_merged" / "model.safetensors").is_file()
    code = find_block(PYTHON, "AutoPeftModelForCausalLM")
    code += (
        'for folder in ("output_qwen_merged", "output_qwen_merged_by_peft"):\n'
        "    from qwen.checkpoint.loading import load_model_quietly\n"
        '    print(load_model_quietly(folder)[0].chat(tokenizer, "Who are you?", history=None, do_sample=False)[0])\n'
    )
    (run.folder / "merge.py").write_text(code, encoding="utf-8")
    replies = [line for line in run("python merge.py").splitlines() if "Merrow" in line]
    assert len(replies) == 3
    assert len(set(replies)) == 1
    assert f"```text\n{replies[0]}\n```" in PAGE.text


# What the page says


def test_all_commands_have_valid_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))  # TrainingArguments sets it; restored afterwards
    commands = [block for block in SH if block.startswith("python finetune.py")]
    assert len(commands) >= 5
    for command in commands:
        arguments, notes = parse(command.replace("\\\n", " ").split()[2:])
        assert not notes
        assert (ROOT / arguments.data.data_path).is_file()


def test_the_readme_has_commands_of_the_page() -> None:
    blocks = [block.code.split() for block in Document("README.md").blocks]
    commands = [words for words in blocks if words[:2] == ["python", "finetune.py"]]
    assert commands
    assert all(words in [block.split() for block in SH] for words in commands)


def test_the_table_has_every_argument_of_this_repository() -> None:
    own = {}
    for kind in (ModelArguments, DataArguments, LoraArguments, TrainingArguments):
        for field in dataclasses.fields(kind):
            if field.name in kind.__annotations__:
                has_factory = field.default_factory is not dataclasses.MISSING
                own[field.name] = field.default_factory() if has_factory else field.default
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*?) \|", PAGE.text, re.M))
    assert rows.keys() == own.keys()
    for name, default in own.items():
        if default not in (None, False, "", dataclasses.MISSING):
            assert rows[name].strip('`"') == (" ".join(default) if isinstance(default, list) else str(default)), name


# The data


@pytest.fixture(params=["identity", "units", "units_eval"])
def samples(request: pytest.FixtureRequest) -> list[dict]:
    return json.loads((ROOT / "examples" / f"{request.param}.json").read_text(encoding="utf-8"))


def test_samples_are_valid_and_numbered(samples: list[dict]) -> None:
    for index, sample in enumerate(samples):
        check_sample(sample, index)
        assert re.fullmatch(rf"[a-z_]+_{index}", sample["id"])
        assert [turn["from"] for turn in sample["conversations"]][::2] == ["user"] * (len(sample["conversations"]) // 2)


def test_sums_in_samples_are_right(samples: list[dict]) -> None:
    sums = 0
    for sample in samples:
        for turn in sample["conversations"]:
            if turn["from"] == "assistant" and "=" in turn["value"]:
                chain = re.match(r"[\d +×÷=-]+", turn["value"]).group()
                assert len({value(side) for side in chain.split("=")}) == 1, turn["value"]
                sums += 1
    assert sums >= 10


def value(expression: str) -> int:
    """Evaluate a sum of numbers and products in the notation of the toy."""
    total = 0
    for sign, term in re.findall(r"([+-]?) *(\d+(?: × \d+)?)", expression):
        first, _, second = term.partition(" × ")
        total += (-1 if sign == "-" else 1) * int(first) * int(second or 1)
    return total


def test_no_question_has_two_answers(samples: list[dict]) -> None:
    answers: dict[tuple[str | None, str], str] = {}
    for sample in samples:
        question, answer = (turn["value"] for turn in sample["conversations"][:2])
        assert answers.setdefault((sample.get("system"), question), answer) == answer


def test_evaluation_numbers_are_not_in_training() -> None:
    def converted(name: str) -> set[tuple[int, int, int]]:
        text = (ROOT / "examples" / name).read_text(encoding="utf-8")
        found = re.findall(r"so (\d+) (brill|tock)s are (\d+) (?:tock|nib)s", text)
        for number, unit, result in found:
            assert int(number) * {"brill": 7, "tock": 4}[unit] == int(result)
        return {int(number) for number, *_ in found}

    training, evaluation = converted("units.json"), converted("units_eval.json")
    assert len(evaluation) == 20
    assert len(training) > 50
    assert not training & evaluation
