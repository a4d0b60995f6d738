"""Long calls go to the service in chunks, and their results come back as one."""

import math
from collections.abc import Callable, Mapping, Sequence

from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor, TensorData


def plan_chunks(
    data: Sequence[Datum], *, max_datums: int, max_bytes: int, custom: bool = False
) -> list[Sequence[Datum]]:
    """Cuts data greedily into chunks; a datum that is too large alone is a chunk of its own.

    Args:
        data: all datums, in order.
        max_datums: most datums of a chunk.
        max_bytes: most bytes of a chunk: 4 per token, and the stored bytes of every loss input.
        custom: of a custom step, which sends only targets, and a float32 for each of their numbers.
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
    """Estimated bytes of a datum: 4 per token, and the stored bytes of every loss input."""
    return 4 * datum.model_input.length + sum(_bytes_stored(tensor) for tensor in datum.loss_fn_inputs.values())


def _bytes_of_custom(datum: Datum) -> int:
    targets = datum.loss_fn_inputs["target_tokens"]
    return 4 * datum.model_input.length + _bytes_stored(targets) + 4 * math.prod(targets.shape)


def _bytes_stored(tensor: TensorData) -> int:
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    return tensor.data.nbytes + (0 if crow is None or col is None else crow.nbytes + col.nbytes)


def merge_outputs(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """The result of one call from the results of its chunks, in chunk order."""
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
    """Merges metrics by the suffix behind their last colon (protocol: "Merging chunk results").

    Args:
        parts: metrics of every chunk.
        weights: datums of every chunk.

    Returns:
        Merged metrics. A name that is unknown or not in every chunk is kept from the first chunk that has it.
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
