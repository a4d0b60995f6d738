"""Every entry of the sheet: its numbers, its gradient, and what holds for all of them.

The tables are `sheet_*.py`. Numbers there were computed in float64 with plain torch, apart from this package.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

import tests.objectives
from tests.objectives.entries import (
    Row,
    Value,
    check,
    evaluated,
    numbers_of,
    with_masked_positions,
    with_nothing_selected,
)
from tinkex_py import Pipeline

SHEETS = [
    importlib.import_module(f"tests.objectives.{module.name}")
    for module in pkgutil.iter_modules(tests.objectives.__path__)
    if module.name.startswith("sheet_")
]
ROWS: list[Row] = [row for sheet in SHEETS for row in sheet.ROWS]
VALUES: list[Value] = [value for sheet in SHEETS for value in sheet.VALUES]
Compared = Callable[[str, object], None]

each_row = pytest.mark.parametrize("row", ROWS, ids=str)
each_masked_row = pytest.mark.parametrize("row", [row for row in ROWS if row.masked], ids=str)


@each_row
def test_value_and_gradient(row: Row, record_property: Compared) -> None:
    value, gradient, metrics = evaluated(row.term, row.batch)
    check(value, row.loss)
    if row.grad is not None:
        check(gradient, row.grad)
    for name, expected in row.metrics.items():
        check(metrics[name], expected)
    record_property("sheet", row.entry)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_other_numbers(value: Value, record_property: Compared) -> None:
    check(value.compute(), value.expected)
    record_property("sheet", value.entry)


@pytest.mark.parametrize("row", [row for row in ROWS if row.smooth], ids=str)
def test_the_gradient_is_the_derivative(row: Row) -> None:
    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        result: Any = row.term.compute(row.batch.data, logprobs)
        return result[0]

    assert gradcheck(loss, row.batch.packed.clone().requires_grad_())


@each_masked_row
def test_masked_positions_reach_nothing(row: Row) -> None:
    padded, old = with_masked_positions(row.batch)
    term = row.term.with_options({"mask": "weights"})
    value, gradient, _ = evaluated(term, padded)
    plain, expected, _ = evaluated(row.term, row.batch)
    kept = torch.cat(old)
    assert value.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(gradient[kept], expected)
    assert not gradient[~kept].any()


@pytest.mark.parametrize("row", [row for row in ROWS if row.masked and row.zero_if_empty], ids=str)
def test_without_any_position_the_loss_is_zero(row: Row) -> None:
    term = row.term.with_options({"mask": "weights"})
    value, gradient, _ = evaluated(term, with_nothing_selected(row.batch))
    assert value.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("row", [row for row in ROWS if row.together], ids=str)
def test_parts_add_up_to_the_whole(row: Row) -> None:
    """Packed equals per datum: calls that know the total add up to one call, in value and gradient."""
    total = row.term.total_of(row.batch.data)
    term = row.term if total is None else row.term.with_options({"total": total})
    count = len(row.batch.data)
    parts = [range(at, at + row.together) for at in range(0, count, row.together)]
    values, gradients, _ = zip(*(evaluated(term, row.batch.part(*part)) for part in parts), strict=True)
    value, gradient, _ = evaluated(row.term, row.batch)
    assert sum(values).item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients), gradient)


@each_row
def test_as_a_loss_of_the_official_sdk(row: Row) -> None:
    leaves = [part.clone().requires_grad_() for part in row.batch.logprobs]
    loss, _ = Pipeline(row.term).as_tinker_loss()(row.batch.data, leaves)
    loss.backward()
    value, gradient, _ = evaluated(row.term, row.batch)
    assert loss.item() == pytest.approx(value.item(), rel=1e-12)
    check(torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None]), numbers_of(gradient))


@pytest.mark.parametrize("row", [row for row in ROWS if not row.together], ids=str)
def test_a_term_that_couples_datums_says_so(row: Row) -> None:
    assert row.term.coupling
