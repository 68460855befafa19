"""Exports a checkpoint as `Qwen2ForCausalLM`, the architecture of the next generation.

It computes the same function up to the trained length: `c_attn` is split into query, key and value matrices; `w2` is
the gate projection and `w1` the up projection. All current engines support it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import Qwen2Config
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..checkpoint.checkpoint import Checkpoint, resolve
from ..checkpoint.files import SAFETENSORS, SAFETENSORS_INDEX, JSONObject, apply_umask
from ..checkpoint.staging import check_target, staged_directory
from ..checkpoint.weights import Weights
from ..model.configuration_qwen import QWenConfig
from ..model.tokenization_qwen import QWenTokenizer
from .layout import EMBEDDING, HEAD, NORM, QKV_MODULE, exported_tensors, split_name
from .limits import check_architecture, exact_length, export_notes, rope_base
from .source import open_checkpoint
from .tokenizer_json import write_tokenizer

NON_LAYER_NAMES = {EMBEDDING: "model.embed_tokens", NORM: "model.norm", HEAD: "lm_head"}
LAYER_NAMES = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
QKV_NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "initializer_range",
    "use_sliding_window",
    "use_cache",
)
_MAX_SHARD_BYTES = 2_000_000_000
# Optional files: deleted when a model without them replaces one that has them.
_OPTIONAL_FILES = ["chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
# Fields of generation_config.json that only this library reads.
_QWEN_ONLY_FIELDS = ("chat_format", "stop_words_ids", "transformers_version", "_from_model_config")


def export_qwen2(
    checkpoint: str | os.PathLike | None,
    folder: str | os.PathLike,
    *,
    max_length: int | None = None,
    hub: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write a checkpoint in Qwen2 format with tokenizer.json; weights stay as they are, float or GPTQ.

    Peak memory is one weight file of the checkpoint, or 2 GB of a larger one.

    Args:
        checkpoint: local folder or hub id. None: the bundled chat model.
        folder: new or empty output folder. It is complete or, after an error, absent.
        max_length: scale the rotary embedding for prompts of this many tokens. None: exact, up to the trained length.
        hub: hub to download from, "huggingface" or "modelscope". None: $QWEN_HUB, or "huggingface".
        overwrite: replace an exported model in `folder`.
        progress: show a progress bar on stderr.

    Returns:
        Notes for the user, as sentences: what differs from the original model.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of another architecture.
        ValueError: the model cannot be written in this format, or not with this `max_length`.
        OSError: `folder` cannot be written.
    """
    target = Path(folder)
    # Before downloading gigabytes.
    check_target(target, Path(resolve(checkpoint)), overwrite, model_type=Qwen2Config.model_type)
    source, tokenizer = open_checkpoint(checkpoint, hub)
    config = qwen2_config(source.config, max_length)
    weights = source.weights()
    names = exported_tensors(weights, source.config)
    with staged_directory(target, replaces=_OPTIONAL_FILES) as staging:
        dtype = _write_weights(weights, names, staging, progress)
        _write_json(_config_json(config, source, tokenizer, dtype), staging / CONFIG_NAME)
        _write_json(generation_config(source, tokenizer), staging / GENERATION_CONFIG_NAME)
        write_tokenizer(tokenizer, staging, config.max_position_embeddings, source.is_chat)
        apply_umask(staging)
    return export_notes(source.config, max_length, source.chat_format)


def qwen2_config(config: QWenConfig, max_length: int | None = None) -> Qwen2Config:
    """Return the Qwen2 config of the same network.

    Raises:
        ValueError: Qwen2 cannot represent the network.
    """
    check_architecture(config)
    return Qwen2Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.kv_channels,  # type: ignore[call-arg]  # an extra field of config.json, which engines read
        intermediate_size=config.intermediate_size // 2,
        vocab_size=config.vocab_size,
        max_position_embeddings=max(exact_length(config), max_length or 0),
        rms_norm_eps=float(config.layer_norm_epsilon),
        rope_parameters={"rope_type": "default", "rope_theta": rope_base(config, max_length)},
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=float(config.initializer_range),
    )


