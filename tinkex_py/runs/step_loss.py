"""The loss of an optimizer step, from those of its micro-batches."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tinkex_py.losses.output import (
    BASE_LOSS_NAME,
    TOTAL_METRIC,
    BaseLossOutput,
    RegularizerOutput,
    denominator_of,
    mean_violation,
)
from tinkex_py.losses.spec import reduction_of
from tinkex_py.runs.step import MicroBatch
from tinkex_py.types import Datum

if TYPE_CHECKING:
    from tinkex_py.losses.pipeline import Pipeline

TermOutput = BaseLossOutput | RegularizerOutput
Combine = Callable[[Sequence[float]], float]


def step_loss(pipeline: "Pipeline", parts: Sequence[MicroBatch]) -> dict[str, float]:
    """Returns the loss of an accumulated step as one call with all of its micro-batches would report it.

    The values of a term add up if its `reduction` is "sum", or if its mean divides by the total of the step; those of
    another mean are averaged, weighted with its denominators. A term without a `reduction`, such as a plain function,
    counts as a mean over the answers' tokens: the positions whose `weights` are not 0, or all of them in data without
    weights.

    Args:
        pipeline: the terms.
        parts: the micro-batches; those without an output do not count.

    Returns:
        The numbers under their names in `scalars`; nothing if there is only one micro-batch.
    """
    outputs = [part.output for part in parts if part.output is not None]
    if len(outputs) < 2:
        return {}
    tokens = [sum(map(_answer_tokens, part.batch)) for part in parts if part.output is not None]
    reductions = _reductions(pipeline)
    combine = _combination([output.base_loss for output in outputs], tokens, reductions[BASE_LOSS_NAME])
    named = {"loss/base": combine([output.base_loss.value for output in outputs]), "loss/regularizers": 0.0}
    for name in dict.fromkeys(name for output in outputs for name in output.regularizers):
        # A skipped term is missing in some micro-batches.
        found = [at for at, output in enumerate(outputs) if name in output.regularizers]
        terms = [outputs[at].regularizers[name] for at in found]
        combine = _combination(terms, [tokens[at] for at in found], reductions[name])
        named[f"term/{name}/value"] = combine([term.value for term in terms])
        named[f"term/{name}/contribution"] = combine([term.contribution for term in terms])
        named |= _constraint(name, terms)
        named["loss/regularizers"] += named[f"term/{name}/contribution"]
    named["loss/total"] = named["loss/base"] + named["loss/regularizers"]
    return named


def _constraint(name: str, terms: Sequence[RegularizerOutput]) -> dict[str, float]:
    """Returns how the mean of a term stands to its bound; nothing without a bound."""
    violation = mean_violation([term.constraint for term in terms if term.constraint is not None])
    if violation is None:
        return {}
    return {f"term/{name}/violation": violation, f"term/{name}/feasible": float(violation <= 0)}


def _reductions(pipeline: "Pipeline") -> Mapping[str, object]:
    reductions: dict[str, object] = {BASE_LOSS_NAME: getattr(pipeline.base_loss, "reduction", None)}
    for spec in pipeline.regularizers:
        reductions[spec.name] = reduction_of(spec)
    return reductions


def _combination(terms: Sequence[TermOutput], tokens: Sequence[float], reduction: object) -> Combine:
    """Returns the function that combines the numbers of one term in the micro-batches."""
    if reduction == "sum" or all(TOTAL_METRIC in _metrics(term) for term in terms):
        return math.fsum
    counts = tokens if reduction is None else _denominators(terms, str(reduction)) or tokens
    total = math.fsum(counts)
    if total <= 0:
        return statistics.fmean
    return lambda values: math.fsum(count * value for count, value in zip(counts, values, strict=True)) / total


def _denominators(terms: Sequence[TermOutput], reduction: str) -> list[float] | None:
    found = [denominator_of(_metrics(term), reduction) for term in terms]
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else None


def _metrics(term: TermOutput) -> Mapping[str, float]:
    return term.metrics if isinstance(term, BaseLossOutput) else term.custom_metrics


def _answer_tokens(datum: Datum) -> int:
    weights = datum.loss_fn_inputs.get("weights")
    if weights is not None and weights.shape:
        array = weights.to_numpy()
        return int((array != 0).reshape(len(array), -1).any(axis=1).sum())
    return datum.positions
