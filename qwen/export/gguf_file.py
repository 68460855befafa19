"""A checkpoint of this family → GGUF, llama.cpp's format, which knows this architecture under the name "qwen"."""

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import CheckpointError
from ..checkpoint.weights import Weights
from ..model.configuration_qwen import QWenConfig
from ..model.gptq_qwen import PARTS
from ..model.tokenization_qwen import QWenTokenizer
from .layout import EMBEDDING, HEAD, NORM, dequantized, split_name, wanted
from .limits import check_network, exact_length, remarks, rope_base
from .source import open_source
from .tokenizer_json import as_text, chat_template, merges

OUTSIDE = {EMBEDDING: "token_embd", NORM: "output_norm", HEAD: "output"}
IN_LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.w1": "ffn_up",
    "mlp.w2": "ffn_gate",
    "mlp.c_proj": "ffn_down",
}
KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
"""Types that the matrices of a file can have."""
OUTSIDE_KINDS = {"q4_0": "q8_0"}
"""Type of the embedding and the output, where it is not that of the layers: four bits would cost most there."""

_SLICE = 4_000_000  # numbers that are converted at a time


class Entry(NamedTuple):
    """A tensor that is read when its turn comes."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


def export_gguf(
    checkpoint: str | os.PathLike | None,
    file: str | os.PathLike,
    *,
    kind: str = "f16",
    max_length: int | None = None,
    hub: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write a checkpoint as one GGUF file with tokenizer and chat template; GPTQ weights are unpacked.

    Memory: one matrix of the checkpoint at a time.

    Args:
        checkpoint: a folder or a hub id; None is the bundled chat model.
        file: it is complete at the end or not there at all.
        kind: type of the matrices, one of `KINDS`.
        max_length: stretch the rotary embedding for prompts of so many tokens. None: exact, up to the trained length.
        hub: where an id is fetched from, "huggingface" or "modelscope"; None is $QWEN_HUB, or the former.
        overwrite: `file` may be replaced.
        progress: show a bar on stderr.

    Returns:
        Remarks for the user of the model, in sentences: what the target does not do.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of another kind.
        ValueError: an unknown `kind`, or a `max_length` that the model is not stretched to.
        ModuleNotFoundError: the package gguf is not installed.
        OSError: `file` cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("No module named 'gguf'")
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no type of weights that is written: name one of {', '.join(KINDS)}.")
    target = Path(file)
    if target.is_dir():
        raise FileExistsError(f"{target} is a folder. Name a file.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already. Name another file, or add --overwrite to replace it.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} to write {target.name} into.")
    source, tokenizer = open_source(checkpoint, hub)
    config = source.config
    check_network(config)
    if config.num_attention_heads * config.kv_channels != config.hidden_size:
        raise ValueError("llama.cpp has heads that are as wide together as the model, and this model has others.")
    rope_base(config, max_length)  # raises what it has to say before anything is written
    weights = source.weights()
    entries = _entries(weights, wanted(weights, config), config)
    work = target.with_name(f".{target.name}-{os.getpid()}")  # beside its place, so that taking it is one step
    try:
        write_gguf(work, config, entries, kind, source=(source, tokenizer), max_length=max_length, progress=progress)
        work.replace(target)
    except CheckpointError:  # about what is read
        raise
    except OSError as error:
        raise OSError(f"{target} could not be written ({error}). Is there room and permission for it?") from error
    finally:
        work.unlink(missing_ok=True)
    return remarks(config, max_length, source.chat_format)


def write_gguf(
    file: Path,
    config: QWenConfig,
    entries: Iterable[Entry],
    kind: str,
    *,
    outside: str | None = None,
    source: tuple[Checkpoint, QWenTokenizer] | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> None:
    """Write tensors of this architecture as GGUF.

    Args:
        entries: all of a float model, named as in our checkpoints.
        kind: type of the matrices in the layers; vectors are in float32.
        outside: type of the embedding and of the output matrix, where it is another than the one for `kind`.
        source: a checkpoint and its tokenizer, which goes into the file. None: token ids go in and come out.
    """
    import gguf

    in_layers = gguf.GGMLQuantizationType[kind.upper()]
    elsewhere = gguf.GGMLQuantizationType[(outside or OUTSIDE_KINDS.get(kind, kind)).upper()]
    writer = gguf.GGUFWriter(str(file), "qwen")
    writer.add_context_length(max(exact_length(config), max_length or 0))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_freq_base(rope_base(config, max_length))
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    if source is None:
        writer.add_tokenizer_model("none")
    else:
        _add_tokenizer(writer, *source)

    typed = []
    for entry in entries:
        layer, module, part = split_name(entry.name)
        name = f"blk.{layer}.{IN_LAYER[module]}.{part}" if layer else f"{OUTSIDE[module]}.{part}"
        type_ = gguf.GGMLQuantizationType.F32 if len(entry.shape) == 1 else in_layers if layer else elsewhere
        block, _ = gguf.GGML_QUANT_SIZES[type_]
        if entry.shape[-1] % block:
            raise ValueError(
                f"{kind} packs {block} weights at a time: rows of {entry.shape[-1]} are no multiple of it."
            )
        size = _size(entry.shape, type_)
        # Its shape is given in numbers, so the type of an array must be one that the writer does not count bytes of.
        writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), size, raw_dtype=type_)
        typed.append((entry, type_))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for entry, type_ in tqdm(typed, unit="tensor", disable=not progress):
            writer.write_tensor_data(_Converted(entry.load(), type_))
    finally:
        writer.close()


def _size(shape: Sequence[int], type_) -> int:
    """Bytes of a tensor of this type."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    return math.prod(shape) // block * block_bytes


