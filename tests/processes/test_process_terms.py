"""Terms with `runs_in="process"`: the numbers of a thread, and workers that end in every case."""

import asyncio
import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.losses.support import datum, guide_logprobs, nll, until
from tests.processes import terms
from tinkex_py import (
    InPlaceMutation,
    InvalidSpec,
    Pipeline,
    RegularizerError,
    RegularizerSpec,
    RegularizerTimeout,
    per_datum,
)

COUNT = int(os.environ.get("TINKEX_TEST_PROCESS_TERMS", "60"))
DATA = [datum(2), datum(3)]


def workers() -> list[psutil.Process]:
    """The worker processes of this program, zombies included."""
    return [child for child in psutil.Process().children() if is_worker(child)]


def is_worker(child: psutil.Process) -> bool:
    try:
        return child.status() == psutil.STATUS_ZOMBIE or "tinkex_py.processes.worker" in child.cmdline()
    except psutil.NoSuchProcess:  # it was just reaped
        return False


@pytest.fixture(scope="module")
def pipelines() -> Iterator[dict[str, Pipeline]]:
    """Pipelines that share nothing but live as long as the module: starting torch takes seconds."""
    kept: dict[str, Pipeline] = {}
    yield kept
    kept.clear()
    gc.collect()
    assert workers() == []


def process_spec(fn: Any, **settings: Any) -> RegularizerSpec:
    return RegularizerSpec(fn, 0.5, "own", runs_in="process", **settings)


async def output_of(spec: RegularizerSpec, **options: Any) -> Any:
    pipeline = Pipeline(nll, [spec], track_grad_norms=True, **options)
    logprobs = guide_logprobs().requires_grad_()
    (await pipeline.loss(DATA, logprobs)).backward()
    return (await pipeline.compute(DATA, guide_logprobs())).regularizers["own"], logprobs.grad