def qwen2_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert a tensor to Qwen2: renamed, or `c_attn` split into query, key and value.

    Args:
        name: name in the checkpoint.
        tensor: weight, bias or part of a GPTQ layer.
    """
    layer, module, part = split_name(name)
    if not layer:
        yield f"{NON_LAYER_NAMES[module]}.{part}", tensor
    elif module != QKV_MODULE:
        yield f"model.layers.{layer}.{LAYER_NAMES[module]}.{part}", tensor
    elif part == "g_idx":  # indexes the inputs, which all three share
        for target in QKV_NAMES:
            yield f"model.layers.{layer}.{target}.{part}", tensor.clone()
    else:
        # GPTQ has outputs in columns, everything else in rows.
        output_dim = 1 if part in ("qweight", "qzeros", "scales") else 0
        for target, chunk in zip(QKV_NAMES, tensor.chunk(3, dim=output_dim), strict=True):
            yield f"model.layers.{layer}.{target}.{part}", chunk.contiguous()


def generation_config(source: Checkpoint, tokenizer: QWenTokenizer) -> JSONObject:
    """Return the generation config with all end tokens as EOS: other engines do not read `stop_words_ids`."""
    generation = {name: value for name, value in source.generation_settings.items() if name not in _QWEN_ONLY_FIELDS}
    if generation.get("top_k") == 0:  # all tokens; SGLang rejects 0, all engines accept vocab_size
        generation["top_k"] = source.config.vocab_size
    stop_token_ids = [tokenizer.im_end_id, tokenizer.im_start_id] if source.is_chat else []
    return generation | {"eos_token_id": [*stop_token_ids, tokenizer.eod_id], "pad_token_id": tokenizer.eod_id}


def _write_weights(weights: Weights, names: list[str], folder: Path, progress: bool) -> torch.dtype:
    """Write one file for each weight file, split into shards of _MAX_SHARD_BYTES. Return the embedding's dtype."""
    total_size, dtype = 0, torch.float32
    files: list[list[str]] = []
    tensors: dict[str, torch.Tensor] = {}
    remaining_bytes, previous = _MAX_SHARD_BYTES, None
    for name in tqdm(names, unit="tensor", disable=not progress):
        tensor, file = weights[name], weights.file_of(name)
        if tensors and (file != previous or tensor.nbytes > remaining_bytes):
            files.append(_write_file(tensors, folder / f"{len(files)}.safetensors"))
            tensors, remaining_bytes = {}, _MAX_SHARD_BYTES
        previous = file
        converted = dict(qwen2_tensors(name, tensor))
        tensors |= converted
        remaining_bytes -= tensor.nbytes
        total_size += sum(part.nbytes for part in converted.values())
        if name == f"{EMBEDDING}.weight":
            dtype = tensor.dtype
    files.append(_write_file(tensors, folder / f"{len(files)}.safetensors"))
    # File names contain the number of files, which is known only now.
    weight_map: dict[str, str] = {}
    for number, tensor_names in enumerate(files):
        file = SAFETENSORS if len(files) == 1 else f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(tensor_names, file)
    if len(files) > 1:
        _write_json({"metadata": {"total_size": total_size}, "weight_map": weight_map}, folder / SAFETENSORS_INDEX)
    return dtype


def _write_file(tensors: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Save tensors to a file and return their names.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # wraps OSError
        raise OSError(f"Cannot write the weights: {error}") from error
    return list(tensors)


def _config_json(config: Qwen2Config, source: Checkpoint, tokenizer: QWenTokenizer, dtype: torch.dtype) -> JSONObject:
    """Return config.json for engines; renamed fields have both the current and the old name of transformers."""
    config_json = {name: getattr(config, name) for name in _CONFIG_FIELDS}
    config_json |= {
        "architectures": ["Qwen2ForCausalLM"],
        "eos_token_id": tokenizer.im_end_id if source.is_chat else tokenizer.eod_id,
        "pad_token_id": tokenizer.eod_id,
        "rope_theta": cast(JSONObject, config.rope_parameters)["rope_theta"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    quantization = getattr(source.config, "quantization_config", None)
    return config_json | ({"quantization_config": quantization} if quantization else {})


def _write_json(content: JSONObject, path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
