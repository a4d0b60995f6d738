"""Checks the datums of one call, cuts them into chunks, and merges the results of the chunks."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinkex_py.arguments import plain, shown
from tinkex_py.errors import InvalidData
from tinkex_py.transport.encoding import (
    NO_DATUMS,
    EncodedBatch,
    EncodingName,
    LossConfig,
    PassHeader,
    PlannedBatch,
    encode_custom_batch,
    encode_request,
)
from tinkex_py.transport.server_config import ServerConfig
from tinkex_py.types import (
    Datum,
    ForwardBackwardOutput,
    ImageAssetPointerChunk,
    PackedTensor,
    SampledProvenanceSpan,
    TensorData,
)
from tinkex_py.types.datum import own_datums, target_shape
from tinkex_py.types.tensors import Array

# The losses of the protocol and the fields that they need besides target_tokens. Other losses are not checked here.
_SAMPLED = ("logprobs", "advantages")
_NEEDED: Mapping[str, Sequence[str]] = {
    "cross_entropy": (),
    "importance_sampling": _SAMPLED,
    "ppo": _SAMPLED,
    "cispo": _SAMPLED,
    "dro": _SAMPLED,
    "gspo": (*_SAMPLED, "sequence_ratio_mask"),
    "stable_reinforce": (),
}
# Fields that say what is learned.
_LEARNED = ("weights", "advantages")
# The service looks up what it recorded of the sampled sequences that the spans name.
_NEEDS_PROVENANCE = "stable_reinforce"


@dataclass(frozen=True)
class CustomBatch:
    """The encoded datums of a custom step, one request per chunk."""

    data: Sequence[Datum]
    chunks: Sequence[EncodedBatch]

    @property
    def size(self) -> int:
        """Number of weights of all datums."""
        return sum(chunk.weight_count for chunk in self.chunks)

    def write_weights(self, weights: Array) -> None:
        """Replaces the weights of all datums in place, which no request in flight may still read.

        Args:
            weights: float32, concatenated over the datums.
        """
        for chunk, part in zip(self.chunks, self._parts(), strict=True):
            chunk.write_weights(weights[part])

    def with_advantages(self, logprobs: Array, advantages: Array) -> "CustomBatch":
        """Returns the datums with logprobs and advantages instead of weights, both float32 and concatenated."""
        return CustomBatch(
            self.data,
            [
                chunk.with_advantages(logprobs[part], advantages[part])
                for chunk, part in zip(self.chunks, self._parts(), strict=True)
            ],
        )

    def _parts(self) -> list[slice]:
        stops = itertools.accumulate((chunk.weight_count for chunk in self.chunks), initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(stops)]


def checked_chunks(
    data: Sequence[Datum], loss_fn: str, config: LossConfig, limits: ServerConfig
) -> Sequence[PlannedBatch]:
    """Returns the datums for a loss of the service in chunks that are encoded when they are sent.

    Raises:
        InvalidData: the datums, the loss or its config are invalid.
    """
    datums = checked_data(data, loss_fn, config)
    parts = plan_chunks(datums, max_datums=limits.fwdbwd_max_chunk_len, max_bytes=limits.fwdbwd_max_chunk_bytes_count)
    return [PlannedBatch(part, sum(map(bytes_of, part))) for part in parts]


def loss_config(given: LossConfig | None) -> LossConfig:
    """Returns the settings of a loss with Python's numbers; `check_loss` checks them."""
    if given is None:
        return {}
    return {name: plain(value) for name, value in given.items()} if isinstance(given, Mapping) else given  # pyright: ignore[reportUnnecessaryIsInstance]


def checked_data(
    data: Sequence[Datum], loss_fn: str = "cross_entropy", config: LossConfig | None = None
) -> Sequence[Datum]:
    """Returns the datums if a loss of the service accepts them; else raises InvalidData."""
    datums = check_data(data)
    check_loss(loss_fn, {} if config is None else config)
    check_inputs(datums, loss_fn)
    return datums


def custom_batch(data: Sequence[Datum], limits: ServerConfig) -> CustomBatch:
    """Encodes checked datums of a custom step: only their targets and weights."""
    max_datums, max_bytes = limits.fwdbwd_max_chunk_len, limits.fwdbwd_max_chunk_bytes_count
    parts = plan_chunks(data, max_datums=max_datums, max_bytes=max_bytes, custom=True)
    return CustomBatch(data, [encode_custom_batch(part) for part in parts])


def check_data(data: Sequence[Datum]) -> Sequence[Datum]:
    """Returns a non-empty list of datums, official ones converted; raises InvalidData for anything else."""
    if isinstance(data, Datum) or not isinstance(data, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"data must be a list of Datum, got a {type(data).__name__}")
    if not data:
        raise InvalidData("data is empty: pass at least one datum")
    datums = own_datums(data)
    for index, datum in enumerate(datums):
        if datum.model_input.size.length == 0:
            raise InvalidData(f"model_input of datum {index} is empty: it needs at least one token")
    return datums


