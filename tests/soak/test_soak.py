"""A short soak holds, a plan is the same for the same seed, and every check can fail."""

import asyncio
import dataclasses
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

from tests.faults.proxy import FaultProxy, Passing
from tests.soak.outcomes import Outcome, check_same, check_same_weights
from tests.soak.plan import Burst, Custom, Optim, draw_segment, planned_failures
from tests.soak.report import table
from tests.soak.resources import MIB, Look, check_counts, growth, look, settled_look
from tests.soak.run import SeededFaults, Settings, Tally, soak
from tests.soak.watch import Clock, Complaints, Ledger, SoakFailed
from tinkex_py import telemetry


@pytest.fixture
def one_torch_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_short_soak_holds(one_torch_thread):
    settings, tally = Settings(seed=20261128, segments=2, trainers=2, moves=5), Tally()
    asyncio.run(soak(settings, tally))
    assert tally.segments == 2
    assert sum(tally.injected.values()) >= 5
    assert tally.seen == tally.planned
    assert sum(tally.planned.values()) > 0
    assert tally.checked["outcomes equal to those of the twin"] > 20
    assert tally.checked["tensors equal to those of the twin"] > 100
    assert tally.checked["tasks, threads, sockets and descriptors as at the start"] == 2
    told = table(settings, tally)
    assert "seed 20261128" in told
    assert "optim_step" in told


