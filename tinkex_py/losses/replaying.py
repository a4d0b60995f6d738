"""Replays a recorded step offline: the same terms, logprobs and weights."""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any, cast

import torch

from tinkex_py.arguments import check_kind
from tinkex_py.errors import PipelineError
from tinkex_py.losses.constraints import Constraint, DualAscent
from tinkex_py.losses.options import DEFAULTS, PipelineOptions
from tinkex_py.losses.output import CustomLossOutput
from tinkex_py.losses.pipeline import Pipeline
from tinkex_py.losses.recording import (
    JSON_NAME,
    TENSORS_NAME,
    RecordedRegularizer,
    RecordedStep,
    RecordedTerm,
    RecordPath,
    field_key,
    read_record,
)
from tinkex_py.losses.spec import ConfiguredTerm, RegularizerSpec, Term, per_datum
from tinkex_py.losses.weights import Weight
from tinkex_py.types import Datum, EncodedTextChunk, ModelInput, TensorData


async def replay(path: RecordPath, pipeline: Pipeline | None = None) -> CustomLossOutput:
    """Replays a recorded step.

    Args:
        path: the folder that was passed as `record=`.
        pipeline: the terms, under the same names; the weights come from the record. None rebuilds the terms from the
            record, which requires that all of them are ready-made terms of this package.

    Raises:
        PipelineError: the record cannot be read, or the pipeline has other terms.
        RegularizerError: a term failed, for example as it did when the step was recorded.
        MissingExtra: safetensors is not installed.
    """
    if pipeline is not None:
        check_kind("pipeline", pipeline, Pipeline, error=PipelineError)
    record, tensors = read_record(path)
    recorded = rebuilt_pipeline(record) if pipeline is None else with_recorded_weights(pipeline, record)
    try:
        data = _data(record, tensors)
        logprobs = _logprobs(record, tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise PipelineError(
            f"the record {str(path)!r} is damaged: {JSON_NAME} and {TENSORS_NAME} do not match: {error}. Record the "
            "step again"
        ) from error
    return await recorded.compute(data, logprobs, step=record.step)


def with_recorded_weights(pipeline: Pipeline, record: RecordedStep) -> Pipeline:
    """Returns the pipeline with the weights of the record.

    Raises:
        PipelineError: the enabled regularizers have other names than in the record.
    """
    weights = {recorded.name: recorded.weight for recorded in record.regularizers}
    specs = [spec for spec in pipeline.regularizers if spec.enabled]
    if [spec.name for spec in specs] != list(weights):
        raise PipelineError(
            f"the record contains the regularizers {list(weights)}, but the pipeline has "
            f"{[spec.name for spec in specs]}: pass a pipeline with the same names in the same order"
        )
    weighted = [
        dataclasses.replace(spec, weight=_recorded_weight(spec.weight, weights[spec.name]), at_most=None, at_least=None)
        for spec in specs
    ]
    return Pipeline(pipeline.base_loss, weighted, **cast("PipelineOptions", pipeline.options))


def rebuilt_pipeline(record: RecordedStep) -> Pipeline:
    """Rebuilds the pipeline of a record from ready-made terms.

    Raises:
        PipelineError: a term is not a ready-made term of this package.
    """
    specs = [_rebuilt_spec(recorded) for recorded in record.regularizers]
    options = {name: value for name, value in record.options.items() if name in DEFAULTS}
    return Pipeline(_rebuilt_term(record.base_loss), specs, **cast("PipelineOptions", options))


def _rebuilt_spec(recorded: RecordedRegularizer) -> RegularizerSpec:
    fields = recorded.model_dump(exclude={*RecordedTerm.model_fields, "weight", "at_most", "at_least"})
    weight = recorded.weight
    if recorded.at_most is not None or recorded.at_least is not None:
        bounds = {"at_most": recorded.at_most, "at_least": recorded.at_least}
        weight = DualAscent(**bounds, initial=weight, maximum=math.inf)
    return RegularizerSpec(fn=_rebuilt_term(recorded), name=recorded.name, weight=weight, **fields)


def _recorded_weight(weight: Weight, recorded: float) -> Weight:
    """Returns the weight of a record: with a bound, as the multiplier of the same bound."""
    if not isinstance(weight, Constraint):
        return recorded
    return DualAscent(at_most=weight.at_most, at_least=weight.at_least, initial=recorded, maximum=math.inf)


def _rebuilt_term(recorded: RecordedTerm) -> Term:
    module_name, _, class_name = recorded.source.partition(":")
    # A record is data: a file must not choose which modules outside of this package are imported.
    if recorded.ready_made is None or not module_name.startswith("tinkex_py."):
        raise PipelineError(
            f"term {recorded.name!r} ({recorded.source}) cannot be rebuilt from the record, because it is not a "
            "ready-made term: pass the pipeline"
        )
    try:
        made = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise PipelineError(
            f"term {recorded.name!r}: this version has no {recorded.source} ({error}): pass the pipeline"
        ) from error
    if not (isinstance(made, type) and issubclass(made, ConfiguredTerm)):
        raise PipelineError(f"term {recorded.name!r}: {recorded.source} is not a ready-made term: pass the pipeline")
    try:
        term = cast("Term", made(**recorded.ready_made))
    except TypeError as error:
        raise PipelineError(
            f"term {recorded.name!r}: {recorded.source} has other settings in this version ({error}): pass the pipeline"
        ) from error
    return per_datum(term) if recorded.per_datum else term


class _Reader:
    """Reads arrays from the tensors of a record in the order in which they were written."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._taken: dict[str, int] = {}

    def take(self, key: str, count: int) -> torch.Tensor:
        start = self._taken.get(key, 0)
        self._taken[key] = start + count
        part = (
            self._tensors[key][start : start + count]
            if count or key in self._tensors
            else torch.zeros(0, dtype=torch.float32, device="cpu")
        )
        if part.shape[0] != count:
            raise ValueError(f"{key!r} has {part.shape[0] + start} elements, expected at least {start + count}")
        return part


def _data(record: RecordedStep, tensors: Mapping[str, torch.Tensor]) -> list[Datum]:
    reader = _Reader(tensors)
    data: list[Datum] = []
    for datum in record.datums:
        chunks = tuple(EncodedTextChunk(tokens=reader.take("tokens", length).int().numpy()) for length in datum.chunks)
        inputs: dict[str, Any] = {}
        for name, field in datum.fields.items():
            values = reader.take(field_key(name, field.dtype), field.stored)
            parts: dict[str, Any] = {}
            if field.sparse:
                parts = {
                    "sparse_crow_indices": reader.take(field_key(name, field.dtype, "rows"), field.shape[0] + 1),
                    "sparse_col_indices": reader.take(field_key(name, field.dtype, "columns"), field.stored),
                }
            inputs[name] = TensorData(data=values, dtype=cast("Any", field.dtype), shape=field.shape, **parts)
        data.append(Datum(model_input=ModelInput(chunks=chunks), loss_fn_inputs=inputs))
    return data


def _logprobs(record: RecordedStep, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    buffer = tensors["logprobs"]
    if record.logprob_shapes is None:
        return buffer
    sizes = [math.prod(shape) for shape in record.logprob_shapes]
    parts = torch.split(buffer.reshape(-1), sizes)
    return [part.reshape(shape) for part, shape in zip(parts, record.logprob_shapes, strict=True)]
