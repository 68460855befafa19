"""Exports a checkpoint to GGUF, llama.cpp's format, where this architecture is called "qwen"."""

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import CheckpointError
from ..checkpoint.staging import sync
from ..checkpoint.weights import Weights
from ..model.configuration_qwen import QWenConfig
from ..model.gptq_qwen import GPTQ_SUFFIXES
from ..model.tokenization_qwen import QWenTokenizer
from .layout import EMBEDDING, HEAD, NORM, dequantize_weight, exported_tensors, split_name
from .limits import check_architecture, exact_length, export_notes, rope_base
from .source import open_checkpoint
from .tokenizer_json import bpe_merges, chat_template, token_to_str

NON_LAYER_NAMES = {EMBEDDING: "token_embd", NORM: "output_norm", HEAD: "output"}
LAYER_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.w1": "ffn_up",
    "mlp.w2": "ffn_gate",
    "mlp.c_proj": "ffn_down",
}
KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
"""Supported types of the weight matrices."""
OUTPUT_TYPES = {"q4_0": "q8_0"}
"""Type of the embedding and output matrices, where it differs from the layers': they lose most from four bits."""

_CHUNK_NUMEL = 4_000_000  # numbers converted at a time


class LazyTensor(NamedTuple):
    """A tensor that is loaded lazily."""

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
    """Write a checkpoint as one GGUF file with tokenizer and chat template, unpacking GPTQ weights.

    Peak memory is one matrix of the checkpoint.

    Args:
        checkpoint: local folder or hub id. None: the bundled chat model.
        file: output file. It is complete or, after an error, absent.
        kind: type of the matrices, one of `KINDS`.
        max_length: scale the rotary embedding for prompts of this many tokens. None: exact, up to the trained length.
        hub: hub to download from, "huggingface" or "modelscope". None: $QWEN_HUB, or "huggingface".
        overwrite: replace an existing `file`.
        progress: show a progress bar on stderr.

    Returns:
        Notes for the user, as sentences: what differs from the original model.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or of another architecture.
        ValueError: unknown `kind`, or a `max_length` that the model does not support.
        ModuleNotFoundError: the package gguf is not installed.
        OSError: `file` cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("No module named 'gguf'")
    if kind not in KINDS:
        raise ValueError(f"Unknown GGUF weight type {kind!r}: use one of {', '.join(KINDS)}.")
    target = Path(file)
    if target.is_dir():
        raise FileExistsError(f"{target} is a folder. Give the path of a file.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} already exists. Choose another file, or add --overwrite to replace it.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {target.name}: the folder {target.parent} does not exist.")
    source, tokenizer = open_checkpoint(checkpoint, hub)
    config = source.config
    check_architecture(config)
    if config.num_attention_heads * config.kv_channels != config.hidden_size:
        raise ValueError("llama.cpp needs num_attention_heads * kv_channels == hidden_size in config.json.")
    rope_base(config, max_length)  # validates max_length before anything is written
    weights = source.weights()
    tensors = _lazy_tensors(weights, exported_tensors(weights, config), config)
    staged = target.with_name(f".{target.name}-{os.getpid()}")  # in the same folder, so that the move is atomic
    try:
        with _exclusive(target):
            write_gguf(
                staged, config, tensors, kind, source=(source, tokenizer), max_length=max_length, progress=progress
            )
            sync(staged)
            staged.replace(target)
    except CheckpointError:  # an OSError about the input
        raise
    except OSError as error:
        raise OSError(f"Cannot write {target} ({error}). Check free disk space and permissions.") from error
    finally:
        staged.unlink(missing_ok=True)
    return export_notes(config, max_length, source.chat_format)


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Lock the file to write, and delete what killed runs left of it.

    Raises:
        OSError: another run is writing it, or the folder is not writable.
    """
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError("another run is writing it") from None
    try:
        for path in target.parent.iterdir():
            name, _, process = path.name.rpartition("-")
            if name == f".{target.name}" and process.isdecimal():
                path.unlink()
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_gguf(
    file: Path,
    config: QWenConfig,
    tensors: Iterable[LazyTensor],
    kind: str,
    *,
    output_type: str | None = None,
    source: tuple[Checkpoint, QWenTokenizer] | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> None:
    """Write tensors of this architecture as GGUF.

    Args:
        tensors: all tensors of a float model, named as in this family's checkpoints.
        kind: type of the matrices in the layers; vectors are written as float32.
        output_type: type of the embedding and output matrices. None: the default for `kind`.
        source: checkpoint and tokenizer, which is written to the file. None: no tokenizer; the model maps ids to ids.
    """
    import gguf

    layer_ggml_type = gguf.GGMLQuantizationType[kind.upper()]
    output_ggml_type = gguf.GGMLQuantizationType[(output_type or OUTPUT_TYPES.get(kind, kind)).upper()]
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
        _add_tokenizer(writer, config.vocab_size, *source)

    typed_tensors = []
    for tensor in tensors:
        layer, module, part = split_name(tensor.name)
        name = f"blk.{layer}.{LAYER_NAMES[module]}.{part}" if layer else f"{NON_LAYER_NAMES[module]}.{part}"
        ggml_type = (
            gguf.GGMLQuantizationType.F32 if len(tensor.shape) == 1 else layer_ggml_type if layer else output_ggml_type
        )
        block, _ = gguf.GGML_QUANT_SIZES[ggml_type]
        if tensor.shape[-1] % block:
            raise ValueError(
                f"{kind} packs blocks of {block} weights: the row length {tensor.shape[-1]} is not a multiple of it."
            )
        size = _nbytes(tensor.shape, ggml_type)
        # Any dtype but uint8, whose shape the writer takes as bytes and not as numbers.
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=ggml_type)
        typed_tensors.append((tensor, ggml_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for tensor, ggml_type in tqdm(typed_tensors, unit="tensor", disable=not progress):
            # The writer only reads its `nbytes` and calls `tofile`.
            writer.write_tensor_data(cast(np.ndarray, _QuantizedArray(tensor.load(), ggml_type)))
    finally:
        writer.close()


def _nbytes(shape: Sequence[int], ggml_type) -> int:
    """Size in bytes of a tensor of this type."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    return math.prod(shape) // block * block_bytes


class _QuantizedArray:
    """Array for the GGUF writer that quantizes a few rows at a time: all at once would need three copies in memory."""

    def __init__(self, tensor: torch.Tensor, ggml_type):
        self._tensor, self._type = tensor, ggml_type
        self.nbytes = _nbytes(tensor.shape, ggml_type)

    def tofile(self, file: BinaryIO) -> None:
        from gguf.quants import quantize

        rows = max(1, _CHUNK_NUMEL // self._tensor.shape[-1])
        for chunk in self._tensor.split(rows) if self._tensor.dim() > 1 else [self._tensor]:
            quantize(chunk.float().numpy(), self._type).tofile(file)


def _lazy_tensors(weights: Weights, names: list[str], config: QWenConfig) -> list[LazyTensor]:
    """Return the model's tensors as floats; GPTQ layers are unpacked when loaded."""
    tensors = []
    for name in names:
        module, part = name.rsplit(".", 1)
        if part == "qweight":
            shape = (weights.shape(f"{module}.scales")[1], weights.shape(f"{module}.g_idx")[0])
            load = functools.partial(_dequantize, weights, module, config.quantization_config)
            tensors.append(LazyTensor(f"{module}.weight", shape, load))
        elif f".{part}" not in GPTQ_SUFFIXES:
            tensors.append(LazyTensor(name, weights.shape(name), functools.partial(weights.__getitem__, name)))
    if config.tie_word_embeddings:  # llama.cpp expects both tensors
        tied = next(tensor for tensor in tensors if tensor.name == f"{EMBEDDING}.weight")
        tensors.append(tied._replace(name=f"{HEAD}.weight"))
    return tensors


def _dequantize(weights: Weights, module: str, quantization: dict) -> torch.Tensor:
    qweight, qzeros, scales, g_idx = (weights[f"{module}{part}"] for part in GPTQ_SUFFIXES)
    return dequantize_weight(qweight, qzeros, scales, g_idx, quantization)


def _add_tokenizer(writer, rows: int, source: Checkpoint, tokenizer: QWenTokenizer) -> None:
    """Add vocabulary for this many rows of the embedding, merges, control tokens and a chat model's template."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(rows)]  # rows of the embedding without a token
    types = [TokenType.UNUSED] * rows
    for index, token in tokenizer.decoder.items():
        tokens[index] = token if isinstance(token, str) else token_to_str(token)
        types[index] = TokenType.CONTROL if isinstance(token, str) else TokenType.NORMAL
    writer.add_name(Path(source.name).resolve().name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # same split pattern
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(
        [f"{token_to_str(left)} {token_to_str(right)}" for left, right in bpe_merges(tokenizer.mergeable_ranks)]
    )
    writer.add_eos_token_id(tokenizer.im_end_id if source.is_chat else tokenizer.eod_id)
    writer.add_pad_token_id(tokenizer.eod_id)
    writer.add_add_bos_token(False)
    if source.is_chat:
        writer.add_chat_template(chat_template(tokenizer))
