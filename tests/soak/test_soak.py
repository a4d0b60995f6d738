"""A short soak passes, a seed gives one plan, and every check of a soak can fail."""

import asyncio
import dataclasses
import gc
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tests.faults.proxy import FaultProxy, Passing
from tests.soak.__main__ import main
from tests.soak.outcomes import Outcome, check_same, check_same_weights
from tests.soak.plan import Burst, Custom, Optim, draw_segment, planned_failures
from tests.soak.report import table
from tests.soak.resources import MIB, Look, check_counts, check_growth, growth, look, settled_look
from tests.soak.run import SeededFaults, Settings, Tally, soak
from tests.soak.watch import Clock, Complaints, Ledger, SoakFailed
from tinkex_py import telemetry


@pytest.fixture
def one_torch_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_short_soak_passes(one_torch_thread):
    settings, tally = Settings(seed=20261128, segments=2, trainers=1, moves=5), Tally()
    asyncio.run(soak(settings, tally))
    assert tally.segments == 2
    assert sum(tally.injected.values()) >= 5
    assert tally.seen == tally.planned
    assert sum(tally.planned.values()) > 0
    assert tally.checked["outcomes equal to those of the twin"] > 10
    assert tally.checked["tensors equal to those of the twin"] > 50
    assert tally.checked["tasks, threads and descriptors as at the start"] == 2
    summary = table(settings, tally)
    assert "seed 20261128" in summary
    assert "optim_step" in summary


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (KeyboardInterrupt(), 130, "ended by Ctrl-C"),
        (ExceptionGroup("tasks", [SoakFailed("the first difference")]), 1, "FAILED with seed 3 in segment 0"),
        (None, 0, "all checks passed (seed 3)"),
    ],
)
def test_a_soak_ends_with_the_table_and_its_exit_code(monkeypatch, capsys, error, code, shown):
    async def ends(settings: Settings, tally: Tally) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("tests.soak.run.soak", ends)
    assert main(["--seconds", "100", "--seed", "3"]) == code
    output = capsys.readouterr().out
    assert output.startswith("soak: seed 3")
    assert shown in output
    assert "RESOURCES" in output
    assert ("the first difference" in output) == (code == 1)


# The plan


def test_a_seed_gives_one_plan():
    plans = [draw_segment(seed, 4, trainers=3, moves=10) for seed in (7, 7, 8)]
    assert plans[0] == plans[1] != plans[2]
    drawn: Counter[str] = Counter()
    for index in range(40):
        drawn += planned_failures(draw_segment(7, index, trainers=3, moves=10))
    expected = {"CancelledError", "TimeoutExceeded", "RegularizerTimeout", "RegularizerError", "skipped"}
    assert drawn.keys() == expected | {"PrecedingRequestFailed", "PartialFailure", "RequestFailed"}


def test_a_failure_fails_the_calls_behind_it_only_in_a_gathered_burst():
    moves = (move for index in range(40) for move in draw_segment(1, index, trainers=3, moves=10).trainers[0].moves)
    calls = (call for move in moves if isinstance(move, Burst) for call in move.calls)
    failing = next(call for call in calls if isinstance(call, Custom) and call.failure)
    burst = Burst((Optim(0.1), failing, Optim(0.1)), gathered=True)
    assert burst.failures() == (None, failing.failure, "PrecedingRequestFailed")
    assert dataclasses.replace(burst, gathered=False).failures() == (None, failing.failure, None)


def faults_of(seed: str, order: list[int]) -> dict[tuple[int, int], str]:
    """Returns the fault of each attempt of each number, for requests in some order."""
    choose, faults, attempts = SeededFaults(seed, 0.5, 0.5), dict[tuple[int, int], str](), Counter[int]()
    proxy = FaultProxy("http://127.0.0.1:1")
    for number in order:
        attempts[number] += 1
        passing = Passing(proxy, None, b"", "B", ("session:train:0", number), None, None)  # type: ignore[arg-type]
        fault = choose(passing)
        faults[number, attempts[number]] = "" if fault is None else fault.name
    return faults


@pytest.mark.asyncio
async def test_the_faults_of_a_request_are_independent_of_the_order_of_requests():
    one = faults_of("1", [1, 2, 3, 1, 2, 3])
    assert one == faults_of("1", [3, 3, 2, 1, 1, 2])
    assert one != faults_of("2", [1, 2, 3, 1, 2, 3])
    assert any(one.values())


# Checks that fail


