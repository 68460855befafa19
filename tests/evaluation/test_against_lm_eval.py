"""Compares the benchmarks with lm-evaluation-harness: the same files, prompts and model give the same scores.

lm-eval reads the data, builds the prompts, runs the model and scores with its own code. Its task configurations below
describe the same benchmarks.
"""

import csv
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen.checkpoint.loading import load_model, load_tokenizer
from qwen.evaluation import harness
from qwen.evaluation.benchmarks import ceval as evaluate_ceval
from qwen.evaluation.benchmarks import gsm8k as evaluate_gsm8k
from qwen.evaluation.benchmarks import mmlu as evaluate_mmlu
from tests.support.evaluation_runs import read_records, read_scores, run_script

pytestmark = pytest.mark.slow

LETTERS = "ABCD"
KEYWORDS = ("for", "while", "def", "class", "return", "import", "yield", "raise")
NEW_TOKENS = 32
QUIET = {"bootstrap_iters": 0, "verbosity": "ERROR"}


@pytest.fixture(scope="module")
def loaded(bundled_base: Path) -> tuple[Any, Any]:
    return load_model(bundled_base, cpu_only=True)


@pytest.fixture
def lm_eval(loaded: tuple[Any, Any], bundled_base: Path, tmp_path: Path):
    """Run lm-eval with the model: tasks → (results, samples), by name."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = load_tokenizer(bundled_base)

    def run(*tasks: dict[str, Any]) -> tuple[dict, dict]:
        outcome = simple_evaluate(
            HFLM(pretrained=loaded[0], tokenizer=tokenizer, batch_size=1, max_length=2048),
            tasks=[
                {"dataset_kwargs": {**task.pop("files"), "cache_dir": str(tmp_path / "cache")}, **task}
                for task in tasks
            ],
            task_manager=TaskManager(include_defaults=False),
            **QUIET,
        )
        return outcome["results"], outcome["samples"]

    return run


@pytest.fixture
def ours(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a benchmark of this repository: arguments → scores by name, records."""
    monkeypatch.setattr(harness, "load_model_quietly", lambda *_, **__: loaded)

    def run(script: Any, *arguments: object) -> tuple[dict, list[dict]]:
        task = next(value for name, value in vars(script).items() if name.startswith("Evaluate"))
        out = tmp_path / "ours.jsonl"
        assert run_script(task, out, *arguments) == 0
        return read_scores(out), read_records(out)

    return run


def sums(rng: random.Random) -> tuple[str, list[str], str]:
    """Return a long question: six of them exceed the length that the toy was trained on."""
    a, b = rng.randint(10, 49), rng.randint(10, 49)
    values = rng.sample([a + b, a + b + 1, a + b + 10, a + b - 10], 4)
    return f"What is {a} + {b},\nand why do people say so?", [*map(str, values)], LETTERS[values.index(a + b)]


def keywords(rng: random.Random) -> tuple[str, list[str], str]:
    words = rng.sample(KEYWORDS, 4)
    letter = rng.choice(LETTERS)
    return f'Which is "{words[LETTERS.index(letter)]}", in quotes?', words, letter


def write_questions(path: Path, make: Any, count: int, header: list[str]) -> None:
    rng = random.Random(path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header] if header else [])
        for number in range(count):
            question, options, letter = make(rng)
            writer.writerow([*([number] if header else []), question, *options, letter])


def compare(scores: dict, records: list[dict], results: dict, samples: dict) -> None:
    """Check that the log-probabilities of the letters, the chosen letters and the scores are equal."""
    remaining = {record["name"]: record for record in records}
    for subject in results:
        for number, sample in enumerate(samples[subject]):
            record = remaining.pop(f"{subject}/{number}")
            theirs = [logprob for logprob, _ in sample["filtered_resps"]]
            assert list(record["logprobs"].values()) == pytest.approx(theirs, abs=1e-3)
            assert record["gold"] == LETTERS[int(sample["target"])]
            assert record["correct"] == bool(sample["acc"])
        assert scores[subject]["value"] == pytest.approx(results[subject]["acc,none"])
    assert not remaining
    accuracy = [record["correct"] for record in records]
    assert 0 < sum(accuracy) < len(accuracy), "compares nothing"
    assert len({record["letter"] for record in records}) > 1, "compares nothing"


