"""transformers' Trainer for language models: loss and perplexity as means over tokens, and complete output folders."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from ..checkpoint.adapters import adapter_file, check_tensor_names
from ..checkpoint.files import apply_umask, first_line
from ..checkpoint.generation_settings import save_generation_config
from ..checkpoint.staging import staged_directory
from ..data.samples import IGNORE_INDEX
from ..library_errors import is_write_failed
from ..model.loss_qwen import use_loss_head
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import QWenTokenizer
from ..model.weight_files_qwen import tensor_shapes
from .arguments import TrainingArguments, zero_stage
from .resuming import check_loaded_names, check_optimizer, check_scheduler, explain_damage


class SupervisedTrainer(Trainer):
    """Trains on {"input_ids", "labels", …} and writes folders that load as chat models."""

    args: TrainingArguments
    processing_class: QWenTokenizer

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any):
        try:
            use_loss_head(cast("QWenLMHeadModel", model).get_output_embeddings())
            self._skips_logits = True
        except TypeError:
            self._skips_logits = False
        super().__init__(model, args, compute_metrics=token_loss_and_perplexity, **kwargs)
        self._final_dtype: torch.dtype | None = None
        self._saves_result = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Compute the loss without logits and only where some row learns its next token: prompts are not learned, and
        logits over the whole vocabulary take most of the memory of long samples. LoRA on the output matrix needs them.
        """
        inputs = dict(inputs)
        positions, next_labels = label_positions(inputs["labels"])
        inputs["logits_to_keep"] = positions
        if self._skips_logits:
            del inputs["labels"]
            inputs |= {"skip_logits": True, "label_smoothing": self.args.label_smoothing_factor}
        # The Trainer's label smoothing does not shift labels, since it does not recognize this class as a language
        # model.
        shifted = "labels" if self.label_smoother is not None and not self._skips_logits else "shift_labels"
        inputs[shifted] = next_labels
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the mean loss of a batch and, instead of its logits, which take gigabytes, sums of each row."""
        inputs = dict(self._prepare_inputs(inputs))
        labels = inputs.pop("labels")
        inputs["logits_to_keep"], next_labels = label_positions(labels)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._skips_logits:
                losses = model(**inputs, skip_logits=True, shift_labels=next_labels, reduction="none").loss
                counts = (next_labels != IGNORE_INDEX).to(losses)
                sums = torch.stack((losses.sum(1), counts.sum(1)), 1)
            else:
                sums = sum_nll_per_row(model(**inputs).logits, next_labels)
        total, count = sums.sum(0)
        return total / count.clamp(min=1), sums, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(
            dataloader,
            description,
            prediction_loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        assert output.metrics is not None  # the Trainer always makes a dict
        # The Trainer's own loss is a mean of means, which depends on the batching.
        output.metrics[f"{metric_key_prefix}_loss"] = output.metrics.pop(f"{metric_key_prefix}_token_loss")
        return output

    def save_final(self) -> None:
        """Write the result to `output_dir`: weights in the precision of training (not of its float32 copies),
        tokenizer, code, and generation config; for an adapter, without the weights and code of the base.

        Every process must call it.
        """
        if self.is_fsdp_enabled:  # checkpoints may be sharded, the result is not
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self._saves_result = True
        self._final_dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        try:
            self.save_model()
        finally:
            self._saves_result, self._final_dtype = False, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save like transformers, but without its copy of all weights in every process under ZeRO 1 and 2. For an
        adapter, that copy would include the frozen weights."""
        if not self.is_deepspeed_enabled or zero_stage(self.args) == 3:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self._saves_result:
            with staged_directory(folder.absolute()) as staging:  # the result of an earlier run stays until it is whole
                self._write(staging, state_dict)
        else:
            self._write(folder, state_dict)

    def _write(self, folder: Path, state_dict: dict | None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.use_lora:
            super()._save(str(folder), state_dict)
            (folder / TRAINING_ARGS_NAME).unlink()  # a pickle, and nothing reads it
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
            save_generation_config(model.generation_config, folder)
            apply_umask(folder)
            return
        state_dict = model.state_dict() if state_dict is None else state_dict
        if self._final_dtype is not None:
            # One by one to the CPU, since the optimizer still fills the device.
            state_dict = {name: tensor.to("cpu", self._final_dtype) for name, tensor in state_dict.items()}
        meta_model = self._meta_model(model, next(iter(state_dict.values())).dtype)
        meta_model.save_pretrained(folder, state_dict=state_dict, max_shard_size="2GB")  # loaders read file by file
        save_generation_config(model.generation_config, folder)
        self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            if not is_write_failed(error):
                raise
            raise OSError(
                f"checkpoint-{self.state.global_step} could not be written to {self.args.output_dir}: the disk is full "
                f"or failed ({first_line(error)}). Make room and add --resume_from_checkpoint True, which ignores this "
                "unfinished checkpoint."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with explain_damage(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            file = adapter_file(Path(resume_from_checkpoint))
            if self.args.use_lora and file is not None:  # peft leaves missing tensors as they were initialized
                check_tensor_names(set(tensor_shapes(file)), self.accelerator.unwrap_model(self.model))

    def _issue_warnings_after_load(self, load_result):
        check_loaded_names(load_result.missing_keys, load_result.unexpected_keys)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.is_deepspeed_enabled:
            with explain_damage(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        # accelerate wraps both
        scheduler = cast(Any, getattr(self.lr_scheduler, "scheduler", self.lr_scheduler))
        optimizer = cast(Any, getattr(self.optimizer, "optimizer", self.optimizer))
        new_schedule = copy.deepcopy(scheduler.state_dict())
        new_groups = [dict(group) for group in optimizer.param_groups]
        with explain_damage(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            check_scheduler(scheduler, new_schedule)
            if isinstance(optimizer, torch.optim.Adam) and not self.is_fsdp_enabled:  # or AdamW, which derives from it
                check_optimizer(optimizer, cast(nn.Module, self.model), new_groups)

    def _load_scaler(self, checkpoint):
        with explain_damage(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with explain_damage(checkpoint):
            super()._load_rng_state(checkpoint)

    def _meta_model(self, model: QWenLMHeadModel, dtype: torch.dtype) -> QWenLMHeadModel:
        """Build the model without weights, to save weights with it: FSDP replaces the class of the trained one."""
        config = copy.deepcopy(model.config)
        config.use_cache = True
        with torch.device("meta"):
            meta_model = QWenLMHeadModel(config)
            cast(nn.Module, meta_model).to(dtype)  # the decorator of transformers' own `to` hides its parameters
        return meta_model


def label_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions (K) at which some row of labels (B, S) learns its next token, and these tokens (B, K)."""
    next_labels = labels[:, 1:]
    positions = (next_labels != IGNORE_INDEX).any(0).nonzero()[:, 0]
    return positions, next_labels[:, positions].contiguous()


def sum_nll_per_row(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return, for logits (B, K, V) and labels (B, K), the summed negative log-likelihood of each row's labels in nats,
    and their number (B, 2). Works row by row, to hold the float32 copy of only one row."""
    rows = []
    for row_logits, row_labels in zip(logits, labels, strict=True):
        total = cross_entropy(row_logits.float(), row_labels, ignore_index=IGNORE_INDEX, reduction="sum")
        rows.append(torch.stack((total, (row_labels != IGNORE_INDEX).sum().to(total.dtype))))
    return torch.stack(rows)


def token_loss_and_perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Return the loss in nats per token, and its perplexity e^loss."""
    total, count = torch.as_tensor(prediction.predictions).double().sum(0)
    loss = total / count
    return {"token_loss": loss.item(), "perplexity": loss.exp().item()}
