"""The contents of a run's files: `run.json`, `steps.jsonl` (a line per optimizer step), `state.json`."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tinkex_py.arguments import check_kind
from tinkex_py.losses.output import CustomLossOutput

RunStatus = Literal["running", "finished", "stopped", "failed"]


class Record(BaseModel):
    """Base of the models: frozen, plain JSON, and unknown fields of newer versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class Change(Record):
    """What differed from before when a run was resumed with `allow_changes=True`.

    Attributes:
        step: number of the first step after it.
        what: the difference.
        batches: number of batches read when the data differed; those before it are compared no longer. None if the data
            did not differ.
    """

    step: int
    what: str
    batches: int | None = None


class RunInfo(Record):
    """`run.json`.

    Attributes:
        name: name of the run's folder.
        started_at: when the run was first started, in seconds since the epoch.
        updated_at: when this file was written, in seconds since the epoch.
        status: "running", "finished" (all steps made, or the batches ended), "stopped" (on request, or early) or
            "failed".
        reason: why it stopped, failed, or ended before `total_steps`; None otherwise. Contains no user data.
        total_steps: planned optimizer steps; None if the run ends with its data.
        model: name of the base model as the service reported it; None if it did not.
        config: settings of the run, as given.
        versions: of Python, this package and torch.
        seed: `seed` of the `config=` that `train` was called with; None without one.
        fingerprints: of the code and captured values of the loss and the optimizer, by their names; None where there is
            no fingerprint. Empty in runs of older versions.
        objective: `Pipeline.fingerprint` of the loss; None if a part of it is code.
        changes: what was changed on purpose.
        batches_ahead: fingerprints, by position, of batches read after the last checkpoint; a resumed run reads
            them again.
        certificate: digest of the certificate by which the surrogate was chosen; None if none was needed.
    """

    name: str
    started_at: float
    updated_at: float
    status: RunStatus = "running"
    reason: str | None = None
    total_steps: int | None = None
    model: str | None = None
    config: dict[str, JsonValue] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    fingerprints: dict[str, str | None] = Field(default_factory=dict)
    objective: str | None = None
    changes: tuple[Change, ...] = ()
    batches_ahead: dict[int, str] = Field(default_factory=dict[int, str])
    certificate: str | None = None

    @property
    def outcome(self) -> str:
        """The status, and its reason if there is one."""
        return self.status if self.reason is None else f"{self.status}: {self.reason}"

    def _repr_html_(self) -> str:
        from tinkex_py.html_table import html_facts

        facts = self.model_dump(include={"status", "reason", "model", "total_steps", "seed"})
        return html_facts(f"Run {self.name}", facts) + html_facts("Settings", flattened(self.config))


class StepRecord(Record):
    """One line of `steps.jsonl`: one optimizer step.

    Attributes:
        step: number of the optimizer step, from 1.
        finished_at: in seconds since the epoch.
        seconds: from the start of the step to its end.
        queue_seconds: the part of `seconds` in which the service held requests in its queue.
        datums: of all micro-batches.
        tokens: of all micro-batches.
        learning_rate: of the optimizer step; None if the optimizer has none.
        losses: the composed loss of each micro-batch, without the service's own output.
        loss: of several micro-batches, the loss of the step under the names of `scalars`: as one call with all of them
            would report it. Empty if there is one micro-batch, and in records of earlier versions.
        metrics: what the service reported about the optimizer step; with `TrainSettings(grad_norm=True)`, the norm of
            the gradient is always `grad_norm`.
        evaluation: numbers that the evaluation hook returned after this step; empty if it did not run.
        samples: texts that the evaluation hook returned after this step, by name or prompt.
        batches: fingerprint of each micro-batch; empty in runs of older versions.
    """

    step: int
    finished_at: float
    seconds: float
    queue_seconds: float = 0.0
    datums: int
    tokens: int
    learning_rate: float | None = None
    losses: tuple[CustomLossOutput, ...]
    loss: dict[str, float] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    evaluation: dict[str, float] = Field(default_factory=dict)
    samples: dict[str, str] = Field(default_factory=dict)
    batches: tuple[str, ...] = ()


class SavedCheckpoint(Record):
    """A checkpoint that the service keeps for the run.

    Attributes:
        step: optimizer steps of the run that it contains.
        path: on the service.
    """

    step: int
    path: str


class RunState(Record):
    """`state.json`: the state between two optimizer steps.

    Attributes:
        checkpoints: those that the service keeps, oldest first; the run resumes from the last.
        batches: number of batches (micro-batches) that the steps consumed.
        client_step: value of `AsyncTrainingClient.step`, the argument of weight schedules.
        pipeline: `Pipeline.state_dict()`: weights that depend on measurements.
        patience: early-stopping state; empty without early stopping.
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


def flattened(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Returns nested settings under dotted names; lists are kept whole."""
    flat: dict[str, JsonValue] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= {f"{name}.{inner}": setting for inner, setting in flattened(value).items()}
        else:
            flat[name] = value
    return flat


def term_names(record: StepRecord) -> list[str]:
    """Returns the names of the regularizers that took part in a step."""
    return list(dict.fromkeys(name for output in record.losses for name in output.regularizers))


def scalars(record: StepRecord) -> dict[str, float]:
    """Returns the numbers of one step under flat names, for charts and metric sinks.

    Losses are those of the whole step (`StepRecord.loss`); other measurements of micro-batches are averaged.

    Names: `loss/total`, `loss/base`, `loss/regularizers`, `grad_norm/total`, `grad_norm/base_loss`,
    `term/NAME/{value,weight,contribution,grad_norm,grad_norm_weighted,cosine_with_base,cosine_with_total,share_of_total}`,
    `term/NAME/{bound,violation,feasible}` of terms with a bound, whose weight is the multiplier,
    `time/{step,queue}`, `data/{datums,tokens}`, `optimizer/...`, `evaluation/...`. Unmeasured values are omitted.
    """
    check_kind("record", record, StepRecord)
    gathered: dict[str, list[float]] = {}
    for output in record.losses:
        for name, value in _of_output(output):
            if value is not None:
                gathered.setdefault(name, []).append(value)
    named = {name: values[0] if len(values) == 1 else statistics.fmean(values) for name, values in gathered.items()}
    named |= record.loss
    named |= {
        "time/step": record.seconds,
        "time/queue": record.queue_seconds,
        "data/datums": float(record.datums),
        "data/tokens": float(record.tokens),
    }
    if record.learning_rate is not None:
        named["optimizer/learning_rate"] = record.learning_rate
    named |= {f"optimizer/{name}": value for name, value in record.metrics.items()}
    return named | {f"evaluation/{name}": value for name, value in record.evaluation.items()}


def _of_output(output: CustomLossOutput) -> Iterator[tuple[str, float | None]]:
    yield "loss/total", output.loss_total
    yield "loss/base", output.base_loss.value
    yield "loss/regularizers", output.regularizer_total
    yield "grad_norm/total", output.total_grad_norm
    yield "grad_norm/base_loss", output.base_loss.grad_norm
    for name, term in output.regularizers.items():
        for measure in ("value", "weight", "contribution", "grad_norm", "grad_norm_weighted"):
            yield f"term/{name}/{measure}", getattr(term, measure)
        for measure in ("bound", "violation", "feasible") if term.constraint is not None else ():
            yield f"term/{name}/{measure}", float(getattr(term.constraint, measure))
    for name, diagnosis in output.diagnosis.items():
        for measure in ("cosine_with_base", "cosine_with_total", "share_of_total"):
            yield f"term/{name}/{measure}", getattr(diagnosis, measure)
