"""Runs fine-tuning: reads the data, loads the model, trains it and writes the output folder.

Data is read before weights, so that mistakes show early.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.integrations import is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from ..checkpoint.adapters import ADAPTER_CONFIG, is_adapter
from ..checkpoint.bundled import BUNDLED_CHAT, BUNDLED_CHAT_INT4
from ..checkpoint.files import CheckpointError
from ..checkpoint.staging import clean_up_leftovers
from ..data.conversation_file import ConversationFile, DataFileError
from ..data.datasets import Collator, PackedDataset, SupervisedDataset
from ..data.samples import IGNORE_INDEX
from ..library_errors import is_deepspeed_mismatch
from ..model.tokenization_qwen import QWenTokenizer
from .arguments import ArgumentError, Arguments, TrainingArguments
from .callbacks import SaveOnInterrupt, ShowProgress
from .distributed import allow_fsdp_on_cpu, is_main_process, raise_on_all_ranks
from .loss_curve import plot_loss
from .model import load_for_training
from .resuming import check_training_checkpoint
from .trainer import SupervisedTrainer

LOSS_CURVE = "loss.png"


@dataclass
class TrainResult:
    """Result of a run."""

    output_dir: Path
    interrupted: bool
    metrics: dict[str, float]


def finetune(arguments: Arguments) -> TrainResult:
    """Train with the given arguments and write the result to `output_dir`.

    An interrupted run leaves a checkpoint there instead, from which `resume_from_checkpoint` continues.

    Raises:
        ArgumentError, CheckpointError, DataFileError, MalformedSample: the arguments, checkpoint or data are invalid.
        ProcessFailed: one of these in another process.
    """
    training, data = arguments.training, arguments.data
    _check_packages(training)
    with raise_on_all_ranks():
        _check_inputs_are_kept(arguments)
        _prepare_output_dir(Path(training.output_dir), training.use_lora)
        checkpoint = _checkpoint_to_resume(arguments)
        train_file = ConversationFile(data.data_path, progress=is_main_process())
        eval_file = ConversationFile(data.eval_data_path, progress=is_main_process()) if data.eval_data_path else None
    for file in filter(None, (train_file, eval_file)):
        for note in file.notes:
            _print_rank_0(note)
    try:
        SupervisedTrainer.get_optimizer_cls_and_kwargs(training)  # its package may be missing
    except (ValueError, ImportError) as error:
        name = OptimizerNames(training.optim).value
        raise ArgumentError(f"--optim {name}: {' '.join(str(error).split())}") from error
    set_seed(training.seed)  # adapters are initialized randomly
    try:
        model, tokenizer = load_for_training(arguments)
    except ValueError as error:
        if isinstance(error, ArgumentError):
            raise
        raise CheckpointError(str(error)) from error  # of a config or tokenizer file

    def make_dataset(file: ConversationFile) -> SupervisedDataset:
        return SupervisedDataset(
            file,
            tokenizer,
            training.model_max_length,
            system_message=data.system_message,
            lazy=data.lazy_preprocess,
            progress=is_main_process(),
        )

    train_samples = make_dataset(train_file)
    if not data.lazy_preprocess or data.packing:  # lengths are known
        _print_truncated_samples(train_samples.lengths, training.model_max_length)
    _check_labels(train_samples, tokenizer, train_file.path)
    train_dataset: Dataset = train_samples
    if data.packing:
        train_dataset = PackedDataset(train_samples, training.model_max_length)
    if training.fsdp:
        allow_fsdp_on_cpu()
    save_on_interrupt = SaveOnInterrupt()
    eval_dataset = None if eval_file is None else make_dataset(eval_file)
    if eval_dataset is not None and not data.lazy_preprocess:
        _print_truncated_samples(eval_dataset.lengths, training.model_max_length, "evaluation samples")
    try:
        trainer = SupervisedTrainer(
            model,
            training,
            data_collator=Collator(tokenizer.eod_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[save_on_interrupt, ShowProgress()],
        )
    except (ValueError, ImportError, RuntimeError) as error:  # contradictory settings, missing packages
        raise ArgumentError(" ".join(str(error).split())) from error
    trainer.pop_callback(ProgressCallback)
    trainer.pop_callback(PrinterCallback)
    if is_main_process():
        _print_setup(arguments, model, train_file, checkpoint)
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except ValueError as error:
        if not is_deepspeed_mismatch(error):
            raise
        raise ArgumentError(f"--deepspeed: {' '.join(str(error).split())}") from error
    if not save_on_interrupt.interrupted:
        trainer.save_final()
        trainer.save_state()
        if eval_file is not None:
            metrics |= _last_evaluation(trainer) or trainer.evaluate()
            trainer.save_state()
    if is_main_process() and _is_installed("matplotlib"):
        plot_loss(trainer.state.log_history, Path(training.output_dir) / LOSS_CURVE)
    return TrainResult(Path(training.output_dir), save_on_interrupt.interrupted, metrics)


def _last_evaluation(trainer: SupervisedTrainer) -> dict[str, float] | None:
    """Return the metrics of an evaluation after the last step, if there was one and the model has these weights."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if last is None or last["step"] != trainer.state.global_step or trainer.args.load_best_model_at_end:
        return None
    return last


def _print_setup(arguments: Arguments, model: nn.Module, file: ConversationFile, checkpoint: str | None) -> None:
    training = arguments.training
    method = "Q-LoRA on" if arguments.lora.q_lora else "LoRA on" if training.use_lora else "All weights of"
    # Under ZeRO 3 a parameter is empty until it is needed; ds_numel is its full size.
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in model.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    print(
        f"{method} {arguments.model.model_name_or_path or 'the bundled toy'}, {len(file)} samples, {precision} on "
        f"{training.device.type}: {trained:,} of {total:,} parameters are trained"
        + (f", resuming from {checkpoint}." if checkpoint else "."),
        file=sys.stderr,
    )