class _Converted:
    """What the writer asks of an array, of a tensor that takes its type on the way into the file, some rows at a time:
    as a whole it would be in memory three times."""

    def __init__(self, tensor: torch.Tensor, type_):
        self._tensor, self._type = tensor, type_
        self.nbytes = _size(tensor.shape, type_)

    def tofile(self, file: BinaryIO) -> None:
        from gguf.quants import quantize

        rows = max(1, _SLICE // self._tensor.shape[-1])
        for slice_ in self._tensor.split(rows) if self._tensor.dim() > 1 else [self._tensor]:
            quantize(slice_.float().numpy(), self._type).tofile(file)


def _entries(weights: Weights, names: list[str], config: QWenConfig) -> list[Entry]:
    """The model's tensors as floats: GPTQ layers are unpacked when their turn comes."""
    entries = []
    for name in names:
        module, part = name.rsplit(".", 1)
        if part == "qweight":
            shape = (weights.shape(f"{module}.scales")[1], weights.shape(f"{module}.g_idx")[0])
            load = functools.partial(_unpacked, weights, module, config.quantization_config)
            entries.append(Entry(f"{module}.weight", shape, load))
        elif f".{part}" not in PARTS:
            entries.append(Entry(name, weights.shape(name), functools.partial(weights.__getitem__, name)))
    if config.tie_word_embeddings:  # llama.cpp wants both
        tied = next(entry for entry in entries if entry.name == f"{EMBEDDING}.weight")
        entries.append(tied._replace(name=f"{HEAD}.weight"))
    return entries


def _unpacked(weights: Weights, module: str, quantization: dict) -> torch.Tensor:
    qweight, qzeros, scales, g_idx = (weights[f"{module}{part}"] for part in PARTS)
    return dequantized(qweight, qzeros, scales, g_idx, quantization)


def _add_tokenizer(writer, source: Checkpoint, tokenizer: QWenTokenizer) -> None:
    """Vocabulary, merges, control tokens and, for a chat model, its template."""
    from gguf import TokenType

    rows = source.config.vocab_size
    tokens = [f"[PAD{i}]" for i in range(rows)]  # rows of the matrices that no token has
    types = [TokenType.UNUSED] * rows
    for index, token in tokenizer.decoder.items():
        tokens[index] = token if isinstance(token, str) else as_text(token)
        types[index] = TokenType.CONTROL if isinstance(token, str) else TokenType.NORMAL
    writer.add_name(Path(source.name).resolve().name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # the split pattern is the same
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{as_text(left)} {as_text(right)}" for left, right in merges(tokenizer.mergeable_ranks)])
    writer.add_eos_token_id(tokenizer.im_end_id if source.is_chat else tokenizer.eod_id)
    writer.add_pad_token_id(tokenizer.eod_id)
    writer.add_add_bos_token(False)
    if source.is_chat:
        writer.add_chat_template(chat_template(tokenizer))