def test_ctrl_c_ends_it_with_the_table():
    command = [sys.executable, "-u", "-m", "tests.soak", "--seconds", "100", "--seed", "3"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_heed_ctrl_c,  # noqa: PLW1509  # it only sets a signal
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("soak: seed 3")
        assert process.stdout.readline().startswith("listening at ")
        process.send_signal(signal.SIGINT)
        told = process.stdout.read()
    assert process.returncode == 130, told
    assert "ended by Ctrl-C" in told
    assert "Traceback" not in told


def _heed_ctrl_c():
    """What a shell starts in the background ignores Ctrl-C, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# The plan


def test_a_seed_is_one_plan():
    plans = [draw_segment(seed, 4, trainers=3, moves=10) for seed in (7, 7, 8)]
    assert plans[0] == plans[1] != plans[2]
    drawn: Counter[str] = Counter()
    for index in range(40):
        drawn += planned_failures(draw_segment(7, index, trainers=3, moves=10))
    wanted = {"CancelledError", "TimeoutExceeded", "RegularizerTimeout", "RegularizerError", "skipped"}
    assert drawn.keys() == wanted | {"PrecedingRequestFailed", "PartialFailure", "RequestFailed"}


def test_a_failure_takes_along_what_is_behind_it_only_where_all_is_started_at_once():
    moves = (move for index in range(40) for move in draw_segment(1, index, trainers=3, moves=10).trainers[0].moves)
    calls = (call for move in moves if isinstance(move, Burst) for call in move.calls)
    failing = next(call for call in calls if isinstance(call, Custom) and call.failure)
    burst = Burst((Optim(0.1), failing, Optim(0.1)), gathered=True)
    assert burst.failures() == (None, failing.failure, "PrecedingRequestFailed")
    assert dataclasses.replace(burst, gathered=False).failures() == (None, failing.failure, None)


async def faults_met(seed: str, order: list[int]) -> dict[tuple[int, int], str]:
    """The fault of each attempt of each number, when requests come in some order."""
    choose, met, came = SeededFaults(seed, 0.5, 0.5), dict[tuple[int, int], str](), Counter[int]()
    async with FaultProxy("http://127.0.0.1:1") as proxy:
        for number in order:
            came[number] += 1
            passing = Passing(proxy, None, b"", "B", ("session:train:0", number), None, None)  # type: ignore[arg-type]
            fault = choose(passing)
            met[number, came[number]] = "" if fault is None else fault.name
    return met


@pytest.mark.asyncio
async def test_the_faults_of_a_request_do_not_depend_on_the_order_in_which_requests_come():
    one = await faults_met("1", [1, 2, 3, 1, 2, 3])
    assert one == await faults_met("1", [3, 3, 2, 1, 1, 2])
    assert one != await faults_met("2", [1, 2, 3, 1, 2, 3])
    assert any(one.values())


# Checks that fail


def test_an_outcome_or_a_weight_that_differs_is_told():
    same = [Outcome("custom step", None, "loss_total=1.0"), Outcome("sample", None, "[1]", compared=False)]
    assert check_same("here", same, [same[0], Outcome("sample", "CancelledError", "", compared=False)]) == 1
    with pytest.raises(SoakFailed, match=r"here, call 0:[\s\S]*1\.0000001"):
        check_same("here", same, [Outcome("custom step", None, "loss_total=1.0000001"), same[1]])
    with pytest.raises(SoakFailed, match="2 calls, its twin made 1"):
        check_same("here", same, same[:1])
    one, other = {"a": np.ones(3, np.float32)}, {"a": np.array([1, 1, 1 + 1e-7], np.float32)}
    assert check_same_weights("here", one, one) == 1
    with pytest.raises(SoakFailed, match="a differs from the run without faults, by at most 1.19209e-07"):
        check_same_weights("here", one, other)
    with pytest.raises(SoakFailed, match="other tensors"):
        check_same_weights("here", one, {})


def test_starts_and_ends_of_telemetry_that_do_not_match_are_told():
    def heard(*events: tuple[str, int]) -> Ledger:
        ledger = Ledger()
        with ledger.listening():
            for name, unit in events:
                telemetry.emit(f"tinkex.future.{name}", {}, {}, unit=unit)
        return ledger

    heard(("start", 1), ("start", 2), ("exception", 2), ("stop", 1)).check()
    with pytest.raises(SoakFailed, match=r"tinkex.future.start of unit 2 has no end"):
        heard(("start", 1), ("start", 2), ("stop", 1)).check()
    with pytest.raises(SoakFailed, match=r"tinkex.future.exception for unit 1, which is not open"):
        heard(("start", 1), ("stop", 1), ("exception", 1)).check()
    with pytest.raises(SoakFailed, match="came twice"):
        heard(("start", 1), ("start", 1)).check()
    ledger = heard(("start", 1), ("stop", 1))
    ledger.lines["tinkex.future.stop"] = 0
    with pytest.raises(SoakFailed, match="events and lines differ"):
        ledger.check()


@pytest.mark.asyncio
async def test_errors_that_nobody_hears_and_warnings_are_told():
    async def failing() -> None:
        raise OSError("nobody hears this")

    def complaints_of(work: object) -> Complaints:
        complaints = Complaints()
        with complaints.listening():
            work()  # type: ignore[operator]
            gc.collect()
        return complaints

    complaints_of(lambda: None).check()
    with pytest.raises(SoakFailed, match="DeprecationWarning: old"):
        complaints_of(lambda: warnings.warn("old", DeprecationWarning, stacklevel=1)).check()
    heard = Complaints()
    with heard.listening():
        task = asyncio.create_task(failing())
        await asyncio.wait([task])
        del task
        gc.collect()
    with pytest.raises(SoakFailed, match="never retrieved[\\s\\S]*nobody hears this"):
        heard.check()

    def in_a_thread() -> None:
        raise OSError("in a thread")

    def run_thread() -> None:
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()

    with pytest.raises(SoakFailed, match="thread: OSError: in a thread"):
        complaints_of(run_thread).check()


@pytest.mark.asyncio
async def test_a_call_beyond_its_bound_is_cut_off_and_told():
    clock = Clock(bound=0.01)
    await clock.timed("quick", lambda: asyncio.sleep(0))
    clock.check()
    with pytest.raises(TimeoutError):
        await clock.timed("slow", asyncio.Event().wait)
    with pytest.raises(SoakFailed, match=r"slow took longer than 0\.01 s"):
        clock.check()


@pytest.mark.asyncio
async def test_what_is_left_behind_is_told(monkeypatch):
    monkeypatch.setattr("tests.soak.resources.PATIENCE", 0.05)
    before = look(os.getpid())
    check_counts(before, await settled_look(os.getpid(), before))

    task = asyncio.create_task(asyncio.Event().wait(), name="forgotten")
    with pytest.raises(SoakFailed, match=r"tasks: at most 0, 1 now[\s\S]*task forgotten"):
        check_counts(before, await settled_look(os.getpid(), before))
    task.cancel()
    await asyncio.wait([task])

    let_go = threading.Event()
    thread = threading.Thread(target=let_go.wait, name="forgotten thread")
    thread.start()
    with pytest.raises(SoakFailed, match=r"threads: [\s\S]*forgotten thread"):
        check_counts(before, await settled_look(os.getpid(), before))
    let_go.set()
    thread.join()

    with socket.socket(), pytest.raises(SoakFailed, match="sockets: "):
        check_counts(before, await settled_look(os.getpid(), before))
    descriptor = os.open(__file__, os.O_RDONLY)
    with pytest.raises(SoakFailed, match=r"descriptors: [\s\S]*test_soak.py"):
        check_counts(before, await settled_look(os.getpid(), before))
    os.close(descriptor)
    check_counts(before, await settled_look(os.getpid(), before))


def test_memory_that_grows_is_told_and_memory_that_jumps_is_not():
    steps = [100 * MIB + number * MIB for number in range(30)]
    with pytest.raises(SoakFailed, match=r"the client grows: 20\.0 MiB .* 6\.0 MiB are allowed"):
        growth("the client", steps, 6 * MIB).check()
    jumping = [100 * MIB + (number % 3) * 9 * MIB for number in range(30)]
    growth("the client", jumping, 6 * MIB).check()
    assert growth("the client", steps[:3], 6 * MIB).grown is None


@pytest.mark.asyncio
async def test_a_service_that_holds_more_than_before_is_told():
    before = Look(0, 2, 3, 4, None, 5, 6, 7, None)
    check_counts(before, dataclasses.replace(before, service_sockets=1))
    with pytest.raises(SoakFailed, match="service sockets: at most 6, 8 now"):
        check_counts(before, dataclasses.replace(before, service_sockets=8))
    check_counts(dataclasses.replace(before, service_threads=3), dataclasses.replace(before, service_threads=4))
    with pytest.raises(SoakFailed, match="service threads: at most 4, 5 now"):
        check_counts(dataclasses.replace(before, service_threads=3), dataclasses.replace(before, service_threads=5))
