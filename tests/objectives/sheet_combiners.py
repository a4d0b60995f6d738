"""Balancing controllers, and combiners of gradients from their products: sections I and J of the sheet."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.objectives.entries import Row, Value
from tinkex_py import BaseLossOutput, CustomLossOutput, RegularizerOutput, WeightController
from tinkex_py.losses.balancing import DWA, FAMO, famo_slopes, log_variance_slope
from tinkex_py.losses.combiners import aligned, balancing_factors, cagrad, mgda, nash, upgrad

TWO = np.array([[1.0, 0.0], [-0.5, 1.0]])
THREE = np.array([[1.0, 0.0, 0.0], [-0.5, 1.0, 0.0], [0.0, -0.5, 2.0]])
LONG = TWO * [[1.0], [10.0]]  # the second gradient ten times as long

METHODS: dict[str, Callable[[Any], Any]] = {
    "upgrad": lambda gram: upgrad(gram, np.full(len(gram), 1.0 / len(gram))),
    "mgda": mgda,
    "cagrad": lambda gram: cagrad(gram, 0.5),
    "nash": lambda gram: nash(gram, np.ones(len(gram))),
    "aligned": aligned,
}


def coefficients(method: str, rows: Any) -> list[float]:
    """The published coefficients, of the mean for UPGrad and CAGrad."""
    return METHODS[method](rows @ rows.T).tolist()


def of(entry: str, rows: Any, numbers: dict[str, tuple[list[float], list[float]]]) -> list[Value]:
    """Coefficients and their direction."""
    values = []
    for method, (expected, direction) in numbers.items():
        values.append(Value(entry, method, lambda method=method: coefficients(method, rows), expected))
        values.append(Value(entry, f"{method}-d", lambda method=method: coefficients(method, rows) @ rows, direction))
    return values


def weights_of(controller: WeightController, *steps: tuple[float, float]) -> float:
    """The weight of a regularizer after steps with these values of base loss and regularizer."""
    controller.weight_of("r")
    for base, value in steps:
        own = RegularizerOutput(name="r", value=value, weight=1.0, contribution=value)
        output = CustomLossOutput(loss_total=0.0, base_loss=BaseLossOutput(value=base), regularizers={"r": own})
        controller.update([output])
    return controller.weight_of("r")


def shares_of(weight: float) -> list[float]:
    """The weights of base loss and regularizer, divided by their sum."""
    return [1.0 / (1.0 + weight), weight / (1.0 + weight)]


EQUAL = {"base_loss": 0.0, "r": 0.0}
PROGRESS = {"base_loss": 0.223144, "r": 0.051293}

ROWS: list[Row] = []
VALUES = [
    Value("I1", "relative", lambda: weights_of(DWA(), (2.0, 1.0), (1.0, 0.9)), 1.221403),
    Value("I2", "weights", lambda: shares_of(weights_of(FAMO(), (1.0, 2.0))), [0.666667, 0.333333]),
    Value("I2", "slopes", lambda: list(famo_slopes(EQUAL, PROGRESS).values()), [0.042963, -0.042963]),
    Value("I3", "slope", lambda: log_variance_slope(2.0, -0.5), -1.148721),
    Value("I3", "best", lambda: log_variance_slope(2.0, 0.693147), 0.0),
    *of(
        "J2",
        TWO,
        {
            "upgrad": ([0.75, 0.7], [0.4, 0.7]),
            "mgda": ([0.538462, 0.461538], [0.307692, 0.461538]),
            "cagrad": ([0.801306, 0.686834], [0.457889, 0.686834]),
            "nash": ([1.344997, 1.203002], [0.743496, 1.203002]),
            "aligned": ([1.041514, 0.946830], [0.568098, 0.946830]),
        },
    ),
    *of(
        "J3",
        THREE,
        {
            "upgrad": ([0.583333, 0.639918, 0.389010], [0.263374, 0.445413, 0.778020]),
            "mgda": ([0.463035, 0.428016, 0.108949], [0.249027, 0.373541, 0.217899]),
            "cagrad": ([0.647950, 0.650623, 0.333333], [0.322638, 0.483957, 0.666667]),
            "nash": ([1.400227, 1.372114, 0.572453], [0.714170, 1.085887, 1.144906]),
            "aligned": ([1.050001, 1.014082, 0.457282], [0.542960, 0.785441, 0.914563]),
        },
    ),
    *of(
        "J10",
        LONG,
        {
            "upgrad": ([3.0, 0.52], [0.4, 5.2]),
            "mgda": ([0.955882, 0.044118], [0.735294, 0.441176]),
            "cagrad": ([3.192582, 0.5], [0.692582, 5.0]),
            "nash": ([1.344997, 0.120300], [0.743496, 1.203002]),
            "aligned": ([1.035493, 0.118342], [0.443783, 1.183421]),
        },
    ),
    Value("J11", "powers", lambda: nash(TWO @ TWO.T, np.array([1.0, 4.0])).tolist(), [1.674589, 2.154855]),
    Value("J12", "unit lengths", lambda: unit_mgda(LONG), [0.5, 0.044721]),
    Value("J13", "negative", lambda: aligned(np.array([[1.0, 3.0], [3.0, 9.5]])).tolist(), [0.645840, -0.115858]),
]


def unit_mgda(rows: Any) -> Any:
    """The factors of a pipeline without their unit, the sum of the lengths."""
    factors = balancing_factors("mgda", rows @ rows.T, np.ones(len(rows)))
    return factors / np.sqrt((rows**2).sum(1)).sum()
