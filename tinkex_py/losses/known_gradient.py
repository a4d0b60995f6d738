"""Values whose gradient is known: autograd can differentiate them once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import numpy as np
import torch

from tinkex_py.arguments import as_number, shown
from tinkex_py.errors import InvalidTermResult, PipelineError


@dataclass(frozen=True, eq=False)
class Scored:
    """The result of a term whose gradient was computed elsewhere: by a service, a solver or another library.

    A term returns it instead of a loss. Norms, cosines, clipping and combiners treat the gradient like that of
    autograd, but it has no second derivative.

    Attributes:
        value: the loss, a number.
        gradient: d(value)/d(logprobs), as a tensor, an array or nested lists of numbers, in the shape of the logprobs
            that the term received; a list with one per datum under `per_datum`. None if the value does not depend on
            the logprobs.
        metrics: numbers by name.
    """

    value: float
    gradient: Any = None
    metrics: Mapping[str, "bool | int | float | torch.Tensor"] = field(default_factory=dict[str, Any])


def as_loss(result: object, logprobs: "torch.Tensor | Sequence[torch.Tensor]", name: str) -> object:
    """Returns the result of a term as a loss with a graph, if it is `Scored`; any other result unchanged.

    Args:
        result: what the term returned.
        logprobs: what it received.
        name: name of the term.

    Raises:
        InvalidTermResult: value or gradient cannot be used.
    """
    if not isinstance(result, Scored):
        return result
    value = as_number(result.value)
    if value is None:
        raise InvalidTermResult(
            f"term {name!r}: the value of Scored must be a number, got {shown(result.value)}", name=name
        )
    is_packed = isinstance(logprobs, torch.Tensor)
    parts = [logprobs] if is_packed else list(logprobs)
    device = parts[0].device if parts else torch.device("cpu")
    dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    if result.gradient is None or not parts:
        return torch.tensor(value, dtype=dtype, device=device), result.metrics
    given = cast("object", [result.gradient] if is_packed else result.gradient)
    if not isinstance(given, Sequence) or len(cast("Sequence[object]", given)) != len(parts):
        raise InvalidTermResult(
            f"term {name!r}: under per_datum(...), the gradient of Scored must be a list with one gradient per datum "
            f"({len(parts)}), got {_described_gradient(cast('object', given))}",
            name=name,
        )
    gradients = [
        _as_gradient(own, part, name) for own, part in zip(cast("Sequence[object]", given), parts, strict=True)
    ]
    return with_known_gradient(value, dtype, parts, gradients), result.metrics


def _as_gradient(given: object, logprobs: torch.Tensor, name: str) -> torch.Tensor:
    try:
        gradient = given.detach() if isinstance(given, torch.Tensor) else torch.from_numpy(np.array(given))  # pyright: ignore[reportUnknownMemberType]
    except (TypeError, ValueError, RuntimeError):
        gradient = None
    is_real = gradient is not None and not gradient.is_complex() and gradient.dtype is not torch.bool
    if gradient is None or not is_real or gradient.shape != logprobs.shape or gradient.layout is not torch.strided:
        raise InvalidTermResult(
            f"term {name!r}: the gradient of Scored must have real numbers in the shape of the logprobs, "
            f"{tuple(logprobs.shape)}, got {_described_gradient(given if gradient is None else gradient)}",
            name=name,
        )
    return gradient.as_subclass(torch.Tensor).to(device=logprobs.device, dtype=logprobs.dtype)


def _described_gradient(given: object) -> str:
    if isinstance(given, torch.Tensor):
        return f"shape {tuple(given.shape)} of dtype {given.dtype}, layout {given.layout}"
    return f"{len(cast('Sequence[object]', given))} of them" if isinstance(given, list | tuple) else shown(given)


def with_known_gradient(
    value: float, dtype: torch.dtype, logprobs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Returns a 0-d tensor whose `backward()` passes the given gradients, one per tensor, to the graph of the logprobs.

    Its second derivative raises PipelineError.
    """
    device = logprobs[0].device if logprobs else None
    detached = torch.tensor(value, dtype=dtype, device=device)
    if not any(part.requires_grad for part in logprobs):
        return detached
    return _known_gradient(detached, len(logprobs), *logprobs, *gradients)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        ctx.count = count
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logprobs, gradients = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        scaled = [gradient * outer[0].to(gradient.dtype) for gradient in gradients]
        if torch.is_grad_enabled():  # create_graph=True
            scaled = [_only_once(gradient, part) for gradient, part in zip(scaled, logprobs, strict=True)]
        return None, None, *scaled, *([None] * ctx.count)


class _OnlyOnce(torch.autograd.Function):
    """Identity whose derivative is unknown: differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, _logprobs: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_outer: torch.Tensor) -> NoReturn:  # noqa: ARG004
        raise PipelineError(
            "the loss of a pipeline has a first derivative only, because its terms are evaluated outside of this "
            "graph. Write a loss that needs a second derivative as a term, as regularizers.GradientPenalty does"
        )


_known_gradient = cast("Callable[..., torch.Tensor]", _KnownGradient.apply)  # pyright: ignore[reportUnknownMemberType]
_only_once = cast("Callable[..., torch.Tensor]", _OnlyOnce.apply)  # pyright: ignore[reportUnknownMemberType]
