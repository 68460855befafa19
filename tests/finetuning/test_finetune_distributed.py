"""Fine-tuning in several processes, with the scripts of finetune/ and with torchrun: the result equals that of one
process, memory is sharded, and runs can be stopped and resumed.

Every run is a real one of two processes on the CPU with the bundled toy. Starting them takes most of the time, so each
test checks several things. Unless a test is about the start, the processes are forked from one that has imported torch:
either from here, with the arguments of a script, or by the script, whose PYTHON is a command that forks.
"""

import itertools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from qwen.checkpoint.loading import load_model
from tests.support import ROOT
from tests.support.processes import Child, forking_python, run_finetune

pytestmark = pytest.mark.training

TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT"]
SCRIPTS = ROOT / "finetune"
STEPS, SAVED, BATCH = 6, 4, 2
TOLERANCE = 1e-4  # relative, of a loss: only the order of summation differs
TIMEOUT = 180  # seconds, for a run of ten on an idle machine

# Dropout draws different numbers in two processes.
COMMON = f"--lora_dropout 0 --gradient_accumulation_steps 1 --max_steps {STEPS} --save_steps {SAVED}".split()
COMMON += ["--lr_scheduler_type", "constant", "--weight_decay", "0.1", "--adam_beta2", "0.95", "--report_to", "none"]
FULL = ["--learning_rate", "1e-3"]
LORA = ["--learning_rate", "5e-3"]


@dataclass
class Run:
    """A finished run."""

    folder: Path
    status: int
    console_output: str

    @property
    def log(self) -> list[dict]:
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in history if "loss" in entry]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        [file] = self.folder.glob("*model.safetensors")
        return load_file(file)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


