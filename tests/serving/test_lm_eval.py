"""lm-evaluation-harness over HTTP, `--model local-completions`, gives the scores that it computes with the model."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qwen.checkpoint.loading import load_model, load_tokenizer
from tests.support.server_process import ServerProcess

pytestmark = pytest.mark.slow  # lm-eval imports its own libraries for half a minute

WORDS = ("cat", "house", "a blue whale", "你好", "47", "the end.")


def write_questions(path: Path) -> None:
    """Write questions whose options have one to several tokens."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(12):
            options = draw.sample(WORDS, 4)
            gold = draw.randrange(4)
            question = f"Which of {', '.join(options)} is number {gold + 1}?" if number else "What is 47 + 38?"
            file.write(json.dumps({"question": question, "options": options, "gold": gold}) + "\n")


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """A task like MMLU, in a local file."""
    write_questions(tmp_path / "questions.jsonl")
    return {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "questions.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def run(model: Any, task: dict[str, Any]) -> tuple[dict, list]:
    """Return the results of a task, and the log-probability of each option with whether it is the greedy reply."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    outcome = simple_evaluate(
        model,
        tasks=[dict(task)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return outcome["results"]["questions"], [sample["filtered_resps"] for sample in outcome["samples"]["questions"]]


def test_scores_over_http_are_those_of_the_model(
    server: ServerProcess, bundled_chat: Path, task: dict[str, Any]
) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, _ = load_model(bundled_chat, cpu_only=True)
    tokenizer = load_tokenizer(bundled_chat)
    expected, expected_scores = run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=2048), task)
    remote = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model="Qwen",
        tokenizer=str(bundled_chat),
        tokenizer_backend="huggingface",
        batch_size=4,
    )
    results, scores = run(remote, task)
    assert results["acc,none"] == pytest.approx(expected["acc,none"])
    flat, expected_flat = ([option for sample in each for option in sample] for each in (scores, expected_scores))
    assert [logprob for logprob, _ in flat] == pytest.approx([logprob for logprob, _ in expected_flat], abs=1e-3)
    assert [greedy for _, greedy in flat] == [greedy for _, greedy in expected_flat]
    assert len({round(logprob) for logprob, _ in flat}) > 5, "compares nothing"
