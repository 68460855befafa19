"""One run of fine-tuning: arguments → data, model, training, a folder.

The rooms beside this one each know one thing; here they are put together, in the order that lets a mistake show before
it costs time: data is read before weights.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, set_seed
from transformers.integrations import is_tensorboard_available

from ..checkpoint.adapters import ADAPTER_CONFIG, is_adapter
from ..data.conversation_file import ConversationFile, DataFileError
from ..data.datasets import Collator, PackedDataset, SupervisedDataset
from ..data.samples import IGNORE_INDEX
from ..library_errors import is_deepspeed_mismatch
from ..model.tokenization_qwen import QWenTokenizer
from .arguments import ArgumentError, Arguments, TrainingArguments
from .callbacks import SaveOnInterrupt, ShowProgress
from .distributed import failing_together, is_main_process
from .loss_curve import draw
from .model import load_for_training
from .trainer import SupervisedTrainer

LOSS_CURVE = "loss.png"


@dataclass
class Outcome:
    """What a run came to."""

    output_dir: Path
    interrupted: bool
    metrics: dict[str, float]


def finetune(arguments: Arguments) -> Outcome:
    """Train as the arguments say and write the result to their `output_dir`.

    A run that is interrupted leaves a checkpoint there instead, from which `resume_from_checkpoint` goes on.

    Raises:
        ArgumentError, CheckpointError, DataFileError, MalformedSample: mistakes of the person who called it.
        ProcessFailed: one of these in another process.
    """
    training, data = arguments.training, arguments.data
    _check_packages(training)
    with failing_together():
        _prepare(Path(training.output_dir), training.use_lora)
        checkpoint = _checkpoint_to_resume(arguments)
        train_file = ConversationFile(data.data_path, progress=is_main_process())
        eval_file = ConversationFile(data.eval_data_path, progress=is_main_process()) if data.eval_data_path else None
    try:
        SupervisedTrainer.get_optimizer_cls_and_kwargs(training)  # its package may be missing
    except (ValueError, ImportError) as error:
        raise ArgumentError(f"--optim {training.optim.value}: {' '.join(str(error).split())}") from error
    set_seed(training.seed)  # adapters begin at random
    model, tokenizer = load_for_training(arguments)

    def supervised(file: ConversationFile) -> SupervisedDataset:
        return SupervisedDataset(
            file,
            tokenizer,
            training.model_max_length,
            system_message=data.system_message,
            lazy=data.lazy_preprocess,
            progress=is_main_process(),
        )

    train_dataset: Dataset = supervised(train_file)
    if not data.lazy_preprocess or data.packing:  # lengths are known
        _note_cut_samples(train_dataset.lengths, training.model_max_length)
    _require_something_to_learn(train_dataset, tokenizer, train_file.path)
    if data.packing:
        train_dataset = PackedDataset(train_dataset, training.model_max_length)
    interrupts = SaveOnInterrupt()
    eval_dataset = None if eval_file is None else supervised(eval_file)
    try:
        trainer = SupervisedTrainer(
            model,
            training,
            data_collator=Collator(tokenizer.eod_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[interrupts, ShowProgress()],
        )
    except (ValueError, ImportError, RuntimeError) as error:  # settings that contradict each other, missing packages
        raise ArgumentError(" ".join(str(error).split())) from error
    trainer.pop_callback(ProgressCallback)
    trainer.pop_callback(PrinterCallback)
    if is_main_process():
        _introduce(arguments, model, train_file, checkpoint)
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except ValueError as error:
        if not is_deepspeed_mismatch(error):
            raise
        raise ArgumentError(f"--deepspeed: {' '.join(str(error).split())}") from error
    if not interrupts.interrupted:
        trainer.save_final()
        trainer.save_state()
        if eval_file is not None:
            metrics |= _last_evaluation(trainer) or trainer.evaluate()
            trainer.save_state()
    if is_main_process() and _is_installed("matplotlib"):
        draw(trainer.state.log_history, Path(training.output_dir) / LOSS_CURVE)
    return Outcome(Path(training.output_dir), interrupts.interrupted, metrics)


def _last_evaluation(trainer: SupervisedTrainer) -> dict[str, float] | None:
    """What the last step's own evaluation came to, where there was one and its weights are still the model's."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    if last is None or last["step"] != trainer.state.global_step or trainer.args.load_best_model_at_end:
        return None
    return last