def check_targets(data: Sequence[Datum]) -> None:
    """Raises InvalidData unless the targets fit the input, and the weights fit the targets, of every datum."""
    for index, datum in enumerate(data):
        shape = target_shape(datum, index)
        targets = datum.loss_fn_inputs["target_tokens"]
        if targets.dtype != "int64":
            raise InvalidData(f"target_tokens of datum {index} must be integers, got {targets.dtype}")
        length = datum.model_input.size.length
        if length is not None and shape[0] != length:
            raise InvalidData(
                f"target_tokens of datum {index} have shape {shape}, but its model_input has "
                f"{length} tokens: one target per input position is needed (targets are pre-shifted)"
            )
        weights = datum.loss_fn_inputs.get("weights")
        if weights is not None and weights.shape != shape:
            raise InvalidData(
                f"weights of datum {index} have shape {weights.shape}, its target_tokens {shape}; they must be equal"
            )
        if length is not None and not datum.model_input.size.is_text:
            _check_learns_text(datum, index)


def _check_learns_text(datum: Datum, index: int) -> None:
    """Raises InvalidData if a position whose target is an image or audio is learned."""
    text = datum.model_input.text_mask()[1:]
    for name in _LEARNED:
        if name not in datum.loss_fn_inputs:
            continue
        rows = datum.loss_fn_inputs[name].to_numpy()
        learned = (rows != 0).reshape(len(rows), -1).any(axis=1)[: text.size]
        wrong = np.flatnonzero(learned & ~text[: learned.size])
        if wrong.size:
            raise InvalidData(
                f"{name} of datum {index} are not 0 at position {wrong[0]}, whose target is part of an image or of "
                f"audio, which the model does not predict: set them to 0 at {wrong.size} positions"
            )


def check_inputs(data: Sequence[Datum], loss_fn: str) -> None:
    """Raises InvalidData if a datum lacks a field that a loss of the protocol needs."""
    needed = _NEEDED.get(loss_fn)
    if needed is None:
        return
    check_targets(data)
    for index, datum in enumerate(data if needed else ()):
        missing = [name for name in needed if name not in datum.loss_fn_inputs]
        if missing:
            raise InvalidData(
                f"datum {index} has no {', '.join(map(repr, missing))} in loss_fn_inputs, which loss_fn {loss_fn!r} "
                f"needs (it has {sorted(datum.loss_fn_inputs)})"
            )
    for index, datum in enumerate(data if loss_fn == _NEEDS_PROVENANCE else ()):
        if not any(isinstance(span, SampledProvenanceSpan) for span in datum.loss_fn_input_spans or ()):
            raise InvalidData(
                f"datum {index} names no sampled sequence, which loss_fn {loss_fn!r} needs: sample with "
                "record_stability_info=True, and use datum.with_provenance"
            )


def check_encodable(data: Sequence[Datum], encoding: EncodingName) -> None:
    """Raises InvalidData for what the encoding has no form for: images that only the service has, and provenance."""
    for index, datum in enumerate(data):
        if encoding == "json" and datum.model_input_spans is not None:
            raise InvalidData(f"datum {index} has provenance, which JSON cannot represent: use wire='protobuf'")
        for chunk in datum.model_input.chunks:
            if encoding == "protobuf" and isinstance(chunk, ImageAssetPointerChunk):
                raise InvalidData(
                    f"datum {index} contains an ImageAssetPointerChunk, which protobuf cannot represent: pass the "
                    "image itself, as an ImageChunk, or use wire='json'"
                )


def check_loss(loss_fn: str, config: Mapping[str, float | str]) -> None:
    """Raises InvalidData unless the name and the config of a loss can be encoded."""
    if not isinstance(loss_fn, str) or not loss_fn:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"loss_fn must be the name of a loss, got {shown(loss_fn)}")
    if not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"loss_fn_config must map names to numbers or texts, got {shown(config)}")
    for name, value in config.items():
        sendable = isinstance(value, str | int | float) and not isinstance(value, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not isinstance(name, str) or not sendable:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"loss_fn_config must map names to numbers or texts, got {shown(name)}: {shown(value)}")
    try:
        encode_request(NO_DATUMS, PassHeader("", 1, loss_fn, config, forward_only=True))
    except (ValueError, OverflowError) as error:
        raise InvalidData(
            f"loss_fn {loss_fn!r} with loss_fn_config {shown(dict(config))} cannot be encoded: {error}"
        ) from None


def check_finite(data: Sequence[Datum], config: Mapping[str, float | str], *, fields: Collection[str] | None) -> None:
    """Raises InvalidData for NaN and infinity, which JSON cannot represent.

    Args:
        data: the datums.
        config: settings of the loss.
        fields: the loss inputs that are sent; None means all.
    """
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidData(f"loss_fn_config[{name!r}] is {value}, which JSON cannot represent: use wire='protobuf'")
    for index, datum in enumerate(data):
        for name, tensor in datum.loss_fn_inputs.items():
            is_sent = fields is None or name in fields
            if is_sent and tensor.dtype == "float32" and not np.isfinite(tensor.data).all():
                raise InvalidData(
                    f"{name!r} of datum {index} is not finite, which JSON cannot represent: use wire='protobuf'"
                )