def multiple_choice(
    folder: Path, subject: str, make: Any, header: list[str], splits: tuple[str, str], **wording: Any
) -> dict[str, Any]:
    """Write the files of a subject; returns the task configuration for lm-eval."""
    shots, asked = splits
    files = {split: folder / split / f"{subject}_{split}.csv" for split in splits}
    write_questions(files[shots], make, 5, header)
    write_questions(files[asked], make, 6, header)
    names = {} if header else {"column_names": ["question", *LETTERS, "answer"]}
    return {
        "task": subject,
        "dataset_path": "csv",
        "files": {"data_files": {split: str(path) for split, path in files.items()}, **names},
        "test_split": asked,
        "fewshot_split": shots,
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": 5,
        "output_type": "multiple_choice",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **wording,
    }


def test_mmlu(tmp_path: Path, ours: Callable, lm_eval: Callable) -> None:
    subjects = {"philosophy": keywords, "high_school_physics": sums}
    tasks = [
        multiple_choice(
            tmp_path,
            subject,
            make,
            [],
            ("dev", "test"),
            description="The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
            doc_to_text="Question: {{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\nAnswer:",
        )
        for subject, make in subjects.items()
    ]
    scores, records = ours(evaluate_mmlu, "-d", tmp_path, "--subjects", ",".join(subjects))
    compare(scores, records, *lm_eval(*tasks))


def test_ceval(tmp_path: Path, ours: Callable, lm_eval: Callable) -> None:
    subjects = {"logic": keywords, "high_school_physics": sums}
    header = ["id", "question", *LETTERS, "answer"]
    tasks = [
        multiple_choice(
            tmp_path,
            subject,
            make,
            header,
            ("dev", "val"),
            doc_to_text="问题：{{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",
            target_delimiter="",
        )
        for subject, make in subjects.items()
    ]
    scores, records = ours(evaluate_ceval, "-d", tmp_path, "--subjects", ",".join(subjects), "--batch-size", 4)
    compare(scores, records, *lm_eval(*tasks))


def step_by_step(sample: dict[str, Any]) -> str:
    return f"Question: {sample['question']}\nLet's think step by step\n"


def test_gsm8k(
    loaded: tuple[Any, Any], tmp_path: Path, ours: Callable, lm_eval: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_gsm8k, "MAX_NEW_TOKENS", NEW_TOKENS)
    rng = random.Random(3)
    forms = ("What is {} + {}?", "请问 {} 加 {} 等于几？")
    summands = [rng.sample(range(10, 50), 2) for _ in range(14)]
    samples = [
        {"question": forms[number % 2].format(a, b), "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
        for number, (a, b) in enumerate(summands)
    ]
    train, test = samples[:8], samples[8:]
    order = random.Random(1234).sample(range(8), 8)
    shots = [
        {"text": step_by_step(train[index]), "target": f"{a} + {b} = {a + b}.\nThe answer is {a + b}"}
        for index in order
        for a, b in [summands[index]]
    ]
    # The toy solves none of these, so its reply becomes the right answer of every other question.
    model, tokenizer = loaded
    for sample in test[::2]:
        prompt = "".join(f"{shot['text']}{shot['target']}\n\n" for shot in shots) + step_by_step(sample)
        ids = torch.tensor([tokenizer.encode(prompt)])
        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, top_p=None, top_k=None)
        reply = re.split(r"\n\n|Question:", tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))[0]
        sample["answer"] = f"So it is.\n#### {re.findall('[0-9]+', reply)[-1]}"
    for split, members in (("train", train), ("test", test)):
        lines = [json.dumps(sample, ensure_ascii=False) for sample in members]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    scores, records = ours(evaluate_gsm8k, "-f", tmp_path / "test.jsonl", "--batch-size", 4)
    assert all(record["shots"] == order for record in records)
    results, logged = lm_eval(
        {
            "task": "word_problems",
            "dataset_path": "json",
            "files": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
            "test_split": "test",
            "num_fewshot": 8,
            "fewshot_config": {
                "sampler": "first_n",
                "samples": shots,
                "doc_to_text": "{{text}}",
                "doc_to_target": "{{target}}",
            },
            "output_type": "generate_until",
            "doc_to_text": step_by_step,
            "doc_to_target": "{{answer.split('#### ')[-1]}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
            "filter_list": [
                {
                    "name": "last number",
                    "filter": [
                        {"function": "regex", "regex_pattern": "([0-9]+)", "group_select": -1},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    for record, sample in zip(records, logged["word_problems"], strict=True):
        assert record["completion"] == sample["resps"][0][0]
        assert record["correct"] == bool(sample["exact_match"])
    assert scores["gsm8k"]["value"] == pytest.approx(results["word_problems"]["exact_match,last number"])
    assert 0 < scores["gsm8k"]["value"] < 1
    assert len({record["completion"] for record in records}) > 1
