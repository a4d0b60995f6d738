"""Recovery from failures: send the missing part of a step again, restart from a checkpoint, or give up."""

from collections.abc import Awaitable, Callable

from tinkex_py import telemetry
from tinkex_py.client.rest import AsyncRestClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import (
    APIStatusError,
    InPlaceMutation,
    InvalidTermResult,
    NonFiniteLoss,
    NotFound,
    PartialFailure,
    PipelineError,
    PrecedingRequestFailed,
    RegularizerError,
    RequestFailed,
    ResultLost,
    SequenceLost,
    TinkexError,
    TransportError,
)
from tinkex_py.runs.records import SavedCheckpoint
from tinkex_py.runs.settings import TrainSettings
from tinkex_py.runs.step import OptimizerStep

# Failures of a term that repeat with the same logprobs.
_LASTING_TERM_FAILURES = (NonFiniteLoss, InPlaceMutation, InvalidTermResult)
# 404 and 410: a restarted service has lost the model, but not its checkpoints.
_TRANSIENT_STATUSES = frozenset({404, 408, 409, 410, 425, 429})


class ModelLost(Exception):
    """The model's state is unknown or wrong, so the run must restart from a checkpoint."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


async def complete(
    step: OptimizerStep, training: AsyncTrainingClient, send: Callable[[], Awaitable[None]], resends: int
) -> None:
    """Sends the missing parts of a step until all of it took effect.

    Args:
        step: a step that was sent, and failed in part.
        training: the model's client.
        send: sends what is missing.
        resends: largest number of attempts.

    Raises:
        ModelLost: the step cannot be completed with this model.
        Exception: the failure, if another attempt would fail too.
    """
    left = resends
    while not step.is_made:
        cause = step.failures[0]
        if not is_transient(cause):
            raise cause
        if not _is_completable(step, training):
            raise ModelLost(cause)
        if left == 0:
            # A term that keeps failing would also fail after a restart.
            raise cause if isinstance(cause, PipelineError) else ModelLost(cause)
        left -= 1
        telemetry.emit("tinkex.run.resent", {}, {"step": step.number, "reason": type(cause).__name__}, cause)
        await send()


async def save_checkpoint(training: AsyncTrainingClient, step: int, settings: TrainSettings) -> SavedCheckpoint:
    """Saves the model after `step` optimizer steps; repeated if the service failed.

    Raises:
        ModelLost: it could not be saved; a restart may help.
        TinkexError: it cannot be saved.
    """
    for attempt in range(settings.resends + 1):
        # A failed attempt may have used the name.
        name = f"step-{step:06d}" if attempt == 0 else f"step-{step:06d}-{attempt + 1}"
        try:
            saved = await training.save_state(name, ttl_seconds=settings.checkpoint_ttl)
            return SavedCheckpoint(step=step, path=saved.path)
        except TinkexError as error:
            if not is_transient(error):
                raise
            if not isinstance(error, RequestFailed) or attempt == settings.resends:
                raise ModelLost(error) from error
    raise AssertionError("the last attempt returns or raises")


async def delete_old_checkpoints(
    rest: AsyncRestClient, checkpoints: tuple[SavedCheckpoint, ...], keep: int
) -> tuple[SavedCheckpoint, ...]:
    """Deletes all but the last `keep`, which it returns. An event reports a failure, which is not repeated."""
    for old in checkpoints[:-keep]:
        try:
            await rest.delete_checkpoint(old.path)
        except NotFound:
            continue  # it has expired, or a run that was killed had deleted it
        except TinkexError as error:
            metadata = {"path": old.path, "reason": type(error).__name__}
            telemetry.emit("tinkex.run.checkpoint_not_deleted", {}, metadata, error)
    return checkpoints[-keep:]


def is_untouched(step: OptimizerStep) -> bool:
    """Returns whether it is certain that nothing of the step took effect."""
    return step.response is None and all(part.output is None for part in step.parts) and _is_known(step)


def is_transient(error: Exception) -> bool:
    """Returns whether the same request may succeed another time."""
    if isinstance(error, RegularizerError):
        return not isinstance(error, _LASTING_TERM_FAILURES)
    if isinstance(error, RequestFailed):
        return error.category != "user"
    if isinstance(error, APIStatusError):
        return error.status >= 500 or error.status in _TRANSIENT_STATUSES
    return isinstance(error, PrecedingRequestFailed | SequenceLost | TransportError)


def reason_of(error: Exception) -> str:
    """Returns the failure in words for `run.json`, without user data."""
    name = type(error).__name__
    if isinstance(error, RegularizerError):
        return f"{name} of {error.name!r}"
    # Messages of this package's errors contain no data; those of others, terms among them, may.
    return f"{name}: {error}" if isinstance(error, TinkexError) else name


def _is_completable(step: OptimizerStep, training: AsyncTrainingClient) -> bool:
    """Whether sending the missing parts gives the same step as one without a failure."""
    if not _is_known(step):
        return False
    held = sum(part.output is not None for part in step.parts)
    # A request that the service failed is counted as handed over, but the service does not hold its gradient.
    failed = sum(type(part.error) is RequestFailed for part in step.parts)
    return held <= training.accumulated <= held + failed


def _is_known(step: OptimizerStep) -> bool:
    """Whether it is known which parts took effect; an update without all gradients cannot be completed."""
    if step.response is not None and not step.has_gradients:
        return False
    return all(_had_no_effect(error) for error in step.failures)


def _had_no_effect(error: Exception) -> bool:
    if isinstance(error, RequestFailed):
        return not isinstance(error, ResultLost | PartialFailure)
    return not isinstance(error, SequenceLost | TransportError)