def plan_chunks(
    data: Sequence[Datum], *, max_datums: int, max_bytes: int, custom: bool = False
) -> list[Sequence[Datum]]:
    """Cuts data greedily into chunks; a datum that exceeds the limit by itself becomes its own chunk.

    Args:
        data: all datums, in order.
        max_datums: maximum number of datums per chunk.
        max_bytes: maximum number of estimated bytes per chunk, see `bytes_of`.
        custom: a custom step sends only targets and one float32 weight for each of them.
    """
    chunks: list[Sequence[Datum]] = []
    start, size = 0, 0
    for index, datum in enumerate(data):
        estimate = _bytes_of_custom(datum) if custom else bytes_of(datum)
        if index > start and (size + estimate > max_bytes or index - start >= max_datums):
            chunks.append(data[start:index])
            start, size = index, 0
        size += estimate
    if start < len(data):
        chunks.append(data[start:])
    return chunks


def bytes_of(datum: Datum) -> int:
    """Returns the estimated bytes of a datum: the stored bytes of every chunk and of every loss input."""
    return datum.model_input.size.stored_bytes + sum(_bytes_stored(tensor) for tensor in datum.loss_fn_inputs.values())


def _bytes_of_custom(datum: Datum) -> int:
    targets = datum.loss_fn_inputs["target_tokens"]
    return datum.model_input.size.stored_bytes + _bytes_stored(targets) + 4 * math.prod(targets.shape)


def _bytes_stored(tensor: TensorData) -> int:
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    return tensor.data.nbytes + (0 if crow is None or col is None else crow.nbytes + col.nbytes)


def without_padding(output: ForwardBackwardOutput, data: Sequence[Datum]) -> ForwardBackwardOutput:
    """Cuts logprobs that the service has padded to the length of a longer datum of the request.

    Args:
        output: the result of the request; returned as it is where anything else is wrong with its shapes.
        data: the datums of the request.
    """
    logprobs = output.packed.get("logprobs")
    if logprobs is None or not _have_one_length(logprobs, len(data)):
        return output
    expected = [
        datum.loss_fn_inputs["target_tokens"].shape for datum in data if "target_tokens" in datum.loss_fn_inputs
    ]
    if len(expected) != len(data) or any(len(shape) != 1 for shape in expected):
        return output
    found = logprobs.shapes
    if found == expected or found[0] != max(expected):
        return output
    rows = [logprobs.datum(index)[:length] for index, (length,) in enumerate(expected)]
    return output.model_copy(update={"packed": {**output.packed, "logprobs": PackedTensor.from_arrays(rows)}})


def _have_one_length(logprobs: PackedTensor, count: int) -> bool:
    ends = logprobs.offsets
    return len(ends) == count + 1 > 2 and ends[-1] == count * ends[1]


def merge_outputs(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """Merges the results of the chunks of one call, in chunk order."""
    if len(outputs) == 1:
        return outputs[0]
    names = list(dict.fromkeys(name for output in outputs for name in output.packed))
    return ForwardBackwardOutput(
        loss_fn_output_type=outputs[0].loss_fn_output_type,
        num_datums=sum(output.num_datums for output in outputs),
        packed={name: PackedTensor.join([_field(output, name) for output in outputs]) for name in names},
        metrics=merge_metrics([output.metrics for output in outputs], [output.num_datums for output in outputs]),
    )


def _field(output: ForwardBackwardOutput, name: str) -> PackedTensor:
    return output.packed.get(name) or PackedTensor.empty(output.num_datums)


def merge_metrics(parts: Sequence[Mapping[str, float]], weights: Sequence[int]) -> dict[str, float]:
    """Merges metrics by the suffix after their last colon (protocol: "Merging chunk results").

    A metric with an unknown suffix, or that a chunk lacks, keeps the value of the first chunk that has it.

    Args:
        parts: metrics of every chunk.
        weights: number of datums of every chunk.
    """
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        suffix = name.rpartition(":")[2]
        if suffix == "unique":
            merged[name] = values[0]
            merged.update({f"{name}_{index}": value for index, value in enumerate(values[1:], start=1)})
        elif suffix in _REDUCTIONS and len(values) == len(parts):
            merged[name] = _REDUCTIONS[suffix](values, weights)
        else:
            merged[name] = values[0]
    return merged


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else values[0]


def _hash(values: Sequence[float], _weights: Sequence[int]) -> float:
    if not all(math.isfinite(value) for value in values):
        return values[0]
    return float(sum(int(value) % 2**64 for value in values) % 2**64)


_REDUCTIONS: Mapping[str, Callable[[Sequence[float], Sequence[int]], float]] = {
    "sum": lambda values, _weights: sum(values),
    "min": lambda values, _weights: min(values),
    "max": lambda values, _weights: max(values),
    "mean": _mean,
    "slack": lambda values, weights: max(values) - _mean(values, weights),
    "hash2": _hash,
}
