"""The options of fine-tuning that `--help` shows at once: our own, and those of the published scripts.

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
        Option("model_name_or_path", None, "a folder or a hub id (default: the bundled toy)"),
        Option("hub", None, "hub to download from (default: $QWEN_HUB or huggingface)", ("huggingface", "modelscope")),
        Option("cache_dir", None, "where downloads are kept"),
        Option("extra_vocab_file", None, "new tokens for the vocabulary, as examples/add_merges.py writes them"),
    ),
    "data": (
        Option("data_path", REQUIRED, "conversations to learn: a JSON list, or JSON Lines"),
        Option("eval_data_path", None, "conversations to measure loss and perplexity on"),
        Option("model_max_length", 8192, "longest sample in tokens; the rest of a longer one is cut off"),
        Option("lazy_preprocess", False, "tokenize a sample when it is needed, not all at the start"),
        Option("packing", False, "fill rows with several short samples, which do not see each other"),
        Option("system_message", "You are a helpful assistant.", "system message of samples that have none"),
    ),
    "adapters": (
        Option("use_lora", False, "train low-rank adapters (LoRA) instead of all weights"),
        Option("q_lora", False, "train adapters on a GPTQ checkpoint (-Chat-Int4)"),
        Option("lora_r", 64, "rank of the adapter matrices"),
        Option("lora_alpha", 16, "the adapter's output is scaled by alpha / r"),
        Option("lora_dropout", 0.05, "dropout in front of the adapter"),
        Option("lora_target_modules", ["c_attn", "c_proj", "w1", "w2"], "layers that get an adapter"),
        Option("lora_weight_path", "", "an adapter to continue training"),
        Option("lora_bias", "none", "which biases are trained as well", ("none", "all", "lora_only")),
        Option("modules_to_save", None, "modules to train and save whole (default: wte lm_head of a base model)"),
    ),
    "training": (
        Option("output_dir", "output_qwen", "where the result is written"),
        Option("num_train_epochs", 3.0, "how often the data are gone through"),
        Option("max_steps", -1, "number of optimizer steps, in place of epochs"),
        Option("per_device_train_batch_size", 8, "samples a step and process"),
        Option("per_device_eval_batch_size", 8, "the same when evaluating"),
        Option("gradient_accumulation_steps", 1, "batches whose gradients are added up for a step"),
        Option("learning_rate", 5e-5, "the highest learning rate"),
        Option("lr_scheduler_type", "linear", "how the learning rate changes: linear, cosine, constant, ..."),
        Option("warmup_steps", 0, "steps in which the learning rate rises; below 1 a share of all steps"),
        Option("weight_decay", 0.0, "weight decay of AdamW"),
        Option("adam_beta2", 0.999, "beta2 of AdamW"),
        Option("max_grad_norm", 1.0, "gradients are clipped to this norm"),
        Option("activation_checkpointing", None, "compute activations again instead of keeping them; saves memory"),
        Option("bf16", False, "compute in bfloat16 (default on a GPU that can)"),
        Option("fp16", False, "compute in float16"),
        Option("use_cpu", False, "stay off the GPU"),
        Option("seed", 42, "random seed"),
        Option("deepspeed", None, "a DeepSpeed configuration: finetune/ds_config_zero2.json or ..._zero3.json"),
        Option("fsdp", None, "shard with FSDP"),
        Option("ddp_find_unused_parameters", False, "look for parameters without a gradient at every step"),
    ),
    "logging, evaluating and saving": (
        Option("logging_steps", 1, "log the loss every so many steps"),
        Option("report_to", "tensorboard", "where the loss is logged: tensorboard, wandb, ..., or none"),
        Option("eval_strategy", "no", "when to evaluate: no, steps or epoch"),
        Option("eval_steps", None, "evaluate every so many steps"),
        Option("save_strategy", "steps", "when to save a checkpoint: no, steps, epoch or best"),
        Option("save_steps", 500, "save a checkpoint every so many steps"),
        Option("save_total_limit", None, "number of checkpoints that are kept"),
        Option("resume_from_checkpoint", None, "a checkpoint to continue from, or True for the last one"),
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the table to a parser that prints help; it is not meant to parse."""
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
    """What the help says about the default, where there is one and the text does not tell it."""
    if option.default is REQUIRED:
        return " (required)"
    if option.default is None or option.default is False or option.default == "" or "(default" in option.help:
        return ""
    value = " ".join(option.default) if isinstance(option.default, list) else option.default
    return f" (default: {value})"
