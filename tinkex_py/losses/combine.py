"""From the gradients of the terms to the gradient of the whole, with diagnostics of their alignment. No event loop."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tinkex_py.losses.gradients import BLOCK, block_dot, check_finite, check_weights, dot, norm, wide
from tinkex_py.losses.output import GradientDiagnosis


@dataclass(frozen=True)
class WeightedGradient:
    """One term's share in the total gradient.

    Attributes:
        name: of the term; the first one is the base loss.
        scale: what its gradient is multiplied by: the weight, and less where the gradient is clipped.
        gradient: d(term)/d(logprobs), unweighted; None if it is zero.
        norm: its L2 norm; None if it is not known.
    """

    name: str
    scale: float
    gradient: torch.Tensor | None
    norm: float | None


@dataclass(frozen=True)
class Combined:
    """The gradient of the whole.

    Attributes:
        gradient: d(loss_total)/d(logprobs).
        diagnosis: alignment of each term's gradient, by name; empty if not asked for.
        norm: the L2 norm of `gradient`; None if no diagnosis was asked for.
    """

    gradient: torch.Tensor
    diagnosis: dict[str, GradientDiagnosis]
    norm: float | None


@dataclass(frozen=True)
class AddedBlock:
    """What is known of one block of the total.

    Attributes:
        size: its L2 norm, without a diagnosis its sum; NaN or infinite if one of its elements is.
        with_base: products of each term's gradient with that of the base loss; empty without a diagnosis.
        with_total: products of each term's gradient with the total.
    """

    size: float
    with_base: Sequence[float] = ()
    with_total: Sequence[float] = ()


class WeightedSum:
    """The weighted sum of the gradients, added up block by block, by several threads if they are given.

    Args:
        parts: the base loss first.
        like: shape, dtype and device of the result; contiguous.
        diagnose: take the products for the diagnosis too, which needs the norms.

    Raises:
        NonFiniteLoss: a weight is too large for that dtype.
    """

    def __init__(self, parts: Sequence[WeightedGradient], like: torch.Tensor, *, diagnose: bool) -> None:
        check_weights([part.scale for part in parts], like.dtype)
        self._parts = parts
        self._diagnose = diagnose
        with torch.inference_mode(False):
            self._total = torch.empty_like(like, requires_grad=False)
        self._gradients = [None if part.gradient is None else part.gradient.detach().reshape(-1) for part in parts]

    def blocks(self, ranges: int = 1) -> list[range]:
        """All blocks, cut into so many ranges or fewer. The result is the same to the last bit however they are cut."""
        count = math.ceil(self._total.numel() / BLOCK)
        length = max(1, math.ceil(count / ranges))
        return [range(first, min(first + length, count)) for first in range(0, count, length)]

    def add(self, blocks: range) -> list[AddedBlock]:
        """Adds up some blocks."""
        with torch.no_grad():
            return [self._add_block(slice(block * BLOCK, (block + 1) * BLOCK)) for block in blocks]

    def _add_block(self, where: slice) -> AddedBlock:
        pieces = [None if gradient is None else gradient[where] for gradient in self._gradients]
        own = self._total.view(-1)[where].zero_()
        for part, piece in zip(self._parts, pieces, strict=True):
            if piece is not None and part.scale:
                own.add_(piece, alpha=part.scale)
        if not self._diagnose:
            return AddedBlock(own.sum().item())
        rows = [None if piece is None else wide(piece) for piece in pieces]
        own = wide(own)
        return AddedBlock(norm(own), [block_dot(row, rows[0]) for row in rows], [block_dot(row, own) for row in rows])

    def combined(self, added: Sequence[AddedBlock]) -> Combined:
        """The result, from what `add` returned for all blocks in order.

        Raises:
            NonFiniteLoss: the total has NaN or infinite elements.
        """
        if not all(math.isfinite(block.size) for block in added):
            check_finite(self._total, "loss_total")
        if not self._diagnose:
            return Combined(self._total, {}, None)
        total_norm = math.hypot(*(block.size for block in added))
        base_norm = self._parts[0].norm
        diagnosis: dict[str, GradientDiagnosis] = {}
        for index, part in enumerate(self._parts):
            with_base = math.fsum(block.with_base[index] for block in added)
            with_total = math.fsum(block.with_total[index] for block in added)
            diagnosis[part.name] = _diagnosis(
                _cosine(with_base, part.norm, base_norm),
                _cosine(with_total, part.norm, total_norm),
                part.scale * with_total / total_norm / total_norm if total_norm > 0 else None,
            )
        return Combined(self._total, diagnosis, total_norm)


def summed(parts: Sequence[WeightedGradient], like: torch.Tensor, *, diagnose: bool) -> Combined:
    """The weighted sum of the gradients, added up here and now; see `WeightedSum`."""
    total = WeightedSum(parts, like, diagnose=diagnose)
    return total.combined([added for blocks in total.blocks() for added in total.add(blocks)])


def without_conflicts(parts: Sequence[WeightedGradient], like: torch.Tensor, *, step: int) -> Combined:
    """The sum of the weighted gradients, each freed of what points against another one ("PCGrad").

    Every term's weighted gradient is projected, one other term after another, onto the plane that is normal to the
    other's gradient, where the two conflict (their product is negative); the results are summed. The order in which a
    term meets the others is drawn in each step, from the step and the names alone, so that a resumed run and a run
    with the specs in another order give the same.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning" (2020), algorithm 1.

    Args:
        parts: the base loss first.
        like: shape, dtype and device of the result.
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


def _products(parts: Sequence[WeightedGradient]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    products = np.zeros((len(parts), len(parts)))
    for row, part in enumerate(parts):
        for column in range(row + 1):
            products[row, column] = products[column, row] = dot(part.gradient, parts[column].gradient)
    return products


def _diagnosis(with_base: float | None, with_total: float | None, share: float | None) -> GradientDiagnosis:
    return GradientDiagnosis(
        cosine_with_base=with_base,
        cosine_with_total=with_total,
        share_of_total=share,
        conflicts=None if with_base is None else with_base < 0,
    )


def _cosine(product: float, norm: float | None, other_norm: float | None) -> float | None:
    if not norm or not other_norm:
        return None
    return float(min(max(product / norm / other_norm, -1.0), 1.0))
