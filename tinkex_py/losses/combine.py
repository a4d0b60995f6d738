"""From the gradients of the terms to the gradient that is sent, and how the terms get along in it. No event loop."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch

from tinkex_py.losses.gradients import weighted_sum
from tinkex_py.losses.output import GradientDiagnosis

Combine = Literal["sum", "pcgrad"]
COMBINES: tuple[Combine, ...] = ("sum", "pcgrad")

# Float32 products of this many elements are summed in float32, the sums of blocks in double precision.
_BLOCK = 65_536
_dot = cast("Callable[[torch.Tensor, torch.Tensor], torch.Tensor]", torch.dot)


Combined = tuple[torch.Tensor, dict[str, GradientDiagnosis]]


@dataclass(frozen=True)
class Part:
    """One term's share in the total gradient.

    Attributes:
        name: of the term; the first part is the base loss.
        scale: what its gradient is multiplied by: the weight, and less where the gradient is clipped.
        gradient: d(term)/d(logprobs), unweighted; None if it is zero.
        norm: its L2 norm; None if it is not known.
    """

    name: str
    scale: float
    gradient: torch.Tensor | None
    norm: float | None


def summed(parts: Sequence[Part], like: torch.Tensor, *, diagnose: bool) -> Combined:
    """The weighted sum of the gradients.

    Args:
        parts: the base loss first.
        like: shape and dtype of the result.
        diagnose: also say how the terms get along, which needs the norms.

    Returns:
        The sum, and a diagnosis for each term's name.
    """
    total = weighted_sum([(part.scale, part.gradient) for part in parts], like)
    if not diagnose:
        return total, {}
    square = dot(total, total)
    base = parts[0]
    # Laid out once: that of a sum is one number, seen everywhere.
    base_gradient = None if base.gradient is None else _flat(base.gradient)
    diagnosis: dict[str, GradientDiagnosis] = {}
    for part in parts:
        with_total = dot(part.gradient, total)
        diagnosis[part.name] = _diagnosis(
            _cosine(dot(part.gradient, base_gradient), _norm(part), _norm(base)),
            _cosine(with_total, _norm(part), square**0.5),
            part.scale * with_total / square if square > 0 else None,
        )
    return total, diagnosis


def without_conflicts(parts: Sequence[Part], like: torch.Tensor, *, step: int) -> Combined:
    """The sum of the weighted gradients, each freed of what points against another one ("PCGrad").

    Every term's weighted gradient is projected, one other term after another, onto the plane that is normal to the
    other's gradient, where the two conflict (their product is negative); the results are summed. The order in which a
    term meets the others is drawn anew each step, from the step and the names alone, so that a resumed run and a run
    with the specs in another order give the same.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning" (2020), algorithm 1.

    Args:
        parts: the base loss first.
        like: shape and dtype of the result.
        step: seeds the order.

    Returns:
        As `summed`, always with a diagnosis.
    """
    products = _products(parts)
    scales = np.array([part.scale for part in parts])
    weighted = products * np.outer(scales, scales)  # the products of the weighted gradients
    by_name = sorted(range(len(parts)), key=lambda index: parts[index].name)
    # Row i: how much of each weighted gradient is left in the one of term i.
    left = np.eye(len(parts))
    for index in by_name:
        others = [other for other in by_name if other != index]
        random.Random(f"{step} {parts[index].name}").shuffle(others)  # noqa: S311  # an order, not a secret
        for other in others:
            product = left[index] @ weighted[:, other]
            if product < 0:
                left[index, other] -= product / weighted[other, other]
    combined = left.sum(0)
    total = weighted_sum(
        [(float(factor) * part.scale, part.gradient) for factor, part in zip(combined, parts, strict=True)], like
    )
    square = float(combined @ weighted @ combined)
    shares = left @ weighted @ combined
    with_total = products @ (scales * combined)
    norms = np.sqrt(np.diag(products))
    diagnosis = {
        part.name: _diagnosis(
            _cosine(products[index, 0], norms[index], norms[0]),
            _cosine(with_total[index], norms[index], square**0.5 if square > 0 else 0.0),
            float(shares[index]) / square if square > 0 else None,
        )
        for index, part in enumerate(parts)
    }
    return total, diagnosis


def dot(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    """Sum of the products of all elements, in double precision over blocks; None is zero."""
    if first is None or second is None:
        return 0.0
    if first.numel() <= _BLOCK:
        return _dot(_flat(first), _flat(second)).item()
    pieces = zip(torch.split(_flat(first), _BLOCK), torch.split(_flat(second), _BLOCK), strict=True)
    return sum(_dot(one, other).item() for one, other in pieces)


def _products(parts: Sequence[Part]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    products = np.zeros((len(parts), len(parts)))
    for row, part in enumerate(parts):
        for column in range(row + 1):
            products[row, column] = products[column, row] = dot(part.gradient, parts[column].gradient)
    return products


def _flat(gradient: torch.Tensor) -> torch.Tensor:
    flat = gradient.detach().reshape(-1).contiguous()
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def _norm(part: Part) -> float:
    return part.norm or 0.0


def _diagnosis(with_base: float | None, with_total: float | None, share: float | None) -> GradientDiagnosis:
    return GradientDiagnosis(
        cosine_with_base=with_base,
        cosine_with_total=with_total,
        share_of_total=share,
        conflicts=None if with_base is None else with_base < 0,
    )


def _cosine(product: float, norm: float, other_norm: float) -> float | None:
    if not (norm > 0 and other_norm > 0):
        return None
    return float(min(max(product / norm / other_norm, -1.0), 1.0))
