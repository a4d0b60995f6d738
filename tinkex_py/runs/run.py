"""A run between its start and its end: its model, its place in the data, and what its folder holds."""

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import JsonValue

from tinkex_py import telemetry
from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.client.training import AsyncTrainingClient
from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.runs.batches import BatchReader
from tinkex_py.runs.checkpoints import delete_old, save_checkpoint
from tinkex_py.runs.description import Optimizer, check_same, optimizer_description, pipeline_description, versions
from tinkex_py.runs.early_stop import Patience
from tinkex_py.runs.folder import RunFolder
from tinkex_py.runs.records import RunInfo, RunStatus, StepRecord, scalars
from tinkex_py.runs.settings import TrainSettings
from tinkex_py.runs.state import RunState, SavedCheckpoint
from tinkex_py.threads import FileThread

if TYPE_CHECKING:
    from tinkex_py.losses.pipeline import Pipeline

Model = AsyncTrainingClient | Callable[[], Awaitable[AsyncTrainingClient]]

# The settings that decide what numbers come out.
_DECISIVE = ("accumulate", "seed", "execution")


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        service: where.
        model: the model that a new run trains, or what makes it.
        pipeline: the loss.
        optimizer: its settings, or a function of the steps made before that gives them.
        settings: of the run.
        config: what else decides the numbers.
    """

    service: AsyncServiceClient
    model: Model
    pipeline: "Pipeline"
    optimizer: Optimizer
    settings: TrainSettings
    config: Mapping[str, JsonValue]

    def written(self) -> dict[str, JsonValue]:
        """As it is in `run.json`.

        Raises:
            ConfigError: `config` is no JSON.
        """
        fields = {
            "config": dict(self.config),
            "settings": self.settings.model_dump(),
            "optimizer": optimizer_description(self.optimizer),
            "pipeline": pipeline_description(self.pipeline),
        }
        try:
            return json.loads(json.dumps(fields))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config must be plain JSON values, for run.json: {error}") from None


class Run:
    """One run. `open` it first.

    Args:
        plan: what it is to do.
        folder: where it is written to, locked by the caller.
        files: where file work is done.
        reader: the data.

    Attributes:
        training: the model that is trained now.
        state: where the run can go on from.
        info: what `run.json` says.
        made: optimizer steps made.
        last: the last of them; None before the first.
        patience: what early stopping has seen.
        is_begun: whether `run.json` tells of this process; before that nothing in the folder was changed.
    """

    training: AsyncTrainingClient
    state: RunState
    info: RunInfo

    def __init__(self, plan: Plan, folder: RunFolder, files: FileThread, reader: BatchReader) -> None:
        self.plan = plan
        self.reader = reader
        self.made = 0
        self.last: StepRecord | None = None
        self.patience = Patience()
        self.is_begun = False
        self._folder = folder
        self._files = files
        self._restarts_left = plan.settings.restarts

    async def open(self) -> None:
        """Starts the run, or takes it up where its last checkpoint is.

        Raises:
            ConfigError: the folder holds a run with other settings, or cannot be read.
        """
        written = self.plan.written()
        before = await self._files.run(self._folder.read_run)
        state = await self._files.run(self._folder.read_state)
        if before is not None:
            check_same(_decisive(before.config), _decisive(written), self._folder.path)
        elif state is not None:
            raise ConfigError(f"{self._folder.path} has a state.json, but no run.json that tells what it belongs to")
        self.training = await self._new_model() if state is None else await self._model_of(state)
        self.info = await self._described(written, before)
        if state is None:
            await self.reader.go_to(0)
            await self._begin()
            await self._files.run(lambda: self._folder.keep_steps(0))
            await self.save(())
        else:
            await self._take_up(state)
            await self._begin()

    async def _begin(self) -> None:
        self.is_begun = True
        await self._files.run(lambda: self._folder.write_run(self.info))

    async def _new_model(self) -> AsyncTrainingClient:
        made = self.plan.model
        training = made if isinstance(made, AsyncTrainingClient) else await made()
        if training.accumulated:
            raise InvalidData(
                f"the training client holds {training.accumulated} backward passes that no optimizer step applied; a "
                "run must begin with a model that holds none"
            )
        return training

    async def _model_of(self, state: RunState) -> AsyncTrainingClient:
        path = state.checkpoints[-1].path
        return await self.plan.service.create_training_client_from_state(path, with_optimizer=True)

    async def _described(self, written: dict[str, JsonValue], before: RunInfo | None) -> RunInfo:
        model, now = await self.training.get_info(), time.time()
        return RunInfo(
            name=self._folder.path.resolve().name,
            started_at=now if before is None else before.started_at,
            updated_at=now,
            total_steps=self.plan.settings.steps,
            model=model.model_data.model_name or model.model_name,
            config=written,
            versions=versions(),
            seed=self.plan.settings.seed,
        )

    async def _take_up(self, state: RunState) -> None:
        await self.reader.go_to(state.batches)
        self.plan.pipeline.load_state_dict(state.pipeline)
        self.training.step = state.client_step
        self.patience = Patience.model_validate(state.patience)
        kept = await self._files.run(lambda: self._folder.keep_steps(state.step))
        self.state, self.made, self.last = state, state.step, kept[-1] if kept else None

    async def go_back(self, cause: Exception) -> None:
        """Takes the run up at its last checkpoint, with a new model.

        Args:
            cause: why the model cannot be used any more.

        Raises:
            Exception: the cause, if the run has gone back as often as it may, or its data cannot be read again.
        """
        if self._restarts_left == 0:
            raise cause
        if not self.reader.can_begin_again:
            cause.add_note(
                "the run could not go back to its last checkpoint because batches is an iterator: give a list, or a "
                "function that is called with the number of batches to leave out"
            )
            raise cause
        self._restarts_left -= 1
        metadata = {"step": self.made + 1, "checkpoint_step": self.state.step, "reason": type(cause).__name__}
        telemetry.emit("tinkex.run.restarted", {}, metadata, cause)
        if self.training is not self.plan.model:
            await self.training.aclose()
        self.training = await self._model_of(self.state)
        await self._take_up(self.state)

    def at_step(self, number: int) -> None:
        """Lets schedules of weights see optimizer step `number` as the next, whatever was counted before."""
        self.training.step = self.state.client_step + number - 1 - self.state.step

    async def record(self, step: StepRecord) -> None:
        """An optimizer step was made."""
        await self._files.run(lambda: self._folder.append_step(step))
        self.made, self.last = step.step, step
        rule = self.plan.settings.early_stop
        if rule is not None:
            self.patience = self.patience.after(rule, scalars(step))

    async def save(self, checkpoints: tuple[SavedCheckpoint, ...] | None = None) -> None:
        """Makes a checkpoint, writes down how to go on from it, and deletes old ones.

        Args:
            checkpoints: those before it; default are those of the run.
        """
        settings = self.plan.settings
        saved = await save_checkpoint(self.training, self.made, settings)
        self.state = RunState(
            checkpoints=(*(self.state.checkpoints if checkpoints is None else checkpoints), saved),
            batches=self.reader.position,
            client_step=self.training.step,
            pipeline=self.plan.pipeline.state_dict(),
            patience=self.patience.model_dump(),
        )
        await self._files.run(lambda: self._folder.write_state(self.state))
        rest = self.plan.service.create_rest_client()
        left = await delete_old(rest, self.state.checkpoints, settings.keep_checkpoints)
        self.state = self.state.model_copy(update={"checkpoints": left})
        await self.tell("running")

    async def tell(self, status: RunStatus, reason: str | None = None) -> None:
        """Writes how the run stands."""
        self.info = self.info.model_copy(update={"status": status, "reason": reason, "updated_at": time.time()})
        await self._files.run(lambda: self._folder.write_run(self.info))


def _decisive(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    settings = config.get("settings")
    kept = {name: settings.get(name) for name in _DECISIVE} if isinstance(settings, dict) else {}
    return {**config, "settings": kept}
