"""The checkpoints of one run: saved under a name per step, old ones deleted."""

from tinkex_py import telemetry
from tinkex_py.client.rest import AsyncRestClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import NotFound, RequestFailed, TinkexError
from tinkex_py.runs.settings import TrainSettings
from tinkex_py.runs.state import SavedCheckpoint
from tinkex_py.runs.step import is_worth_repeating


async def save_checkpoint(training: AsyncTrainingClient, step: int, settings: TrainSettings) -> SavedCheckpoint:
    """Saves the model as it is after `step` optimizer steps; tried again where the service failed.

    Raises:
        TinkexError: it could not be saved.
    """
    for attempt in range(settings.resends + 1):
        # A failed attempt may have used the name.
        name = f"step-{step:06d}" if attempt == 0 else f"step-{step:06d}-{attempt + 1}"
        try:
            saved = await training.save_state(name, ttl_seconds=settings.checkpoint_ttl)
        except RequestFailed as error:
            if attempt == settings.resends or not is_worth_repeating(error):
                raise
        else:
            return SavedCheckpoint(step=step, path=saved.path)
    raise AssertionError("the last attempt returns or raises")


async def delete_old(
    rest: AsyncRestClient, checkpoints: tuple[SavedCheckpoint, ...], keep: int
) -> tuple[SavedCheckpoint, ...]:
    """Deletes all but the last `keep`; one that cannot be deleted is told in an event, and not tried again.

    Returns:
        Those that are left.
    """
    for old in checkpoints[:-keep]:
        try:
            await rest.delete_checkpoint(old.path)
        except NotFound:
            continue  # it has expired, or a run that was killed had deleted it already
        except TinkexError as error:
            metadata = {"path": old.path, "reason": type(error).__name__}
            telemetry.emit("tinkex.run.checkpoint_not_deleted", {}, metadata, error)
    return checkpoints[-keep:]
