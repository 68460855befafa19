"""One run of fine-tuning: arguments → data, model, training, a folder.

The rooms beside this one each know one thing; here they are put together, in the order that lets a mistake show before
it costs time: data is read before weights.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..chat_files import Collator, ConversationFile, PackedDataset, SupervisedDataset
from .arguments import ArgumentError, Arguments
from .interrupts import SaveOnInterrupt
from .loss_curve import draw
from .model import load_for_training
from .processes import failing_together, is_main
from .trainer import SupervisedTrainer


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
    with failing_together():
        checkpoint = _checkpoint_to_resume(arguments)
        train_file = ConversationFile(data.data_path, progress=is_main())
        eval_file = ConversationFile(data.eval_data_path, progress=is_main()) if data.eval_data_path else None
    set_seed(training.seed)  # adapters begin at random
    model, tokenizer = load_for_training(arguments)

    def supervised(file: ConversationFile) -> SupervisedDataset:
        return SupervisedDataset(
            file,
            tokenizer,
            training.model_max_length,
            system_message=data.system_message,
            lazy=data.lazy_preprocess,
            progress=is_main(),
        )

    train_dataset: Dataset = supervised(train_file)
    if data.packing:
        train_dataset = PackedDataset(train_dataset, training.model_max_length)
    interrupts = SaveOnInterrupt()
    trainer = SupervisedTrainer(
        model,
        training,
        data_collator=Collator(tokenizer.eod_id),
        train_dataset=train_dataset,
        eval_dataset=None if eval_file is None else supervised(eval_file),
        processing_class=tokenizer,
        callbacks=[interrupts],
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if not interrupts.interrupted:
        trainer.save_final()
        trainer.save_state()
        if eval_file is not None:
            metrics |= trainer.evaluate()
            trainer.save_state()
    if is_main():
        draw(trainer.state.log_history, Path(training.output_dir) / "loss.png")
    return Outcome(Path(training.output_dir), interrupts.interrupted, metrics)


def _make_writable(folder: Path) -> None:
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
    if asked is True:
        found = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if found is None:
            raise ArgumentError(
                f"--resume_from_checkpoint: {folder} has no checkpoint-N folder. Leave it out to start."
            )
        return found
    if asked and not Path(asked, "trainer_state.json").is_file():
        raise ArgumentError(f"--resume_from_checkpoint {asked} is no checkpoint-N folder of a run.")
    return asked or None
