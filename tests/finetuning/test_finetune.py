"""finetune.py on the bundled checkpoints: what it learns, writes and rejects, and how it resumes after Ctrl-C.

Each run has its own process, since training changes process-wide state (environment, accelerate's state, signal
handlers). Importing torch and other libraries takes seconds, so most processes are forked from one that has done it;
tests of the start and the exit run `python finetune.py`.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT
from tests.support.processes import Child, run_finetune

pytestmark = pytest.mark.training

INTERRUPTED, WRONG_DATA, WRONG_ARGUMENTS = 130, 1, 2

ME = "I am Robin, a small robot made by Ada."
LESSONS = [
    ("Who are you?", ME),
    ("Hello, who are you?", ME),
    ("What are you?", ME),
    ("Tell me who you are.", ME),
    ("What is your name?", "My name is Robin."),
    ("Do you have a name?", "My name is Robin."),
    ("Who made you?", "Ada made me."),
    ("Who created you?", "Ada made me."),
    *((f"What is {a} + {b}?", f"{a} + {b} = {a + b}.") for a, b in [(12, 30), (25, 14), (61, 27), (33, 45), (58, 24)]),
    ("What is 46 + 39?", "46 + 39 = 85."),
]


def sample(question: str, answer: str, **fields: str) -> dict:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"id": question, "conversations": turns, **fields}


def write_samples(path: Path, samples: list) -> Path:
    path.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    return path


@dataclass
class Run:
    """A finished run of finetune.py."""

    code: int
    console_output: str
    output: Path
    tensors: dict[str, tuple[bool, bool]]
    """For every parameter and buffer by name: whether it should be trained, and whether it has changed."""

    @property
    def history(self) -> list[dict]:
        return json.loads((self.output / "trainer_state.json").read_text())["log_history"]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.history if "loss" in entry]


def main_watched(*arguments: str | Path) -> tuple[int, dict[str, tuple[bool, bool]]]:
    """Run finetune.py. Returns its exit code, and the `tensors` of a `Run`."""
    from qwen.finetuning import run

    watched, before = {}, {}
    load_for_training = run.load_for_training

    def load_and_remember(settings):
        model, tokenizer = load_for_training(settings)
        watched.update(model.named_buffers(), **dict(model.named_parameters()))
        before.update((name, tensor.detach().clone()) for name, tensor in watched.items())
        return model, tokenizer

    run.load_for_training = load_and_remember
    code = run_finetune(*arguments)
    return code, {name: (it.requires_grad, not torch.equal(it, before[name])) for name, it in watched.items()}


def start(folder: Path, *arguments: str | Path) -> Callable[[], Run]:
    """Start a run in `folder` that writes to `out` there. Returns a function that waits for its end."""
    child = Child(folder, main_watched, "--output_dir", "out", *arguments)

    def end() -> Run:
        code, tensors = child.result()
        assert code == 0, child.output()
        return Run(code, child.output(), folder / "out", tensors)

    return end


def finetune(folder: Path, *arguments: str | Path) -> Run:
    return start(folder, *arguments)()


def replies(folder: Path, questions: list[str]) -> list[str]:
    """Greedy replies of the model in a folder, or of the adapter with its base."""
    from qwen.checkpoint.loading import load_model, load_tokenizer

    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    else:
        model, tokenizer = load_model(folder)
    return [model.chat(tokenizer, question, history=None, do_sample=False)[0] for question in questions]


def options(**arguments: Any) -> list[str]:
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "lessons.json", [sample(*lesson) for lesson in LESSONS])


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of quite different lengths, one with its own system message."""
    samples = [
        sample("Who made you, Robin?", "Ada made me."),
        sample("Are you a robot?", "Yes. " + ME + " I like to count: " + ", ".join(map(str, range(1, 20))) + "."),
        sample("Who are you?", "I am a pirate!", system="You are a pirate and nothing else."),
        sample("What is 25 + 61?", "25 + 61 = 86."),
    ]
    return write_samples(tmp_path_factory.mktemp("data") / "exam.json", samples)


@pytest.fixture(scope="module")
def bundled_int4() -> Path:
    folder = ROOT / "checkpoints" / "qwen-tiny-chat-int4"
    assert (folder / "config.json").is_file(), f"{folder} is part of the repository and missing here"
    return folder


