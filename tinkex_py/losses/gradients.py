"""The arithmetic of the gradients: of one term, and of the whole with the alignment of its parts.

No event loop here, and any device.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from tinkex_py.errors import InvalidTermResult, NonFiniteLoss
from tinkex_py.losses.output import GradientDiagnosis, MetricValue

# Products of this many float32 numbers are summed in float32, the sums of blocks in double precision: as fast as a
# float32 sum, and exact enough for millions of numbers. Smaller blocks would fit the processor's cache, but threads
# that make many small calls wait for each other to let go of Python.
BLOCK = 262_144
_ROW = 4096
# Squares of float32 numbers below this lose digits or vanish.
_SMALL_NORM = 1e-15
_vector_norm = cast("Callable[..., torch.Tensor]", torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
_split = cast("Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]", torch.split)
_dot = cast("Callable[[torch.Tensor, torch.Tensor], torch.Tensor]", torch.dot)


@dataclass(frozen=True)
class Evaluation:
    """What one term gave.

    Attributes:
        value: the loss.
        metrics: plain numbers by name.
        gradient: d(loss)/d(logprobs), shaped like the leaf; None if it is zero or was not needed.
        grad_norm: its L2 norm; None if it was not asked for.
        differentiable: False if the loss has no path to the logprobs.
        attempts: how often the term was called.
    """

    value: float
    metrics: dict[str, MetricValue]
    gradient: torch.Tensor | None
    grad_norm: float | None
    differentiable: bool
    attempts: int = 1


def evaluate(result: object, leaf: torch.Tensor, *, name: str, needs_gradient: bool, needs_norm: bool) -> Evaluation:
    """Value, gradient and norm of one term, from one backward pass.

    Args:
        result: what the term returned.
        leaf: the tensor the term was given.
        name: the term, for errors.
        needs_gradient: False saves the backward pass.
        needs_norm: asks for the norm; implies the backward pass.

    Raises:
        InvalidTermResult: not a loss, nor `(loss, metrics)`.
        NonFiniteLoss: the loss or its gradient is NaN or infinite.
    """
    loss, named = loss_and_metrics(result, name)
    metrics = {key: _metric_value(key, value, name) for key, value in named.items()}
    if loss.ndim:
        loss = loss.sum()
    value = float(loss.item())
    if not math.isfinite(value):
        raise NonFiniteLoss(f"the loss of term {name!r} is {value}; nothing was sent", name=name)
    if not loss.requires_grad:
        return Evaluation(value, metrics, None, 0.0 if needs_norm else None, differentiable=False)
    if not (needs_gradient or needs_norm):
        return Evaluation(value, metrics, None, None, differentiable=True)
    (gradient,) = cast("tuple[torch.Tensor | None]", torch.autograd.grad(loss, leaf, allow_unused=True))
    if gradient is None:
        return Evaluation(value, metrics, None, 0.0 if needs_norm else None, differentiable=False)
    gradient = gradient.detach().as_subclass(torch.Tensor)
    size = norm(gradient) if needs_norm else None
    if size is None or not math.isfinite(size):  # NaN and infinity survive in a norm
        check_finite(gradient, name)
    return Evaluation(value, metrics, gradient, size, differentiable=True)


def check_finite(gradient: torch.Tensor, name: str) -> None:
    """Raises NonFiniteLoss if any element is NaN or infinite."""
    # The sum is one cheap pass and NaN or infinity survive it; only a suspicious sum is looked at closely.
    if math.isfinite(gradient.sum().item()):
        return
    finite = torch.isfinite(gradient)
    if not bool(finite.all()):
        raise NonFiniteLoss(
            f"the gradient of term {name!r} has {int((~finite).sum())} NaN or infinite element(s) "
            f"of {gradient.numel()}; nothing was sent",
            name=name,
        )


def norm(gradient: torch.Tensor) -> float:
    """L2 norm over all elements: float32 norms of rows, combined in double precision, are fast and exact enough."""
    if gradient.numel() <= _ROW:
        return _exact_norm(gradient)
    row = wide(gradient.detach().reshape(-1))
    whole = row.numel() // _ROW * _ROW
    norms = _vector_norm(row[:whole].view(-1, _ROW), dim=1)
    size = math.hypot(_exact_norm(norms), _exact_norm(row[whole:]))
    return size if _SMALL_NORM < size < math.inf else _exact_norm(row)


def _exact_norm(numbers: torch.Tensor) -> float:
    dtype = torch.float32 if numbers.device.type == "mps" else torch.float64  # which that device lacks
    return float(_vector_norm(numbers.detach(), dtype=dtype).item())


def dot(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    """Sum of the products of all elements, in double precision over blocks; None is zero."""
    if first is None or second is None:
        return 0.0
    rows = (_split(wide(gradient.detach().reshape(-1)), BLOCK) for gradient in (first, second))
    return sum(map(block_dot, *rows))


def block_dot(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    """`dot` of rows of at most `BLOCK` elements that `wide` returned."""
    return 0.0 if first is None or second is None else _dot(first, second).item()


def wide(row: torch.Tensor) -> torch.Tensor:
    """A row fit for products: at least float32, and spread out where one number stands for all."""
    row = row.contiguous()
    return row.float() if row.dtype in (torch.float16, torch.bfloat16) else row


def check_weights(weights: Sequence[float], dtype: torch.dtype) -> None:
    """Raises NonFiniteLoss if a weight is too large for a dtype: torch would name neither the weight nor the loss."""
    largest = torch.finfo(dtype).max
    for weight in weights:
        if weight > largest:
            raise NonFiniteLoss(f"the weight {weight} is too large for {dtype}; nothing was sent", name="loss_total")


def loss_and_metrics(result: object, name: str) -> tuple[torch.Tensor, dict[str, object]]:
    """Takes apart what a term returned: `loss` or `(loss, metrics)`.

    Raises:
        InvalidTermResult: it is neither.
    """
    loss: object = result
    metrics: object = {}
    if isinstance(result, tuple):
        parts = cast("tuple[object, ...]", result)
        if len(parts) != 2:
            raise InvalidTermResult(f"term {name!r} returned a tuple of {len(parts)}, not (loss, metrics)", name=name)
        loss, metrics = parts
    if not isinstance(loss, torch.Tensor):
        raise InvalidTermResult(f"term {name!r} returned a loss of type {type(loss).__name__}, not a tensor", name=name)
    if loss.is_complex():
        raise InvalidTermResult(f"term {name!r} returned a complex loss ({loss.dtype})", name=name)
    if not isinstance(metrics, Mapping):
        raise InvalidTermResult(
            f"term {name!r} returned metrics of type {type(metrics).__name__}, not a mapping", name=name
        )
    named = {_metric_name(key, name): value for key, value in cast("Mapping[object, object]", metrics).items()}
    return loss, named


def _metric_name(key: object, name: str) -> str:
    if not isinstance(key, str):
        raise InvalidTermResult(f"term {name!r} returned a metric named {key!r}; names must be str", name=name)
    return key


def _metric_value(key: object, value: object, name: str) -> MetricValue:
    number = value
    if isinstance(value, torch.Tensor | np.generic) and value.ndim == 0:
        number = cast("object", value.item())
    if not isinstance(number, bool | int | float):
        raise InvalidTermResult(
            f"term {name!r}: metric {key!r} must be a number or a 0-d tensor, got {type(number).__name__}", name=name
        )
    return number


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
