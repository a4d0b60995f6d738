"""Runs a recorded step again, offline: the same terms on the same numbers with the same weights."""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any, cast

import torch

from tinkex_py.errors import PipelineError
from tinkex_py.losses.options import DEFAULTS, PipelineOptions
from tinkex_py.losses.output import CustomLossOutput
from tinkex_py.losses.pipeline import Pipeline
from tinkex_py.losses.recording import RecordedStep, RecordedTerm, RecordPath, field_key, read_record
from tinkex_py.losses.spec import ConfiguredTerm, RegularizerSpec, Term, per_datum
from tinkex_py.types import Datum, EncodedTextChunk, ModelInput, TensorData


async def replay(path: RecordPath, pipeline: Pipeline | None = None) -> CustomLossOutput:
    """Runs the step that a record holds again.

    Args:
        path: what `record=` named.
        pipeline: the terms, with the names they had; their weights are those of the record. None rebuilds the terms
            from the record, which works if all of them are this package's own.

    Raises:
        PipelineError: the record cannot be read, or the pipeline does not have its terms.
        RegularizerError: a term failed, as it may have when the record was written.
        MissingExtra: safetensors is not installed.
    """
    record, tensors = read_record(path)
    recorded = rebuilt_pipeline(record) if pipeline is None else with_recorded_weights(pipeline, record)
    try:
        data = _data(record, tensors)
        logprobs = _logprobs(record, tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise PipelineError(f"the record {str(path)!r} is damaged: its parts do not fit together: {error}") from error
    return await recorded.compute(data, logprobs, step=record.step)


def with_recorded_weights(pipeline: Pipeline, record: RecordedStep) -> Pipeline:
    """The pipeline with the weights of the record.

    Raises:
        PipelineError: the names of its enabled regularizers are not those of the record.
    """
    weights = {recorded.name: recorded.weight for recorded in record.regularizers}
    specs = [spec for spec in pipeline.regularizers if spec.enabled]
    if [spec.name for spec in specs] != list(weights):
        raise PipelineError(
            f"the record has the regularizers {list(weights)}, the pipeline {[spec.name for spec in specs]}; they must "
            "be the same, in the same order"
        )
    weighted = [dataclasses.replace(spec, weight=weights[spec.name]) for spec in specs]
    return Pipeline(pipeline.base_loss, weighted, **cast("PipelineOptions", pipeline.options))


def rebuilt_pipeline(record: RecordedStep) -> Pipeline:
    """The pipeline of a record whose terms are all this package's own.

    Raises:
        PipelineError: one is not; it names it and the way out.
    """
    specs = [
        RegularizerSpec(
            fn=_rebuilt_term(recorded),
            weight=recorded.weight,
            name=recorded.name,
            timeout=recorded.timeout,
            options=recorded.options,
            on_error=recorded.on_error,
            is_async=recorded.is_async,
            max_grad_norm=recorded.max_grad_norm,
        )
        for recorded in record.regularizers
    ]
    options = {name: value for name, value in record.options.items() if name in DEFAULTS}
    return Pipeline(_rebuilt_term(record.base_loss), specs, **cast("PipelineOptions", options))


def _rebuilt_term(recorded: RecordedTerm) -> Term:
    module_name, _, class_name = recorded.source.partition(":")
    # A record is data: nothing outside this package is imported because a file says so.
    if recorded.ready_made is None or not module_name.startswith("tinkex_py."):
        raise PipelineError(
            f"term {recorded.name!r} ({recorded.source}) cannot be rebuilt from its record: pass the pipeline"
        )
    try:
        made = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise PipelineError(f"term {recorded.name!r}: there is no {recorded.source}: {error}") from error
    if not (isinstance(made, type) and issubclass(made, ConfiguredTerm)):
        raise PipelineError(f"term {recorded.name!r}: {recorded.source} is no ready-made term")
    try:
        term = cast("Term", made(**recorded.ready_made))
    except TypeError as error:
        raise PipelineError(f"term {recorded.name!r}: {recorded.source} has other settings now: {error}") from error
    return per_datum(term) if recorded.per_datum else term


class _Reader:
    """Takes arrays off a record's tensors in the order in which they were put there."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._taken: dict[str, int] = {}

    def take(self, key: str, count: int) -> torch.Tensor:
        start = self._taken.get(key, 0)
        self._taken[key] = start + count
        part = self._tensors[key][start : start + count] if count or key in self._tensors else torch.zeros(0)
        if part.shape[0] != count:
            raise ValueError(f"{key!r} ends at {part.shape[0] + start}, before {start + count}")
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
