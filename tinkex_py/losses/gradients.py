"""Gradient arithmetic: the gradient of one term, and the total gradient with the alignment of its parts.

Works on any device. Nothing here uses the event loop.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch

from tinkex_py.errors import InvalidTermResult, NonFiniteLoss
from tinkex_py.losses.combiners import Balancing, Matrix, balancing_factors
from tinkex_py.losses.output import GradientDiagnosis, MetricValue

_BLOCK = 262_144
_ROW = 4096
# Squares of smaller float32 numbers lose digits or underflow.
_SMALL_NORM = 1e-15
_vector_norm = cast("Callable[..., torch.Tensor]", torch.linalg.vector_norm)  # pyright: ignore[reportUnknownMemberType]
_split = cast("Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]", torch.split)
_dot = cast("Callable[[torch.Tensor, torch.Tensor], torch.Tensor]", torch.dot)


@dataclass(frozen=True)
class Evaluation:
    """The result of evaluating one term.

    Attributes:
        value: the loss.
        metrics: numbers by name.
        gradient: d(loss)/d(logprobs), with the shape of the leaf; None if it is zero or was not requested.
        grad_norm: L2 norm of the gradient; None if it was not requested.
        differentiable: False if the loss does not depend on the logprobs.
        attempts: number of calls of the term.
    """

    value: float
    metrics: dict[str, MetricValue]
    gradient: torch.Tensor | None
    grad_norm: float | None
    differentiable: bool
    attempts: int = 1


def evaluate(result: object, leaf: torch.Tensor, *, name: str, needs_gradient: bool, needs_norm: bool) -> Evaluation:
    """Computes value, gradient and norm of one term from its return value, with at most one backward pass.

    Raises:
        InvalidTermResult: the result is not a loss or `(loss, metrics)`.
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
    if size is None or not math.isfinite(size):  # NaN and infinity make the norm non-finite
        check_finite(gradient, name)
    return Evaluation(value, metrics, gradient, size, differentiable=True)


def check_finite(gradient: torch.Tensor, name: str) -> None:
    """Raises NonFiniteLoss if any element is NaN or infinite."""
    # The sum is one cheap pass, and NaN or infinity make it non-finite; the elements are only checked in that case.
    if math.isfinite(gradient.sum().item()):
        return
    finite = torch.isfinite(gradient)
    if not bool(finite.all()):
        raise NonFiniteLoss(
            f"the gradient of term {name!r} has {int((~finite).sum())} NaN or infinite element(s) out of "
            f"{gradient.numel()}; nothing was sent",
            name=name,
        )


def norm(gradient: torch.Tensor) -> float:
    """Returns the L2 norm over all elements, as float32 norms of rows that are combined in double precision."""
    if gradient.numel() <= _ROW:
        return _exact_norm(gradient)
    row = _wide(gradient.detach().reshape(-1))
    whole = row.numel() // _ROW * _ROW
    norms = _vector_norm(row[:whole].view(-1, _ROW), dim=1)
    size = math.hypot(_exact_norm(norms), _exact_norm(row[whole:]))
    return size if _SMALL_NORM < size < math.inf else _exact_norm(row)


def _exact_norm(numbers: torch.Tensor) -> float:
    dtype = torch.float32 if numbers.device.type == "mps" else torch.float64  # mps has no float64
    return float(_vector_norm(numbers.detach(), dtype=dtype).item())


