"""Position encoding of Qwen in float32: rotary embedding, dynamic NTK and LogN.

The network calls `rotary_tables` once per forward and `apply_rotary_emb` in every layer.

Shapes: B batch, S new tokens, H heads, D head size, R rotary channels of D.
"""

import torch

MAX_DOUBLINGS = 24  # of the trained length; beyond any realistic context


def ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """α of dynamic NTK for prompts of `lengths` tokens: max(1, 2^⌈log2(n / seq_length) + 1⌉ − 1).

    Counts the doublings of the trained length until it holds n, which is exact in integers, unlike a logarithm.

    Args:
        lengths: (B), tokens of each prompt without padding.

    Returns:
        (B), float32.
    """
    doublings = torch.arange(MAX_DOUBLINGS, device=lengths.device)
    doublings = (lengths[:, None] > seq_length * 2**doublings).sum(-1)
    return (2 ** (doublings + 1) - 1).float()


def rotary_tables(
    position_ids: torch.Tensor, rotary_dim: int, base: float, alpha: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34).

    Dynamic NTK replaces the base by base · α^(R/(R−2)), so that the lowest frequency is stretched by α.

    Args:
        position_ids: (B, S) or (1, S).
        alpha: (B), or None for 1.

    Returns:
        Two of (B, 1, S, R), float32, in the halves layout: channel i is rotated with channel i + R/2.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device).float() / rotary_dim
    if alpha is None:
        inv_freq = (1.0 / base**exponents)[None]
    else:
        inv_freq = 1.0 / (base * alpha[:, None] ** (rotary_dim / (rotary_dim - 2))) ** exponents
    angles = position_ids[:, :, None].float() * inv_freq[:, None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def logn_scale(position_ids: torch.Tensor, seq_length: int) -> torch.Tensor:
    """LogN attention: max(1, log(p + 1) / log(seq_length)) for queries at position p (https://kexue.fm/archives/8823).

    Returns:
        (B, 1, S, 1), float32.
    """
    trained_length = torch.full((), float(seq_length), device=position_ids.device)
    return (torch.log(position_ids.float() + 1) / torch.log(trained_length)).clamp(min=1.0)[:, None, :, None]


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R channels of every head, in float32. x: (B, H, S, D)."""
    rotary_dim = cos.shape[-1]
    x_rot, x_pass = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    x1, x2 = x_rot.chunk(2, dim=-1)
    rotated = x_rot * cos + torch.cat((-x2, x1), dim=-1) * sin
    return torch.cat((rotated, x_pass.float()), dim=-1) if x_pass.shape[-1] else rotated