def of_here(factor: float) -> Any:
    class Local:
        def compute(self, data: Any, logprobs: torch.Tensor) -> Any:
            return torch.softmax(logprobs * factor, 0).square().sum(), {"factor": factor}

    return Local()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fn", "options"),
    [
        (terms.entropy, {"scale": 0.3}),
        (per_datum(terms.parts), {}),
        (terms.scored, {}),
        (of_here(1.7), {}),
    ],
    ids=["function", "per datum", "scored", "closure"],
)
async def test_equals_a_thread_to_the_last_bit(fn: Any, options: dict[str, Any]):
    own, gradient = await output_of(process_spec(fn, options=options, max_grad_norm=0.1))
    usual, expected = await output_of(RegularizerSpec(fn, 0.5, "own", options=options, max_grad_norm=0.1))
    assert torch.equal(gradient, expected)
    same = {"value", "contribution", "grad_norm", "clip_scale", "differentiable"}
    assert own.model_dump(include=same) == usual.model_dump(include=same)
    if "pid" in own.custom_metrics:
        assert own.custom_metrics.pop("pid") != usual.custom_metrics.pop("pid") == os.getpid()
        assert own.custom_metrics.pop("main") is True  # that of the worker; the program's is pytest
        usual.custom_metrics.pop("main")
    assert own.custom_metrics == usual.custom_metrics


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fn", "kind", "message"),
    [
        (terms.fails, RegularizerError, "failed with ValueError: the topology is odd"),
        (terms.exits, RegularizerError, "ended with exit status 7"),
        (terms.crashes, RegularizerError, "was ended by SIGSEGV"),
        (terms.hangs, RegularizerTimeout, "within its timeout of 0.5 s"),
        (terms.writes, InPlaceMutation, "'own' modified the shared logprobs in place"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_failure_is_typed_and_the_next_step_works(fn: Any, kind: type, message: str):
    pipeline = Pipeline(nll, [process_spec(fn, timeout=0.5)])
    with pytest.raises(kind, match=message) as caught:
        await pipeline.compute(DATA, guide_logprobs())
    assert type(caught.value) is kind
    again = Pipeline(nll, [process_spec(terms.entropy)])
    again._own_workers = pipeline._own_workers  # as in a client
    assert (await again.compute(DATA, guide_logprobs())).regularizers["own"].value < 0


@pytest.mark.asyncio
@pytest.mark.parametrize("cancelled_at_start", [True, False])
async def test_cancellation_kills_at_once(cancelled_at_start: bool):
    gc.collect()
    before = len(workers())
    pipeline = Pipeline(nll, [process_spec(terms.naps, options={"seconds": 600.0}, timeout=600.0)])
    step = asyncio.ensure_future(pipeline.compute(DATA, guide_logprobs()))
    await until(lambda: len(workers()) > before)
    if not cancelled_at_start:
        pool: Any = pipeline._own_workers.processes  # type: ignore[union-attr]
        await until(lambda: any(worker.loaded for worker in pool._all))
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    await until(lambda: len(workers()) == before)
    assert pipeline._own_workers.process_limiter.holders() == []  # type: ignore[union-attr]


@pytest.mark.asyncio
async def test_random_kills_timeouts_and_cancellations(pipelines: dict[str, Pipeline]):
    """After all of them every permit is back, and no process or descriptor is left."""
    chance = random.Random(7)
    specs = [
        process_spec(terms.naps, options={"seconds": seconds}, timeout=0.2) for seconds in (0.0, 0.0, 0.01, 0.02, 5.0)
    ]
    first = pipelines.setdefault("random", Pipeline(nll, specs[:1]))
    await first.compute(DATA, guide_logprobs())
    workers_of = first._own_workers
    assert workers_of is not None
    ends: list[str] = []
    for _ in range(COUNT):
        pipeline = Pipeline(nll, [chance.choice(specs)])
        pipeline._own_workers = workers_of
        step = asyncio.ensure_future(pipeline.compute(DATA, guide_logprobs()))
        act = chance.choice(["kill", "cancel", *["nothing"] * 10])
        await asyncio.sleep(chance.random() * 0.04)
        if act == "kill" and (alive := workers()):
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(alive).kill()
        elif act == "cancel":
            step.cancel()
        (end,) = await asyncio.gather(step, return_exceptions=True)
        ends.append(type(end).__name__)
        assert not isinstance(end, BaseException) or type(end) in (
            RegularizerError,
            RegularizerTimeout,
            asyncio.CancelledError,
        )
    assert len(set(ends)) >= 3, ends
    assert workers_of.process_limiter.holders() == []
    assert (await first.compute(DATA, guide_logprobs())).regularizers["own"].value > 0
    gc.collect()
    await until(lambda: len(workers()) <= workers_of.process_limiter.limit)
    workers_of.close()
    assert workers() == []


@pytest.mark.parametrize(
    ("fn", "settings", "message"),
    [
        (nll, {"runs_in": "loop"}, "runs_in='loop' does not fit fn, which is sync"),
        (nll, {"runs_in": "process", "is_async": True}, "which is async: use runs_in='loop'"),
        (nll, {"runs_in": "thread", "is_async": True}, "which is async"),
        (nll, {"runs_in": "moon"}, "runs_in"),
        (nll, {"runs_in": "process", "options": {"lock": threading.Lock()}}, "lock|cross"),
    ],
)
def test_contradictions_are_refused(fn: Any, settings: dict[str, Any], message: str):
    with pytest.raises(InvalidSpec, match=message):
        RegularizerSpec(fn, 1.0, "own", **settings)


def test_what_cannot_cross_is_refused_when_the_spec_is_made():
    lock = threading.Lock()
    with pytest.raises(InvalidSpec, match="cannot cross to another process .TypeError"):
        RegularizerSpec(lambda data, logprobs: lock, 1.0, "own", runs_in="process")


PROGRAM = """
import asyncio, os, sys, torch
print("imported", flush=True)
from tinkex_py import Pipeline, RegularizerSpec
FACTOR = 3.0
def of_main(data, logprobs):
    return logprobs.sum() * FACTOR, {"pid": os.getpid()}
def hangs(data, logprobs):
    import re, ctypes
    print("pid", os.getpid(), flush=True)
    re.match(r"(a+)+$", "a" * 64 + "b")
async def main():
    one = Pipeline(of_main, [RegularizerSpec(of_main, 1.0, runs_in="process")])
    print("value", (await one.compute([], torch.ones(4))).regularizers["of_main"].value, flush=True)
    if sys.argv[1] == "hang":
        spec = RegularizerSpec(hangs, 1.0, runs_in="process", timeout=600.0)
        await Pipeline(of_main, [spec]).compute([], torch.ones(4))
if sys.argv[2] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


def program(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, str(file), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_functions_of_main_cross_and_it_is_not_imported(tmp_path: Path, loop: str):
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    with program(tmp_path, "end", loop) as process:
        assert process.stdout is not None
        assert process.stdout.read().split("\n") == ["imported", "value 12.0", ""]
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_hung_worker_dies_with_its_parent(tmp_path: Path):
    with program(tmp_path, "hang", "asyncio") as process:
        assert process.stdout is not None
        pid = next(int(line.split()[1]) for line in process.stdout if line.startswith("pid"))
        worker = psutil.Process(pid)
        assert worker.is_running()
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # until the worker, which has the same stdout, is gone
    assert not psutil.pid_exists(pid) or worker.status() == psutil.STATUS_ZOMBIE
