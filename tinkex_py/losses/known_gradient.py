"""A tensor with a known value and gradient that autograd can differentiate once."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch

from tinkex_py.errors import PipelineError


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