class Runs:
    """Starts runs outside of the repository, in a folder whose name has a space.

    Args:
        recorder: a Python that only prints its arguments.
        forking: a Python that is forked.
    """

    def __init__(self, folder: Path, recorder: Path, forking: Path):
        self.folder = folder / "with a space"
        self.folder.mkdir()
        self.recorder = recorder
        self.forking = str(forking)
        self.data = self.folder / "some data.json"
        self.data.write_text(json.dumps([_sample(i) for i in range(2 * STEPS)]))

    def start(self, command: list, *arguments: str, output: str, **environment: str) -> subprocess.Popen:
        """Start a command in its own process group, with the data and output arguments of a script or finetune.py."""
        port = environment.setdefault("MASTER_PORT", free_port())
        command = [port if word == "PORT" else str(word) for word in command]
        paths = self.path_arguments(output, script=command[-1].endswith(".sh"))
        base = {"PYTHON": self.forking, "PYTHON_EXEC": self.forking, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(self.folder / f"{output}.txt", "a") as log:
            return subprocess.Popen(
                [*command, *paths, *arguments],
                cwd=self.folder,
                env=os.environ | base | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def path_arguments(self, output: str, script: bool) -> list[str]:
        data, folder = ("-d", "-o") if script else ("--data_path", "--output_dir")
        return [data, str(self.data), folder, output]

    def forked(
        self,
        *arguments: str,
        output: str,
        script: str | None = None,
        processes: int = 2,
        status: int = 0,
        run: Callable[..., int] = run_finetune,
    ) -> Run:
        """Run finetune.py in forked processes, with the environment variables that torchrun sets.

        Args:
            arguments: of finetune.py, or of the script.
            script: one of finetune/, whose arguments for finetune.py are used.
            status: expected exit status of every process.
            run: calls finetune.py.
        """
        words = [*self.path_arguments(output, script=script is not None), *arguments]
        if script is not None:
            recorded = scripted("sh", script, *words, recorder=self.recorder).stdout
            words = recorded.partition(f"{ROOT / 'finetune.py'}\n")[2].splitlines()
        environments = [{}]
        if processes > 1:
            world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
            environments = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        log = self.folder / f"{output}.txt"
        children = [Child(self.folder, run, *words, log=log, **environment) for environment in environments]
        try:
            assert [child.result(TIMEOUT) for child in children] == [status] * processes, self.console_output(output)
        finally:
            for child in children:
                child.kill()
        return Run(self.folder / output, status, self.console_output(output))

    def wait(self, process: subprocess.Popen, output: str) -> Run:
        try:
            status = process.wait(TIMEOUT)
        finally:
            kill_group(process)
        return Run(self.folder / output, status, self.console_output(output))

    def console_output(self, output: str) -> str:
        return (self.folder / f"{output}.txt").read_text()

    def __call__(self, command: list, *arguments: str, output: str, **environment: str) -> Run:
        run = self.wait(self.start(command, *arguments, output=output, **environment), output)
        assert run.status == 0, run.console_output
        return run


def _sample(i: int) -> dict:
    """Samples have different lengths, since a mean over processes is not a mean over tokens."""
    answer = " ".join(["I am Robin, a small robot."] + ["Ada made me."] * (i % 4))
    turns = [{"from": "user", "value": f"{i}: who are you?"}, {"from": "assistant", "value": answer}]
    return {"id": str(i), "conversations": turns}


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def kill_group(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def processes_with(words: str) -> list[str]:
    """The command lines of running processes that contain these words."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if words in line:
            lines.append(line)
    return lines


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "the run took too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with forking_python(tmp_path_factory.mktemp("forking")) as python:
        yield python


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, recorder: Path, forking: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), recorder, forking)


@pytest.fixture(scope="module")
def full_alone(runs: Runs) -> Run:
    """Full training in one process, both samples of a step in one batch."""
    return runs.forked(*[*COMMON, *FULL, "--per_device_train_batch_size", str(BATCH)], output="full_alone", processes=1)


@pytest.fixture(scope="module")
def lora_alone(runs: Runs) -> Run:
    return runs.forked(
        *[*COMMON, *LORA, "--per_device_train_batch_size", str(BATCH)],
        output="lora_alone",
        script="finetune_lora_single_gpu.sh",
        processes=1,
    )


def initial_weights(run: Run) -> dict[str, torch.Tensor]:
    """The weights before training: those of the model, or zeros for the B matrices of an adapter."""
    if "adapter_config.json" in run.files:
        return {name: torch.zeros_like(tensor) for name, tensor in run.weights.items() if "lora_B" in name}
    return load_file(ROOT / "checkpoints" / "qwen-tiny-chat" / "model.safetensors")


def assert_same_training(run: Run, alone: Run) -> None:
    """Compare the losses of every step, the final weights, and the files."""
    assert len(run.losses) == len(alone.losses) == STEPS
    # Sums are taken in different orders, which matters more for small losses.
    assert run.losses == pytest.approx(alone.losses, rel=TOLERANCE, abs=1e-5 * alone.losses[0])
    assert run.losses[-1] < 0.2 * run.losses[0], "it has not learned"
    assert run.files == alone.files
    weights, expected, before = run.weights, alone.weights, initial_weights(alone)
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in expected.items()}
    for name, start in before.items():
        moved = (expected[name] - start).norm()
        assert moved > 0
        # If a gradient is almost zero, its sign is noise, and Adam makes a step of it.
        assert (weights[name] - expected[name]).norm() < 0.03 * moved, name


def assert_quiet(run: Run) -> None:
    """Losses and the output folder are printed once, and no noise."""
    assert_no_noise(run)
    assert run.console_output.count("Done: ") == 1
    assert run.console_output.count(": loss ") == STEPS


def assert_no_noise(run: Run) -> None:
    """No warnings, banners or tracebacks."""
    for word in (
        "Warning",
        "WARN",
        "INFO",
        "[transformers]",
        "Failed to load",
        "GPT-QModel",
        "Traceback",
        "built successfully",
    ):
        assert word not in run.console_output


def bytes_of(folder: Path, pattern: str) -> list[int]:
    return sorted(path.stat().st_size for path in folder.glob(pattern))


def parameters(run: Run) -> int:
    return sum(tensor.numel() for tensor in run.weights.values())


def resumed(runs: Runs, *arguments: str, run: Run, script: str | None = None) -> Run:
    """Resume a run from a copy of its first checkpoint."""
    output = f"{run.folder.name}_resumed"
    shutil.copytree(run.folder / f"checkpoint-{SAVED}", runs.folder / output / f"checkpoint-{SAVED}")
    return runs.forked(*arguments, "--resume_from_checkpoint", "True", output=output, script=script)


def assert_resumed(resumed: Run, run: Run) -> None:
    assert [entry["step"] for entry in resumed.log] == list(range(1, STEPS + 1))
    assert resumed.losses == pytest.approx(run.losses, rel=1e-5)
    assert resumed.console_output.count(": loss ") == STEPS - SAVED, "the first steps were repeated"


def test_plain_torchrun(runs: Runs, full_alone: Run):
    arguments = [*COMMON, *FULL, "--per_device_train_batch_size", "1"]
    run = runs([runs.forking, *TORCHRUN, ROOT / "finetune.py"], *arguments, output="ddp")
    assert_same_training(run, full_alone)
    assert_quiet(run)
    model, _ = load_model(run.folder)
    assert model.num_parameters() == parameters(full_alone)


def test_zero_3_full(runs: Runs, full_alone: Run):
    run = runs.forked(*COMMON, *FULL, output="zero3", script="finetune_ds.sh")
    assert_same_training(run, full_alone)
    assert_quiet(run)
    load_model(run.folder)

    # Each process holds half of the weights and of Adam's two moments, all float32, and nothing else.
    shards = run.folder / f"checkpoint-{SAVED}" / f"global_step{SAVED}"
    assert bytes_of(shards, "*optim_states.pt") == pytest.approx([3 * 4 * parameters(run) / 2] * 2, rel=0.01)
    assert max(bytes_of(shards, "*model_states.pt")) < 0.01 * 4 * parameters(run)

    assert_resumed(resumed(runs, *COMMON, *FULL, run=run, script="finetune_ds.sh"), run)


def test_fsdp_full(runs: Runs, full_alone: Run):
    # Checkpoints are sharded; the result is a whole model all the same, as checked below.
    sharded = ["--fsdp", "--fsdp_config", '{"state_dict_type": "SHARDED_STATE_DICT"}']
    arguments = [*COMMON, *FULL, *sharded, "--per_device_train_batch_size", "1"]
    run = runs.forked(*arguments, output="fsdp")
    assert_same_training(run, full_alone)
    assert_quiet(run)
    load_model(run.folder)
    assert json.loads((run.folder / "config.json").read_text())["architectures"] == ["QWenLMHeadModel"]

    checkpoint = run.folder / f"checkpoint-{SAVED}"
    assert bytes_of(checkpoint, "pytorch_model_fsdp_0/*.distcp") == pytest.approx(
        [4 * parameters(run) / 2] * 2, rel=0.1
    )
    assert bytes_of(checkpoint, "optimizer_0/*.distcp") == pytest.approx([8 * parameters(run) / 2] * 2, rel=0.1)

    assert_resumed(resumed(runs, *arguments, run=run), run)


def test_fsdp_lora(runs: Runs, lora_alone: Run):
    run = runs.forked(*COMMON, *LORA, "--use_lora", "--fsdp", "--per_device_train_batch_size", "1", output="fsdp_lora")
    assert_same_training(run, lora_alone)
    assert_quiet(run)
    assert (run.folder / f"checkpoint-{SAVED}" / "optimizer.bin").is_file()  # which DDP does not write


def test_zero_3_lora(runs: Runs, lora_alone: Run):
    zero_3 = ["--deepspeed", str(SCRIPTS / "ds_config_zero3.json"), "--per_device_train_batch_size", "1"]
    run = runs.forked(*COMMON, *LORA, *zero_3, output="zero3_lora", script="finetune_lora_ds.sh")
    assert_same_training(run, lora_alone)
    assert_quiet(run)
    shards = run.folder / f"checkpoint-{SAVED}" / f"global_step{SAVED}"
    assert bytes_of(shards, "*optim_states.pt") == pytest.approx([3 * 4 * parameters(run) / 2] * 2, rel=0.1)


@pytest.mark.parametrize("new", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["forked", "started anew"])
def test_zero_2_lora_can_be_stopped_and_resumed(runs: Runs, lora_alone: Run, new: bool):
    """Ctrl-C ends the launcher and its processes, forked ones or, which takes longer, new interpreters."""
    script = "finetune_lora_ds.sh"
    arguments = [*COMMON, *LORA, "--per_device_train_batch_size", "1"]
    name = f"zero2_lora_{'new' if new else 'forked'}"
    run = runs.forked(*arguments, output=name, script=script)
    assert_same_training(run, lora_alone)
    assert_quiet(run)
    shards = run.folder / f"checkpoint-{SAVED}" / f"global_step{SAVED}"
    assert bytes_of(shards, "*optim_states.pt") == pytest.approx([3 * 4 * parameters(run) / 2] * 2, rel=0.1)

    output = f"{name}_stopped"
    pythons = dict.fromkeys(("PYTHON", "PYTHON_EXEC"), sys.executable if new else runs.forking)
    process = runs.start(["bash", SCRIPTS / script], *arguments, output=output, **pythons)
    wait_until(lambda: ": loss " in runs.console_output(output), process)
    os.killpg(process.pid, signal.SIGINT)
    stopped = runs.wait(process, output)
    assert stopped.status == 130, stopped.console_output
    assert not processes_with(output)
    assert stopped.console_output.count("Stopping after this step") == 1
    assert stopped.console_output.count("--resume_from_checkpoint True") == 1
    assert_no_noise(stopped)
    steps_done = stopped.console_output.count(": loss ")
    assert 1 <= steps_done < STEPS
    assert [path.name for path in stopped.folder.glob("checkpoint-*")] == [f"checkpoint-{steps_done}"]

    again = runs.forked(*arguments, "--resume_from_checkpoint", "True", output=output, script=script)
    assert again.losses == pytest.approx(run.losses, rel=1e-5)
    assert again.console_output.count(": loss ") == STEPS


def test_qlora_on_two_machines_matches_one_process(runs: Runs):
    alone = runs.forked(
        *[*COMMON, *LORA, "--per_device_train_batch_size", str(BATCH)],
        output="qlora_alone",
        script="finetune_qlora_single_gpu.sh",
        processes=1,
    )
    command = ["bash", SCRIPTS / "finetune_qlora_ds.sh"]
    arguments = [*COMMON, *LORA, "--per_device_train_batch_size", "1"]
    machines = {"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    second = runs.start(command, *arguments, output="qlora_second_machine", NODE_RANK="1", **machines)
    try:
        run = runs(command, *arguments, output="qlora", NODE_RANK="0", **machines)
        assert second.wait(TIMEOUT) == 0
    finally:
        kill_group(second)
    assert_same_training(run, alone)
    assert_quiet(run)
    assert ": loss " not in runs.console_output("qlora_second_machine")


def main_without_mpi(*arguments: str) -> int:
    """finetune.py where mpi4py is not installed."""
    sys.modules["mpi4py"] = None
    return run_finetune(*arguments)


def test_one_process_runs_deepspeed_with_the_schedule_of_the_arguments(runs: Runs):
    """Without a launcher, without MPI, and although the configuration names another schedule."""
    config = json.loads((SCRIPTS / "ds_config_zero2.json").read_text())
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
    (runs.folder / "warmup.json").write_text(json.dumps(config))
    run = runs.forked(
        *[*COMMON, "--learning_rate", "1e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", "2"],
        *["--deepspeed", "warmup.json"],
        output="schedule",
        processes=1,
        run=main_without_mpi,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert [entry["learning_rate"] for entry in run.log] == pytest.approx(expected)
    assert "The WarmupLR of the DeepSpeed configuration is ignored" in run.console_output
    assert_quiet(run)


def main_without_delay(*arguments: str) -> int:
    """finetune.py without the delay of processes that print no error, in which a launcher would end them."""
    from qwen.finetuning import distributed

    distributed.delay_exit_on_workers.__defaults__ = (0,)
    return run_finetune(*arguments)


def test_error_is_printed_once(runs: Runs):
    mistaken = {"status": 1, "run": main_without_delay}
    run = runs.forked("--data_path", "nowhere.json", output="missing", script="finetune_lora_ds.sh", **mistaken)
    assert run.console_output == f"{runs.folder / 'nowhere.json'} does not exist: check the path.\n"

    run = runs.forked("--epochs", "3", output="unknown", script="finetune_ds.sh", **mistaken | {"status": 2})
    assert run.console_output.count("\n") == 1
    assert "Unknown argument --epochs" in run.console_output


def test_error_on_one_machine_ends_all(runs: Runs):
    machines = {"NNODES": "2", "GPUS_PER_NODE": "1", "MASTER_PORT": free_port()}
    command = [runs.forking, SCRIPTS / "launch.py", ROOT / "finetune.py"]
    first = runs.start(command, output="first_machine", NODE_RANK="0", **machines)
    second = runs.start(command, "--data_path", "nowhere.json", output="second_machine", NODE_RANK="1", **machines)
    try:
        assert runs.wait(second, "second_machine").status == 1
        run = runs.wait(first, "first_machine")
    finally:
        kill_group(first)
    assert run.status == 1
    assert run.console_output == f"In process 1: {runs.folder / 'nowhere.json'} does not exist: check the path.\n"


@pytest.mark.parametrize(
    ("name", "value"), [("GPUS_PER_NODE", "all"), ("GPUS_PER_NODE", "0"), ("NNODES", "-1"), ("MASTER_PORT", "x")]
)
def test_launcher_needs_numbers(name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("GPUS_PER_NODE", "1")
    monkeypatch.setenv(name, value)
    launch = runpy.run_path(str(SCRIPTS / "launch.py"))
    assert launch["main"](["end.py"]) == 2
    assert capsys.readouterr().err.startswith(f"{name} is {value}: it must be a whole number")


def test_launcher_explains_failures(tmp_path: Path, forking: Path):
    def launched(port: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [forking, SCRIPTS / "launch.py", tmp_path / "end.py"],
            env=os.environ | {"GPUS_PER_NODE": "1", "MASTER_PORT": port, "PYTHON_EXEC": str(forking)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )

    (tmp_path / "end.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = launched(port)
    assert result.returncode == 1
    assert f"cannot connect at localhost:{port}" in result.stderr
    assert "set MASTER_PORT" in result.stderr
    assert "Traceback" not in result.stderr

    result = launched(free_port())
    assert result.returncode == 128 + signal.SIGKILL
    assert result.stderr == "Process 0 was ended by SIGKILL. Is the memory full?\n"

    (tmp_path / "end.py").write_text("import sys; sys.exit(2)")  # it has printed why
    result = launched(free_port())
    assert (result.returncode, result.stderr) == (2, "")


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that only prints its arguments, one per line."""
    path = tmp_path_factory.mktemp("recorder") / "my python"
    path.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    path.chmod(0o755)
    return path


def scripted(
    shell: str, script: str, *arguments: str, recorder: Path, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script with `recorder` as Python, from a folder beside the repository's `finetune`."""
    return subprocess.run(
        [shell, f"../finetune/{script}", *arguments],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHON": str(recorder)} | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_scripts_pass_arguments_on(shell: str, recorder: Path):
    arguments = [
        "--run_name",
        "a  b",
        "-d",
        "my data.json",
        "--model",
        "org/name",
        "--seed=3",
        "--use_cpu",
        "-o",
        "o p",
    ]
    result = scripted(shell, "finetune_lora_ds.sh", *arguments, recorder=recorder, CDPATH=str(ROOT))
    assert result.returncode == 0
    assert result.stderr == ""
    words = result.stdout.splitlines()
    assert words[:2] == [str(SCRIPTS / "launch.py"), str(ROOT / "finetune.py")]
    for option, value in (("model_name_or_path", "org/name"), ("data_path", "my data.json"), ("output_dir", "o p")):
        assert words.count(f"--{option}") == 1
        assert words[words.index(f"--{option}") + 1] == value
    assert words[-4:] == ["--run_name", "a  b", "--seed=3", "--use_cpu"], "the user's arguments come last, and override"

    usage = scripted(shell, "finetune_ds.sh", "-d", "x", "-h", recorder=recorder)
    assert usage.returncode == 0
    assert usage.stdout.startswith("Usage: ")
    assert "MASTER_PORT" in usage.stdout


@pytest.mark.parametrize("arguments", [["-m"], ["--lora_r", "8", "-d"], ["-m", "-d", "data.json"], ["-o", ""]])
def test_scripts_require_values(arguments: list[str], recorder: Path):
    result = scripted("sh", "finetune_ds.sh", *arguments, recorder=recorder)
    assert result.returncode == 2
    assert result.stdout == ""
    option = next(word for word in arguments if word in ("-m", "-d", "-o"))
    assert result.stderr == f"{option} needs a value.\n"


@pytest.mark.parametrize(
    ("script", "batch", "accumulation", "rate", "stage", "switches"),
    [
        ("finetune_ds.sh", "1", "16", "1e-5", 3, []),
        ("finetune_lora_ds.sh", "2", "8", "3e-4", 2, ["--use_lora"]),
        ("finetune_lora_single_gpu.sh", "2", "8", "3e-4", None, ["--use_lora"]),
        ("finetune_qlora_ds.sh", "2", "8", "3e-4", 2, ["--use_lora", "--q_lora"]),
        ("finetune_qlora_single_gpu.sh", "2", "8", "3e-4", None, ["--use_lora", "--q_lora"]),
    ],
)
def test_scripts_have_the_published_settings(
    script: str, batch: str, accumulation: str, rate: str, stage: int | None, switches: list[str], recorder: Path
):
    words = scripted("sh", script, recorder=recorder).stdout.splitlines()
    settings = dict(itertools.pairwise(words))
    published = {
        "--per_device_train_batch_size": batch,
        "--gradient_accumulation_steps": accumulation,
        "--learning_rate": rate,
        "--num_train_epochs": "5",
        "--weight_decay": "0.1",
        "--adam_beta2": "0.95",
        "--warmup_steps": "0.01",
        "--lr_scheduler_type": "cosine",
        "--model_max_length": "512",
        "--activation_checkpointing": "True",
        "--lazy_preprocess": "True",
    }
    assert published.items() <= settings.items()
    assert [word for word in words if word in ("--use_lora", "--q_lora")] == switches
    if stage is None:
        assert "--deepspeed" not in words
        assert words[0] == str(ROOT / "finetune.py")
    else:
        config = json.loads(Path(settings["--deepspeed"]).read_text())
        assert config["zero_optimization"]["stage"] == stage
        assert "scheduler" not in config
    assert Path(settings["--model_name_or_path"], "config.json").is_file()
    assert Path(settings["--data_path"]).is_file()
