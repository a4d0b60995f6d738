"""One optimizer step: the gradients of its batches, the update behind them, and what can be done if they fail."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinkex_py import telemetry
from tinkex_py.client.custom_step import Execution
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import (
    APIStatusError,
    InPlaceMutation,
    InvalidTermResult,
    NonFiniteLoss,
    PartialFailure,
    PrecedingRequestFailed,
    RegularizerError,
    RequestFailed,
    ResultLost,
    SequenceLost,
    TransportError,
)
from tinkex_py.runs.batches import Batch
from tinkex_py.types import AdamParams, OptimizerParams, OptimStepResponse

if TYPE_CHECKING:
    from tinkex_py.losses.output import CustomLossOutput
    from tinkex_py.losses.pipeline import Pipeline

# Failures of a term that come again with the same logprobs.
_LASTING_TERM_FAILURES = (NonFiniteLoss, InPlaceMutation, InvalidTermResult)
# 404 and 410: a service that was started again has forgotten the model, but not its checkpoints.
_REFUSALS_THAT_PASS = frozenset({404, 408, 409, 410, 425, 429})


@dataclass
class Part:
    """One batch of a step: `output` once the service holds its gradient, else `error` if it was tried."""

    batch: Batch
    output: "CustomLossOutput | None" = None
    error: Exception | None = None


class OptimizerStep:
    """An optimizer step that is sent until all of it took effect.

    Args:
        number: of the step, from 1.
        batches: whose gradients it adds up.
        params: of the optimizer.

    Attributes:
        parts: the batches and what became of them.
        response: the service's answer to the update, once it was made.
        update_error: why it was not made.
        gradients_settled: set as soon as every batch that was sent has an outcome; the update may still be under way.
        started_at: monotonic time in seconds at which it was sent first.
    """

    def __init__(self, number: int, batches: Sequence[Batch], params: AdamParams | OptimizerParams) -> None:
        self.number = number
        self.params = params
        self.parts = [Part(batch) for batch in batches]
        self.response: OptimStepResponse | None = None
        self.update_error: Exception | None = None
        self.gradients_settled = asyncio.Event()
        self.started_at = time.monotonic()

    async def send(
        self,
        training: AsyncTrainingClient,
        pipeline: "Pipeline",
        execution: Execution,
        *,
        after: "OptimizerStep | None" = None,
    ) -> None:
        """Sends what is missing, the update behind the gradients; failures are kept in the step, none is raised.

        Args:
            training: where to.
            pipeline: the loss.
            execution: where the terms run.
            after: the step before, if its update may still be under way: once that has failed nothing is sent.
        """
        missing = [part for part in self.parts if part.output is None]
        sequences = sum(len(part.batch) for part in self.parts) if len(self.parts) > 1 else None
        left = len(missing)
        self.gradients_settled.clear()

        async def gradient(part: Part) -> None:
            nonlocal left
            part.error = None
            try:
                _check(after)
                part.output = await training.forward_backward_custom(
                    part.batch, pipeline, execution=execution, sequences_per_step=sequences
                )
            except Exception as error:  # noqa: BLE001  # kept for whoever decides what to do about it
                part.error = error
            left -= 1
            if left == 0:
                self.gradients_settled.set()

        async def update() -> None:
            self.update_error = None
            try:
                _check(after)
                self.response = await training.optim_step(self.params)
            except Exception as error:  # noqa: BLE001  # as above
                self.update_error = error

        if not missing:
            self.gradients_settled.set()
        try:
            with telemetry.lifecycle("tinkex.run.step", {"step": self.number, "batches": len(self.parts)}):
                await asyncio.gather(*map(gradient, missing), update())
        finally:
            self.gradients_settled.set()

    @property
    def has_gradients(self) -> bool:
        """Whether the service holds the gradients of all batches."""
        return all(part.output is not None for part in self.parts)

    @property
    def is_made(self) -> bool:
        """Whether all of it took effect."""
        return self.has_gradients and self.response is not None

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of it took effect, and nothing can have."""
        return self.response is None and all(part.output is None for part in self.parts) and self.is_known

    @property
    def failures(self) -> list[Exception]:
        """Why it was not made, the cause first."""
        errors = [part.error for part in self.parts] + [self.update_error]
        given = [error for error in errors if error is not None]
        return sorted(given, key=lambda error: isinstance(error, PrecedingRequestFailed))

    @property
    def is_known(self) -> bool:
        """Whether it is known which parts took effect; an update without all gradients cannot be mended."""
        if self.response is not None and not self.has_gradients:
            return False
        return all(_had_no_effect(error) for error in self.failures)

    def can_be_mended(self, training: AsyncTrainingClient) -> bool:
        """Whether sending what is missing makes the step what it should have been."""
        if not self.is_known:
            return False
        held = sum(part.output is not None for part in self.parts)
        # What the service has failed is counted as handed over, but it does not hold it.
        failed = sum(type(part.error) is RequestFailed for part in self.parts)
        return held <= training.accumulated <= held + failed


def _check(before: OptimizerStep | None) -> None:
    if before is not None and before.update_error is not None:
        raise PrecedingRequestFailed(f"optimizer step {before.number} did not take effect, so this was not sent")


def is_worth_repeating(error: Exception) -> bool:
    """Whether the same request may go well another time."""
    if isinstance(error, RegularizerError):
        return not isinstance(error, _LASTING_TERM_FAILURES)
    if isinstance(error, RequestFailed):
        return error.category != "user"
    if isinstance(error, APIStatusError):
        return error.status >= 500 or error.status in _REFUSALS_THAT_PASS
    return isinstance(error, PrecedingRequestFailed | SequenceLost | TransportError)


def _had_no_effect(error: Exception) -> bool:
    """Whether it is certain that the service did nothing of a request that failed in this way."""
    if isinstance(error, RequestFailed):
        return not isinstance(error, ResultLost | PartialFailure)
    return not isinstance(error, SequenceLost | TransportError)