def dot(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    """Returns the dot product over all elements. None counts as zero.

    Products are summed in float32 within a block and in double precision across blocks: as fast as a float32 sum, and
    accurate for millions of elements.
    """
    if first is None or second is None:
        return 0.0
    rows = (_split(_wide(gradient.detach().reshape(-1)), _BLOCK) for gradient in (first, second))
    return math.fsum(_dot(own, other).item() for own, other in zip(*rows, strict=True))


def _wide(row: torch.Tensor) -> torch.Tensor:
    row = row.contiguous()
    return row.float() if row.dtype in (torch.float16, torch.bfloat16) else row


def loss_and_metrics(result: object, name: str) -> tuple[torch.Tensor, dict[str, object]]:
    """Unpacks the return value of a term: `loss` or `(loss, metrics)`.

    Raises:
        InvalidTermResult: it is neither.
    """
    loss: object = result
    metrics: object = {}
    if isinstance(result, tuple):
        parts = cast("tuple[object, ...]", result)
        if len(parts) != 2:
            raise InvalidTermResult(
                f"term {name!r} must return loss, (loss, metrics) or Scored, got a tuple of length {len(parts)}",
                name=name,
            )
        loss, metrics = parts
    if not isinstance(loss, torch.Tensor):
        raise InvalidTermResult(f"term {name!r} must return the loss as a tensor, got {type(loss).__name__}", name=name)
    if loss.is_complex():
        raise InvalidTermResult(f"term {name!r} must return a real loss, got dtype {loss.dtype}", name=name)
    if not isinstance(metrics, Mapping):
        raise InvalidTermResult(
            f"term {name!r} must return metrics as a mapping, got {type(metrics).__name__}", name=name
        )
    named = dict(cast("Mapping[object, object]", metrics))
    for key in named:
        if not isinstance(key, str):
            raise InvalidTermResult(f"term {name!r}: names of metrics must be str, got {key!r}", name=name)
    return loss, cast("dict[str, object]", named)


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
    """One term of the total gradient.

    Attributes:
        name: name of the term; the first one is the base loss.
        scale: factor of the gradient: weight times clipping factor.
        gradient: d(term)/d(logprobs), unweighted; None if it is zero.
        norm: L2 norm of the gradient; None if it is unknown.
    """

    name: str
    scale: float
    gradient: torch.Tensor | None
    norm: float | None


@dataclass(frozen=True)
class Combined:
    """The total gradient.

    Attributes:
        gradient: d(loss_total)/d(logprobs).
        diagnosis: alignment of each term's gradient, by name; empty unless requested.
        norm: L2 norm of `gradient`; None unless the diagnosis was requested.
        coefficients: factor of each term's unweighted gradient in `gradient`, by name; empty for a weighted sum.
        factors: row i has the factors of all unweighted gradients in the part of term i; None for a weighted sum, where
            they are the scales.
    """

    gradient: torch.Tensor
    diagnosis: dict[str, GradientDiagnosis]
    norm: float | None
    coefficients: dict[str, float] = field(default_factory=dict[str, float])
    factors: Matrix | None = None


def summed(parts: Sequence[WeightedGradient], like: torch.Tensor, *, diagnose: bool) -> Combined:
    """Returns the weighted sum of the gradients, the base loss first, in the shape and dtype of `like`.

    With `diagnose`, the norms of the terms must be known.

    Raises:
        NonFiniteLoss: a weight is too large for the dtype, or the sum has NaN or infinite elements.
    """
    largest = torch.finfo(like.dtype).max
    for part in parts:
        if part.scale > largest:  # the error of torch would not contain the weight
            raise NonFiniteLoss(
                f"the weight {part.scale} of term {part.name!r} is too large for {like.dtype}, whose maximum is "
                f"{largest}; nothing was sent. Use a smaller weight",
                name="loss_total",
            )
    with torch.inference_mode(False), torch.no_grad():
        total = torch.zeros_like(like, requires_grad=False)
        for part in parts:
            if part.gradient is not None and part.scale:
                total.add_(part.gradient, alpha=part.scale)
    if not diagnose:
        check_finite(total, "loss_total")
        return Combined(total, {}, None)
    total_norm = norm(total)
    if not math.isfinite(total_norm):
        check_finite(total, "loss_total")
    base = parts[0]
    diagnosis: dict[str, GradientDiagnosis] = {}
    for part in parts:
        with_total = dot(part.gradient, total)
        diagnosis[part.name] = _diagnosis(
            _cosine(dot(part.gradient, base.gradient), part.norm, base.norm),
            _cosine(with_total, part.norm, total_norm),
            part.scale * with_total / total_norm / total_norm if total_norm > 0 else None,
        )
    return Combined(total, diagnosis, total_norm)


def without_conflicts(parts: Sequence[WeightedGradient], like: torch.Tensor, *, step: int) -> Combined:
    """Returns the sum of the weighted gradients after gradient surgery (PCGrad).

    Every term's weighted gradient is projected onto the normal plane of each other term's gradient it conflicts with
    (negative dot product), one after another; the results are summed. The order of the other terms is random, seeded
    by step and name only, so that it does not depend on the order of the specs or on a resume.

    Source: Yu et al., "Gradient Surgery for Multi-Task Learning" (2020), algorithm 1.
    """
    products = _products(parts)
    scales = np.array([part.scale for part in parts])
    weighted = products * np.outer(scales, scales)  # dot products of the weighted gradients
    by_name = sorted(range(len(parts)), key=lambda index: parts[index].name)
    # Row i: coefficients of the weighted gradients in the projected gradient of term i.
    left = np.eye(len(parts))
    for index in by_name:
        others = [other for other in by_name if other != index]
        random.Random(f"{step} {parts[index].name}").shuffle(others)  # noqa: S311  # not a secret
        for other in others:
            product = left[index] @ weighted[:, other]
            if product < 0:
                left[index, other] -= product / weighted[other, other]
    return _combined(parts, like, products, left)


def balanced(parts: Sequence[WeightedGradient], like: torch.Tensor, method: Balancing) -> Combined:
    """Returns the sum of the weighted gradients with factors that depend on how they point to each other.

    Raises:
        PipelineError: there are too many terms.
    """
    products = _products(parts)
    factors = balancing_factors(method, products, np.array([part.scale for part in parts]))
    return _combined(parts, like, products, np.diag(factors))


def _combined(parts: Sequence[WeightedGradient], like: torch.Tensor, products: Matrix, left: Matrix) -> Combined:
    """Returns the sum, and its diagnosis.

    Args:
        parts: the gradients.
        like: a tensor of the shape and dtype of the result.
        products: dot products of the unweighted gradients.
        left: what each term contributes: row i has the factors of all weighted gradients in the part of term i.
    """
    factors = left * np.array([part.scale for part in parts])
    scaled = [replace(part, scale=float(factor)) for factor, part in zip(factors.sum(0), parts, strict=True)]
    total = summed(scaled, like, diagnose=False).gradient
    diagnosis, _ = aligned([part.name for part in parts], products, factors)
    return Combined(total, diagnosis, norm(total), {part.name: part.scale for part in scaled}, factors)


def aligned(names: Sequence[str], products: Matrix, factors: Matrix) -> tuple[dict[str, GradientDiagnosis], float]:
    """Returns the alignment of the terms, and the norm of the total, from dot products alone.

    Args:
        names: of the terms, the base loss first.
        products: dot products of their unweighted gradients, in any space.
        factors: row i has the factors of all unweighted gradients in the part of term i.
    """
    combined = factors.sum(0)
    with_total = products @ combined
    square = float(combined @ with_total)
    shares = factors @ with_total
    norms = np.sqrt(np.diag(products))
    size = square**0.5 if square > 0 else 0.0
    diagnosis = {
        name: _diagnosis(
            _cosine(products[index, 0], norms[index], norms[0]),
            _cosine(with_total[index], norms[index], size),
            float(shares[index]) / square if square > 0 else None,
        )
        for index, name in enumerate(names)
    }
    return diagnosis, size


def _products(parts: Sequence[WeightedGradient]) -> Matrix:
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
