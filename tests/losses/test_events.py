"""Rows 88-98 and 160 of the guide: the events that a composed loss emits."""

import asyncio
import math
import threading
import time
from typing import Any

import pytest
import structlog
import torch

from tests.losses.support import async_l2, async_nll, guide_logprobs, guide_specs, l1, names_of, nll, recorded, spec
from tinkex_py import Executor, Pipeline, RegularizerError, telemetry
from tinkex_py.telemetry import Event

SHORT = 0.005


@pytest.mark.asyncio
async def test_rows_88_and_89_start_and_stop_of_the_whole():
    specs = [*guide_specs(), spec(l1, "off", enabled=False)]
    before = time.time()
    with recorded("tinkex.custom_loss.*") as events:
        output = await Pipeline(nll, specs, track_grad_norms=True).compute([], guide_logprobs())
    start, stop = events
    assert start.name == "tinkex.custom_loss.start"
    assert start.metadata == {"regularizer_count": 3, "track_grad_norms": True}
    assert set(start.measurements) == {"system_time"}
    assert before <= start.measurements["system_time"] <= time.time()
    assert isinstance(start.measurements["system_time"], float)
    assert stop.name == "tinkex.custom_loss.stop"
    assert stop.metadata == {"regularizer_count": 3}
    assert set(stop.measurements) > {"duration", "loss_total", "regularizer_total"}
    assert stop.measurements["total_grad_norm"] == output.total_grad_norm
    assert set(output.diagnosis) == {"base_loss", *output.regularizers}
    for name, diagnosis in output.diagnosis.items():
        for field, value in diagnosis:
            assert stop.measurements[f"{name}.{field}"] == value
    assert stop.measurements["loss_total"] == output.loss_total
    assert stop.measurements["regularizer_total"] == output.regularizer_total
    assert 0 <= stop.measurements["duration"] < 60
    assert isinstance(stop.measurements["duration"], float)
    assert start.exception is stop.exception is None
    with recorded("tinkex.custom_loss.stop") as events:
        await Pipeline(nll, specs).compute([], guide_logprobs())
    assert set(events[0].measurements) == {"duration", "loss_total", "regularizer_total"}


@pytest.mark.asyncio
async def test_rows_90_93_and_98_a_failure():
    own = ValueError("private text of a prompt")

    def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise own

    with recorded() as events, pytest.raises(RegularizerError) as caught:
        await Pipeline(nll, [spec(fails, "fails", 0.25)]).compute([], guide_logprobs())
    (inner,) = [event for event in events if event.name == "tinkex.regularizer.compute.exception"]
    assert inner.metadata == {"regularizer_name": "fails", "weight": 0.25, "reason": "ValueError"}
    assert set(inner.measurements) == {"duration"}
    assert inner.exception is own
    outer = events[-1]
    assert outer.name == "tinkex.custom_loss.exception"
    assert outer.metadata == {"reason": "ValueError"}
    assert set(outer.measurements) == {"duration"}
    assert outer.exception is caught.value


@pytest.mark.asyncio
@pytest.mark.parametrize("track", [False, True])
async def test_rows_91_92_and_97_start_and_stop_of_a_term(track: bool):
    specs = [spec(l1, "sync", 0.01), spec(async_l2, "async", 0.005)]
    with recorded("tinkex.regularizer.compute.*") as events:
        await Pipeline(nll, specs, track_grad_norms=track, parallel=False).compute([], guide_logprobs())
    start, stop, async_start, async_stop = events
    assert start.name == async_start.name == "tinkex.regularizer.compute.start"
    assert start.metadata == stop.metadata == {"regularizer_name": "sync", "weight": 0.01, "is_async": False}
    assert async_start.metadata == async_stop.metadata
    assert async_stop.metadata == {"regularizer_name": "async", "weight": 0.005, "is_async": True}
    assert set(start.measurements) == {"system_time"}
    assert stop.name == async_stop.name == "tinkex.regularizer.compute.stop"
    assert set(stop.measurements) == {"duration", "value", "contribution", "grad_norm"}
    assert stop.measurements["value"] == pytest.approx(4.9, rel=1e-6)
    assert stop.measurements["contribution"] == pytest.approx(0.049, rel=1e-6)
    assert stop.measurements["grad_norm"] == (pytest.approx(math.sqrt(5), rel=1e-6) if track else None)


