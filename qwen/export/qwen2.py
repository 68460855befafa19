"""A checkpoint of this family → `Qwen2ForCausalLM`, the next generation's architecture.

It computes the same function up to the trained length: query, key and value in three matrices instead of one, `w2`
called the gate and `w1` what it gates. Every current engine knows it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import Qwen2Config
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from ..checkpoint.checkpoint import Checkpoint, resolve
from ..checkpoint.files import SAFETENSORS, SAFETENSORS_INDEX, let_others_read
from ..checkpoint.staging import check_target, filled_at_the_end
from ..checkpoint.weights import Weights
from ..model.configuration_qwen import QWenConfig
from ..model.tokenization_qwen import QWenTokenizer
from .layout import BIASED, EMBEDDING, HEAD, NORM, split_name, wanted
from .limits import check_network, exact_length, remarks, rope_base
from .source import open_source
from .tokenizer_json import write_tokenizer

OUTSIDE = {EMBEDDING: "model.embed_tokens", NORM: "model.norm", HEAD: "lm_head"}
IN_LAYER = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_WRITTEN = (
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
_FILE_BYTES = 2_000_000_000
# Some models have, and others then would have too.
_TOKENIZER_FILES = ["chat_template.jinja", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
# Fields of generation_config.json that only our code reads.
_OURS = ("chat_format", "stop_words_ids", "transformers_version", "_from_model_config")


def export_qwen2(
    checkpoint: str | os.PathLike | None,
    folder: str | os.PathLike,
    *,
    max_length: int | None = None,
    hub: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write a checkpoint in the format of Qwen2, weights as they are (float or GPTQ), with tokenizer.json.

    Memory: one file of weights of the checkpoint at a time, and of a larger one 2 GB.

    Args:
        checkpoint: a folder or a hub id; None is the bundled chat model.
        folder: to be made, or empty; it is complete at the end or not there at all.
        max_length: stretch the rotary embedding for prompts of so many tokens. None: exact, up to the trained length.
        hub: where an id is fetched from, "huggingface" or "modelscope"; None is $QWEN_HUB, or the former.
        overwrite: an exported model in `folder` may be replaced.
        progress: show a bar on stderr.

    Returns:
        Remarks for the user of the model, in sentences: what the target does not do.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of another kind.
        ValueError: the model cannot be written in this format, or not with this `max_length`.
        OSError: `folder` cannot be written.
    """
    target = Path(folder)
    # Before gigabytes are fetched.
    check_target(target, Path(resolve(checkpoint)), overwrite, model_type=Qwen2Config.model_type)
    source, tokenizer = open_source(checkpoint, hub)
    config = qwen2_config(source.config, max_length)
    weights = source.weights()
    names = wanted(weights, source.config)
    with filled_at_the_end(target, replaces=_TOKENIZER_FILES) as new:
        dtype = _write_weights(weights, names, new, progress)
        _write_json(_config_json(config, source, tokenizer, dtype), new / CONFIG_NAME)
        _write_json(generation_config(source, tokenizer), new / GENERATION_CONFIG_NAME)
        write_tokenizer(tokenizer, new, config.max_position_embeddings, source.is_chat)
        let_others_read(new)
    return remarks(source.config, max_length, source.chat_format)


def qwen2_config(config: QWenConfig, max_length: int | None = None) -> Qwen2Config:
    """The same network's config.

    Raises:
        ValueError: a network that Qwen2 has no words for.
    """
    check_network(config)
    return Qwen2Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        intermediate_size=config.intermediate_size // 2,
        vocab_size=config.vocab_size,
        max_position_embeddings=max(exact_length(config), max_length or 0),
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": rope_base(config, max_length)},
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
    )


def qwen2_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor of ours as those of Qwen2: itself under another name, or the thirds of `c_attn`.

    Args:
        name: as in the checkpoint; `tensor` is a weight, a bias or a part of a GPTQ layer.
    """
    layer, module, part = split_name(name)
    if not layer:
        yield f"{OUTSIDE[module]}.{part}", tensor
    elif module != BIASED:
        yield f"model.layers.{layer}.{IN_LAYER[module]}.{part}", tensor
    elif part == "g_idx":  # of the inputs, which all three have in common
        for target in QUERY_KEY_VALUE:
            yield f"model.layers.{layer}.{target}.{part}", tensor.clone()
    else:
        # GPTQ has outputs in columns, everything else in rows.
        outputs = 1 if part in ("qweight", "qzeros", "scales") else 0
        for target, third in zip(QUERY_KEY_VALUE, tensor.chunk(3, dim=outputs), strict=True):
            yield f"model.layers.{layer}.{target}.{part}", third.contiguous()


def generation_config(source: Checkpoint, tokenizer: QWenTokenizer) -> dict[str, Any]:
    """The checkpoint's, with all that ends a reply: engines do not know stop words of a model."""
    generation = {name: value for name, value in source.generation_settings.items() if name not in _OURS}
    if generation.get("top_k") == 0:  # all tokens; SGLang refuses requests with that 0, every engine takes their number
        generation["top_k"] = source.config.vocab_size
    ends = [tokenizer.im_end_id, tokenizer.im_start_id] if source.is_chat else []
    return generation | {"eos_token_id": [*ends, tokenizer.eod_id], "pad_token_id": tokenizer.eod_id}


def _write_weights(weights: Weights, names: list[str], folder: Path, progress: bool) -> torch.dtype:
    """Each file of weights becomes one, or several of at most _FILE_BYTES; returns the type of the embedding."""
    total, dtype = 0, torch.float32
    files: list[list[str]] = []
    tensors: dict[str, torch.Tensor] = {}
    room, before = _FILE_BYTES, None
    for name in tqdm(names, unit="tensor", disable=not progress):
        tensor, file = weights[name], weights.file_of(name)
        if tensors and (file != before or tensor.nbytes > room):
            files.append(_write_file(tensors, folder / f"{len(files)}.safetensors"))
            tensors, room = {}, _FILE_BYTES
        before = file
        made = dict(qwen2_tensors(name, tensor))
        tensors |= made
        room -= tensor.nbytes
        total += sum(part.nbytes for part in made.values())
        if name == f"{EMBEDDING}.weight":
            dtype = tensor.dtype
    files.append(_write_file(tensors, folder / f"{len(files)}.safetensors"))
    # How many there are, which their names tell, is known only now.
    weight_map: dict[str, str] = {}
    for number, inside in enumerate(files):
        file = SAFETENSORS if len(files) == 1 else f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(inside, file)
    if len(files) > 1:
        _write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / SAFETENSORS_INDEX)
    return dtype


def _write_file(tensors: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Returns the names of the tensors.

    Raises:
        OSError: there is no room, or the disk fails.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps those of the system
        raise OSError(f"The weights could not be written: {error}") from error
    return list(tensors)


def _config_json(
    config: Qwen2Config, source: Checkpoint, tokenizer: QWenTokenizer, dtype: torch.dtype
) -> dict[str, Any]:
    """What engines read; fields that have two names, today's and yesterday's of transformers, in both."""
    document = {name: getattr(config, name) for name in _WRITTEN}
    document |= {
        "architectures": ["Qwen2ForCausalLM"],
        "eos_token_id": tokenizer.im_end_id if source.is_chat else tokenizer.eod_id,
        "pad_token_id": tokenizer.eod_id,
        "rope_theta": config.rope_parameters["rope_theta"],
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    quantization = getattr(source.config, "quantization_config", None)
    return document | ({"quantization_config": quantization} if quantization else {})


def _write_json(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
