"""Folders of runs that were never trained, whose curves have closed forms."""

import math
from collections.abc import Sequence
from pathlib import Path

from tests.runs.support import run_info
from tinkex_py import BaseLossOutput, CustomLossOutput, GradientDiagnosis, RegularizerOutput
from tinkex_py.losses.output import ConstraintOutput
from tinkex_py.runs.records import RunInfo, StepRecord

TERMS = ("l2", "kl_to_base", "rarity")
BOUND = 0.5  # of the second term


def base_loss(step: int) -> float:
    return 0.5 + 2.0 / step


def contribution(place: int, step: int) -> float:
    """Of the regularizer at that place; every third one is negative."""
    sign = -1.0 if place % 3 == 2 else 1.0
    return sign * 0.2 / (place + 1) * (1.0 + math.cos(step / 7.0 + place))


def weight(place: int, step: int) -> float:
    return 0.1 * (place + 1) * (1.0 - math.exp(-step / 20.0))


def constraint(value: float) -> ConstraintOutput:
    return ConstraintOutput(at_most=BOUND, value=value, violation=value - BOUND, feasible=value <= BOUND)


def made_up_step(step: int, terms: Sequence[str] = TERMS, *, norms: bool = True) -> StepRecord:
    regularizers = {
        name: RegularizerOutput(
            name=name,
            value=contribution(place, step) / weight(place, step),
            weight=weight(place, step),
            contribution=contribution(place, step),
            grad_norm=1.0 / step if norms else None,
            grad_norm_weighted=weight(place, step) / step if norms else None,
            constraint=constraint(contribution(place, step) / weight(place, step)) if place == 1 else None,
        )
        for place, name in enumerate(terms)
    }
    diagnosis = {
        name: GradientDiagnosis(
            cosine_with_base=math.cos(step / 30.0 + place),
            cosine_with_total=math.cos(step / 30.0 + place) ** 2,
            share_of_total=0.3 / len(terms) * math.cos(step / 30.0 + place) if place else 0.8,
        )
        for place, name in enumerate(("base_loss", *terms))
    }
    regularizer_total = sum(contribution(place, step) for place in range(len(terms)))
    output = CustomLossOutput(
        loss_total=base_loss(step) + regularizer_total,
        base_loss=BaseLossOutput(value=base_loss(step), grad_norm=3.0 / step if norms else None),
        regularizers=regularizers,
        regularizer_total=regularizer_total,
        total_grad_norm=3.5 / step if norms else None,
        diagnosis=diagnosis if norms else {},
    )
    return StepRecord(
        step=step,
        finished_at=1_000.0 + 2.0 * step,
        seconds=1.5 + 0.5 * math.sin(step),
        queue_seconds=0.3 * (1.0 + math.sin(step)),
        datums=8,
        tokens=512,
        learning_rate=5e-4,
        losses=(output,),
        metrics={"grad_norm": 2.0 / step} if norms else {},
        rollout={"reward": 1.0 - 0.5**step},
        evaluation={"held_out_nll": base_loss(step) + 0.1} if step % 5 == 0 else {},
    )


def write_run(folder: Path, steps: Sequence[StepRecord], info: RunInfo | None = None) -> Path:
    folder.mkdir(parents=True)
    info = info or run_info(name=folder.name, status="finished", total_steps=len(steps), model="tiny")
    (folder / "run.json").write_text(info.model_dump_json())
    (folder / "steps.jsonl").write_text("".join(step.model_dump_json() + "\n" for step in steps))
    return folder


def made_up_run(
    folder: Path, steps: int = 30, terms: Sequence[str] = TERMS, *, norms: bool = True, **fields: object
) -> Path:
    made = [made_up_step(step, terms, norms=norms) for step in range(1, steps + 1)]
    fields = {"name": folder.name, "status": "finished", "total_steps": steps, "model": "tiny", **fields}
    return write_run(folder, made, run_info(**fields))
