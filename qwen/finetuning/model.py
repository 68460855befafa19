"""Loads a checkpoint for training: all of its parameters, or adapters on it.

Decides which parameters are trained and in which precision they are kept. Invalid combinations are rejected before the
weights are loaded.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from transformers import GPTQConfig

from ..checkpoint.adapters import ADAPTER_CONFIG, attach_adapter, check_adapter, is_adapter
from ..checkpoint.bundled import BUNDLED_CHAT_INT4
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import JSONObject, read_json
from ..model.chat_qwen import chat_generation_config
from ..model.configuration_qwen import QWenConfig
from ..model.loading_options_qwen import choose_attention
from ..model.modeling_qwen import QWenLMHeadModel
from ..model.tokenization_qwen import IM_END, QWenTokenizer
from .arguments import LORA_TARGETS, ArgumentError, Arguments, LoraArguments, TrainingArguments, zero_stage
from .vocabulary import expand_embeddings

if TYPE_CHECKING:
    from peft import PeftModel

EMBEDDINGS = ["wte", "lm_head"]
"""Modules to train whole, so that a model learns control tokens that it has not been trained on."""

_PEFT_NAMES = {"lora_r": "r", "lora_target_modules": "target_modules", "lora_bias": "bias"}  # in adapter_config.json


def load_for_training(arguments: Arguments) -> "tuple[QWenLMHeadModel | PeftModel, QWenTokenizer]":
    """Load the model, with the parameters to train marked, and its tokenizer.

    The model is a QWenLMHeadModel, or a PeftModel around one. It gets the generation config of a chat model, since
    samples are always in ChatML. An adapter will record its base by an absolute path or hub id.

    Raises:
        ArgumentError: the arguments do not fit this checkpoint; the message says which would.
        CheckpointError: the checkpoint cannot be loaded.
    """
    model_args, lora, training = arguments.model, arguments.lora, arguments.training
    name = BUNDLED_CHAT_INT4 if model_args.model_name_or_path is None and lora.q_lora else model_args.model_name_or_path
    if name is not None and os.path.isdir(name):
        name = os.path.abspath(name)  # an adapter records it, and is used from any folder
    checkpoint = Checkpoint(name, hub=model_args.hub, cache_dir=model_args.cache_dir)
    name = checkpoint.name
    if checkpoint.is_adapter:
        raise ArgumentError(
            f"--model_name_or_path {model_args.model_name_or_path} is an adapter. To train it further, name its "
            f"base model and add --lora_weight_path {model_args.model_name_or_path}; to train on top of it, "
            "merge it first with `qwen merge`."
        )
    if model_args.extra_vocab_file is not None and not Path(model_args.extra_vocab_file).is_file():
        raise ArgumentError(
            f"--extra_vocab_file: file {model_args.extra_vocab_file} does not exist. Create it with "
            "examples/add_merges.py."
        )
    checkpoint.check()
    _check_method(name, checkpoint.is_quantized, arguments)
    if checkpoint.is_quantized:
        training.ddp_broadcast_buffers = False  # packed weights are buffers: gigabytes at every step
        if training.device.type == "cpu":
            # The kernel would be compiled, which needs a C++ compiler, without a gain.
            torch.compiler.set_stance("force_eager")
    modules_to_save = _modules_to_save(name, checkpoint.is_chat, arguments)
    if training.use_lora:
        _check_modules(lora, modules_to_save)

    model, tokenizer = checkpoint.load(**_from_pretrained_kwargs(checkpoint.config, training))
    model.generation_config = chat_generation_config(model.generation_config)
    model.config.use_cache = False
    if model_args.extra_vocab_file is not None:
        base_tokenizer = tokenizer
        tokenizer = checkpoint.tokenizer(extra_vocab_file=model_args.extra_vocab_file)
        try:
            expand_embeddings(model, tokenizer, base_tokenizer)
        except ValueError as error:
            raise ArgumentError(str(error)) from error
    end_turns_with_im_end(model, tokenizer)
    if training.use_lora:
        return add_lora(model, lora, modules_to_save), tokenizer
    return model, tokenizer


def add_lora(model: QWenLMHeadModel, lora: LoraArguments, modules_to_save: list[str]) -> "PeftModel":
    """Freeze the model and add trainable LoRA matrices and modules, or load an adapter to train it further.

    Trained parameters are kept in float32, so that small updates are not lost to rounding.
    """
    from peft import LoraConfig, get_peft_model

    if lora.lora_weight_path:
        adapted = attach_adapter(model, Path(lora.lora_weight_path).expanduser(), trainable=True)
    else:
        config = LoraConfig(
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.lora_target_modules,
            bias=cast(Literal["none", "all", "lora_only"], lora.lora_bias),  # checked by the parser
            modules_to_save=modules_to_save or None,
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return adapted


def end_turns_with_im_end(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    """Make <|im_end|> the eos token of a model and its tokenizer, also of a base model, which becomes a chat model.

    The Trainer would copy the tokenizer's eos and pad tokens to both configurations too, with a warning.
    """
    tokenizer.eos_token = IM_END
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    model.generation_config.eos_token_id = [*dict.fromkeys([tokenizer.im_end_id, *ends])]
    model.config.eos_token_id = tokenizer.im_end_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id


def _check_method(name: str, quantized: bool, arguments: Arguments) -> None:
    lora, training = arguments.lora, arguments.training
    if lora.q_lora and not quantized:
        raise ArgumentError(
            f"--q_lora trains adapters on a checkpoint in 4 bits, and {name} is not quantized. Name a "
            "quantized one, for example Qwen/Qwen-7B-Chat-Int4, or leave out --q_lora."
        )
    if quantized and not training.use_lora:
        raise ArgumentError(
            f"{name} is quantized, and packed integers cannot be trained. Add --q_lora, or name the same model without "
            "-Int4 or -Int8."
        )
    if quantized and not lora.q_lora:
        raise ArgumentError(f"{name} is quantized, so adapters on it are Q-LoRA. Add --q_lora, and --fp16 on a GPU.")


def _check_modules(lora: LoraArguments, modules_to_save: list[str]) -> None:
    for option, names, known in (
        ("lora_target_modules", lora.lora_target_modules, [*LORA_TARGETS, *EMBEDDINGS]),
        ("modules_to_save", modules_to_save, [*EMBEDDINGS, *LORA_TARGETS, "ln_1", "ln_2", "ln_f"]),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ArgumentError(f"--{option} {' '.join(unknown)}: these models have {', '.join(known)}.")


def _check_adapter_to_train(lora: LoraArguments) -> JSONObject:
    """Return the configuration of the adapter to train further. Rejects arguments that would change it."""
    folder = Path(lora.lora_weight_path).expanduser()
    if not is_adapter(folder):
        raise ArgumentError(f"--lora_weight_path {folder} is not an adapter folder: it has no {ADAPTER_CONFIG}.")
    check_adapter(folder)
    config, defaults = read_json(folder / ADAPTER_CONFIG, folder), LoraArguments()
    for option in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_bias", "modules_to_save"):
        requested, recorded = getattr(lora, option), config.get(_PEFT_NAMES.get(option, option))
        same = set(requested) == set(recorded or []) if isinstance(requested, list) else requested == recorded
        if not same and requested != getattr(defaults, option):
            raise ArgumentError(f"--{option}: the adapter in {folder} keeps {recorded}. Leave it out.")
    return config


def _modules_to_save(name: str, is_chat: bool, arguments: Arguments) -> list[str]:
    """Modules that LoRA trains whole: a base model has not learned ChatML's control tokens, and no model new words."""
    reasons = {
        f"{name} is a base model, which has not learned the chat's control tokens": not is_chat,
        "--extra_vocab_file adds tokens": arguments.model.extra_vocab_file is not None,
    }
    needed = [reason for reason, applies in reasons.items() if applies]
    modules_requested = arguments.lora.modules_to_save
    if arguments.lora.lora_weight_path:
        modules_requested = _check_adapter_to_train(arguments.lora).get("modules_to_save") or []
    modules = (EMBEDDINGS if needed else []) if modules_requested is None else modules_requested
    if not arguments.training.use_lora:
        return modules
    if arguments.model.extra_vocab_file and not set(EMBEDDINGS) <= set(modules):
        raise ArgumentError(
            "--extra_vocab_file adds tokens, which are trained and saved only with --modules_to_save wte lm_head."
        )
    if modules and zero_stage(arguments.training) == 3:
        reason = needed[0] if needed else f"--modules_to_save {' '.join(modules)} is set"
        raise ArgumentError(
            f"{reason}: LoRA must train {' and '.join(modules)} as a whole, which cannot be combined with ZeRO 3. Use "
            "--deepspeed finetune/ds_config_zero2.json" + ("." if is_chat else ", or start from the chat model.")
        )
    return modules


