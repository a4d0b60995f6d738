"""From the gradients of the terms to the gradient that is sent, and how the terms get along in it. No event loop."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch

from tinkex_py.losses.gradients import check_weights, norm
from tinkex_py.losses.output import GradientDiagnosis

Combine = Literal["sum", "pcgrad"]
COMBINES: tuple[Combine, ...] = ("sum", "pcgrad")

# Float32 products of this many elements are summed in float32, the sums of blocks in double precision. Smaller blocks
# would fit the processor's cache, but threads that make many small calls wait for each other to let go of Python.
_BLOCK = 262_144
_dot = cast("Callable[[torch.Tensor, torch.Tensor], torch.Tensor]", torch.dot)


@dataclass(frozen=True)
class Combined:
    """The gradient of the whole.

    Attributes:
        gradient: d(loss_total)/d(logprobs).
        diagnosis: how each term gets along, by name; empty if not asked for.
        norm: the L2 norm of `gradient`; None if no diagnosis was asked for.
    """

    gradient: torch.Tensor
    diagnosis: dict[str, GradientDiagnosis]
    norm: float | None


@dataclass(frozen=True)
class _Block:
    """Products of one block: of each term's gradient with that of the base loss and the total; the total's norm."""

    with_base: Sequence[float]
    with_total: Sequence[float]
    norm: float


Spread = Callable[[Callable[[range], list[_Block]], int], list[_Block]]
"""Does some work for the numbers below a count, cut into ranges as it likes; gives the results in order."""


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


def in_this_thread(work: Callable[[range], list[_Block]], count: int) -> list[_Block]:
    """All in one range."""
    return work(range(count))


def summed(parts: Sequence[Part], like: torch.Tensor, *, diagnose: bool, spread: Spread = in_this_thread) -> Combined:
    """The weighted sum of the gradients.

    Args:
        parts: the base loss first.
        like: shape and dtype of the result; contiguous.
        diagnose: also say how the terms get along, which needs the norms.
        spread: does the work. The result is the same to the last bit however it is cut.

    Raises:
        NonFiniteLoss: a weight is too large for that dtype.
    """
    check_weights([part.scale for part in parts], like.dtype)
    total = torch.empty_like(like, requires_grad=False)
    flat = total.view(-1)
    gradients = [None if part.gradient is None else part.gradient.detach().reshape(-1) for part in parts]

    def work(blocks: range) -> list[_Block]:
        with torch.no_grad():
            return [_summed_block(parts, gradients, flat, block, diagnose=diagnose) for block in blocks]

    done = spread(work, math.ceil(flat.numel() / _BLOCK))
    if not diagnose:
        return Combined(total, {}, None)
    total_norm = math.hypot(*(block.norm for block in done))
    diagnosis: dict[str, GradientDiagnosis] = {}
    for index, part in enumerate(parts):
        with_total = math.fsum(block.with_total[index] for block in done)
        with_base = math.fsum(block.with_base[index] for block in done)
        diagnosis[part.name] = _diagnosis(
            _cosine(with_base, _norm(part), _norm(parts[0])),
            _cosine(with_total, _norm(part), total_norm),
            part.scale * with_total / total_norm / total_norm if total_norm > 0 else None,
        )
    return Combined(total, diagnosis, total_norm)


def _summed_block(
    parts: Sequence[Part],
    gradients: Sequence[torch.Tensor | None],
    total: torch.Tensor,
    block: int,
    *,
    diagnose: bool,
) -> _Block:
    """Adds up one block of the total, and takes the products of that block."""
    where = slice(block * _BLOCK, (block + 1) * _BLOCK)
    pieces = [None if gradient is None else gradient[where] for gradient in gradients]
    own = total[where].zero_()
    for part, piece in zip(parts, pieces, strict=True):
        if piece is not None and part.scale:
            own.add_(piece, alpha=part.scale)
    if not diagnose:
        return _Block((), (), 0.0)
    own = _flat(own)
    flat = [None if piece is None else _flat(piece) for piece in pieces]
    return _Block(
        with_base=[_product(piece, flat[0]) for piece in flat],
        with_total=[_product(piece, own) for piece in flat],
        norm=norm(own),
    )


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
        As `summed` with a diagnosis.
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
    scaled = [replace(part, scale=float(factor) * part.scale) for factor, part in zip(combined, parts, strict=True)]
    total = summed(scaled, like, diagnose=False).gradient
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
    return Combined(total, diagnosis, norm(total))


def dot(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    """Sum of the products of all elements, in double precision over blocks; None is zero."""
    if first is None or second is None:
        return 0.0
    pieces = zip(torch.split(_flat(first), _BLOCK), torch.split(_flat(second), _BLOCK), strict=True)
    return math.fsum(_product(one, other) for one, other in pieces)


def _product(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    return 0.0 if first is None or second is None else _dot(first, second).item()


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
