"""A pipeline as a loss function of the official SDK: `(data, logprobs_list) -> (loss, metrics)`."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from anyio.from_thread import start_blocking_portal

from tinkex_py.losses.known_gradient import with_known_gradient
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.outcomes import CustomLoss
from tinkex_py.losses.output import CustomLossOutput
from tinkex_py.types import Datum
from tinkex_py.types.datum import own_datums

Evaluate = Callable[[Sequence[Datum], Logprobs], Awaitable[CustomLoss]]


class TinkerLoss:
    """A loss function of the official SDK, made by `Pipeline.as_tinker_loss`.

    It can be called from any thread, including one that runs an event loop. Official datums are converted to this
    package's `Datum` for the terms; the official SDK sends its own, untouched.

    Args:
        evaluate: evaluates the pipeline.

    Attributes:
        output: output of the last call; None before the first.
        data: datums of the last call, as the terms received them.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self.output: CustomLossOutput | None = None
        self.data: Sequence[Datum] = ()
        self._evaluate = evaluate

    def __call__(
        self, data: Sequence[Any], logprobs_list: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Evaluates the pipeline.

        Args:
            data: datums of the official SDK, or of this package.
            logprobs_list: one tensor per datum, `[T]` or `[T, K]`.

        Returns:
            The loss, 0-d, whose `backward()` applies the gradient of the pipeline, and `flat_metrics` of the output.

        Raises:
            RegularizerError: a term failed.
            PipelineError: the loss cannot be evaluated, or no term depends on the logprobs.
            InvalidData: an element is not a datum.
        """
        datums = own_datums(data)
        logprobs = Logprobs.from_tensors(logprobs_list, datums)

        async def evaluate() -> CustomLoss:
            return await self._evaluate(datums, logprobs)

        with start_blocking_portal("asyncio") as portal:
            custom = portal.call(evaluate)
        custom.check_differentiable()
        self.output, self.data = custom.output, datums
        gradients = logprobs.views(custom.gradient, datums)
        loss = with_known_gradient(custom.output.loss_total, torch.float64, logprobs_list, gradients)
        return loss, flat_metrics(custom.output)


def flat_metrics(output: CustomLossOutput) -> dict[str, float]:
    """Returns the numbers of an output by flat names such as `l1.value` or `base_loss.grad_norm`, without None."""
    flat: dict[str, float | None] = {
        "loss_total": output.loss_total,
        "regularizer_total": output.regularizer_total,
        "total_grad_norm": output.total_grad_norm,
        "base_loss.value": output.base_loss.value,
        "base_loss.grad_norm": output.base_loss.grad_norm,
    }
    flat |= {f"base_loss.{name}": value for name, value in output.base_loss.metrics.items()}
    for name, own in output.regularizers.items():
        flat |= {f"{name}.{metric}": value for metric, value in own.custom_metrics.items()}
        flat |= {f"{name}.{field}": getattr(own, field) for field in ("value", "weight", "contribution", "grad_norm")}
    return {name: float(value) for name, value in flat.items() if value is not None}
