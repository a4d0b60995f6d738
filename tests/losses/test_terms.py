"""Rows 5-12, 23-35 and 78-84 of the guide: what a term is, and what it may return."""

import asyncio
import functools
import math
from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from tests.losses.support import GUIDE_VALUES, async_l2, guide_logprobs, l1, l2, nll, spec
from tinkex_py import (
    Datum,
    Executor,
    GradientTracker,
    InvalidSpec,
    InvalidTermResult,
    Pipeline,
    Regularizer,
    RegularizerError,
    RegularizerSpec,
    execute,
    per_datum,
    sum_over_datums,
)

pytestmark = pytest.mark.asyncio


class L1Sparsity:
    """Row 26."""

    name = "l1_sparsity"

    def compute(self, data: Sequence[Datum], logprobs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, dict]:
        loss = logprobs.abs().sum()
        return loss, {"l1_value": loss.item()}


class AsyncObject:
    name = "async_object"

    async def compute(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(0)
        return logprobs.pow(2).sum()


class AsyncCall:
    async def __call__(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(0)
        return logprobs.pow(2).sum()


class NamedByProperty:
    @property
    def name(self) -> str:
        return "from_property"

    def compute(self, data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.sum()


async def one(regularizer: RegularizerSpec, **options: Any) -> Any:
    return await Executor.execute_one(regularizer, [], guide_logprobs(), **options)


async def test_row_5_the_protocol_is_structural():
    assert isinstance(L1Sparsity(), Regularizer)
    assert isinstance(AsyncObject(), Regularizer)
    assert not isinstance(object(), Regularizer)


@pytest.mark.parametrize(
    ("result", "seen"),
    [
        (None, "NoneType"),
        (1.0, "float"),
        (3, "int"),
        (1j, "complex"),
        (torch.tensor(1j), "complex"),
        ("text", "str"),
        ((torch.tensor(1.0),), "tuple of length 1"),
        ((torch.tensor(1.0), {}, {}), "tuple of length 3"),
        ((torch.tensor(1.0), [("a", 1)]), "list"),
        ([torch.tensor(1.0), {}], "list"),
        (np.float32(1.0), "float32"),
    ],
)
async def test_rows_7_and_8_anything_else_is_an_invalid_result(result: Any, seen: str):
    async def later(data: Any, logprobs: Any) -> Any:
        return result

    for term in (later, lambda data, logprobs: result):
        with pytest.raises(InvalidTermResult, match=seen) as caught:
            await one(spec(term, "odd"))
        assert caught.value.name == "odd"
        assert isinstance(caught.value, TypeError)
        with pytest.raises(InvalidTermResult, match=seen):
            await execute(term, [], guide_logprobs())


@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (1, 5), (5, 2, 1)])
async def test_row_8_any_shape_is_summed(shape: tuple[int, ...]):
    count = math.prod(shape) // 5 or 1

    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        if not shape:
            return logprobs.sum()
        return logprobs.reshape(-1, 1).expand(5, count).reshape(shape)

    output = await one(spec(term, "shaped"), track_grad_norms=True)
    assert output.value == pytest.approx(-4.9 * count, rel=1e-6)
    assert output.grad_norm == pytest.approx(count * math.sqrt(5), rel=1e-6)


async def test_row_9_metrics_become_plain_numbers():
    given = {
        "flag": (True, True),
        "count": (3, 3),
        "ratio": (0.25, 0.25),
        "tensor": (torch.tensor(1.5), 1.5),
        "whole": (torch.tensor(7), 7),
        "truth": (torch.tensor(False), False),
        "numpy": (np.float64(2.5), 2.5),
        "numpy_flag": (np.bool_(True), True),
        "inf": (math.inf, math.inf),
    }
    metrics = {name: value for name, (value, _) in given.items()}
    got = (await one(spec(lambda d, p: (p.sum(), {**metrics, "nan": math.nan}), "m"))).custom_metrics
    assert math.isnan(got.pop("nan"))
    assert {name: (value, type(value)) for name, value in got.items()} == {
        name: (expected, type(expected)) for name, (_, expected) in given.items()
    }


@pytest.mark.parametrize(
    "value", ["text", {"nested": 1}, [1.0], torch.zeros(1), torch.zeros(2), None, 1j, torch.tensor(1j), np.str_("x")]
)
async def test_row_9_other_metrics_are_refused_with_their_key(value: Any):
    with pytest.raises(InvalidTermResult, match="'strange'") as caught:
        await one(spec(lambda d, p: (p.sum(), {"strange": value}), "metrics"))
    assert caught.value.name == "metrics"


async def test_row_9_metric_names_are_strings():
    with pytest.raises(InvalidTermResult, match="1"):
        await one(spec(lambda d, p: (p.sum(), {1: 1.0}), "metrics"))


async def test_rows_10_and_11_the_name_of_the_object():
    assert RegularizerSpec(fn=NamedByProperty(), weight=1.0).name == "from_property"
    assert RegularizerSpec(fn=L1Sparsity(), weight=1.0).name == "l1_sparsity"
    assert RegularizerSpec(fn=per_datum(L1Sparsity()), weight=1.0).name == "l1_sparsity"


async def base_loss(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.sum()


def named_otherwise(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.sum()


setattr(named_otherwise, "name", "own_name")  # noqa: B010


def of_one_datum(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.sum()


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (l1, "l1"),
        (async_l2, "async_l2"),
        (functools.partial(l1), "l1"),
        (per_datum(l1), "l1"),
        (per_datum(functools.partial(functools.partial(l1))), "l1"),
        (sum_over_datums(of_one_datum), "of_one_datum"),
        (named_otherwise, "own_name"),
        (functools.partial(named_otherwise), "own_name"),
    ],
)
async def test_row_11_the_name_of_a_function(fn: Any, name: str):
    assert RegularizerSpec(fn=fn, weight=1.0).name == name
    assert RegularizerSpec(fn=fn, weight=1.0, name="given").name == "given"


class Unnamed:
    def __call__(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.sum()


@pytest.mark.parametrize(
    "fn",
    [lambda d, p: p.sum(), per_datum(lambda d, p: p[0].sum()), Unnamed(), functools.partial(Unnamed()), math],
    ids=["lambda", "lambda per datum", "object", "partial of an object", "module"],
)
async def test_row_11_no_name_anywhere(fn: Any):
    with pytest.raises(InvalidSpec, match=r"no name: pass name="):
        RegularizerSpec(fn=fn, weight=1.0)


@pytest.mark.parametrize("fn", [base_loss, functools.partial(base_loss), per_datum(base_loss)])
async def test_row_11_a_function_named_base_loss_needs_another_name(fn: Any):
    with pytest.raises(InvalidSpec, match=r"reserved for the base loss: pass another name="):
        RegularizerSpec(fn=fn, weight=1.0)
    assert RegularizerSpec(fn=fn, weight=1.0, name="again").name == "again"


async def test_row_10_a_name_method_is_not_a_name():
    class Wrong:
        def name(self) -> str:
            return "method"

        def compute(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            return logprobs.sum()

    with pytest.raises(InvalidSpec, match="name"):
        RegularizerSpec(fn=Wrong(), weight=1.0)


@pytest.mark.parametrize(("threshold", "value"), [(None, 4.9), (0.0, 4.9), (1.0, 3.3)])
async def test_rows_24_and_25_threshold(threshold: float | None, value: float):
    def thresholded(data: Any, logprobs: torch.Tensor, *, threshold: float = 0.0) -> Any:
        loss = torch.where(logprobs.abs() > threshold, logprobs, 0.0).abs().sum()
        return loss, {"threshold": threshold}

    options = {} if threshold is None else {"threshold": threshold}
    output = await one(spec(thresholded, "threshold", options=options))
    assert output.value == pytest.approx(value, rel=1e-6)
    assert output.custom_metrics == {"threshold": threshold or 0.0}


async def test_rows_26_and_27_an_object_in_many_pipelines():
    shared = L1Sparsity()
    pipelines = [Pipeline(nll, [RegularizerSpec(fn=shared, weight=weight)]) for weight in (0.01, 0.1)]
    named = Pipeline(nll, [RegularizerSpec(fn=shared, weight=0.01, name=L1Sparsity.name)])
    outputs = await asyncio.gather(*(pipeline.compute([], guide_logprobs()) for pipeline in [*pipelines, named]))
    assert [output.regularizers["l1_sparsity"].contribution for output in outputs] == pytest.approx(
        [0.049, 0.49, 0.049], rel=1e-6
    )


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
async def test_rows_28_and_29_item_in_metrics_is_fine(track: bool, as_tensor: bool):
    def term(data: Any, logprobs: torch.Tensor) -> Any:
        loss = logprobs.abs().sum()
        return loss, {"l1_value": loss if as_tensor else loss.item()}

    output = await one(spec(term, "l1"), track_grad_norms=track)
    assert output.custom_metrics["l1_value"] == output.value
    assert output.grad_norm == (pytest.approx(math.sqrt(5), rel=1e-6) if track else None)
    assert output.differentiable


@pytest.mark.parametrize(
    "cut",
    [
        lambda d, p: p.detach().sum(),
        lambda d, p: torch.from_numpy(p.detach().numpy()).sum(),
        lambda d, p: torch.tensor(p.sum().item()),
        lambda d, p: torch.tensor(2.5),
        lambda d, p: torch.tensor(2.5, requires_grad=True),
    ],
)
async def test_rows_29_and_31_a_cut_gradient_is_told(cut: Any):
    for track, norm in ((True, 0.0), (False, None)):
        output = await one(spec(cut, "cut"), track_grad_norms=track)
        assert (output.differentiable, output.grad_norm) == (False, norm)
        assert output.value != 0.0


# Rows 32-35 by the closed forms: |lp| has gradient sign(lp); lp^2: 2 lp; p log p: e^lp (1 + lp); forward KL to the
# uniform distribution: -1/5 for each of five.
CLOSED_FORMS = [
    ("l1", l1, 0.01, sum(map(abs, GUIDE_VALUES)), math.sqrt(5)),
    ("l2", l2, 0.005, sum(v * v for v in GUIDE_VALUES), math.sqrt(sum(4 * v * v for v in GUIDE_VALUES))),
    (
        "entropy",
        lambda d, p: (p.exp() * p).sum(),
        0.001,
        sum(math.exp(v) * v for v in GUIDE_VALUES),
        math.sqrt(sum((math.exp(v) * (1 + v)) ** 2 for v in GUIDE_VALUES)),
    ),
    (
        "kl_uniform",
        lambda d, p: (
            torch.full_like(p, -math.log(p.numel())).exp() * (torch.full_like(p, -math.log(p.numel())) - p)
        ).sum(),
        0.002,
        sum(0.2 * (-math.log(5) - v) for v in GUIDE_VALUES),
        math.sqrt(5 * 0.2**2),
    ),
]
FROM_THE_TABLE = {
    "l1": (4.9, 0.049, 2.2360680, 0.0223607),
    "l2": (6.83, 0.03415, 5.2268537, 0.0261343),
    "entropy": (-1.5035655, -0.0015035655, 0.6250894, 0.0006251),
    "kl_uniform": (-0.6294379, -0.0012588758, 0.4472136, 0.000894427),
}


@pytest.mark.parametrize(("name", "fn", "weight", "value", "norm"), CLOSED_FORMS, ids=[c[0] for c in CLOSED_FORMS])
async def test_rows_32_to_35_values_and_norms(name: str, fn: Any, weight: float, value: float, norm: float):
    output = await one(spec(fn, name, weight), track_grad_norms=True)
    assert output.value == pytest.approx(value, rel=1e-6)
    assert output.grad_norm == pytest.approx(norm, rel=1e-6)
    assert output.contribution == pytest.approx(weight * value, rel=1e-6)
    table = FROM_THE_TABLE[name]
    assert (output.value, output.contribution, output.grad_norm) == pytest.approx(table[:3], rel=2e-7, abs=1e-7)
    assert output.grad_norm_weighted == pytest.approx(table[3], abs=5e-8)


async def test_row_78_execute_takes_a_function():
    logprobs = guide_logprobs().requires_grad_()
    loss, metrics = await execute(l2, [], logprobs)
    assert metrics == {}
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.equal(gradient, 2 * logprobs.detach())


async def test_row_79_options_come_back_as_metrics():
    loss, metrics = await execute(lambda d, p, **o: (p.sum(), o), [], guide_logprobs(), custom_option="value")
    assert metrics == {"custom_option": "value"}
    assert loss.item() == pytest.approx(-4.9, rel=1e-6)


@pytest.mark.parametrize("error", [TimeoutError("own"), KeyError("own"), asyncio.CancelledError("own")])
async def test_row_80_the_terms_own_exception_comes_out(error: BaseException):
    def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise error

    async def fails_later(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise error

    for term in (fails, fails_later):
        with pytest.raises(type(error)) as caught:
            await execute(term, [], guide_logprobs())
        assert caught.value is error


async def test_row_80_a_stop_iteration_ends_execute_too():
    def stops(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise StopIteration

    with pytest.raises(RuntimeError) as caught:  # what Python makes of it in a coroutine
        await execute(stops, [], guide_logprobs())
    assert isinstance(caught.value.__cause__, StopIteration)


async def test_row_79_the_loss_keeps_its_shape():
    loss, _ = await execute(lambda d, p: p * 2, [], guide_logprobs())
    assert loss.shape == (5,)


async def test_row_79_every_keyword_goes_to_the_term():
    def term(data: Any, logprobs: Any, *, timeout: float, weight: float, data_: int = 0) -> Any:
        return logprobs.sum(), {"timeout": timeout, "weight": weight}

    _, metrics = await execute(term, [], guide_logprobs(), timeout=1.0, weight=2.0)
    assert metrics == {"timeout": 1.0, "weight": 2.0}


async def test_row_80_execute_takes_any_form():
    for term, value in ((L1Sparsity(), 4.9), (AsyncObject(), 6.83), (AsyncCall(), 6.83), (async_l2, 6.83)):
        loss, _ = await execute(term, [], guide_logprobs())
        assert loss.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("term", "options", "message"),
    [
        *((stranger, {}, "must be callable") for stranger in ("l2", None, 5, torch.zeros(2))),
        (L1Sparsity, {}, "pass an instance"),
        (l2, {"threshold": 1.0}, "threshold"),
        (lambda data: data, {}, r"\(data, logprobs\)"),
    ],
)
async def test_row_78_what_cannot_be_executed_is_named(term: Any, options: dict[str, Any], message: str):
    with pytest.raises(InvalidSpec, match=message):
        await execute(term, [], guide_logprobs(), **options)
    for call in (Executor.execute_one, GradientTracker.regularizer_grad_norm):
        with pytest.raises(InvalidSpec, match=f"RegularizerSpec, got a {type(term).__name__}"):
            await call(term, [], guide_logprobs())


async def test_row_83_is_async_true_for_a_function_that_needs_the_loop():
    def starts_a_task(data: Any, logprobs: Any) -> Any:
        return asyncio.create_task(async_l2(data, logprobs))

    output = await one(spec(starts_a_task, "task", is_async=True), track_grad_norms=True)
    assert output.grad_norm == pytest.approx(5.2268537, rel=1e-6)
    with pytest.raises(RegularizerError) as caught:  # undetected it runs in a thread, where no loop runs
        await one(spec(lambda d, p: asyncio.get_running_loop().create_future(), "task"))
    assert isinstance(caught.value.__cause__, RuntimeError)


async def test_row_17_is_async_false_refuses_an_awaitable():
    with pytest.raises(InvalidTermResult, match="is_async"):
        await one(spec(async_l2, "wrong", is_async=False))


async def test_row_17_is_async_true_needs_an_awaitable():
    with pytest.raises(InvalidTermResult, match="is_async"):
        await one(spec(l2, "wrong", is_async=True))


async def test_rows_82_and_84_the_async_validator():
    async def check(data: Any, logprobs: torch.Tensor) -> Any:
        await anyio.sleep(0.01)
        return logprobs.abs().mean(), {"external_validated": True}

    output = await one(spec(check, "async_validator", 0.02))
    again = type(output).model_validate_json(output.model_dump_json())
    assert again.custom_metrics["external_validated"] is True
    assert output.contribution == pytest.approx(0.02 * 0.98, rel=1e-6)
