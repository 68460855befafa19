"""The options of fine-tuning that the quick `--help` shows: our own, and those of the published scripts.

The real parser is made from transformers' TrainingArguments, which take seconds to import and have two hundred options.
A test compares this table with it.
"""

import argparse
from typing import NamedTuple

REQUIRED = object()


class Option(NamedTuple):
    """One option: its name without the dashes, its default, and what it does."""

    name: str
    default: object
    help: str
    choices: tuple[str, ...] = ()


OPTIONS: dict[str, tuple[Option, ...]] = {
    "model": (
        Option("model_name_or_path", None, "folder or hub id (default: the bundled toy)"),
        Option("hub", None, "hub to download from (default: $QWEN_HUB or huggingface)", ("huggingface", "modelscope")),
        Option("cache_dir", None, "folder for downloads"),
        Option("extra_vocab_file", None, "tokens to add to the vocabulary, as written by examples/add_merges.py"),
    ),
    "data": (
        Option("data_path", REQUIRED, "conversations to train on: a JSON list, or JSON Lines"),
        Option("eval_data_path", None, "conversations for measuring loss and perplexity"),
        Option("model_max_length", 8192, "maximum length of a sample in tokens; longer ones are truncated"),
        Option("lazy_preprocess", False, "tokenize samples on demand instead of all at the start"),
        Option("packing", False, "pack several short samples into a row; they do not attend to each other"),
        Option("system_message", "You are a helpful assistant.", "system message of samples without one"),
    ),
    "adapters": (
        Option("use_lora", False, "train low-rank adapters (LoRA) instead of all weights"),
        Option("q_lora", False, "train adapters on a GPTQ checkpoint (-Chat-Int4)"),
        Option("lora_r", 64, "rank of the adapter matrices"),
        Option("lora_alpha", 16, "the adapter's output is scaled by alpha / r"),
        Option("lora_dropout", 0.05, "dropout on the input of the adapter"),
        Option("lora_target_modules", ["c_attn", "c_proj", "w1", "w2"], "layers that get an adapter"),
        Option("lora_weight_path", "", "an adapter to continue training"),
        Option("lora_bias", "none", "which biases are trained as well", ("none", "all", "lora_only")),
        Option("modules_to_save", None, "modules to train and save whole (default: wte lm_head of a base model)"),
    ),
    "training": (
        Option("output_dir", "output_qwen", "folder for the result"),
        Option("num_train_epochs", 3.0, "number of passes over the data"),
        Option("max_steps", -1, "number of optimizer steps, instead of epochs"),
        Option("per_device_train_batch_size", 8, "samples per process and step"),
        Option("per_device_eval_batch_size", 8, "samples per process and step in evaluation"),
        Option("gradient_accumulation_steps", 1, "batches whose gradients are accumulated for a step"),
        Option("learning_rate", 5e-5, "peak learning rate"),
        Option("lr_scheduler_type", "linear", "learning rate schedule: linear, cosine, constant, ..."),
        Option("warmup_steps", 0, "warm-up steps of the learning rate; below 1, a fraction of all steps"),
        Option("weight_decay", 0.0, "weight decay of AdamW"),
        Option("adam_beta2", 0.999, "beta2 of AdamW"),
        Option("max_grad_norm", 1.0, "maximum gradient norm"),
        Option("activation_checkpointing", None, "recompute activations instead of keeping them, to save memory"),
        Option("bf16", False, "compute in bfloat16 (default on a GPU that supports it)"),
        Option("fp16", False, "compute in float16"),
        Option("use_cpu", False, "run on the CPU even if there is a GPU"),
        Option("seed", 42, "random seed"),
        Option("deepspeed", None, "a DeepSpeed configuration: finetune/ds_config_zero2.json or ..._zero3.json"),
        Option("fsdp", None, "shard with FSDP"),
        Option("ddp_find_unused_parameters", False, "look for parameters without a gradient at every step"),
    ),
    "logging, evaluating and saving": (
        Option("logging_steps", 1, "log the loss every N steps"),
        Option("report_to", "tensorboard", "where to log the loss: tensorboard, wandb, ..., or none"),
        Option("eval_strategy", "no", "when to evaluate: no, steps or epoch"),
        Option("eval_steps", None, "evaluate every N steps"),
        Option("save_strategy", "steps", "when to save a checkpoint: no, steps, epoch or best"),
        Option("save_steps", 500, "save a checkpoint every N steps"),
        Option("save_total_limit", None, "maximum number of checkpoints to keep"),
        Option("resume_from_checkpoint", None, "checkpoint to resume from, or True for the last one"),
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the table to a parser that only prints help."""
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            group.add_argument(
                f"--{option.name}",
                metavar=_metavar(option),
                nargs="?" if isinstance(option.default, bool) else "+" if isinstance(option.default, list) else None,
                help=option.help + _default(option),
            )


def _metavar(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    if isinstance(option.default, bool):
        return "BOOL"
    return "N" if isinstance(option.default, int | float) else "VALUE"


def _default(option: Option) -> str:
    """Format the default for the help, if there is one and the text does not mention it."""
    if option.default is REQUIRED:
        return " (required)"
    if option.default is None or option.default is False or option.default == "" or "(default" in option.help:
        return ""
    value = " ".join(option.default) if isinstance(option.default, list) else option.default
    return f" (default: {value})"
