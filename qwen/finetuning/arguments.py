"""Parses the command line of finetune.py: transformers' TrainingArguments and the arguments of these models.

Arguments written for transformers 4 are translated. Values that are invalid for every checkpoint are rejected here. The
only file that is read is the DeepSpeed configuration.
"""

import dataclasses
import difflib
import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import transformers
from transformers import HfArgumentParser, IntervalStrategy

from ..checkpoint.files import JSONObject
from ..checkpoint.hub import HUBS
from ..model.qwen_generation_utils import DEFAULT_SYSTEM
from .distributed import init_deepspeed
from .transformers4_arguments import translate

if TYPE_CHECKING:
    from transformers.hf_argparser import DataClassType

LORA_TARGETS = ["c_attn", "c_proj", "w1", "w2"]

Settings = dict[str, Any]
"""The fields of all arguments by name, before the dataclasses are created. Each has its own type."""


class ArgumentError(ValueError):
    """The command line asks for something impossible; the message says what to type instead."""


@dataclass
class ModelArguments:
    """The checkpoint to train."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the model; the bundled toy if omitted."}
    )
    hub: str | None = field(
        default=None, metadata={"help": "Hub to download from, else $QWEN_HUB or huggingface.", "choices": list(HUBS)}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads."})
    extra_vocab_file: str | None = field(
        default=None, metadata={"help": "Tokens to add to the vocabulary, as written by examples/add_merges.py."}
    )


@dataclass
class DataArguments:
    """The training and evaluation data, and how they are tokenized."""

    data_path: str = field(metadata={"help": "Conversations to train on: a JSON list, or JSON Lines."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Conversations for measuring loss and perplexity, in the same format."}
    )
    lazy_preprocess: bool = field(
        default=False, metadata={"help": "Tokenize samples on demand instead of all at the start."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Pack several short samples into a row; they do not attend to each other."}
    )
    system_message: str = field(default=DEFAULT_SYSTEM, metadata={"help": "System message of samples without one."})


@dataclass
class LoraArguments:
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's output is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "Layers that get an adapter."}
    )
    lora_weight_path: str = field(default="", metadata={"help": "An adapter to continue training."})
    lora_bias: str = field(
        default="none", metadata={"help": "Which biases are trained as well.", "choices": ["none", "all", "lora_only"]}
    )
    q_lora: bool = field(default=False, metadata={"help": "Train adapters on a GPTQ checkpoint (-Chat-Int4)."})
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to train and save whole beside the adapters, for example wte lm_head for your own control "
            "tokens; 'none' for no module. If omitted: wte and lm_head of a base model, no module of a chat model."
        },
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' TrainingArguments with the loss logged by default, plus `model_max_length` and `use_lora`, which
    the published scripts have here."""

    output_dir: str = field(default="output_qwen", metadata={"help": "Folder for the result."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  HfArgumentParser reads only the first two
        default="tensorboard", metadata={"help": "Where to log the loss: tensorboard, wandb, …, or none."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log the loss every N steps."})
    model_max_length: int = field(
        default=8192, metadata={"help": "Maximum length of a sample in tokens; longer ones are truncated on the right."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train low-rank adapters instead of all weights."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient, of which there are none."}
    )

    def __post_init__(self):
        self.prediction_loss_only = False  # loss and perplexity are computed from the logits
        if str(self.metric_for_best_model).endswith("perplexity") and self.greater_is_better is None:
            self.greater_is_better = False  # transformers infers this for losses only
        super().__post_init__()

    @property
    def n_gpu(self) -> int:
        """Number of GPUs that this process uses, at most one: the Trainer would split batches among several."""
        return min(1, self.visible_gpus)

    @property
    def visible_gpus(self) -> int:
        """Number of GPUs that this process could use."""
        return super().n_gpu


@dataclass
class Arguments:
    """All settings of a run."""

    model: ModelArguments
    data: DataArguments
    lora: LoraArguments
    training: TrainingArguments


def parse(argv: list[str]) -> tuple[Arguments, list[str]]:
    """Parse the settings of a run. Also returns notes for the user about ignored or changed arguments.

    Creating TrainingArguments sets up the device and the process group; that of DeepSpeed must exist before.
    `read_settings` has no such effects.

    Args:
        argv: the arguments of `finetune.py`.

    Raises:
        ArgumentError: an argument is unknown or invalid, or two exclude each other.
    """
    try:
        settings, notes = read_settings(argv)
        if settings["deepspeed"]:
            init_deepspeed(settings["use_cpu"], settings["ddp_timeout"])
        arguments = Arguments(*make_parser().parse_dict(settings))
        if (gpus := arguments.training.visible_gpus) > 1:
            notes.append(f"Using one of {gpus} GPUs. To use all, run finetune/*_ds.sh or torchrun.")
    except ArgumentError:
        raise
    except (ValueError, ImportError, OSError) as error:
        raise ArgumentError(" ".join(str(error).split())) from error
    _check(arguments)
    return arguments, notes


def read_settings(argv: list[str]) -> tuple[Settings, list[str]]:
    """Read the fields of all arguments from a command line. Also returns notes for the user.

    Precision and device depend on the hardware unless the command line names them.

    Raises:
        ArgumentError: an argument is unknown, or does not fit the others or this machine.
    """
    argv, notes = translate(argv)
    for word in argv:
        if instead := _OPTIONS_OF_SCRIPTS.get(word.partition("=")[0]):
            raise ArgumentError(f"Unknown argument {word}. {instead}")
    parser = make_parser()
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ArgumentError(_unknown_argument_message(unknown[0], parser))
    settings: Settings = vars(namespace)
    explicit = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    if settings["deepspeed"]:
        settings["deepspeed"] = _deepspeed_config(settings["deepspeed"], settings["lr_scheduler_type"], notes)
        for half in ("bf16", "fp16"):  # enabled there counts as typed here
            if half not in explicit and settings["deepspeed"].get(half, {}).get("enabled") is True:
                settings[half] = True
                explicit.add(half)
    settings |= _device_and_precision(settings, explicit)
    settings["use_lora"] = settings["use_lora"] or settings["q_lora"]
    if settings["load_best_model_at_end"] and "save_strategy" not in explicit:  # the best model must have been saved
        settings["save_strategy"] = settings["eval_strategy"]
        if "save_steps" not in explicit and settings["eval_steps"]:
            settings["save_steps"] = settings["eval_steps"]
    if settings["modules_to_save"] == ["none"]:
        settings["modules_to_save"] = []
    if str(settings["resume_from_checkpoint"]).lower() in ("true", "false"):
        settings["resume_from_checkpoint"] = settings["resume_from_checkpoint"].lower() == "true"
    return settings, notes


def make_parser() -> HfArgumentParser:
    """Build the parser of all arguments, ours and transformers'."""
    kinds = (ModelArguments, DataArguments, LoraArguments, TrainingArguments)
    return _Parser(cast("Iterable[DataClassType]", kinds), allow_abbrev=False)


_GPUS = "The scripts in finetune/ that end in _ds.sh use all GPUs; the variable GPUS_PER_NODE sets another number."
# Options of the scripts in finetune/ and of other programs → what to use.
_OPTIONS_OF_SCRIPTS = {
    "-m": "Use --model_name_or_path.",
    "-d": "Use --data_path.",
    "-o": "Use --output_dir.",
    "--gpus": _GPUS,
    "--num_gpus": _GPUS,
}


class _Parser(HfArgumentParser):
    """Raises ArgumentError instead of printing two hundred options and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(f"{message[0].upper()}{message[1:]}. `--help-all` lists all arguments.")


def _unknown_argument_message(word: str, parser: HfArgumentParser) -> str:
    known = ["--help"]
    for option in (each for kind in parser.dataclass_types for each in dataclasses.fields(kind) if each.init):
        known += [f"--{option.name}"] + [f"--no_{option.name}"] * (option.default is True)
    matches = difflib.get_close_matches(word.partition("=")[0], known, n=3)
    return f"Unknown argument {word}." + (
        f" Did you mean {' or '.join(matches)}?" if matches else " `--help-all` lists all arguments."
    )


def _device_and_precision(settings: Settings, explicit: set[str]) -> dict[str, bool]:
    """Choose what the command line leaves open: bfloat16 on a GPU that supports it, else float16; float32 on the CPU.

    Adapters on GPTQ weights compute in float16, the precision in which these weights are stored.
    """
    use_cpu = settings["use_cpu"] or not torch.accelerator.is_available()
    if use_cpu and settings["fp16"]:
        raise ArgumentError("--fp16 needs a GPU. On the CPU, leave it out (float32) or use --bf16.")
    if settings["bf16"] and settings["fp16"]:
        raise ArgumentError("--bf16 and --fp16 exclude each other: use one of them.")
    if use_cpu or explicit & {"bf16", "fp16"}:
        return {"use_cpu": use_cpu}
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    half = "bf16" if bf16 and not settings["q_lora"] else "fp16"
    return {"use_cpu": False, half: True}


def _deepspeed_config(file_or_json: str | JSONObject, schedule: str, notes: list[str]) -> JSONObject:
    """Read the DeepSpeed configuration. Drops its learning rate schedule, which would override the arguments', and lets
    ZeRO 3 gather the weights for saving."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ArgumentError("--deepspeed needs the deepspeed package: `pip install deepspeed`.")
    if isinstance(file_or_json, str) and not file_or_json.startswith("{"):
        path = Path(file_or_json)
        if not path.is_file():
            raise ArgumentError(f"--deepspeed: file {path} does not exist. Use one of the two in finetune/.")
        file_or_json = path.read_text(encoding="utf-8")
    try:
        config = json.loads(file_or_json) if isinstance(file_or_json, str) else file_or_json
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"--deepspeed: the configuration is not valid JSON ({error}).") from error
    sections = ("zero_optimization", "bf16", "fp16")
    if not isinstance(config, dict) or not all(isinstance(config.get(name, {}), dict) for name in sections):
        raise ArgumentError(f"--deepspeed: the configuration and its {', '.join(sections)} must be objects {{…}}.")
    if config.get("zero_optimization", {}).get("stage") == 3:
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    if dropped := config.pop("scheduler", None):
        name = dropped.get("type", "schedule") if isinstance(dropped, dict) else "schedule"
        notes.append(f"The {name} of the DeepSpeed configuration is ignored: --lr_scheduler_type {schedule} is used.")
    return config


def _check(arguments: Arguments) -> None:
    """Reject settings that are invalid for every checkpoint."""
    lora, training = arguments.lora, arguments.training
    if lora.q_lora and (zero_stage(training) == 3 or training.fsdp):
        raise ArgumentError(
            "Q-LoRA cannot be combined with ZeRO 3 or FSDP: packed Int4 weights cannot be split among processes. Use "
            "--deepspeed finetune/ds_config_zero2.json."
        )
    if not training.use_lora and (lora.lora_weight_path or lora.modules_to_save):
        option = "lora_weight_path" if lora.lora_weight_path else "modules_to_save"
        raise ArgumentError(f"--{option} needs an adapter: add --use_lora or --q_lora.")
    if arguments.data.packing and training.train_sampling_strategy == "group_by_length":
        raise ArgumentError("--packing makes all rows the same length: leave out --group_by_length.")
    for group, option, minimum in (
        (training, "per_device_train_batch_size", 1),
        (training, "per_device_eval_batch_size", 1),
        (training, "gradient_accumulation_steps", 1),
        (training, "model_max_length", 2),  # the first token has no loss
        (training, "learning_rate", 0),
        (training, "seed", 0),
        (training, "dataloader_num_workers", 0),
        (lora, "lora_r", 1),
        (lora, "lora_alpha", 1),
    ):
        if not getattr(group, option) >= minimum:  # also rejects NaN
            raise ArgumentError(f"--{option} is {getattr(group, option)}: it must be at least {minimum}.")
    if not 0 <= lora.lora_dropout < 1:
        raise ArgumentError(f"--lora_dropout is {lora.lora_dropout}: it must be at least 0 and below 1.")
    if training.max_steps <= 0 and not training.num_train_epochs > 0:
        raise ArgumentError(f"--num_train_epochs is {training.num_train_epochs}: it must be above 0.")
    if not training.output_dir:
        raise ArgumentError("--output_dir is empty: name a folder, or leave it out for output_qwen.")
    if training.eval_strategy != "no" and not arguments.data.eval_data_path:
        strategy = IntervalStrategy(training.eval_strategy).value
        raise ArgumentError(f"--eval_strategy {strategy} needs evaluation data: add --eval_data_path FILE.")


def zero_stage(training: TrainingArguments) -> int:
    """Return the ZeRO stage of DeepSpeed; 0 without DeepSpeed."""
    config = training.deepspeed if isinstance(training.deepspeed, dict) else {}
    return config.get("zero_optimization", {}).get("stage", 0)
