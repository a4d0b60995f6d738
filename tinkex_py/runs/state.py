"""What a run needs to go on from its last checkpoint: `state.json`."""

from pydantic import Field, JsonValue

from tinkex_py.runs.records import Record


class SavedCheckpoint(Record):
    """A checkpoint that the service keeps for the run.

    Attributes:
        step: optimizer steps of the run that it holds.
        path: on the service.
    """

    step: int
    path: str


class RunState(Record):
    """`state.json`: one moment between two optimizer steps.

    Attributes:
        checkpoints: those that the service keeps, oldest first; the run goes on from the last.
        batches: how many batches (micro-batches) the steps up to there took from the data.
        client_step: what `AsyncTrainingClient.step` was, which schedules of weights are called with.
        pipeline: state of the weights that follow the measurements, as `Pipeline.state_dict` gives it.
        patience: what early stopping has seen; empty without it.
    """

    checkpoints: tuple[SavedCheckpoint, ...] = Field(min_length=1)
    batches: int
    client_step: int
    pipeline: dict[str, JsonValue] = Field(default_factory=dict)
    patience: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def step(self) -> int:
        """The optimizer steps that were made."""
        return self.checkpoints[-1].step
