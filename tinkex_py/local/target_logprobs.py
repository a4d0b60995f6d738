"""Logprobs of target tokens out of logits, with a backward pass that needs one tensor of the logits' size."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of logits that are summed up at once: their exponentials stay in the processor's cache.
_ROWS = 32


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """`log_softmax(logits)` at some places of each row, float32.

    Args:
        logits: `[..., vocabulary]`.
        targets: places in the vocabulary, `[..., candidates]`; the same place may come twice.

    Returns:
        `[..., candidates]`.
    """
    vocabulary, candidates = logits.shape[-1], targets.shape[-1]
    rows, wanted = logits.float().reshape(-1, vocabulary), targets.reshape(-1, candidates)
    return cast("Tensor", _TargetLogprobs.apply(rows, wanted)).view(targets.shape)  # pyright: ignore[reportUnknownMemberType]


class _TargetLogprobs(torch.autograd.Function):
    """Autograd's own way would make a gradient for the gather, another one for the logsumexp, and then their sum."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        normalizer = torch.cat([rows.logsumexp(-1, keepdim=True) for rows in torch.split(logits, _ROWS)])
        ctx.save_for_backward(logits, normalizer, targets)
        return logits.gather(-1, targets) - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, normalizer, targets = ctx.saved_tensors
        of_logits = torch.sub(logits, normalizer).exp_().mul_(gradient.sum(-1, keepdim=True).neg_())
        return of_logits.scatter_add_(-1, targets, gradient), None
