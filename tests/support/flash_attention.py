"""The functions of flash-attn that transformers calls, in plain torch, as a package that transformers' own code finds.

Shapes, dtypes and layout are checked as flash-attn does, and the causal mask is aligned to the last query.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.pretend_runtime import clear_caches

VERSION = "2.8.3"
calls: Counter[str] = Counter()
"""How often each function was called since `install`."""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Install the package for one test: metadata in `folder`, which is put on the path, and modules."""
    metadata = folder / f"flash_attn-{VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\n")
    (metadata / "top_level.txt").write_text("flash_attn\n")
    package = folder / "flash_attn"
    package.mkdir()
    functions = "flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache"
    (package / "__init__.py").write_text(f"from {__name__} import {functions}\n")
    (package / "bert_padding.py").write_text(f"from {__name__} import pad_input, unpad_input\n")
    monkeypatch.syspath_prepend(folder)
    for name in ("flash_attn", "flash_attn.bert_padding"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    clear_caches()
    calls.clear()


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """Attention of (B, S, H, D) queries to (B, T, H, D) keys and values → (B, S, H, D)."""
    _check(q, k, v)
    calls["flash_attn_func"] += 1
    return torch.stack([_attention(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention within sequences that lie one after the other: (tokens, H, D) each → (tokens, H, D)."""
    _check(q, k, v)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32, "cu_seqlens must be int32"
    calls["flash_attn_varlen_func"] += 1
    queries, keys = cu_seqlens_q.cpu().tolist(), cu_seqlens_k.cpu().tolist()  # a kernel reads them on the device
    outputs = []
    for q_start, q_end, k_start, k_end in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        assert q_end - q_start <= int(max_seqlen_q), "max_seqlen_q is too small"
        assert k_end - k_start <= int(max_seqlen_k), "max_seqlen_k is too small"
        parts = q[q_start:q_end], k[k_start:k_end], v[k_start:k_end]
        outputs.append(_attention(*parts, softmax_scale, causal, window_size))
    return torch.cat(outputs)


def flash_attn_with_kvcache(*args: object, **kwargs: object) -> torch.Tensor:
    """Only transformers' continuous batching calls it."""
    raise NotImplementedError("flash_attn_with_kvcache is not pretended here")


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """(B, S, …) → tokens that are not masked, their indices, cumulative lengths, the longest length, lengths."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = torch.nonzero(attention_mask.flatten()).flatten()
    cumulative = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, cumulative, int(lengths.max()), lengths


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """The inverse of `unpad_input`, zero where it had dropped tokens: (tokens, …) → (B, S, …)."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))


def _check(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if tensor.stride(-1) != 1:
            raise RuntimeError("Input tensor must have contiguous last dimension")
        if tensor.device.type != "cuda":
            raise RuntimeError("Input tensor must be on CUDA device")


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """(S, H, D), (T, H, D), (T, H, D) → (S, H, D)."""
    query, key, value = (tensor.transpose(0, 1).float() for tensor in (q, k, v))
    scores = query @ key.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    columns = torch.arange(len(k), device=q.device)[None]
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
    if left >= 0:
        hidden = hidden | (columns < rows - left)
    if right >= 0:
        hidden = hidden | (columns > rows + right)
    weights = scores.masked_fill(hidden, -float("inf")).softmax(-1).nan_to_num()
    return (weights @ value).transpose(0, 1).to(q.dtype)
