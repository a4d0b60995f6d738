"""Rows of the guide about a single term that no other file proves whole: its forms, its options, where it runs."""

import asyncio
import functools
import threading
import types
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
import torch

from tests.losses.support import async_l2, guide_logprobs, l2, recorded, spec
from tinkex_py import (
    Datum,
    Executor,
    GradientTracker,
    ModelInput,
    Pipeline,
    RegularizerSpec,
    RegularizerTimeout,
    execute,
    per_datum,
)

pytestmark = pytest.mark.asyncio

DATA = [Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]})]
PAIR = torch.tensor([-0.5, -1.0])


async def one(regularizer: RegularizerSpec, **options: Any) -> Any:
    return await Executor.execute_one(regularizer, [], guide_logprobs(), **options)


class Recording:
    """Row 6: keeps what `compute` is called with."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[float], dict[str, Any]]] = []

    def compute(self, data: Sequence[Datum], logprobs: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls.append((data, logprobs.tolist(), options))
        return logprobs.sum()


class RecordingLater(Recording):
    async def compute(self, data: Sequence[Datum], logprobs: torch.Tensor, **options: Any) -> torch.Tensor:  # type: ignore[override]
        return super().compute(data, logprobs, **options)


@pytest.mark.parametrize("kind", [Recording, RecordingLater])
async def test_row_6_what_compute_is_called_with(kind: type[Recording]):
    term = kind()
    options = {"threshold": 0.5, "kind": "soft"}
    await Executor.execute_one(RegularizerSpec(fn=term, weight=1.0, options=options), DATA, PAIR)
    await Executor.execute_one(RegularizerSpec(fn=term, weight=1.0), DATA, PAIR)
    (data, logprobs, first), (_, _, second) = term.calls
    assert list(data) == DATA
    assert logprobs == [-0.5, -1.0]
    assert (first, second) == (options, {})


class Item(torch.Tensor):
    """A 0-d tensor that tells which thread makes a number of it."""

    threads: list[int] = []  # noqa: RUF012  # shared by all, emptied by the test

    def item(self) -> float:  # type: ignore[override]
        Item.threads.append(threading.get_ident())
        return super().item()


def measured(data: Any, logprobs: torch.Tensor) -> Any:
    return logprobs.sum(), {"metric": torch.tensor(1.5).as_subclass(Item)}


async def measured_later(data: Any, logprobs: torch.Tensor) -> Any:
    return measured(data, logprobs)


@pytest.mark.parametrize(("fn", "size"), [(measured, 5), (measured, 10_000), (measured_later, 10_000)])
async def test_row_9_metrics_become_numbers_off_the_loop(fn: Any, size: int):
    Item.threads.clear()
    output = await Executor.execute_one(spec(fn, "m"), [], torch.zeros(size))
    assert output.custom_metrics == {"metric": 1.5}
    assert Item.threads
    assert threading.get_ident() not in Item.threads


class Squares:
    def compute(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.pow(2).sum()

    __call__ = compute


class OnlyCallable:
    def __call__(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.pow(2).sum()


class AsyncSquares:
    async def compute(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return await async_l2(data, logprobs)


class AsyncCallable:
    async def __call__(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return await async_l2(data, logprobs)


def module() -> types.ModuleType:
    made = types.ModuleType("squares")
    made.compute = l2  # type: ignore[attr-defined]
    return made


FORMS: dict[str, Any] = {
    "function": l2,
    "coroutine function": async_l2,
    "partial": functools.partial(l2),
    "lambda": lambda data, logprobs: logprobs.pow(2).sum(),
    "callable object": OnlyCallable(),
    "object with compute": Squares(),
    "bound method": Squares().compute,
    "module": module(),
    "object with async compute": AsyncSquares(),
    "object with async __call__": AsyncCallable(),
    "async bound method": AsyncSquares().compute,
    "async partial": functools.partial(async_l2),
    "per_datum": per_datum(lambda data, parts: sum(part.pow(2).sum() for part in parts)),
}


@pytest.mark.parametrize("form", FORMS)
async def test_rows_14_and_47_every_form_runs_as_regularizer_and_as_base_loss(form: str):
    pipeline = Pipeline(FORMS[form], [spec(FORMS[form], "l2", 0.005)], track_grad_norms=True)
    output = await pipeline.compute([], [guide_logprobs()])
    assert output.base_loss.value == output.regularizers["l2"].value == pytest.approx(6.83, rel=1e-6)
    assert output.regularizers["l2"].contribution == pytest.approx(0.03415, rel=1e-6)
    assert output.base_loss.grad_norm == output.regularizers["l2"].grad_norm == pytest.approx(5.2268537, rel=1e-6)


class Seen:
    """Which thread ran the call and which the coroutine, if there was one."""

    def __init__(self) -> None:
        self.called: int | None = None
        self.awaited: int | None = None

    def plain(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        self.called = threading.get_ident()
        return logprobs.sum()

    async def coroutine(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        self.awaited = threading.get_ident()
        return logprobs.sum()

    def gives_a_coroutine(self, data: Any, logprobs: torch.Tensor) -> Any:
        self.called = threading.get_ident()
        return self.coroutine(data, logprobs)

    def starts_a_task(self, data: Any, logprobs: torch.Tensor) -> Any:
        self.called = threading.get_ident()
        return asyncio.create_task(self.coroutine(data, logprobs))


@pytest.mark.parametrize(
    ("form", "is_async", "called_on_loop", "awaited_on_loop"),
    [
        ("plain", None, False, None),
        ("plain", False, False, None),
        ("coroutine", None, None, True),
        ("coroutine", True, None, True),
        ("gives_a_coroutine", None, False, True),
        ("gives_a_coroutine", True, True, True),
        ("starts_a_task", True, True, True),
    ],
)
async def test_rows_17_18_23_and_83_where_a_term_runs(
    form: str, is_async: bool | None, called_on_loop: bool | None, awaited_on_loop: bool | None
):
    seen = Seen()
    output = await one(spec(getattr(seen, form), "t", is_async=is_async), track_grad_norms=True)
    assert output.grad_norm == pytest.approx(5**0.5, rel=1e-6)
    loop = threading.get_ident()
    assert (None if seen.called is None else seen.called == loop) == called_on_loop
    assert (None if seen.awaited is None else seen.awaited == loop) == awaited_on_loop


async def test_row_30_the_pipeline_reports_the_value_without_a_metric():
    bare = await one(spec(lambda data, logprobs: logprobs.abs().sum(), "l1", 0.01))
    empty = await one(spec(lambda data, logprobs: (logprobs.abs().sum(), {}), "l1", 0.01))
    assert bare == empty
    assert (bare.value, bare.contribution) == (pytest.approx(4.9, rel=1e-6), pytest.approx(0.049, rel=1e-6))


async def test_row_78_execute_emits_no_event():
    with recorded() as events:
        await execute(l2, [], guide_logprobs())
        await execute(async_l2, [], guide_logprobs())
    assert events == []


async def test_row_83_the_thread_and_the_awaitable_share_one_timeout():
    async def rest(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await anyio.sleep(0.15)
        return logprobs.sum()

    def slow_start(data: Any, logprobs: torch.Tensor) -> Any:
        threading.Event().wait(0.15)
        return rest(data, logprobs)

    with pytest.raises(RegularizerTimeout) as caught:  # each half would be in time, both together are not
        await one(spec(slow_start, "slow"), timeout=0.2)
    assert (caught.value.name, caught.value.timeout) == ("slow", 0.2)


class Where(torch.autograd.Function):
    """The sum, telling which thread runs its backward pass."""

    threads: list[int] = []  # noqa: RUF012  # emptied by the test

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        ctx.count = values.numel()
        return values.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        Where.threads.append(threading.get_ident())
        return gradient.expand(ctx.count)


def where(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return Where.apply(logprobs)  # type: ignore[no-untyped-call]


async def where_later(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return where(data, logprobs)


@pytest.mark.parametrize(("fn", "size"), [(where, 9), (where_later, 10_000)])
async def test_rows_74_and_87_torch_work_is_off_the_loop(fn: Any, size: int):
    Where.threads.clear()
    logprobs = torch.zeros(size)
    norms = [
        await GradientTracker.grad_norm(lambda values: fn([], values), logprobs),
        await GradientTracker.regularizer_grad_norm(spec(fn, "where"), [], logprobs),
        await GradientTracker.total_grad_norm(fn, [], [], logprobs),
    ]
    assert norms == pytest.approx([size**0.5] * 3, rel=1e-6)
    assert len(Where.threads) == 3
    assert threading.get_ident() not in Where.threads
