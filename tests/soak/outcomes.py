"""What calls ended in, as texts that are equal exactly when every number is."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tests.soak.watch import SoakFailed
from tinkex_py import CustomLossOutput, ForwardBackwardOutput, OptimStepResponse

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """One call's.

    Attributes:
        kind: of the call.
        failure: class of the error; None if it went well.
        told: the numbers, or what the error names.
        compared: whether a twin must have the same; not so where a caller left at any moment.
    """

    kind: str
    failure: str | None
    told: str
    compared: bool = True


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Of names, shapes and every bit."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()[:16]


def told_by(output: object) -> str:
    """The numbers of an output."""
    if isinstance(output, CustomLossOutput):
        terms = {name: (term.value, term.weight, term.grad_norm) for name, term in output.regularizers.items()}
        assert output.service_output is not None
        return (
            f"loss_total={output.loss_total!r} base={output.base_loss.value!r} terms={terms!r} "
            f"norm={output.total_grad_norm!r} skipped={sorted(output.skipped.items())} "
            f"backward: {told_by(output.service_output)}"
        )
    if isinstance(output, ForwardBackwardOutput):
        packed = {name: field.values for name, field in output.packed.items()}
        return f"metrics={sorted(output.metrics.items())!r} outputs={digest(packed)}"
    if isinstance(output, OptimStepResponse):
        return f"metrics={sorted((output.metrics or {}).items())!r}"
    return str(output)


def check_same(where: str, spoiled: list[Outcome], quiet: list[Outcome]) -> int:
    """The outcomes of a run and of its twin; how many were compared."""
    if len(spoiled) != len(quiet):
        raise SoakFailed(f"{where}: {len(spoiled)} calls, its twin made {len(quiet)}")
    compared = 0
    for number, (one, other) in enumerate(zip(spoiled, quiet, strict=True)):
        if one.compared and other.compared:
            compared += 1
            if one != other:
                raise SoakFailed(f"{where}, call {number}:\n  with faults:    {one}\n  without faults: {other}")
    return compared


def check_same_weights(where: str, spoiled: Weights, quiet: Weights) -> int:
    """Bit for bit; how many tensors."""
    if spoiled.keys() != quiet.keys():
        raise SoakFailed(f"{where}: other tensors: {sorted(spoiled.keys() ^ quiet.keys())}")
    for name, values in spoiled.items():
        if not np.array_equal(values, quiet[name]):
            most = float(np.max(np.abs(values.astype(np.float64) - quiet[name].astype(np.float64))))
            raise SoakFailed(f"{where}: {name} differs from the run without faults, by at most {most:g}")
    return len(spoiled)
