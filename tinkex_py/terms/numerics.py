"""Numerically safe functions, and sums over the datums of a packed tensor."""

import math

import torch

# Up to here the exponential is exact. e**20 is 5e8, far beyond the ratios of probabilities that occur in training.
EXACT_UP_TO = 20.0
_SLOPE = math.exp(EXACT_UP_TO)
_LOG2 = math.log(2.0)


def safe_exp(exponent: torch.Tensor) -> torch.Tensor:
    """Returns `exp(x)`, continued by its tangent for x > 20, so that neither value nor gradient overflows."""
    return exponent.clamp(max=EXACT_UP_TO).exp() + _SLOPE * torch.relu(exponent - EXACT_UP_TO)


def safe_expm1(exponent: torch.Tensor) -> torch.Tensor:
    """Returns `exp(x) - 1`, exact near 0 and continued by its tangent for x > 20."""
    return exponent.clamp(max=EXACT_UP_TO).expm1() + _SLOPE * torch.relu(exponent - EXACT_UP_TO)


def safe_sqrt(square: torch.Tensor) -> torch.Tensor:
    """Returns `sqrt(x)` for x >= 0, with gradient 0 at 0."""
    positive = square > 0
    return torch.where(positive, square, 1.0).sqrt() * positive


def log1mexp(negative: torch.Tensor) -> torch.Tensor:
    """Returns `log(1 - exp(x))` for x < 0, without cancellation at either end."""
    is_near = negative > -_LOG2
    near = torch.where(is_near, negative, -1.0)
    far = torch.where(is_near, -1.0, negative)
    return torch.where(is_near, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def with_gradient_of(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Returns the value of one tensor with the gradient of another."""
    return other - other.detach() + value.detach()


def segment_sum(values: torch.Tensor, segments: torch.Tensor | None, count: int) -> torch.Tensor:
    """Sums over segments.

    Args:
        values: `[M]`.
        segments: index of the segment of each value, `[M]`; None if there is only one segment.
        count: number of segments.

    Returns:
        `[count]`.
    """
    if segments is None:
        return values.sum().reshape(1)
    return values.new_zeros(count).index_add(0, segments, values)


def segment_log_softmax(values: torch.Tensor, segments: torch.Tensor | None, count: int) -> torch.Tensor:
    """Computes `log_softmax` over each segment; the arguments are those of `segment_sum`."""
    if segments is None:
        return values.log_softmax(0)
    largest = values.detach().new_full((count,), -torch.inf).scatter_reduce(0, segments, values.detach(), "amax")
    shifted = values - largest.clamp(min=torch.finfo(values.dtype).min)[segments]
    return shifted - segment_sum(shifted.exp(), segments, count).log()[segments]
