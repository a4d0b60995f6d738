"""Outcomes of calls, as texts that are equal exactly if every number is equal."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tests.soak.watch import SoakFailed
from tinkex_py import CustomLossOutput, ForwardBackwardOutput, OptimStepResponse

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one call.

    Attributes:
        kind: kind of the call.
        failure: class of the error; None if it succeeded.
        numbers: the numbers, or the name in the error.
        compared: whether its twin must be equal; false if the call was cancelled at any moment.
    """

    kind: str
    failure: str | None
    numbers: str
    compared: bool = True


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns a digest of names, shapes and every bit."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()[:16]


def numbers_of(output: object) -> str:
    """Formats the numbers of an output."""
    if isinstance(output, CustomLossOutput):
        terms = {name: (term.value, term.weight, term.grad_norm) for name, term in output.regularizers.items()}
        assert output.service_output is not None
        return (
            f"loss_total={output.loss_total!r} base={output.base_loss.value!r} terms={terms!r} "
            f"norm={output.total_grad_norm!r} skipped={sorted(output.skipped.items())} "
            f"backward: {numbers_of(output.service_output)}"
        )
    if isinstance(output, ForwardBackwardOutput):
        packed = {name: field.values for name, field in output.packed.items()}
        return f"metrics={sorted(output.metrics.items())!r} outputs={digest(packed)}"
    if isinstance(output, OptimStepResponse):
        return f"metrics={sorted((output.metrics or {}).items())!r}"
    return str(output)


def check_same(where: str, spoiled: list[Outcome], quiet: list[Outcome]) -> int:
    """Compares the outcomes of a run and its twin; returns how many were compared."""
    if len(spoiled) != len(quiet):
        raise SoakFailed(f"{where}: {len(spoiled)} calls, but {len(quiet)} without faults")
    compared = 0
    for number, (one, other) in enumerate(zip(spoiled, quiet, strict=True)):
        if one.compared and other.compared:
            compared += 1
            if one != other:
                raise SoakFailed(f"{where}, call {number}:\n  with faults:    {one}\n  without faults: {other}")
    return compared


def check_same_weights(where: str, spoiled: Weights, quiet: Weights) -> int:
    """Compares tensors bit for bit; returns how many."""
    if spoiled.keys() != quiet.keys():
        raise SoakFailed(f"{where}: the tensors differ: {sorted(spoiled.keys() ^ quiet.keys())}")
    for name, values in spoiled.items():
        if not np.array_equal(values, quiet[name]):
            most = float(np.max(np.abs(values.astype(np.float64) - quiet[name].astype(np.float64))))
            raise SoakFailed(f"{where}: {name} differs from the run without faults, by at most {most:g}")
    return len(spoiled)
