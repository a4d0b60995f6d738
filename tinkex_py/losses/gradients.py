"""The arithmetic of one term: value, gradient and norm. No event loop here, and any device."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from tinkex_py.errors import InvalidTermResult, NonFiniteLoss
from tinkex_py.losses.output import MetricValue

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
