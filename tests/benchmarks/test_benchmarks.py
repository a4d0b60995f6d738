"""The benchmarks measure what they say: tiny versions of them, and what becomes of a target that is missed."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import against_official, overlap, pipeline_alone
from benchmarks.__main__ import PAGE, main
from benchmarks.batches import Batch
from benchmarks.benchmark import Benchmark, Settings
from benchmarks.composed import TERMS, WEIGHTS
from benchmarks.delay_proxy import handler
from benchmarks.replay_service import stored_logprobs
from benchmarks.results import FOLDER, Report, Result
from benchmarks.subjects import BenchmarkError, Measured, alternate, check_equal, subject
from benchmarks.table import BEGIN, END, markdown, rows_of
from benchmarks.trainings import accumulated
from benchmarks.usage import Usage, used_by
from benchmarks.ways import fused, naive, naive_threads, pipeline
from tinkex_py.local import LocalOptions, serve

MOST_BYTES = 1 << 34


def is_sane(usage: Usage) -> bool:
    """More cannot be said of times. CPU is counted in ticks that may round to 0."""
    cores = os.cpu_count() or 1
    return usage.wall > 0 and 0 <= usage.cpu <= (cores + 1) * (usage.wall + 0.1) and 0 < usage.peak < MOST_BYTES


def test_both_sdks_send_the_same_gradient_and_are_compared():
    batch = Batch(4, (8,))
    measured = against_official.measure(batch, rounds=1)  # refuses gradients that differ
    assert list(measured) == ["official", "own"]
    for one in measured.values():
        assert len(one.usages) == 1
        assert all(map(is_sane, one.usages))
        assert one.growth >= 0
    cpu, wall, memory = against_official.compared(batch, measured)
    assert cpu.measured == pytest.approx(measured["own"].cpu / measured["official"].cpu)
    assert wall.measured == pytest.approx(measured["own"].wall / measured["official"].wall)
    assert (wall.bound, memory.bound) == (None, 1.0)


@pytest.mark.asyncio
@pytest.mark.parametrize("way", [pipeline, fused, naive, naive_threads])
async def test_all_ways_compute_the_gradient_of_the_composed_loss(way: Any, tmp_path: Path):
    tokens = 300
    async with way(tokens=tokens, gradient_to=str(tmp_path / "gradient.npy")) as work:
        usage = await used_by(work)
    assert is_sane(usage)
    expected = torch.full((tokens,), -1.0, dtype=torch.float64)  # of the base loss, -sum(logprobs)
    leaf = torch.from_numpy(stored_logprobs(tokens, (1,))).double().requires_grad_()
    for weight, term in zip(WEIGHTS, TERMS, strict=True):
        (gradient,) = torch.autograd.grad(term([], leaf), leaf)
        expected += weight * gradient
    assert np.allclose(np.load(tmp_path / "gradient.npy"), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_the_pipeline_is_compared_by_its_wall_time():
    seconds = {"pipeline": 1.0, "pipeline_on_cpus": 0.5, "fused": 2.0, "naive": 6.0, "naive_threads": 1.0}
    measured = {way: Measured(0, [Usage(wall, 1.0, 1)], [None]) for way, wall in seconds.items()}
    results = pipeline_alone.compared(1_000, measured)
    assert [result.measured for result in results[:4]] == [0.5, 6.0, 1.0, 0.25]
    assert [result.passed for result in results[:4]] == [True, True, False, None]


@pytest.mark.asyncio
async def test_micro_batches_train_the_same_together_and_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-benchmark")
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    service = asyncio.create_task(serve(LocalOptions(), on_listening=listening.set_result))
    port = int((await listening).rpartition(":")[2])
    async with await asyncio.start_server(handler("127.0.0.1", port, 0.002), "127.0.0.1", 0) as proxy:
        url = f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        measured: dict[str, Measured] = {}
        for name, together in (("together", True), ("in_turn", False)):
            async with accumulated(url, together, batches=2, shape=(2, 8), term_seconds=0.001) as work:
                measured[name] = Measured(0, [Usage(1.0, 1.0, 1)], [await work()])
    service.cancel()
    with pytest.raises(asyncio.CancelledError):
        await service
    overlap.check_weights(measured)  # refuses weights that differ
    result = overlap.compared(measured, 0.002)
    assert result.measured == pytest.approx(told_seconds(measured, "together") / told_seconds(measured, "in_turn"))
    other = {**measured, "in_turn": Measured(0, [], [{"seconds": 1.0, "weights": "others"}])}
    with pytest.raises(BenchmarkError, match="2 different sets"):
        overlap.check_weights(other)


def told_seconds(measured: dict[str, Measured], name: str) -> float:
    return measured[name].told[0]["seconds"]


def test_subjects_run_in_turn_and_warm_up_runs_do_not_count():
    counted = "tests.benchmarks.counted:counted"
    with subject(counted, {"start": 10}) as first, subject(counted, {"start": 20}) as second:
        measured = alternate({"first": first, "second": second}, rounds=2, warm_up=1)
    assert (measured["first"].told, measured["second"].told) == ([12, 13], [22, 23])
    assert all(map(is_sane, measured["first"].usages))


def test_a_subject_that_dies_is_an_error(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(BenchmarkError, match="no_such"), subject("benchmarks.clients:no_such_function", {}) as one:
        one.ready()
    assert "no_such_function" in capfd.readouterr().err


def test_gradients_that_differ_are_refused():
    one = np.ones(3, np.float32)
    check_equal({"a": one, "b": one * (1 + 1e-7)})
    for wrong in (one * 1.001, np.ones(4, np.float32)):
        with pytest.raises(BenchmarkError, match="b sent another gradient than a"):
            check_equal({"a": one, "b": wrong})
    for nothing in (np.zeros(0, np.float32), np.zeros(3, np.float32)):
        with pytest.raises(BenchmarkError, match="no gradient"):
            check_equal({"a": nothing, "b": nothing})


def benchmark_of(*results: Result) -> Benchmark:
    def run(_: Settings) -> Sequence[Result]:
        return results

    return Benchmark("z", "made up", run)


MISSED = Result(benchmark="z", what="slow", measured=2.0, bound=1.0)
REACHED = Result(benchmark="z", what="fast", measured=3.0, bound=2.0, target="at least")
TOLD = Result(benchmark="z", what="told", measured=7.0, unit="ms")


@pytest.mark.parametrize(
    ("result", "options", "status"), [(MISSED, [], 1), (REACHED, [], 0), (TOLD, [], 0), (MISSED, ["--quick"], 0)]
)
def test_the_exit_status_tells_whether_a_target_was_missed(
    result: Result, options: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*options, "--out", str(tmp_path)], [benchmark_of(result, TOLD)]) == status
    name = "quick" if options else "latest"
    report = Report.model_validate_json((tmp_path / f"{name}.json").read_text())
    assert list(report.results) == [result, TOLD]
    assert report.machine.cores >= 1
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    verdict = "-" if options else result.verdict
    assert rows_of(report)[0] == (f"(z) {result.what}", result.target_text, result.measured_text, verdict)
    assert f"(z) {result.what}" in capsys.readouterr().out


def test_a_name_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["nonsense"], [benchmark_of(TOLD)])
    assert caught.value.code == 2
    assert "no benchmark nonsense; there are z" in capsys.readouterr().err


def test_the_page_shows_the_latest_run():
    report = Report.model_validate_json((FOLDER / "latest.json").read_text())
    _, _, rest = PAGE.read_text().partition(BEGIN)
    assert rest.partition(END)[0].strip() == markdown(report)
    assert not report.quick