def _check_labels(dataset: SupervisedDataset, tokenizer: QWenTokenizer, path: Path) -> None:
    """Raise DataFileError if no sample has labels other than control tokens and their newlines."""
    control_ids = {IGNORE_INDEX, tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.encode("\n")}
    if all(control_ids.issuperset(dataset[index]["labels"]) for index in range(len(dataset))):
        raise DataFileError(
            f"{path}: no sample has text to learn. Either none has an assistant turn after a user turn, or "
            f"--model_max_length {dataset.max_length} truncates all of them."
        )


def _print_truncated_samples(lengths: Sequence[int], max_length: int, kind: str = "samples") -> None:
    """Print how many samples have the full length: they were probably truncated."""
    if is_main_process() and (num_truncated := sum(length == max_length for length in lengths)):
        samples = f"{num_truncated} of {len(lengths)} {kind}"
        print(f"{samples} fill or exceed --model_max_length {max_length}: their ends are cut off.", file=sys.stderr)


def _check_packages(training: TrainingArguments) -> None:
    """Raise ArgumentError if a required package is missing. For packages that only show the loss, print a note."""
    loggers = cast(list[str], training.report_to)  # once __post_init__ has run
    needed = [*(["peft"] if training.use_lora else []), *(["wandb"] if "wandb" in loggers else [])]
    if missing := [name for name in needed if not _is_installed(name)]:
        raise ArgumentError(
            f"These arguments need missing packages: `pip install {' '.join(missing)}`. The extra `finetune` has all "
            "but wandb; --report_to none disables logging."
        )
    if "tensorboard" in loggers and not is_tensorboard_available():
        loggers.remove("tensorboard")
        _print_rank_0("The loss is not logged for TensorBoard, which is not installed: `pip install tensorboard`.")
    if not _is_installed("matplotlib"):
        _print_rank_0(f"{LOSS_CURVE} is not drawn, since matplotlib is not installed: `pip install matplotlib`.")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _print_rank_0(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr)


def _check_inputs_are_kept(arguments: Arguments) -> None:
    """Raise ArgumentError if the output folder is, contains or is within the folder of the model or adapter to train.

    The result would replace it, or its checkpoints would be mixed with it and deleted by --save_total_limit.
    """
    output = Path(arguments.training.output_dir).resolve()
    bundled = BUNDLED_CHAT_INT4 if arguments.lora.q_lora else BUNDLED_CHAT
    for option, name in (
        ("model_name_or_path", arguments.model.model_name_or_path or bundled),
        ("lora_weight_path", arguments.lora.lora_weight_path),
    ):
        source = Path(name).expanduser().resolve()
        if not name or not source.is_dir():
            continue
        same = output.is_dir() and output.samefile(source)  # also by another path to it, e.g. a bind mount
        if same or output == source or source in output.parents or output in source.parents:
            raise ArgumentError(
                f"--output_dir {arguments.training.output_dir} {_relation(output, source)} --{option} {name}, which "
                "training would change. Name another folder."
            )


def _relation(output: Path, source: Path) -> str:
    return "contains" if output in source.parents else "is within" if source in output.parents else "is"


def _prepare_output_dir(folder: Path, use_lora: bool) -> None:
    """Create the output folder, unless its content would be mixed with the result."""
    if not use_lora and (folder / ADAPTER_CONFIG).exists():
        raise ArgumentError(
            f"--output_dir {folder} holds an adapter, which would be applied to the full model. Name another folder."
        )
    if use_lora and (folder / "config.json").exists():
        raise ArgumentError(
            f"--output_dir {folder} holds a full model, which would be mistaken for the result. Name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            clean_up_leftovers(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno is None:  # of ours, with its own advice
            raise
        raise ArgumentError(
            f"--output_dir {folder} cannot be written to: {error.strerror}. Name another folder."
        ) from error


def _checkpoint_to_resume(arguments: Arguments) -> str | None:
    requested, folder = arguments.training.resume_from_checkpoint, arguments.training.output_dir
    if not requested:
        return None
    if requested is True:
        # The state is written last: a checkpoint without it is incomplete.
        states = Path(folder).glob("checkpoint-*/trainer_state.json")
        steps = [int(number) for state in states if (number := state.parent.name.rpartition("-")[2]).isdecimal()]
        requested = os.path.join(folder, f"checkpoint-{max(steps)}") if steps else None
        if requested is None:
            raise ArgumentError(
                f"--resume_from_checkpoint: {folder} has no checkpoint-N folder. Leave it out in a first run."
            )
    if not Path(requested, TRAINER_STATE_NAME).is_file():
        raise ArgumentError(f"--resume_from_checkpoint {requested} is not a checkpoint-N folder of a run.")
    adapter = is_adapter(Path(requested))
    full_model = Path(requested, "config.json").is_file()  # sharded FSDP checkpoints have neither
    if (adapter and not arguments.training.use_lora) or (full_model and arguments.training.use_lora):
        kind, remedy = ("an adapter", "add") if adapter else ("a whole model", "leave out")
        raise ArgumentError(
            f"--resume_from_checkpoint {requested} is a checkpoint of {kind}: {remedy} --use_lora, as in the original "
            "run."
        )
    check_training_checkpoint(Path(requested), arguments.training)
    return requested