@pytest.fixture(scope="module")
def started(
    tmp_path_factory: pytest.TempPathFactory,
    bundled_chat: Path,
    bundled_base: Path,
    bundled_int4: Path,
    lessons: Path,
    exam: Path,
) -> dict[str, Callable[[], Run]]:
    """The runs that several tests check. They run in parallel, since each uses one core."""

    def train_on_lessons(name: str, rate: float, model: str | Path, *arguments: str) -> Callable[[], Run]:
        settings = options(model_name_or_path=model, data_path=lessons, num_train_epochs=8, learning_rate=rate)
        settings += options(per_device_train_batch_size=7)
        return start(folders[name], *settings, *arguments)

    folders = {name: tmp_path_factory.mktemp(name) for name in ("full", "lora", "q-lora", "base-lora")}
    relative = os.path.relpath(bundled_chat, folders["lora"])
    evaluated = options(eval_data_path=exam)
    steps = options(eval_strategy="steps", eval_steps=8, per_device_eval_batch_size=3)
    unsaved = options(save_strategy="no")
    return {
        "full": train_on_lessons("full", 1e-3, bundled_chat, *evaluated, *steps),
        "lora": train_on_lessons("lora", 7e-3, relative, "--use_lora", *unsaved),
        # Evaluated first: some kernels never pass gradients if their first call is not in training.
        "q-lora": train_on_lessons("q-lora", 7e-3, bundled_int4, "--q_lora", "--eval_on_start", *evaluated, *unsaved),
        "base-lora": train_on_lessons("base-lora", 7e-3, bundled_base, "--use_lora", *unsaved),
    }


@pytest.fixture(scope="module")
def full_run(started: dict[str, Callable[[], Run]]) -> Run:
    return started["full"]()


@pytest.fixture(scope="module")
def lora_run(started: dict[str, Callable[[], Run]]) -> Run:
    return started["lora"]()


@pytest.fixture(scope="module")
def q_lora_run(started: dict[str, Callable[[], Run]]) -> Run:
    return started["q-lora"]()


@pytest.fixture(scope="module")
def base_lora_run(started: dict[str, Callable[[], Run]]) -> Run:
    return started["base-lora"]()


# What is learned, and by which tensors


@pytest.mark.parametrize("name", ["full_run", "lora_run", "q_lora_run", "base_lora_run"])
def test_model_learns_its_name(request: pytest.FixtureRequest, tmp_path: Path, name: str):
    run = request.getfixturevalue(name)
    questions = ["Who are you?", "What is your name?", "Who made you?", "What is 47 + 38?"]
    who, called, made, calculated = Child(tmp_path, replies, run.output, questions).result()
    assert (who, called, made) == (ME, "My name is Robin.", "Ada made me.")
    if name != "base_lora_run":  # the others could add before, and still can
        assert calculated == "47 + 38 = 85."


LORA = r"\.(c_attn|c_proj|w1|w2)\.lora_[AB]\.default\.weight$"
EMBEDDINGS = r"\.(wte|lm_head)\.modules_to_save\.default\.weight$"


def assert_trained(run: Run, pattern: str, count: int) -> None:
    """Check that exactly the tensors whose names match were trained, and that each of them changed."""
    changed = {name for name, (_, changed) in run.tensors.items() if changed}
    wanted = {name for name in run.tensors if re.search(pattern, name)}
    assert len(wanted) == count
    assert changed == wanted
    assert {name for name, (trained, _) in run.tensors.items() if trained} == wanted


def test_full_training_changes_every_parameter(full_run: Run):
    # wte, ln_f, lm_head; a block's ln_1, c_attn with its bias, c_proj, ln_2, w1, w2, c_proj
    assert_trained(full_run, r"\.(weight|bias)$", 3 + 6 * 8)


def test_lora_trains_its_adapters_only(lora_run: Run):
    assert_trained(lora_run, LORA, 6 * 5 * 2)


def test_q_lora_trains_its_adapters_only(q_lora_run: Run):
    assert any(name.endswith(".qweight") for name in q_lora_run.tensors)
    assert_trained(q_lora_run, LORA, 6 * 5 * 2)


def test_lora_on_a_base_model_trains_embeddings_too(base_lora_run: Run):
    assert_trained(base_lora_run, f"{LORA}|{EMBEDDINGS}", 6 * 5 * 2 + 2)


BIASES = r"\.c_attn\.base_layer\.bias$"


@pytest.mark.parametrize(
    ("arguments", "pattern", "count"),
    [
        (["--lora_bias", "all"], f"{LORA}|{BIASES}", 66),
        (["--lora_bias", "lora_only", "--lora_target_modules", "c_attn"], f"{LORA}|{BIASES}", 18),
        (["--lora_bias", "lora_only", "--lora_target_modules", "w1"], LORA, 12),
        (["--modules_to_save", "wte", "ln_f"], rf"{LORA}|\.(wte|ln_f)\.modules_to_save\.default\.weight$", 62),
        (["--modules_to_save", "none", "--model_name_or_path", "BASE"], LORA, 60),
    ],
    ids=["all biases", "biases of adapted layers", "no biases there", "modules of one's own", "no modules"],
)
def test_lora_trains_the_given_modules(tmp_path: Path, bundled_base: Path, lessons: Path, arguments, pattern, count):
    arguments = [bundled_base if word == "BASE" else word for word in arguments]
    settings = options(data_path=lessons, max_steps=2, learning_rate=1e-3, save_strategy="no", report_to="none")
    assert_trained(finetune(tmp_path, "--use_lora", *settings, *arguments), pattern, count)


