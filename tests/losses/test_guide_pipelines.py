"""Rows of the guide about several terms together that no other file proves whole."""

import asyncio
import functools
import math
import os
import time
from typing import Any

import anyio
import pytest
import torch

from tests.losses.failing_terms import SHORT
from tests.losses.support import (
    LIMIT,
    Crowd,
    Gate,
    async_l2,
    async_nll,
    guide_logprobs,
    guide_specs,
    l1,
    l2,
    nll,
    recorded,
    spec,
    until,
)
from tinkex_py import (
    DuplicateRegularizerNames,
    InvalidBaseLoss,
    Pipeline,
    PipelineError,
    RegularizerError,
    RegularizerSpec,
    RegularizerTimeout,
    TinkexError,
    telemetry,
)
from tinkex_py.telemetry import Event

pytestmark = pytest.mark.asyncio


async def test_row_3_sync_terms_and_the_base_loss_are_named_tasks_too():
    gate, base = Gate(), Gate()
    prefix = "tinkex.regularizer."
    with gate.opening(), base.opening():
        computing = asyncio.ensure_future(
            Pipeline(base, [spec(gate, "slow")], max_threads=2).compute([], torch.zeros(2))
        )
        await until(lambda: gate.running == base.running == 1)
        names = {task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(prefix)}
        assert names == {f"{prefix}base_loss", f"{prefix}slow"}
    await computing
    assert not any(task.get_name().startswith(prefix) for task in asyncio.all_tasks())


async def test_row_57_waiting_for_a_permit_does_not_count():
    async def holds(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await anyio.sleep(3 * SHORT)
        return logprobs.sum()

    specs = [spec(holds, "holds"), spec(async_l2, "queued", timeout=SHORT)]
    output = await Pipeline(async_nll, specs, max_concurrency=1).compute([], guide_logprobs())
    assert list(output.regularizers) == ["holds", "queued"]


@pytest.mark.parametrize(
    ("pipelines", "specs", "ends"),
    [
        (None, None, True),
        (LIMIT, None, True),
        (math.inf, None, True),
        (SHORT, LIMIT, True),
        (SHORT, math.inf, True),
        (SHORT, None, False),
        (None, SHORT, False),
        (LIMIT, SHORT, False),
        (math.inf, SHORT, False),
    ],
)
async def test_row_57_none_and_infinity_are_no_limit(pipelines: float | None, specs: float | None, ends: bool):
    async def patient(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await anyio.sleep(3 * SHORT)
        return logprobs.sum()

    pipeline = Pipeline(async_nll, [spec(patient, "patient", timeout=specs, on_error="skip")], timeout=pipelines)
    output = await pipeline.compute([], guide_logprobs())
    assert list(output.skipped) == ([] if ends else ["patient"])


async def test_row_57_an_option_that_is_set_later_holds():
    pipeline = Pipeline(slow)
    pipeline.timeout = SHORT
    with pytest.raises(RegularizerTimeout):
        await pipeline.compute([], guide_logprobs())


async def test_row_59_as_many_threads_as_usable_cpus():
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gate = Gate()
    with gate.opening():
        specs = [spec(gate, f"sync{index}") for index in range(cpus + 2)]
        pipeline = Pipeline(async_nll, specs, max_concurrency=cpus + 3)
        computing = asyncio.ensure_future(pipeline.compute([], guide_logprobs()))
        await until(lambda: gate.running == cpus)
    await computing
    assert (gate.peak, gate.calls) == (cpus, cpus + 2)


async def test_row_82_as_many_async_terms_overlap_as_there_are_permits():
    crowd = Crowd(enough=32)

    async def base(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return await crowd.compute(data, logprobs)

    async with asyncio.timeout(LIMIT):
        await Pipeline(base, [spec(crowd, f"t{index}") for index in range(31)]).compute([], guide_logprobs())
    assert crowd.peak == 32


async def test_row_96_durations_are_monotonic(monkeypatch: pytest.MonkeyPatch):
    backwards = iter(range(1_000_000, 0, -1))
    with recorded() as events, monkeypatch.context() as clock_set_back:
        clock_set_back.setattr(time, "time", lambda: float(next(backwards)))
        await Pipeline(nll, guide_specs()).compute([], guide_logprobs())
    durations = [event.measurements["duration"] for event in events if event.name.endswith(".stop")]
    assert len(durations) == 4
    assert all(0 <= duration < LIMIT for duration in durations)


async def test_row_99_a_handlers_config_is_bound_to_it():
    def report(config: dict[str, list[str]], event: Event) -> None:
        config["names"].append(event.name)

    config: dict[str, list[str]] = {"names": []}
    handler_id = telemetry.attach(functools.partial(report, config), events="tinkex.custom_loss.*")
    await Pipeline(nll).compute([], guide_logprobs())
    assert telemetry.detach(handler_id)
    assert config["names"] == ["tinkex.custom_loss.start", "tinkex.custom_loss.stop"]


async def test_rows_121_and_122_are_raised_before_any_event():
    with recorded() as events:
        with pytest.raises(DuplicateRegularizerNames):
            Pipeline(nll, [spec(l1, "dup", 0.01), spec(l2, "dup", 0.02)])
        with pytest.raises(InvalidBaseLoss):
            Pipeline("not a function")  # type: ignore[arg-type]
    assert events == []


async def failing(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    raise OSError("the disk is gone")


async def slow(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    await anyio.sleep(10.0)
    return logprobs.sum()


async def handled(base_loss: Any, regularizers: list[RegularizerSpec]) -> str:
    try:
        output = await Pipeline(base_loss, regularizers).compute([], guide_logprobs())
    except RegularizerTimeout as error:
        return f"retry {error.name}"
    except RegularizerError as error:
        return f"halt {error.name}"
    except PipelineError:
        raise
    except TinkexError:
        return "unknown"
    return f"done {output.loss_total:.2f}"


async def test_row_126_every_branch_of_the_guide():
    assert await handled(nll, []) == "done 0.98"
    assert await handled(nll, [spec(slow, "slow", timeout=SHORT)]) == "retry slow"
    assert await handled(nll, [spec(failing, "failing")]) == "halt failing"
    assert await handled(failing, []) == "halt base_loss"
    with pytest.raises(DuplicateRegularizerNames) as caught:
        await handled(nll, [spec(l1, "dup"), spec(l2, "dup")])
    assert isinstance(caught.value, PipelineError)
