"""Runs of the tiny model, and records of runs that never were."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.client.data import datum
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    AsyncTrainingClient,
    BaseLossOutput,
    CustomLossOutput,
    Datum,
    Pipeline,
    RegularizerOutput,
    RegularizerSpec,
    controllers,
    schedules,
)
from tinkex_py.base_losses import NLL
from tinkex_py.regularizers import L2, Entropy
from tinkex_py.runs import RunInfo, StepRecord, TrainedRun, TrainSettings, read_steps, train
from tinkex_py.runs.progress import NoProgress


def run_info(**fields) -> RunInfo:
    return RunInfo(**{"name": "somewhere", "started_at": 1.0, "updated_at": 2.0, **fields})


def step_record(step: int, loss: float = 1.5, **fields) -> StepRecord:
    output = CustomLossOutput(
        loss_total=loss + 0.5,
        base_loss=BaseLossOutput(value=loss, metrics={"naïve ratio": float("inf")}),
        regularizers={"l2": RegularizerOutput(name="l2", value=5.0, weight=0.1, contribution=0.5)},
        regularizer_total=0.5,
    )
    return StepRecord(
        **{
            "step": step,
            "finished_at": 10.0 + step,
            "seconds": 0.25,
            "datums": 2,
            "tokens": 12,
            "losses": (output,),
            **fields,
        }
    )


def pipeline() -> Pipeline:
    """A base loss, a weight that follows the measurements, and one that follows the step."""
    return Pipeline(
        NLL(reduction="token-mean"),
        [
            RegularizerSpec(
                fn=L2(mask=None, reduction="token-mean"), weight=controllers.TargetGradientRatio(ratio=0.2)
            ),
            RegularizerSpec(
                fn=Entropy(over="tokens", mask=None, reduction="mean"), weight=schedules.Linear(0.1, 0.0, 6)
            ),
        ],
    )


def batch(number: int) -> list[Datum]:
    """The same datums for the same number."""
    return [datum(6, seed=10 * number), datum(4, seed=10 * number + 1)]


def batches(start: int, end: int = 100) -> Iterator[list[Datum]]:
    return map(batch, range(start, end))


def learning_rate(step: int) -> AdamParams:
    return AdamParams(learning_rate=5e-3 / (1 + 0.1 * step))


class Calls:
    """Makes models, and counts how often."""

    def __init__(self, service: AsyncServiceClient) -> None:
        self.made: list[AsyncTrainingClient] = []
        self._service = service

    async def __call__(self) -> AsyncTrainingClient:
        self.made.append(await self._service.create_lora_training_client("tiny", rank=4, seed=3))
        return self.made[-1]


async def run_to(
    service: AsyncServiceClient, folder: Path, steps: int | None = 6, *, model: Any = None, **options: Any
) -> TrainedRun:
    """A run of the tiny model; settings by their names, the rest as `train` takes it."""
    own = {name: options.pop(name) for name in list(options) if name in TrainSettings.model_fields}
    settings = TrainSettings(**{"steps": steps, "checkpoint_every": 2, **own})
    given = {"batches": batches, "pipeline": pipeline(), "optimizer": learning_rate, "config": {"seed": 3}, **options}
    return await train(
        service,
        model or Calls(service),
        given.pop("batches"),
        given.pop("pipeline"),
        folder=folder,
        settings=settings,
        **given,
    )


def losses(folder: Path) -> list[list[float]]:
    """Total loss of every micro-batch, by step."""
    return [[output.loss_total for output in step.losses] for step in read_steps(folder)]


class Snapshots(NoProgress):
    """Copies the files at every call of the progress view: what a process that is killed there leaves behind."""

    def __init__(self, original: Path, copies: Path) -> None:
        self._original = original
        self._copies = copies
        self.taken: list[tuple[str, Path]] = []

    def start(self, run: RunInfo, made: int) -> None:
        self._copy("start")

    def doing(self, text: str) -> None:
        self._copy(text)

    def step(self, record: StepRecord) -> None:
        self._copy(f"made {record.step}")

    def finish(self, run: RunInfo) -> None:
        self._copy("finish")

    def _copy(self, moment: str) -> None:
        target = self._copies / str(len(self.taken))
        shutil.copytree(self._original, target, ignore=shutil.ignore_patterns("*.draft"))
        self.taken.append((moment, target))


_CALM: dict[int, list[list[float]]] = {}


async def calm(service: AsyncServiceClient, steps: int, accumulate: int = 1) -> list[list[float]]:
    """Losses of the first steps of a run that nothing disturbs, which is trained once."""
    if accumulate not in _CALM:
        with tempfile.TemporaryDirectory() as folder:
            await run_to(service, Path(folder), accumulate=accumulate, checkpoint_every=None)
            _CALM[accumulate] = losses(Path(folder))
    return _CALM[accumulate][:steps]