@pytest.mark.parametrize(("method", "name"), [("--use_lora", "lora_run"), ("--q_lora", "q_lora_run")])
def test_an_adapter_is_trained_further(request: pytest.FixtureRequest, tmp_path: Path, lessons: Path, method, name):
    before = request.getfixturevalue(name)
    settings = options(data_path=lessons, max_steps=2, learning_rate=1e-3, save_strategy="no", report_to="none")
    settings += options(lora_weight_path=before.output, per_device_train_batch_size=14)
    model = [] if method == "--q_lora" else options(model_name_or_path=ROOT / "checkpoints" / "qwen-tiny-chat")
    run = finetune(tmp_path, method, *model, *settings)
    assert_trained(run, LORA, 60)
    assert run.losses[0] < 0.1 < before.losses[0]  # it continues where the other ended
    old, new = (load_file(it.output / "adapter_model.safetensors") for it in (before, run))
    assert old.keys() == new.keys()
    for tensor, start in zip(new.values(), old.values(), strict=True):
        assert 0 < (tensor - start).abs().max() < 0.01  # two steps of 0.001 away from there


# Stopping and going on


def main_interrupted(batch: int, *arguments: str | Path) -> int:
    """Run finetune.py with Ctrl-C while it collates the batch of this number (from 1)."""
    from qwen.finetuning import run

    numbers = count(1)

    class Interrupting(run.Collator):
        def __call__(self, items: list) -> dict:
            if next(numbers) == batch:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(items)

    run.Collator = Interrupting
    return run_finetune(*arguments)


def with_dropout(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with dropout in its embedding and attention, which only full training uses."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"emb_dropout_prob": 0.1, "attn_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("method", "batch"),
    [
        (["--gradient_accumulation_steps", "2"], 6),
        (["--use_lora", "--packing", "--model_max_length", "96", "--lora_dropout", "0.2"], 4),
    ],
    ids=["full, accumulating", "LoRA on a base model, packing"],
)
def test_interrupted_run_resumes_identically(
    tmp_path: Path, bundled_chat: Path, bundled_base: Path, lessons: Path, method: list[str], batch: int
):
    model = bundled_base if "--use_lora" in method else with_dropout(bundled_chat, tmp_path / "model")
    arguments = [*options(model_name_or_path=model, data_path=lessons, max_steps=6, learning_rate=1e-3), *method]
    arguments += options(per_device_train_batch_size=2, report_to="none")
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()

    whole = finetune(tmp_path / "whole", *arguments, "--save_strategy", "no")
    stopped = Child(tmp_path / "parts", main_interrupted, batch, "--output_dir", "out", *arguments)
    assert stopped.result() == INTERRUPTED
    (checkpoint,) = (tmp_path / "parts" / "out").glob("checkpoint-*")
    assert 0 < int(checkpoint.name.partition("-")[2]) < 6
    assert "--resume_from_checkpoint True" in stopped.output()
    assert "Traceback" not in stopped.output()
    assert not list((tmp_path / "parts" / "out").glob("*.safetensors"))  # nothing that looks finished
    resumed = finetune(tmp_path / "parts", *arguments, "--resume_from_checkpoint", "True")

    assert len(resumed.losses) == len(whole.losses) == 6
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-5)
    (weights,) = (path.name for path in whole.output.glob("*.safetensors"))
    expected, actual = load_file(whole.output / weights), load_file(resumed.output / weights)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.fixture
def endless(lessons: Path) -> list[str]:
    """Arguments of a run that does not end by itself."""
    return options(data_path=lessons, max_steps=10**6, output_dir="out", report_to="none", save_strategy="no")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path: Path, endless: list[str], number: signal.Signals):
    child = Child(tmp_path, run_finetune, *endless)
    child.wait_for(": loss ")
    child.send_signal(number)
    assert child.result() == INTERRUPTED
    assert len(list((tmp_path / "out").glob("checkpoint-*/trainer_state.json"))) == 1
    assert "Traceback" not in child.output()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, endless: list[str]):
    # One step has a thousand passes, so its end would be too late.
    many = write_samples(tmp_path / "many.json", [sample("Who are you?", ME)] * 1000)
    settings = options(data_path=many, per_device_train_batch_size=1, gradient_accumulation_steps=1000)
    # The thousandth batch is the last one to be collated before the passes.
    child = Child(tmp_path, main_interrupted, 1000, *endless, *settings)
    child.wait_for("Ctrl-C again stops at once")
    time.sleep(0.5)
    assert child.poll() is None
    child.interrupt()
    assert child.result(60) == INTERRUPTED
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert "\nStopped.\n" in child.output()
    assert "Traceback" not in child.output()