def _from_pretrained_kwargs(config: QWenConfig, training: TrainingArguments) -> dict:
    """Return the arguments of from_pretrained: precision of frozen and trained weights, kernel and device."""
    compute_dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        # The GPTQModel kernel that passes gradients on every device and after any first call. Without a device map
        # the weights would stay on the CPU.
        gptq_config = GPTQConfig(bits=quantization["bits"], backend="torch")
        return {"quantization_config": gptq_config, "dtype": compute_dtype, "device_map": {"": training.device}}
    # Weights trained in mixed precision are kept in float32. DeepSpeed keeps that copy itself; FSDP needs one precision
    # for all weights, and shards them.
    keep_compute_dtype = training.deepspeed or (training.use_lora and not training.fsdp)
    # Load directly to the GPU, to save main memory in every process. Sharded weights are moved there in parts.
    load_on_device = training.device.type != "cpu" and not training.fsdp and zero_stage(training) < 3
    dtype = compute_dtype if keep_compute_dtype else torch.float32
    if load_on_device:
        return {"dtype": dtype, "device_map": {"": training.device}}
    # Without a device map, from_pretrained takes the CPU for the device that computes.
    attention = choose_attention(config, dtype, [training.device])
    return {"dtype": dtype, "device_map": None, "attn_implementation": attention}
