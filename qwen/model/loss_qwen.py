"""The cross-entropy of a language model without its logits.

Logits in float32 take 0.6 GB for 1,024 positions of a vocabulary of 151,936 words, and a backward pass two or three
times as much. Here they are computed for a few positions at a time, and with them the gradients of the hidden states
and of the output matrix, so that nothing of their size is kept. This is the method of Hsu et al. 2024 (Liger Kernel,
https://arxiv.org/abs/2410.10989, section 3.2), with the same matrix products as without it.

Shapes: N positions, C hidden size, V words.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
CHUNK = 512
"""Positions whose logits are computed together: 0.3 GB in float32 for 151,936 words."""


class LossHead(nn.Linear):
    """An output matrix that returns the cross-entropy of its logits, instead of the logits, if labels are given.

    The loss is computed within the module's call, so that ZeRO 3 and FSDP gather the matrix for it.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: Literal["sum", "none"] = "sum",
    ) -> torch.Tensor:
        """Compute logits (..., V), or the loss of the labels in nats, in float32.

        Args:
            hidden: (..., C).
            labels: (...), the word of each position; -100 to ignore it.
            label_smoothing: share of the target's probability that is spread evenly over all words.
            reduction: "sum" for the sum over all positions; "none" for a tensor like `labels` without gradients, 0
                where they are ignored.
        """
        if labels is None:
            return super().forward(hidden)
        labels = labels.to(hidden.device)
        learned = labels != IGNORE_INDEX
        hidden, targets = hidden[learned], labels[learned]
        if reduction == "sum":
            return _SumOfCrossEntropies.apply(hidden, self.weight, targets, label_smoothing)
        matrix = self.weight.to(_compute_dtype(self.weight))
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        parts = [_losses(part, matrix, target, label_smoothing)[0] for part, target in _chunks(hidden, targets)]
        losses[learned] = torch.cat(parts) if parts else losses.new_zeros(0)
        return losses.detach()


def use_loss_head(head: nn.Module) -> None:
    """Make an output matrix compute losses too, also within the wrapper of a module that peft trains as a whole.

    Raises:
        TypeError: it is no matrix of floats alone: it is quantized, or has LoRA.
    """
    matrices = [module for module in head.modules() if isinstance(module, nn.Linear)]
    is_plain = all(hasattr(each, "weight") and each.weight.is_floating_point() for each in matrices)
    if not matrices or not is_plain or hasattr(head, "base_layer"):
        raise TypeError(f"skip_logits needs an output matrix of floats without LoRA, not {type(head).__name__}.")
    for matrix in matrices:
        matrix.__class__ = LossHead


class _SumOfCrossEntropies(torch.autograd.Function):
    """The sum of the cross-entropies of N positions; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, label_smoothing: float
    ) -> torch.Tensor:
        matrix = weight.detach().to(_compute_dtype(weight))
        hidden_needs, weight_needs = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if hidden_needs else None
        # Summed over the chunks in float32, as a product over all positions would be.
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_needs else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        start = 0
        for part, target in _chunks(hidden, targets):
            losses, probabilities = _losses(part, matrix, target, label_smoothing)
            total += losses.sum()
            # The gradient of the logits: probabilities minus the smoothed target.
            if label_smoothing:
                probabilities -= label_smoothing / len(matrix)
            smoothed = probabilities.new_full((len(part), 1), label_smoothing - 1)
            logits_grad = probabilities.scatter_add_(1, target[:, None], smoothed).to(matrix.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                if hidden_grad is not None:
                    hidden_grad[start : start + len(part)] = logits_grad @ matrix
                if weight_grad is not None:
                    part = part.to(matrix.dtype)
                    if matrix.dtype == torch.float32:
                        weight_grad.addmm_(logits_grad.T, part)
                    else:
                        weight_grad += logits_grad.T @ part
            start += len(part)
        ctx.grads = hidden_grad, weight_grad
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("The loss without logits has one backward pass. Compute it again for another one.")
        # In place: a second matrix of gradients would add to the peak of memory.
        hidden_grad, weight_grad = (None if each is None else each.mul_(grad) for each in ctx.grads)
        ctx.grads = None
        return hidden_grad, None if weight_grad is None else weight_grad.to(ctx.weight_dtype), None, None


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the precision of matrix products: that of autocast, where it is on, or of the weights."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _chunks(hidden: torch.Tensor, targets: torch.Tensor) -> zip:
    """Split positions; none if there are none."""
    return zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True) if len(targets) else zip()


def _losses(
    hidden: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropies (N) and the probabilities of all words (N, V), both in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = nn.functional.linear(hidden.to(matrix.dtype), matrix).float()
    expected = logits.gather(1, targets[:, None])
    if label_smoothing:
        expected = expected.lerp(logits.mean(1, keepdim=True), label_smoothing)
    largest = logits.amax(1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()  # in place, like the next line: there is one tensor of this size
    total = exponentials.sum(1, keepdim=True)
    losses = (total.log() - (expected - largest))[:, 0]  # in this order small losses are exact
    return losses, exponentials.div_(total)


__all__ = ["IGNORE_INDEX", "LossHead", "use_loss_head"]