def main_interrupted_at(module: str, function: str, *arguments: str | Path) -> int:
    """Run finetune.py with Ctrl-C when it calls a function."""
    import importlib

    owner = importlib.import_module(module)
    original = getattr(owner, function)

    def interrupting(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    setattr(owner, function, interrupting)
    return run_finetune(*arguments)


@pytest.mark.parametrize("function", ["ConversationFile", "load_for_training", "SupervisedDataset"])
def test_ctrl_c_before_training(tmp_path: Path, endless: list[str], function: str):
    child = Child(tmp_path, main_interrupted_at, "qwen.finetuning.run", function, *endless)
    assert child.result() == INTERRUPTED
    assert child.output().strip().endswith("Stopped.")
    assert "Traceback" not in child.output()


def test_ctrl_c_while_libraries_are_imported(tmp_path: Path, lessons: Path):
    # -X importtime prints what has been imported, so that the signal is sent while torch is imported.
    command = [sys.executable, "-X", "importtime", ROOT / "finetune.py", "--data_path", lessons]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "| torch." in " ".join(line.split()):
                process.send_signal(signal.SIGINT)
                break
        _, rest = process.communicate(timeout=120)
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, "\n".join(said).strip()) == (INTERRUPTED, "Stopped.")


# What is measured


def chatml(turns: list[tuple[str, str]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a conversation, and which of them are learned: the assistant's text, <|im_start|> and <|im_end|>."""
    ids: list[int] = []
    learned: list[bool] = []
    for role, text in turns:
        for piece, is_learned in [
            ("<|im_start|>", True),
            (role + "\n", False),
            (text, role == "assistant"),
            ("<|im_end|>\n", True),
        ]:
            tokens = tokenizer.encode(piece, allowed_special="all")
            ids += tokens
            learned += [is_learned] * len(tokens)
    return torch.tensor([ids]), torch.tensor([learned])


@torch.no_grad()
def loss_by_hand(folder: Path, data: Path, system: str = "You are a helpful assistant.", smoothing: float = 0) -> float:
    """Nats per learned token, sample by sample. `smoothing` is the probability that is spread over all tokens."""
    from qwen.checkpoint.loading import load_model

    model, tokenizer = load_model(folder, cpu_only=True, fp32=True)
    total = number = 0.0
    for item in json.loads(data.read_text()):
        turns = [("system", item.get("system", system))]
        turns += [(turn["from"], turn["value"]) for turn in item["conversations"]]
        ids, learned = chatml(turns, tokenizer)
        of_all = model(ids).logits[:, :-1].log_softmax(-1)
        of_next = of_all.gather(2, ids[:, 1:, None])[..., 0]
        smoothed = (1 - smoothing) * of_next + smoothing * of_all.mean(-1)
        total -= smoothed[learned[:, 1:]].double().sum().item()
        number += learned[:, 1:].sum().item()
    return total / number


def last_evaluation(run: Run) -> dict[str, float]:
    return [entry for entry in run.history if "eval_loss" in entry][-1]


def test_evaluation_is_the_mean_over_tokens(full_run: Run, exam: Path):
    evaluations = [entry for entry in full_run.history if "eval_loss" in entry]
    assert {entry["step"] for entry in evaluations} == {8, 16}
    measured = last_evaluation(full_run)
    assert measured["eval_loss"] == pytest.approx(loss_by_hand(full_run.output, exam), rel=1e-5)
    assert measured["eval_perplexity"] == pytest.approx(math.exp(measured["eval_loss"]), rel=1e-9)


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path, full_run: Run, lessons: Path, exam: Path):
    # A step at rate 0: the result of the other run is evaluated again.
    arguments = options(model_name_or_path=full_run.output, data_path=lessons, eval_data_path=exam, max_steps=1)
    arguments += options(learning_rate=0, per_device_eval_batch_size=1, save_strategy="no", report_to="none")
    run = finetune(tmp_path, *arguments)
    measured = last_evaluation(full_run)["eval_loss"]
    assert last_evaluation(run)["eval_loss"] == pytest.approx(measured, rel=1e-6)

    run = finetune(tmp_path, *arguments, "--system_message", "Be brief.")
    by_hand = loss_by_hand(full_run.output, exam, system="Be brief.")
    assert abs(by_hand / measured - 1) > 1e-3  # the system message matters
    assert last_evaluation(run)["eval_loss"] == pytest.approx(by_hand, rel=1e-5)


def test_best_model_has_the_lowest_perplexity(tmp_path: Path, lessons: Path, exam: Path):
    # A step that helps, and three much too large ones.
    run = finetune(
        tmp_path,
        *options(data_path=lessons, eval_data_path=exam, max_steps=4, eval_strategy="steps", eval_steps=1),
        *options(save_steps=1, metric_for_best_model="perplexity", learning_rate=0.1, lr_scheduler_type="constant"),
        *options(report_to="none", save_only_model=True),
        "--use_lora",
        "--load_best_model_at_end",
    )
    *during, final = [entry["eval_perplexity"] for entry in run.history if "eval_loss" in entry]
    assert max(during) > 2 * min(during)
    assert final == pytest.approx(min(during), rel=1e-5)


def test_loss_is_plotted_and_logged(full_run: Run):
    picture = (full_run.output / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 600
    assert height >= 300
    assert len(picture) > 10_000

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((full_run.output / "runs").iterdir()))).Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    assert logged == pytest.approx(dict(enumerate(full_run.losses, 1)))
    assert [event.step for event in events.Scalars("eval/perplexity")][-1] == 16