def _introduce(arguments: Arguments, model: PreTrainedModel, file: ConversationFile, checkpoint: str | None) -> None:
    training = arguments.training
    method = "Q-LoRA on" if arguments.lora.q_lora else "LoRA on" if training.use_lora else "All weights of"
    # Under ZeRO 3 a parameter is empty until it is needed, and says how many numbers it has.
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in model.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"
    print(
        f"{method} {arguments.model.model_name_or_path or 'the bundled toy'}, {len(file)} samples, {precision} on "
        f"{training.device.type}: {trained:,} of {total:,} parameters are trained"
        + (f", from {checkpoint} on." if checkpoint else "."),
        file=sys.stderr,
    )


def _require_something_to_learn(dataset: SupervisedDataset, tokenizer: QWenTokenizer, path: Path) -> None:
    """Control tokens and their newlines are learned of every sample; one that teaches a word must be among them."""
    frame = {IGNORE_INDEX, tokenizer.im_start_id, tokenizer.im_end_id, *tokenizer.encode("\n")}
    if all(frame.issuperset(dataset[index]["labels"]) for index in range(len(dataset))):
        raise DataFileError(
            f"{path}: no sample has a word to learn. Either none has an assistant's turn behind a user's, or "
            f"--model_max_length {dataset.max_length} cuts all of them off."
        )


def _note_cut_samples(lengths: Sequence[int], most: int) -> None:
    """A sample of the full length was probably longer, and what it should teach may have been cut off."""
    if is_main_process() and (cut := sum(length == most for length in lengths)):
        samples = f"{cut} of {len(lengths)} samples"
        print(f"{samples} fill or exceed --model_max_length {most}: their ends are cut off.", file=sys.stderr)


def _check_packages(training: TrainingArguments) -> None:
    """Refuse to train without a package that is needed. Without one that only draws the loss, say what is not drawn."""
    needed = [*(["peft"] if training.use_lora else []), *(["wandb"] if "wandb" in training.report_to else [])]
    if missing := [name for name in needed if not _is_installed(name)]:
        raise ArgumentError(
            f"Training like this needs packages that are missing: `pip install {' '.join(missing)}`. The extra "
            "`finetune` names all but wandb; --report_to none logs to none."
        )
    if "tensorboard" in training.report_to and not is_tensorboard_available():
        training.report_to.remove("tensorboard")
        _say("The loss is not logged for TensorBoard, which is not installed: `pip install tensorboard`.")
    if not _is_installed("matplotlib"):
        _say(f"{LOSS_CURVE} is not drawn, since matplotlib is not installed: `pip install matplotlib`.")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _say(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr)


def _prepare(folder: Path, use_lora: bool) -> None:
    """Make the output folder, unless its content would mix with what is going to be written."""
    if not use_lora and (folder / ADAPTER_CONFIG).exists():
        raise ArgumentError(
            f"--output_dir {folder} holds an adapter, which would go onto a full model beside it. Name another folder."
        )
    if use_lora and (folder / "config.json").exists():
        raise ArgumentError(
            f"--output_dir {folder} holds a full model, which would be taken for the result. Name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(
            f"--output_dir {folder} cannot be written to: {error.strerror}. Name another folder."
        ) from error


def _checkpoint_to_resume(arguments: Arguments) -> str | None:
    asked, folder = arguments.training.resume_from_checkpoint, arguments.training.output_dir
    if not asked:
        return None
    if asked is True:
        # The state is written last: a checkpoint without it was interrupted.
        states = Path(folder).glob("checkpoint-*/trainer_state.json")
        steps = [int(number) for state in states if (number := state.parent.name.rpartition("-")[2]).isdecimal()]
        asked = os.path.join(folder, f"checkpoint-{max(steps)}") if steps else None
        if asked is None:
            raise ArgumentError(
                f"--resume_from_checkpoint: {folder} has no checkpoint-N folder. Leave it out at first."
            )
    if not Path(asked, "trainer_state.json").is_file():
        raise ArgumentError(f"--resume_from_checkpoint {asked} is no checkpoint-N folder of a run.")
    adapter = is_adapter(Path(asked))
    whole = Path(asked, "config.json").is_file()  # shards of FSDP have neither
    if (adapter and not arguments.training.use_lora) or (whole and arguments.training.use_lora):
        kind, remedy = ("an adapter's", "add") if adapter else ("a whole model's", "leave out")
        raise ArgumentError(
            f"--resume_from_checkpoint {asked} is {kind}: {remedy} --use_lora, as in the run it is from."
        )
    return asked
