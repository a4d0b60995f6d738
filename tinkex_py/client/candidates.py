"""Targets of `[T, K]` for a service that carries a gradient for one target per position only.

The loss that carries a gradient is linear in the logprobs. K datums with the same input and one candidate each have
therefore the same gradient as one datum with K candidates, at K times the computation.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from tinkex_py.errors import UnsupportedFeature
from tinkex_py.types import Datum, PackedTensor
from tinkex_py.types.tensors import Array


def check_splittable(data: Sequence[Datum], host: str, sequences_per_step: int | None) -> None:
    """Raises UnsupportedFeature if datums with one target per position cannot have the gradient of these datums."""
    for index, datum in enumerate(data):
        targets = datum.loss_fn_inputs["target_tokens"]
        if targets.is_sparse or 0 in targets.shape[1:]:
            raise UnsupportedFeature(
                f"{host} does not support the gradients of custom losses for targets with candidates, which are then "
                f"sent one by one, but target_tokens of datum {index} have shape {targets.shape}"
                f"{' and are sparse' if targets.is_sparse else ''}: pass dense targets with at least one candidate. "
                "Nothing was sent for these datums"
            )
    counts = sorted({count for _, count in _sizes(data)})
    if sequences_per_step is not None and len(counts) > 1:
        raise UnsupportedFeature(
            f"{host} does not support the gradients of custom losses for targets with candidates, which are then sent "
            f"one by one. Its divisor is the number of all datums until optim_step, and sequences_per_step="
            f"{sequences_per_step} does not tell it for datums with {' and '.join(map(str, counts))} candidates: pass "
            "datums with the same number of candidates, or all datums in one call without sequences_per_step. Nothing "
            "was sent for these datums"
        )


def one_target_each(data: Sequence[Datum]) -> list[Datum]:
    """Returns a datum with targets of `[T]` for each candidate of each datum, in order."""
    parts: list[Datum] = []
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        columns = [targets] if targets.ndim == 1 else list(targets.T)
        parts += [Datum(model_input=datum.model_input, loss_fn_inputs={"target_tokens": one}) for one in columns]
    return parts


def joined_logprobs(logprobs: PackedTensor, data: Sequence[Datum]) -> PackedTensor:
    """Returns the logprobs of `one_target_each(data)` in the shapes of the targets of the datums."""
    shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in data]
    rows = _cut(logprobs.values, data, candidates_first=True)
    return PackedTensor.from_arrays([row.T.reshape(shape) for row, shape in zip(rows, shapes, strict=True)])


def split_gradient(gradient: Array, data: Sequence[Datum]) -> Array:
    """Returns a gradient that is concatenated over the datums in the order of `one_target_each(data)`."""
    return np.concatenate([row.T.reshape(-1) for row in _cut(gradient, data, candidates_first=False)])


def _cut(values: Array, data: Sequence[Datum], *, candidates_first: bool) -> Iterator[Array]:
    start = 0
    for length, count in _sizes(data):
        part = values[start : start + length * count]
        yield part.reshape((count, length) if candidates_first else (length, count))
        start += length * count


def _sizes(data: Sequence[Datum]) -> Iterator[tuple[int, int]]:
    """Yields the positions and the candidates per position of each datum."""
    for datum in data:
        shape = datum.loss_fn_inputs["target_tokens"].shape
        yield shape[0], 1 if len(shape) == 1 else shape[1]
