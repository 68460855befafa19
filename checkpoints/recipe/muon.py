"""Batched Muon optimizer in float32. torch.optim.Muon uses bfloat16, which is slow on CPUs without matrix units.

The update of a matrix is the orthogonal matrix nearest to its momentum, computed by Newton-Schulz iteration and scaled
to the magnitude of AdamW's updates, so that both optimizers can share a learning rate.
"""

from __future__ import annotations

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: fast rather than exact


def orthogonalised(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Brings the singular values of matrices (N, rows, columns), rows <= columns, close to 1."""
    a, b, c = _COEFFICIENTS
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D matrices. A fused projection with rows == 3 * columns is treated as three square matrices."""

    def __init__(self, parameters, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])  # Nesterov
                rows, columns = update.shape
                parts = update.split(columns) if rows == 3 * columns else [update]
                targets = parameter.split(columns) if rows == 3 * columns else [parameter]
                for part, target in zip(parts, targets, strict=True):
                    tall = part.shape[0] > part.shape[1]
                    wide = part.mT if tall else part
                    by_shape.setdefault(tuple(wide.shape), []).append((wide, target, tall))
            for (_, columns), items in by_shape.items():
                updates = orthogonalised(torch.stack([wide for wide, _, _ in items]))
                for update, (_, target, tall) in zip(updates, items, strict=True):
                    target.mul_(1 - group["lr"] * group["weight_decay"])
                    target.add_(update.mT if tall else update, alpha=-group["lr"] * 0.2 * columns**0.5)
