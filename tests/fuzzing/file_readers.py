"""Small valid folders of each kind that the library reads, and the functions that read them.

A reader takes a folder and reads it as a user's command would. It may return a function that uses what was read.
"""

import contextlib
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from qwen import Checkpoint, QWenLMHeadModel, QWenTokenizer
from qwen.checkpoint.bundled import BUNDLED_CHAT, BUNDLED_CHAT_INT4
from qwen.data.conversation_file import ConversationFile
from qwen.data.datasets import SupervisedDataset
from qwen.evaluation.harness import Run, limit_cases, run_settings
from qwen.evaluation.task import Task
from qwen.export.qwen2 import export_qwen2
from qwen.finetuning.merging import merge
from qwen.finetuning.run import finetune
from qwen_cli.arguments import make_parser
from qwen_cli.evaluate import add_arguments, load_task

Read = Callable[[Path], Callable[[], object] | None]

TURNS = [{"from": "user", "value": "Who are you?"}, {"from": "assistant", "value": "I am Robin."}]
LESSONS = [
    {"id": "1", "conversations": TURNS},
    {"id": "2", "system": "Be brief.", "conversations": TURNS * 2},
    {"conversations": [{"from": "system", "value": "你好"}, *TURNS]},
]
TOOL = {
    "name": "look",
    "description": "Looks something up.",
    "parameters": {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]},
}
REACT = "Thought: look\nAction: look\nAction Input: {'what': 'x'}"
SUBJECTS = ("law", "physician")  # of C-Eval
PROBLEMS = [
    {"task_id": number, "text": "Add.", "code": "def add(): pass", "test_list": ["assert add"], "test_setup_code": ""}
    for number in (2, 3, 4, 11)
]
MATH_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
MATH_SUBJECTS = (*MATH_SUBJECTS, "prealgebra", "precalculus")


