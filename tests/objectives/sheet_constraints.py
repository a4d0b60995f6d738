"""Constraints instead of weights: section H of the sheet."""

from collections.abc import Mapping, Sequence

from tests.objectives.entries import Row, Value
from tinkex_py import BaseLossOutput, CustomLossOutput, RegularizerOutput
from tinkex_py.losses.constraints import Constraint, DualAscent, LogDualAscent, PIDMultiplier

Call = tuple[float, Mapping[str, float]]


def call(constraint: Constraint, value: float, metrics: Mapping[str, float]) -> CustomLossOutput:
    """The output of one call in which the regularizer has this value."""
    measured = constraint.measured(value, metrics, "token-mean")
    own = RegularizerOutput(name="r", value=value, weight=1.0, contribution=value, constraint=measured)
    return CustomLossOutput(loss_total=0.0, base_loss=BaseLossOutput(value=0.0), regularizers={"r": own})


def multipliers(constraint: Constraint, *steps: Sequence[Call]) -> list[float]:
    """The multiplier after each optimizer step, of one or several calls."""
    constraint.weight_of("r")
    found = []
    for calls in steps:
        constraint.update([call(constraint, value, metrics) for value, metrics in calls])
        found.append(constraint.weight_of("r"))
    return found


def over(*values: float) -> list[list[Call]]:
    """One call per step."""
    return [[(value, {})] for value in values]


H1 = over(0.5, 0.3, 0.1)
H2 = over(0.3, 0.5, 0.1)
H3: list[Call] = [(0.4, {"tokens": 10.0}), (0.1, {"tokens": 90.0})]


def seen(calls: Sequence[Call]) -> float:
    """The value that a multiplier sees: with rate 1 and bound 0, it is the multiplier."""
    return multipliers(DualAscent(at_most=0.0, rate=1.0), calls)[0]


ROWS: list[Row] = []
PARTS: list[Call] = [
    (0.04, {"tokens": 10.0, "total_of_step": 100.0}),  # of one mean over the 100 tokens of the step
    (0.09, {"tokens": 90.0, "total_of_step": 100.0}),
]
VALUES = [
    Value(
        "H1",
        "projected",
        lambda: multipliers(DualAscent(at_most=0.2, rate=0.1, initial=0.5), *H1),
        [0.53, 0.54, 0.53],
    ),
    Value(
        "H1",
        "log_param",
        lambda: multipliers(LogDualAscent(at_most=0.2, rate=0.1, initial=0.5), *H1),
        [0.507557, 0.510139, 0.507543],
    ),
    Value("H2", "pid", lambda: multipliers(PIDMultiplier(at_most=0.2), *H2), [0.011, 0.036, 0.0]),
    Value("H3", "mean_unweighted", lambda: seen([(value, {}) for value, _ in H3]), 0.25),
    Value("H3", "mean_by_tokens", lambda: seen(H3), 0.13),
    Value("H3", "mean_of_parts", lambda: seen(PARTS), 0.13),
]