@pytest.mark.asyncio
async def test_row_91_emitted_when_the_term_starts_not_when_it_queues():
    release, entered = asyncio.Event(), asyncio.Event()

    async def holds(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        entered.set()
        await release.wait()
        return logprobs.sum()

    with recorded("tinkex.regularizer.compute.start") as events:
        pipeline = Pipeline(async_nll, [spec(holds, "first"), spec(async_l2, "queued")], max_concurrency=1)
        computing = asyncio.ensure_future(pipeline.compute([], guide_logprobs()))
        await entered.wait()
        assert [event.metadata["regularizer_name"] for event in events] == ["first"]
        release.set()
        await computing
    assert [event.metadata["regularizer_name"] for event in events] == ["first", "queued"]


@pytest.mark.asyncio
async def test_row_93_timeout_skip_and_cancellation():
    async def slow(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    with recorded("tinkex.regularizer.compute.exception") as events:
        await Pipeline(nll, [spec(slow, "slow", timeout=SHORT, on_error="skip")]).compute([], guide_logprobs())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT):
                await Pipeline(async_nll, [spec(slow, "cancelled")]).compute([], guide_logprobs())
    assert [(event.metadata["regularizer_name"], event.metadata["reason"]) for event in events] == [
        ("slow", "RegularizerTimeout"),
        ("cancelled", "CancelledError"),
    ]


@pytest.mark.asyncio
async def test_row_76_execute_one_emits_the_pair_and_nothing_of_a_whole():
    with recorded() as events:
        await Executor.execute_one(spec(l1, "l1"), [], guide_logprobs())
    assert names_of(events) == ["tinkex.regularizer.compute.start", "tinkex.regularizer.compute.stop"]


@pytest.mark.asyncio
async def test_row_48_the_base_loss_has_no_events_of_its_own():
    with recorded() as events:
        await Pipeline(nll).compute([], guide_logprobs())
    assert names_of(events) == ["tinkex.custom_loss.start", "tinkex.custom_loss.stop"]


@pytest.mark.asyncio
async def test_events_belong_to_the_thread_of_the_loop():
    threads: set[int] = set()
    handler = telemetry.attach(lambda event: threads.add(threading.get_ident()))
    await Pipeline(nll, guide_specs()).compute([], torch.full((10_000,), -0.5))
    telemetry.detach(handler)
    assert threads == {threading.get_ident()}


@pytest.mark.asyncio
async def test_row_160_structlog_sees_each_event_flat():
    with structlog.testing.capture_logs() as lines:
        await Pipeline(nll, [spec(l1, "l1", 0.01)], track_grad_norms=True).compute([], guide_logprobs())
    by_name = {line["event"]: line for line in lines}
    stop = by_name["tinkex.regularizer.compute.stop"]
    assert stop["regularizer_name"] == "l1"
    assert stop["value"] == pytest.approx(4.9, rel=1e-6)
    assert stop["log_level"] == "debug"
    assert list(by_name) == [
        "tinkex.custom_loss.start",
        "tinkex.regularizer.compute.start",
        "tinkex.regularizer.compute.stop",
        "tinkex.custom_loss.stop",
    ]


@pytest.mark.asyncio
async def test_row_98_logs_hold_no_text_of_an_error():
    def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise ValueError("private prompt")

    with structlog.testing.capture_logs() as lines, pytest.raises(RegularizerError):
        await Pipeline(nll, [spec(fails, "fails")]).compute([], guide_logprobs())
    assert "private" not in repr(lines)
    assert lines[-1]["reason"] == "ValueError"
    assert lines[-1]["log_level"] == "warning"


@pytest.mark.asyncio
async def test_row_105_a_handler_that_raises_does_not_break_the_step(capsys: pytest.CaptureFixture[str]):
    def broken(event: Event) -> None:
        raise RuntimeError("handler")

    handler = telemetry.attach(broken)
    with recorded() as events:
        await Pipeline(nll, guide_specs()).compute([], guide_logprobs())
    assert not telemetry.detach(handler)
    assert names_of(events)[0] == "tinkex.custom_loss.start"
    assert names_of(events)[-1] == "tinkex.custom_loss.stop"