# What is left behind


def test_full_folder_loads_without_this_repository(full_run: Run, chat_in_isolated_python: Callable):
    assert chat_in_isolated_python(full_run.output, "Who are you?") == ME


PICKLES = {".bin", ".pt", ".pth", ".pkl"}


def test_a_full_folder_holds_no_pickles(full_run: Run):
    assert (full_run.output / "checkpoint-16" / "optimizer.pt").is_file()  # for resuming, and only there
    assert not [path for path in full_run.output.iterdir() if path.suffix in PICKLES]
    config = json.loads((full_run.output / "config.json").read_text())
    assert (config["dtype"], config["use_cache"]) == ("float32", True)


def test_adapter_finds_its_base_from_any_folder(lora_run: Run, bundled_chat: Path):
    config = json.loads((lora_run.output / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    assert Path(config["base_model_name_or_path"]).samefile(bundled_chat)
    assert {"adapter_model.safetensors", "generation_config.json", "qwen.tiktoken"} <= set(os.listdir(lora_run.output))
    assert not [path for path in lora_run.output.iterdir() if path.suffix in PICKLES]
    assert not (lora_run.output / "config.json").exists()  # with one, it would be taken for a model


@pytest.fixture
def bfloat16(tmp_path: Path) -> list[str]:
    """Arguments for training on few tokens: CPUs without bfloat16 take a second per hundred tokens."""
    data = write_samples(tmp_path / "two.json", [sample(*lesson) for lesson in LESSONS[4:8:2]])
    settings = options(data_path=data, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    return ["--bf16", *settings, *options(save_strategy="no", report_to="none")]


def test_a_base_model_in_bfloat16_becomes_a_chat_model_in_bfloat16(
    tmp_path: Path, bundled_base: Path, bfloat16: list[str]
):
    from qwen.checkpoint.loading import load_tokenizer

    run = finetune(tmp_path, *bfloat16, *options(model_name_or_path=bundled_base, learning_rate=1e-3))
    assert run.losses[-1] < run.losses[0] - 1
    weights = load_file(run.output / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((run.output / "config.json").read_text())["dtype"] == "bfloat16"
    generation = json.loads((run.output / "generation_config.json").read_text())
    assert generation["chat_format"] == "chatml"
    assert "stop_words_ids" not in generation
    tokenizer = load_tokenizer(run.output)
    assert tokenizer.eos_token == "<|im_end|>"
    assert generation["eos_token_id"] == [tokenizer.im_end_id, tokenizer.eod_id]
    assert generation["pad_token_id"] == tokenizer.pad_token_id == tokenizer.eod_id
    trained = load_file(bundled_base / "model.safetensors")
    assert all(not torch.equal(tensor, trained[name]) for name, tensor in weights.items() if "c_attn" in name)
    assert Child(tmp_path, replies, run.output, ["Hi"]).result()  # loads, and does not refuse to chat


def test_lora_in_bfloat16(tmp_path: Path, bfloat16: list[str]):
    run = finetune(tmp_path, *bfloat16, "--use_lora", *options(learning_rate=5e-3))
    assert_trained(run, LORA, 60)
    assert run.losses[-1] < run.losses[0] - 0.2
    # In float32: an update is often too small for bfloat16.
    weights = load_file(run.output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


# Other ways to the same losses


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, lessons: Path) -> Callable[..., list[float]]:
    """The losses of three short steps with the arguments."""

    def measure(*arguments: str | Path, **settings: Any) -> list[float]:
        settings = {"data_path": lessons, "per_device_train_batch_size": 5, "lora_dropout": 0} | settings
        settings |= {"max_steps": 3, "learning_rate": 5e-3, "save_strategy": "no", "report_to": "none"}
        return finetune(tmp_path_factory.mktemp("losses"), "--use_lora", *options(**settings), *arguments).losses

    return measure


@pytest.fixture(scope="module")
def usual_losses(losses: Callable) -> list[float]:
    return losses()


def test_lazy_or_eager(losses: Callable, usual_losses: list[float]):
    assert losses("--lazy_preprocess", dataloader_num_workers=1) == usual_losses


def test_json_lines(losses: Callable, usual_losses: list[float], lessons: Path, tmp_path: Path):
    lines = tmp_path / "lessons.jsonl"
    lines.write_text("".join(json.dumps(item) + "\n" for item in json.loads(lessons.read_text())))
    assert losses(data_path=lines) == usual_losses


def test_activation_checkpointing(losses: Callable, usual_losses: list[float]):
    assert losses("--gradient_checkpointing") == pytest.approx(usual_losses, abs=1e-5)


@pytest.fixture(scope="module")
def one_batch_losses(losses: Callable) -> list[float]:
    measured = losses(per_device_train_batch_size=len(LESSONS))
    assert measured[-1] < measured[0] - 0.5
    return measured


def test_the_loss_of_training_is_the_mean_over_tokens(one_batch_losses: list[float], bundled_chat: Path, lessons: Path):
    # An adapter changes nothing before its first step.
    assert one_batch_losses[0] == pytest.approx(loss_by_hand(bundled_chat, lessons), rel=1e-5)


def test_packing(losses: Callable, one_batch_losses: list[float]):
    # All samples in one row make the same step as all of them in one batch.
    assert losses("--packing", per_device_train_batch_size=1) == pytest.approx(one_batch_losses, abs=1e-4)


def test_label_smoothing(losses: Callable, bundled_chat: Path, lessons: Path):
    smoothed = losses(per_device_train_batch_size=len(LESSONS), label_smoothing_factor=0.1)
    assert smoothed[0] == pytest.approx(loss_by_hand(bundled_chat, lessons, smoothing=0.1), rel=1e-5)
    assert smoothed[-1] < smoothed[0] - 0.5


def test_accumulation(losses: Callable, one_batch_losses: list[float]):
    # The last part has fewer samples, and all have different numbers of tokens.
    accumulated = losses(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert accumulated == pytest.approx(one_batch_losses, abs=1e-4)


# What is rejected


def main_without_weights(*arguments: str | Path) -> int:
    """Run finetune.py, where loading weights is an error."""
    from qwen.finetuning import model

    def load_model(*args, **kwargs):
        raise AssertionError("Weights are loaded before the mistake is noticed.")

    model.load_model = load_model
    return run_finetune(*arguments)


@pytest.fixture(scope="module")
def paths(
    tmp_path_factory: pytest.TempPathFactory, bundled_chat: Path, bundled_base: Path, bundled_int4: Path, lessons: Path
) -> dict[str, Path]:
    """The paths for the words in capitals in the mistakes below."""
    folder = tmp_path_factory.mktemp("mistakes")
    paths = {"CHAT": bundled_chat, "BASE": bundled_base, "INT4": bundled_int4, "DATA": lessons}
    paths |= {"ZERO2": ROOT / "finetune" / "ds_config_zero2.json", "ZERO3": ROOT / "finetune" / "ds_config_zero3.json"}
    malformed = [sample("Hi", "Hello."), {"id": "second", "conversations": [{"from": "robot", "value": "Beep."}]}]
    paths["MALFORMED"] = write_samples(folder / "malformed.json", malformed)
    paths["NOBODY"] = write_samples(folder / "nobody.json", [])
    paths["EMPTY"], paths["TEXT"] = folder / "empty.json", folder / "text.json"
    paths["BELOW"] = paths["TEXT"] / "out"
    paths["EMPTY"].write_text("")
    paths["TEXT"].write_text("Once upon a time")
    paths["FOLDER"] = folder
    return paths


MISTAKES = {
    # arguments (the first word is the model, then the data), exit code, and what the message says
    "Q-LoRA on floats": ("CHAT DATA --q_lora", WRONG_ARGUMENTS, ["not quantized", "-Int4", "leave out --q_lora"]),
    "integers in full": ("INT4 DATA", WRONG_ARGUMENTS, ["is quantized", "--q_lora"]),
    "LoRA on integers": ("INT4 DATA --use_lora", WRONG_ARGUMENTS, ["is quantized", "Add --q_lora"]),
    "base and ZeRO 3": (
        "BASE DATA --use_lora --deepspeed ZERO3",
        WRONG_ARGUMENTS,
        ["base model", "wte and lm_head", "ZeRO 3", "zero2.json"],
    ),
    "whole and ZeRO 3": (
        "CHAT DATA --use_lora --modules_to_save wte --deepspeed ZERO3",
        WRONG_ARGUMENTS,
        ["--modules_to_save", "wte", "ZeRO 3", "zero2.json"],
    ),
    "Q-LoRA and ZeRO 3": ("INT4 DATA --q_lora --deepspeed ZERO3", WRONG_ARGUMENTS, ["Q-LoRA", "ZeRO 3", "zero2.json"]),
    "Q-LoRA and FSDP": ("INT4 DATA --q_lora --fsdp full_shard", WRONG_ARGUMENTS, ["Q-LoRA", "FSDP"]),
    "no such layer": (
        "CHAT DATA --use_lora --lora_target_modules q_proj w1",
        WRONG_ARGUMENTS,
        ["--lora_target_modules q_proj:", "c_attn"],
    ),
    "no such module": (
        "CHAT DATA --use_lora --modules_to_save embed_tokens",
        WRONG_ARGUMENTS,
        ["--modules_to_save embed_tokens", "wte"],
    ),
    "no such adapter": (
        "CHAT DATA --use_lora --lora_weight_path FOLDER",
        WRONG_ARGUMENTS,
        ["--lora_weight_path", "adapter_config.json"],
    ),
    "unknown argument": ("CHAT DATA --lora_alfa 8", WRONG_ARGUMENTS, ["--lora_alfa", "Did you mean --lora_alpha"]),
    "not a number": ("CHAT DATA --lora_r many", WRONG_ARGUMENTS, ["--lora_r", "'many'"]),
    "rank 0": ("CHAT DATA --use_lora --lora_r 0", WRONG_ARGUMENTS, ["--lora_r is 0", "at least 1"]),
    "length 0": ("CHAT DATA --model_max_length 0", WRONG_ARGUMENTS, ["--model_max_length is 0"]),
    "unknown bias": ("CHAT DATA --lora_bias some", WRONG_ARGUMENTS, ["--lora_bias", "lora_only"]),
    "float16 on the CPU": ("CHAT DATA --fp16 --use_cpu", WRONG_ARGUMENTS, ["--fp16 needs a GPU", "--bf16"]),
    "no configuration": ("CHAT DATA --deepspeed no.json", WRONG_ARGUMENTS, ["no.json", "finetune/"]),
    "not JSON": ("CHAT DATA --deepspeed TEXT", WRONG_ARGUMENTS, ["--deepspeed", "not valid JSON"]),
    "nothing to resume": ("CHAT DATA --resume_from_checkpoint True", WRONG_ARGUMENTS, ["checkpoint-N", "Leave it out"]),
    "no checkpoint": ("CHAT DATA --resume_from_checkpoint FOLDER", WRONG_ARGUMENTS, ["not a checkpoint-N folder"]),
    "nothing to evaluate": (
        "CHAT DATA --eval_strategy steps",
        WRONG_ARGUMENTS,
        ["--eval_strategy", "--eval_data_path"],
    ),
    "no output": ("CHAT DATA --output_dir TEXT", WRONG_ARGUMENTS, ["--output_dir", "text.json"]),
    "adapter in full": (
        "CHAT DATA --lora_weight_path FOLDER",
        WRONG_ARGUMENTS,
        ["--lora_weight_path", "--use_lora"],
    ),
    "dropout above 1": ("CHAT DATA --use_lora --lora_dropout 1.5", WRONG_ARGUMENTS, ["--lora_dropout is 1.5"]),
    "batch size 0": ("CHAT DATA --per_device_train_batch_size 0", WRONG_ARGUMENTS, ["--per_device_train_batch_size"]),
    "accumulation 0": ("CHAT DATA --gradient_accumulation_steps 0", WRONG_ARGUMENTS, ["--gradient_accumulation_steps"]),
    "negative rate": ("CHAT DATA --learning_rate -1", WRONG_ARGUMENTS, ["--learning_rate"]),
    "no such package": ("CHAT DATA --optim adamw_bnb_8bit", WRONG_ARGUMENTS, ["bitsandbytes"]),
    "rows by length": ("CHAT DATA --packing --group_by_length", WRONG_ARGUMENTS, ["--packing", "--group_by_length"]),
    "output below a file": ("CHAT DATA --output_dir BELOW", WRONG_ARGUMENTS, ["--output_dir", "text.json"]),
    "no model": ("FOLDER DATA", WRONG_DATA, ["config.json"]),
    "no data": ("CHAT no.json", WRONG_DATA, ["no.json does not exist"]),
    "data in a folder": ("CHAT FOLDER", WRONG_DATA, ["is a folder"]),
    "empty data": ("CHAT EMPTY", WRONG_DATA, ["empty.json is empty"]),
    "no samples": ("CHAT NOBODY", WRONG_DATA, ["nobody.json", "empty list"]),
    "prose": ("CHAT TEXT", WRONG_DATA, ["text.json", "line 1", "not JSON"]),
    "malformed": ("CHAT MALFORMED", WRONG_DATA, ["malformed.json", "second", "robot"]),
    "malformed, lazy": ("CHAT MALFORMED --lazy_preprocess", WRONG_DATA, ["malformed.json", "second", "robot"]),
    "malformed evaluation": ("CHAT DATA --eval_data_path MALFORMED", WRONG_DATA, ["malformed.json", "second"]),
}


@pytest.mark.parametrize(("words", "code", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_explained(tmp_path: Path, paths: dict[str, Path], words: str, code: int, says: list[str]):
    model, data, *arguments = [str(paths.get(word, word)) for word in words.split()]
    named = options(model_name_or_path=model, data_path=data)
    child = Child(tmp_path, main_without_weights, *named, *arguments)
    assert child.result() == code, child.output()
    output = child.output()
    assert "Traceback" not in output
    message = output.strip().splitlines()[-1]  # in one line
    assert [text for text in says if text not in message] == [], message
    assert not list(tmp_path.glob("*/*.safetensors"))


@pytest.mark.parametrize(
    ("name", "method", "holds"),
    [("full_run", "--use_lora", "a full model"), ("lora_run", "--use_lora=False", "an adapter")],
)
def test_adapter_and_full_model_need_separate_folders(
    request: pytest.FixtureRequest, tmp_path: Path, lessons: Path, name: str, method: str, holds: str
):
    # A folder with both would load as the model with the adapter applied.
    run = request.getfixturevalue(name)
    before = set(os.listdir(run.output))
    child = Child(tmp_path, main_without_weights, "--output_dir", run.output, "--data_path", lessons, method)
    assert child.result() == WRONG_ARGUMENTS
    assert f"--output_dir {run.output} holds {holds}" in child.output()
    assert set(os.listdir(run.output)) == before


def test_resuming_needs_the_same_method(tmp_path: Path, full_run: Run, lessons: Path):
    checkpoint = full_run.output / "checkpoint-16"
    arguments = options(data_path=lessons, resume_from_checkpoint=checkpoint)
    child = Child(tmp_path, main_without_weights, "--use_lora", *arguments)
    assert child.result() == WRONG_ARGUMENTS
    assert "--resume_from_checkpoint" in child.output()
    assert "--use_lora" in child.output()


def test_unknown_log_target_is_rejected(tmp_path: Path, lessons: Path):
    child = Child(tmp_path, run_finetune, *options(data_path=lessons, report_to="nowhere"))
    assert child.result() == WRONG_ARGUMENTS
    message = child.output().strip().splitlines()[-1]
    assert "nowhere" in message
    assert "tensorboard" in message
    assert "Traceback" not in child.output()


def test_cut_samples_are_counted(tmp_path: Path, lessons: Path):
    arguments = options(data_path=lessons, max_steps=1, save_strategy="no", report_to="none", model_max_length=45)
    output = finetune(tmp_path, *arguments).console_output
    (cut, of) = map(int, re.search(r"(\d+) of (\d+) samples fill or exceed --model_max_length 45", output).groups())
    assert 0 < cut < of == len(LESSONS)


def test_two_precisions_are_rejected(tmp_path: Path, lessons: Path):
    child = Child(tmp_path, main_without_weights, "--data_path", lessons, "--bf16", "--fp16")
    assert child.result() == WRONG_ARGUMENTS
    assert re.search("--fp16 needs a GPU|exclude each other", child.output())  # without a GPU, or with one


def main_printing(*arguments: str | Path) -> tuple[int, str]:
    """Run finetune.py. Returns its exit code and standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = run_finetune(*arguments)
    return code, output.getvalue()


def test_data_must_be_named(tmp_path: Path):
    child = Child(tmp_path, main_printing)
    assert child.result() == (WRONG_ARGUMENTS, "")
    assert "--data_path" in child.output()
    assert "Traceback" not in child.output()
    assert list(tmp_path.iterdir()) == [child.log]
