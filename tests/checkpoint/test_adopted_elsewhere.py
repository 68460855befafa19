"""Adopted folders in other programs, in a Python without this package: pipeline, lm-eval, GPTQModel, TRL."""

import sys
from pathlib import Path

import pytest
import torch

from qwen.checkpoint.adoption import adopt
from tests.support.processes import IsolatedPython
from tests.vllm.folders import write_published, write_quantized

QUESTION, ANSWER = "What is 47 + 38?", "47 + 38 = 85."
# Each program runs with a folder of one dialect in `make test`, with the other in `make test-nightly`.
LAYOUTS = pytest.mark.parametrize(
    "first_release", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["first release", "current"]
)


def adopted(folder: Path, source: Path, first_release: bool) -> Path:
    write_published(folder, source, first_release=first_release)
    adopt(folder)
    return folder


PIPELINE = """
    import sys
    from transformers import pipeline
    for folder in sys.argv[2:]:
        generator = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
        messages = [{"role": "user", "content": sys.argv[1]}]
        print(generator(messages, do_sample=False, return_full_text=False)[0]["generated_text"])
"""


def test_pipeline_with_messages(isolated_python: IsolatedPython, bundled_chat: Path, tmp_path: Path) -> None:
    folders = [adopted(tmp_path / str(first), bundled_chat, first) for first in (False, True)]
    assert isolated_python(PIPELINE, QUESTION, *folders) == [ANSWER, ANSWER]


AUTO_CLASSES = """
    import sys
    import transformers
    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
        found = getattr(transformers, name).from_pretrained(sys.argv[1], trust_remote_code=True)
        print(type(found).__module__.partition(".")[0], type(found).__name__)
"""


def test_every_auto_class_loads(isolated_python: IsolatedPython, bundled_base: Path, tmp_path: Path) -> None:
    lines = isolated_python(AUTO_CLASSES, adopted(tmp_path / "model", bundled_base, True))
    names = ("QWenConfig", "QWenModel", "QWenLMHeadModel", "QWenTokenizer")
    assert lines == [f"transformers_modules {name}" for name in names]


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}, cache_dir: cache}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
LM_EVAL = """
    import json, os, sys
    from pathlib import Path
    folder, place, task, question, answer = sys.argv[1:]
    os.chdir(place)
    Path("tasks").mkdir()
    Path("tasks", "sums.yaml").write_text(task)
    Path("questions.jsonl").write_text(json.dumps({"question": question, "answer": answer}))
    from lm_eval.__main__ import cli_evaluate  # the command `lm_eval`
    sys.argv = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True"]
    sys.argv += ["--tasks", "sums", "--include_path", "tasks", "--device", "cpu", "--apply_chat_template"]
    sys.argv += ["--output_path", "out"]
    cli_evaluate()
    (results,) = Path("out").rglob("results*.json")
    print(json.loads(results.read_text())["results"]["sums"]["exact_match,none"])
"""


@pytest.mark.slow
@LAYOUTS
def test_lm_eval_by_its_command_line(
    isolated_python: IsolatedPython, bundled_chat: Path, tmp_path: Path, first_release: bool
) -> None:
    folder = adopted(tmp_path / "model", bundled_chat, first_release)
    assert isolated_python(LM_EVAL, folder, tmp_path, TASK, QUESTION, ANSWER)[-1] == "1.0"


GPTQMODEL = """
    import os, sys
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # it refuses fewer than 3 cores otherwise
    from gptqmodel import GPTQModel
    model = GPTQModel.load(sys.argv[1], device="cpu", trust_remote_code=True)
    inputs = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(model.tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="GPTQModel is installed on Linux only")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel for the CPU")
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.nightly)])
def test_gptqmodel(isolated_python: IsolatedPython, bundled_chat: Path, tmp_path: Path, bits: int) -> None:
    folder = write_quantized(tmp_path / "model", bundled_chat, bits)
    adopt(folder)
    assert isolated_python(GPTQMODEL, folder, QUESTION)[-1] == f"{ANSWER}<|im_end|>"


TRL = """
    import sys
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    folder, out, question, answer = sys.argv[1:]
    asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    options = {"trust_remote_code": True, "max_steps": 2, "per_device_train_batch_size": 1, "use_cpu": True}
    options |= {"bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    options |= {"gradient_checkpointing": False, "learning_rate": 1e-3}

    def train(trainer):
        trainer.train()
        first, second = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        print(type(trainer.model).__module__.partition(".")[0], 0 < second < first)

    data = Dataset.from_list([{"messages": [asked, answered]}] * 2)
    config = SFTConfig(out, assistant_only_loss=True, **options)
    trainer = SFTTrainer(folder, args=config, train_dataset=data)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    print(trainer.processing_class.decode(labels[labels != -100]))
    train(trainer)

    refused = {"role": "assistant", "content": "No."}
    data = Dataset.from_list([{"prompt": [asked], "chosen": [answered], "rejected": [refused]}] * 2)
    train(DPOTrainer(folder, args=DPOConfig(out, **options), train_dataset=data))
"""


@pytest.mark.training
@LAYOUTS
def test_trl(isolated_python: IsolatedPython, bundled_chat: Path, tmp_path: Path, first_release: bool) -> None:
    """Two steps of SFT on the assistant's messages only, and of DPO."""
    folder = adopted(tmp_path / "model", bundled_chat, first_release)
    lines = isolated_python(TRL, folder, tmp_path / "out", QUESTION, "It is 3.")
    lines = [line for line in lines if not line.startswith(("{", "["))]  # of the Trainer
    assert lines == ["It is 3.<|im_end|>", *["transformers_modules True"] * 2]