def test_a_different_outcome_or_weight_is_reported():
    same = [Outcome("custom step", None, "loss_total=1.0"), Outcome("sample", None, "[1]", compared=False)]
    assert check_same("here", same, [same[0], Outcome("sample", "CancelledError", "", compared=False)]) == 1
    with pytest.raises(SoakFailed, match=r"here, call 0:[\s\S]*1\.0000001"):
        check_same("here", same, [Outcome("custom step", None, "loss_total=1.0000001"), same[1]])
    with pytest.raises(SoakFailed, match="2 calls, but 1 without faults"):
        check_same("here", same, same[:1])
    one, other = {"a": np.ones(3, np.float32)}, {"a": np.array([1, 1, 1 + 1e-7], np.float32)}
    assert check_same_weights("here", one, one) == 1
    with pytest.raises(SoakFailed, match="a differs from the run without faults, by at most 1.19209e-07"):
        check_same_weights("here", one, other)
    with pytest.raises(SoakFailed, match="the tensors differ"):
        check_same_weights("here", one, {})


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([("start", 1), ("start", 2), ("exception", 2), ("stop", 1)], None),
        ([("start", 1), ("start", 2), ("stop", 1)], r"tinkex.future.start of unit 2 has no end"),
        ([("start", 1), ("stop", 1), ("exception", 1)], r"tinkex.future.exception for unit 1, which is not open"),
        ([("start", 1), ("start", 1)], "came twice"),
        ([("start", 1), ("stop", 1), ("line is lost", 1)], "events and lines differ"),
    ],
)
def test_unmatched_starts_and_ends_of_telemetry_are_reported(events: list[tuple[str, int]], problem: str | None):
    ledger = Ledger()
    with ledger.listening():
        for name, unit in events:
            if name == "line is lost":
                ledger.lines["tinkex.future.stop"] = 0
            else:
                telemetry.emit(f"tinkex.future.{name}", {}, {}, unit=unit)
    if problem is None:
        ledger.check()
    else:
        with pytest.raises(SoakFailed, match=problem):
            ledger.check()


async def an_unhandled_error_of_a_task() -> None:
    async def failing() -> None:
        raise OSError("unhandled")

    await asyncio.wait([asyncio.create_task(failing())])


async def an_unhandled_error_of_a_thread() -> None:
    def failing() -> None:
        raise OSError("in a thread")

    thread = threading.Thread(target=failing)
    thread.start()
    thread.join()


async def a_warning() -> None:
    warnings.warn("old", DeprecationWarning, stacklevel=1)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("work", "problem"),
    [
        (an_unhandled_error_of_a_task, r"never retrieved[\s\S]*unhandled"),
        (an_unhandled_error_of_a_thread, "thread: OSError: in a thread"),
        (a_warning, "DeprecationWarning: old"),
    ],
)
async def test_unhandled_errors_and_warnings_are_reported(work: Callable, problem: str):
    complaints = Complaints()
    with complaints.listening():
        await asyncio.sleep(0)
        complaints.check()
        await work()
        gc.collect()
    with pytest.raises(SoakFailed, match=problem):
        complaints.check()


@pytest.mark.asyncio
async def test_a_call_over_its_bound_is_cancelled_and_reported():
    clock = Clock(bound=0.01)
    await clock.timed("quick", lambda: asyncio.sleep(0))
    clock.check()
    with pytest.raises(TimeoutError):
        await clock.timed("slow", asyncio.Event().wait)
    with pytest.raises(SoakFailed, match=r"slow took longer than 0\.01 s"):
        clock.check()


@contextmanager
def a_leftover_thread() -> Iterator[None]:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="leftover thread")
    thread.start()
    yield
    end.set()
    thread.join()


@contextmanager
def a_leftover_task() -> Iterator[None]:
    task = asyncio.create_task(asyncio.Event().wait(), name="leftover")
    yield
    task.cancel()


@contextmanager
def a_leftover_descriptor() -> Iterator[None]:
    with open(__file__, "rb"):  # noqa: PTH123  # the descriptor is the subject
        yield


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("leftover", "problem"),
    [
        (a_leftover_task, r"tasks: at most 0, 1 now[\s\S]*task leftover"),
        (a_leftover_thread, r"threads: [\s\S]*leftover thread"),
        (a_leftover_descriptor, r"descriptors: [\s\S]*test_soak.py"),
    ],
)
async def test_leftovers_are_reported(monkeypatch, leftover: Callable, problem: str):
    monkeypatch.setattr("tests.soak.resources.PATIENCE", 0.05)
    before = look(os.getpid())
    with leftover(), pytest.raises(SoakFailed, match=problem):
        check_counts(before, await settled_look(os.getpid(), before))
    await asyncio.sleep(0)
    check_counts(before, await settled_look(os.getpid(), before))


def test_growing_memory_is_reported_and_jumping_memory_is_not():
    steps = [100 * MIB + number * MIB for number in range(30)]
    with pytest.raises(SoakFailed, match=r"rss grows: 20\.0 MiB .* 6\.0 MiB are allowed"):
        check_growth("rss", steps, 6 * MIB)
    check_growth("rss", [100 * MIB + (number % 3) * 9 * MIB for number in range(30)], 6 * MIB)
    assert growth(steps[:3]) is None


@pytest.mark.asyncio
async def test_a_service_that_holds_more_than_before_is_reported():
    before = Look(0, 2, 3, 0, service_threads=3, service_descriptors=6, service_rss=0)
    check_counts(before, dataclasses.replace(before, service_descriptors=1, service_threads=4))
    with pytest.raises(SoakFailed, match="service descriptors: at most 6, 8 now"):
        check_counts(before, dataclasses.replace(before, service_descriptors=8))
    with pytest.raises(SoakFailed, match="service threads: at most 4, 5 now"):
        check_counts(before, dataclasses.replace(before, service_threads=5))
