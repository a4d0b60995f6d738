"""Makes the means of a pipeline those of a whole optimizer step, whose datums are sent in several calls."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from tinkex_py.errors import ConfigError
from tinkex_py.losses.output import BASE_LOSS_NAME
from tinkex_py.runs.batches import Batch

if TYPE_CHECKING:
    from tinkex_py.losses.options import PipelineOptions
    from tinkex_py.losses.pipeline import Pipeline
    from tinkex_py.terms.ready_made import ReadyMadeTerm


def check_can_accumulate(pipeline: "Pipeline") -> None:
    """Raises ConfigError if a ready-made term couples datums, so that it cannot be split into micro-batches."""
    for name, term in _ready_made(pipeline):
        if term.coupling is not None:
            raise ConfigError(
                f"accumulate > 1 splits the datums of an optimizer step, but the term {name!r} "
                f"({type(term).__name__}) couples them: {term.coupling}. Use accumulate=1 with larger batches, or "
                "another term"
            )


def has_means(pipeline: "Pipeline") -> bool:
    """Returns whether `over_step` changes a term."""
    terms = [term for _, term in _ready_made(pipeline)]
    return any(getattr(term, "reduction", "sum") != "sum" and getattr(term, "total", None) is None for term in terms)


def over_step(pipeline: "Pipeline", batches: Sequence[Batch]) -> "Pipeline":
    """Returns the pipeline for the calls of one optimizer step.

    The means of ready-made terms divide by the tokens or datums of all batches (`total`), unless their `total` is set;
    so the gradients of the calls add up to that of one call with all datums. Other terms stay as they are.

    Raises:
        InvalidData: a datum lacks what a mask needs.
    """
    if len(batches) < 2:
        return pipeline
    from tinkex_py.losses.pipeline import Pipeline

    data = [datum for batch in batches for datum in batch]
    found = {name: (term, term.total_of(data)) for name, term in _ready_made(pipeline)}
    totals = {name: total for name, (term, total) in found.items() if total and getattr(term, "total", None) is None}
    if not totals:
        return pipeline
    base = pipeline.base_loss
    if BASE_LOSS_NAME in totals:
        base = found[BASE_LOSS_NAME][0].with_options({"total": totals[BASE_LOSS_NAME]})
    specs = [
        replace(spec, options={**spec.options, "total": totals[spec.name]}) if spec.name in totals else spec
        for spec in pipeline.regularizers
    ]
    return Pipeline(base, specs, **cast("PipelineOptions", pipeline.options))


def _ready_made(pipeline: "Pipeline") -> "Iterator[tuple[str, ReadyMadeTerm]]":
    """Yields the ready-made terms that are enabled, with the options of their specs."""
    from tinkex_py.terms.ready_made import ReadyMadeTerm

    if isinstance(pipeline.base_loss, ReadyMadeTerm):
        yield BASE_LOSS_NAME, pipeline.base_loss
    for spec in pipeline.regularizers:
        if isinstance(spec.fn, ReadyMadeTerm) and spec.enabled:
            yield spec.name, spec.fn.with_options(spec.options)
