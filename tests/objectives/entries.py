"""What the tables `sheet_*.py` hold: numbers worked out by hand, each under the name of its entry in the sheet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tinkex_py import Datum, ModelInput
from tinkex_py.terms.ready_made import ReadyMadeTerm

Numbers = float | Sequence[Any]


@dataclass(frozen=True)
class Batch:
    """Logprobs of one or more datums, `[T]` or `[T, K]` each, and the datums with their fields."""

    logprobs: Sequence[torch.Tensor]
    data: Sequence[Datum]

    @property
    def packed(self) -> torch.Tensor:
        return torch.cat(list(self.logprobs))

    def part(self, *indices: int) -> "Batch":
        return Batch([self.logprobs[index] for index in indices], [self.data[index] for index in indices])


@dataclass(frozen=True)
class Row:
    """One loss of the sheet.

    Attributes:
        entry: its name in the sheet, such as "A3".
        term: the term with its settings; it must accept the setting `mask`.
        batch: its input.
        loss: its value.
        grad: its gradient, flat; None if the sheet has none.
        metrics: further numbers of the sheet, by the names of the term's metrics.
        smooth: whether the gradient is the derivative of the value, near these logprobs.
        together: how many datums after each other belong together; 0 if all do.
        masked: whether `mask` may be set: not for numbers of the default mask that are no mask.
        zero_if_empty: whether the loss is 0 if the mask leaves nothing.
        what: tells rows of one entry apart.
    """

    entry: str
    term: ReadyMadeTerm
    batch: Batch
    loss: float
    grad: Sequence[float] | None = None
    metrics: Mapping[str, Numbers] = field(default_factory=dict)
    smooth: bool = True
    together: int = 1
    masked: bool = True
    zero_if_empty: bool = True
    what: str = ""

    def __str__(self) -> str:
        return f"{self.entry}-{type(self.term).__name__}{'-' if self.what else ''}{self.what}"


@dataclass(frozen=True)
class Value:
    """Numbers of the sheet that are not a loss: `compute` returns ours."""

    entry: str
    what: str
    compute: Callable[[], Any]
    expected: Numbers

    def __str__(self) -> str:
        return f"{self.entry}-{self.what}"


def batch(logprobs: Sequence[Any], /, **fields: Sequence[Any]) -> Batch:
    """A batch from nested lists: one entry per datum, for the logprobs and for each field."""
    parts = [torch.as_tensor(part, dtype=torch.float64) for part in logprobs]
    return Batch(
        parts, [datum_of(part, {name: values[at] for name, values in fields.items()}) for at, part in enumerate(parts)]
    )


def datum_of(logprobs: torch.Tensor, fields: Mapping[str, Any]) -> Datum:
    inputs: dict[str, Any] = {"target_tokens": np.arange(logprobs.numel()).reshape(logprobs.shape)}
    inputs |= {name: np.asarray(values, np.float32) for name, values in fields.items()}
    return Datum(model_input=ModelInput.from_ints([1] * len(logprobs)), loss_fn_inputs=inputs)


def with_masked_positions(given: Batch) -> tuple[Batch, list[torch.Tensor]]:
    """Puts a position of mask 0 with -inf and nan before every datum; the second value marks the old positions."""
    parts, data, old = [], [], []
    for at, (part, datum) in enumerate(zip(given.logprobs, given.data, strict=True)):
        parts.append(torch.cat([torch.full_like(part[:1], -torch.inf if at % 2 else torch.nan), part]))
        fields = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items() if name != "target_tokens"}
        fields.setdefault("weights", np.ones(len(part), np.float32))
        padded = {
            name: np.concatenate([np.full_like(values[:1], 0.0 if name == "weights" else np.nan), values])
            for name, values in fields.items()
        }
        data.append(datum_of(parts[-1], padded))
        old.append(torch.tensor([False] + [True] * len(part)))
    return Batch(parts, data), old


def with_nothing_selected(given: Batch) -> Batch:
    """The batch with `weights` of 0 everywhere."""
    data = []
    for part, datum in zip(given.logprobs, given.data, strict=True):
        fields = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items() if name != "target_tokens"}
        data.append(datum_of(part, {**fields, "weights": np.zeros(part.shape)}))
    return Batch(given.logprobs, data)


def evaluated(term: ReadyMadeTerm, given: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Loss, gradient and metrics of a term on packed logprobs."""
    leaf = given.packed.clone().requires_grad_()
    result: Any = term.compute(given.data, leaf)
    (gradient,) = torch.autograd.grad(result[0], leaf)
    return result[0].detach(), gradient, dict(result[1])


def numbers_of(values: Any) -> list[float]:
    if isinstance(values, torch.Tensor):
        values = values.detach().double().reshape(-1).tolist()
    return [float(one) for one in np.ravel(values)]


def check(computed: Any, expected: Numbers) -> None:
    """Compares with printed numbers: six decimals are rounded, fewer than four are exact up to the fields' float32."""
    ours, printed = numbers_of(computed), numbers_of(expected)
    assert len(ours) == len(printed), (ours, printed)
    for own, number in zip(ours, printed, strict=True):
        digits = len(repr(number).partition(".")[2])
        rounding = 0.5 * 10.0**-digits if digits >= 4 else 0.0
        assert own == pytest.approx(number, rel=2e-7, abs=rounding + 1e-7), (ours, printed)