def lines(*records: object) -> str:
    """Return JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def sums(*numbers: int) -> str:
    """Return problems in the format of GSM8K."""
    return lines(*({"question": f"Add {n} and 1.", "answer": f"{n} + 1\n#### {n + 1}"} for n in numbers))


BENCHMARKS: dict[str, tuple[dict[str, str], list[str]]] = {
    "gsm8k": ({"test.jsonl": sums(1, 2), "train.jsonl": sums(*range(10))}, ["-f", "test.jsonl"]),
    "leval": (
        {
            "coursera.jsonl": lines({"input": "Text", "instructions": ["Q?\nA. x\nB. y"], "outputs": ["AB"]}),
            "gsm100.jsonl": lines({"input": "", "instructions": ["1 + 1?"], "outputs": ["2"]}),
            "sci_fi.jsonl": lines({"input": "Tale", "instructions": ["Q?"], "outputs": ["False [fact: True]"]}),
        },
        ["-d", ".", "--tasks", "coursera,gsm100,sci_fi"],
    ),
    "ceval": (
        {
            f"{split}/{subject}_{split}.csv": "id,question,A,B,C,D,answer\n"
            + "".join(f'{number},"Which, of ""{number}""?",1,2,3,4,B\n' for number in range(5))
            for subject in SUBJECTS
            for split in ("dev", "val")
        },
        ["-d", ".", "--subjects", ",".join(SUBJECTS)],
    ),
    "math": (
        {
            f"{split}/{subject}/{number}.json": json.dumps(
                {"problem": f"What is {number}?", "level": "Level 1", "solution": rf"It is \boxed{{\frac{number}{2}}}."}
            )
            for split in ("train", "test")
            for subject in MATH_SUBJECTS
            for number in (1,)
        },
        ["-d", "."],
    ),
    "plugin": (
        {
            "positive.jsonl": lines({"prompt": "Use tools.", "response": REACT, "query": "x"}),
            "agent.jsonl": lines({"query": "x", "tools": [TOOL], "gold": {"tool": "look", "arguments": {"what": "x"}}}),
        },
        [
            *("-d", ".", "--eval-react-positive", "--eval-react-positive-filename", "positive.jsonl"),
            *("--eval-hfagent", "--eval-hfagent-filename", "agent.jsonl"),
        ],
    ),
    "humaneval": (
        {
            "problems.jsonl.gz": lines(
                {"task_id": "t/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass"}
            )
        },
        ["-f", "problems.jsonl.gz"],
    ),
    "mbpp": ({"mbpp.jsonl": lines(*PROBLEMS)}, ["-f", "mbpp.jsonl"]),
    "code_interpreter": (
        {
            "questions.jsonl": lines(
                {"query": "1 + 1?", "tags": ["math"], "expected": "2"},
                {"query": "Plot.", "tags": ["general"], "input_file_path": ["a.csv"]},
            ),
            "upload_file_clean/a.csv": "1,2\n",
        },
        ["-f", "questions.jsonl"],
    ),
}
"""Files of benchmarks, and the arguments to read them."""


class Reader(NamedTuple):
    """Reads copies of the folder `original`; `files` are those that are changed."""

    original: str
    files: tuple[str, ...]
    read: Read


CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken")
SHARDS = tuple(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_config.json")


def load_and_chat(folder: Path) -> Callable[[], object]:
    model, tokenizer = Checkpoint.open(folder).load(cpu_only=True)
    return lambda: model.chat(tokenizer, "What is 47 + 38? 你好 <|im_end|>", max_new_tokens=2)


def from_pretrained(folder: Path) -> Callable[[], object]:
    model, tokenizer = QWenLMHeadModel.from_pretrained(folder), QWenTokenizer.from_pretrained(folder)
    return lambda: model.eval().chat(tokenizer, "What is 47 + 38?", max_new_tokens=2)


def tokenize(folder: Path) -> Callable[[], object]:
    tokenizer = QWenTokenizer.from_pretrained(folder)

    def use() -> None:
        ids = tokenizer.encode("What is 47 + 38?\n 你好 <|im_end|> \u0301")
        tokenizer.decode(ids)
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        tokenizer(["a", "a b c"], padding=True)

    return use


def export(folder: Path) -> None:
    export_qwen2(folder, folder.with_name("out"))


def merge_adapter(folder: Path) -> None:
    merge(folder, folder.with_name("out"))


def read_lessons(name: str) -> Read:
    def read(folder: Path) -> Callable[[], object]:
        file = ConversationFile(folder / name)
        tokenizer = QWenTokenizer.from_pretrained(BUNDLED_CHAT)
        return lambda: [*SupervisedDataset(file, tokenizer, 64)]

    return read


def resume(folder: Path) -> None:
    train(folder.with_name("out"), "--resume_from_checkpoint", folder / "checkpoint-1")


def train(out: Path, *more: object) -> None:
    """Fine-tune for two steps."""
    from qwen.finetuning.arguments import parse

    data = out.with_name("lessons.json")
    data.write_text(json.dumps(LESSONS))
    words = ["--data_path", data, "--output_dir", out, "--max_steps", 2, "--save_steps", 1, "--use_lora", *more]
    words += ["--lora_r", 2, "--per_device_train_batch_size", 2, "--model_max_length", 64, "--report_to", "none"]
    arguments, _ = parse([*map(str, words)])
    finetune(arguments)


def make_task(name: str, folder: Path, out: Path) -> Task:
    """Return a benchmark with the arguments to read `folder`, without the sandbox that some start."""
    files, words = BENCHMARKS[name]
    task_class = load_task(name)
    parser = make_parser("", None)
    add_arguments(parser, task_class)
    paths = {".", *files}
    options = parser.parse_args([*(str(folder / word) if word in paths else word for word in words), "-o", str(out)])
    if not hasattr(options, "allow_weaker_sandbox"):
        return task_class(options)
    task = object.__new__(task_class)
    Task.__init__(task, options)
    return task


def read_benchmark(name: str) -> Read:
    def read(folder: Path) -> None:
        limit_cases(make_task(name, folder, folder / "out.jsonl").cases(), None)

    return read


@contextlib.contextmanager
def started_run(folder: Path) -> Any:
    """Start an evaluation with records in `folder`."""
    data = folder.with_name("data")
    write_files(data, BENCHMARKS["leval"][0])
    task = make_task("leval", data, folder / "out.jsonl")
    cases = limit_cases(task.cases(), None)
    with Run(folder / "out.jsonl", run_settings(task, "toy", cases, task.arguments), [], False) as run:
        yield task, cases, run


def resume_evaluation(folder: Path) -> None:
    with started_run(folder) as (task, cases, run):
        if run.resume(cases, 1) == len(cases):
            run.finish(task)


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())


def write_originals(folder: Path) -> None:
    """Write the folders that are damaged. They take some seconds."""
    for name, source in (("chat", BUNDLED_CHAT), ("int4", BUNDLED_CHAT_INT4)):
        for suffix in ("json", "tiktoken", "safetensors"):
            for path in source.glob(f"*.{suffix}"):
                if path.name != "calibration.json":
                    copy(path, folder / name)
    for name in ("sharded", "bin"):
        for file in CONFIGS:
            copy(BUNDLED_CHAT / file, folder / name)
    tensors = load_file(BUNDLED_CHAT / "model.safetensors")
    torch.save(tensors, folder / "bin" / "pytorch_model.bin")
    QWenLMHeadModel.from_pretrained(BUNDLED_CHAT, dtype="auto").save_pretrained(folder / "shards", max_shard_size="8MB")
    for file in (*SHARDS, "model.safetensors.index.json"):
        copy(folder / "shards" / file, folder / "sharded")
    write_files(folder / "lessons", {"lessons.json": json.dumps(LESSONS), "lessons.jsonl": lines(*LESSONS)})
    for name, (files, _) in BENCHMARKS.items():
        write_files(folder / name, files)
    (folder / "records").mkdir()
    with started_run(folder / "records") as (task, cases, run):
        run.begin()
        for case in cases:
            answer = {"reply": "A. It is 2, True.", "cut_tokens": 0}
            record = {"name": case.name, "group": case.group, **answer, "gold": case.gold}
            run.add([record | task.score(case, answer)])
        run.finish(task)
    train(folder / "trained")
    shutil.copytree(folder / "trained" / "checkpoint-1", folder / "run" / "checkpoint-1")
    for file in ("adapter_config.json", "adapter_model.safetensors", "generation_config.json"):
        copy(folder / "trained" / file, folder / "adapter")


def copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / path.name)


READERS = {
    "checkpoint": Reader("chat", (*CONFIGS, "model.safetensors"), load_and_chat),
    "model": Reader("chat", ("config.json", "model.safetensors"), from_pretrained),
    "tokenizer": Reader("chat", ("tokenizer_config.json", "qwen.tiktoken", "generation_config.json"), tokenize),
    "sharded": Reader("sharded", ("config.json", "model.safetensors.index.json", *SHARDS), load_and_chat),
    "bin": Reader("bin", ("config.json", "pytorch_model.bin"), load_and_chat),
    "gptq": Reader("int4", ("config.json", "model.safetensors"), load_and_chat),
    "export": Reader("chat", (*CONFIGS, "model.safetensors"), export),
    "export gptq": Reader("int4", ("config.json", "model.safetensors"), export),
    "adapter": Reader("adapter", ("adapter_config.json", "adapter_model.safetensors"), load_and_chat),
    "merge": Reader("adapter", ("adapter_config.json", "adapter_model.safetensors"), merge_adapter),
    "lessons": Reader("lessons", ("lessons.json",), read_lessons("lessons.json")),
    "lesson lines": Reader("lessons", ("lessons.jsonl",), read_lessons("lessons.jsonl")),
    "run": Reader("run", tuple(f"checkpoint-1/{file}" for file in (*STATE, "adapter_model.safetensors")), resume),
    "records": Reader("records", ("out.jsonl", "out.json"), resume_evaluation),
    **{name: Reader(name, tuple(files), read_benchmark(name)) for name, (files, _) in BENCHMARKS.items()},
}
