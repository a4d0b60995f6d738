"""Certificates: which surrogate a service needs is found by measurement, stored, and used by later clients."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.certify.faults import NORMALIZING, skyrl, twinkle
from tests.client.data import datum
from tests.client.normalizing import LINEAR, as_skyrl, rewriting
from tests.client.recorder import Recorder, answering, http_recorder, quick_config
from tests.runs.support import run_to
from tests.support.layers import innermost
from tinkex_py import AsyncServiceClient, Authentication, ConfigError, InvalidData, UnsupportedFeature
from tinkex_py.client.certificates import Certificate
from tinkex_py.local.core import Core
from tinkex_py.local.engine import Engine
from tinkex_py.runs import read_run
from tinkex_py.transport import wire

DATA = [datum(length, 5) for length in (3, 9, 1, 5)]


@dataclass
class Bench:
    """A service behind a socket and the folder of certificates of its clients."""

    recorder: Recorder
    url: str
    folder: Path

    @property
    def core(self) -> Core:
        return innermost(self.recorder.app).state.service.core

    def client(self, **settings: Any) -> AsyncServiceClient:
        return AsyncServiceClient(quick_config(self.url, certificates=self.folder, **settings))

    async def left_behind(self, service: AsyncServiceClient) -> list[str]:
        """The models and checkpoints of the service, when its engine has finished its work."""
        checkpoints = [checkpoint.tinker_path async for checkpoint in service.create_rest_client().checkpoints()]
        return [*self.core.sequencers, *self.core.engine._models, *checkpoints]


@asynccontextmanager
async def bench_of(folder: Path, inject: Callable[[Engine], None] | None = None) -> AsyncIterator[Bench]:
    async with http_recorder() as (recorder, url):
        bench = Bench(recorder, url, folder)
        if inject is not None:
            inject(bench.core.engine)
        yield bench


def says_nothing(message: wire.ForwardBackwardOutput) -> None:
    """The result of a pass that proves nothing."""
    message.metrics.clear()
    message.metrics["loss:avg"] = 0.0


def cosine(data: Any, logprobs: Any) -> Any:
    pattern = np.cos(np.arange(logprobs.numel())).astype(np.float32)
    return (logprobs * logprobs.new_tensor(pattern)).sum()


async def trained(service: AsyncServiceClient, **options: Any) -> np.ndarray:
    """The logprobs after three steps."""
    training = await service.create_lora_training_client("tiny", rank=4, seed=1)
    for _ in range(3):
        await training.forward_backward_custom(DATA, cosine, **options)
        await training.optim_step(LINEAR)
    return (await training.forward(DATA)).packed["logprobs"].values


@pytest.mark.parametrize(("inject", "surrogate"), NORMALIZING.items(), ids=NORMALIZING.values())
@pytest.mark.asyncio
async def test_the_right_surrogate_is_found_by_measurement_and_used_by_later_clients(tmp_path, inject, surrogate):
    """No answer of these services shows what they do; training ends where it does on a service that sums."""
    async with bench_of(tmp_path) as plain, plain.client() as service:
        expected = await trained(service)
    async with bench_of(tmp_path, inject) as bench:
        bench.recorder.always["retrieve_future"] = rewriting(says_nothing)
        async with bench.client() as service:
            with pytest.raises(UnsupportedFeature, match="tinkex-py check --gradients"):
                await trained(service)
            assert bench.recorder.of("B") == []
            certificate = await service.certify_gradients(rank=4)
            assert certificate.surrogate == surrogate
            np.testing.assert_allclose(await trained(service), expected, rtol=1e-4, atol=1e-4)
        async with bench.client() as later:
            np.testing.assert_allclose(await trained(later), expected, rtol=1e-4, atol=1e-4)
            training = await later.create_lora_training_client("tiny", rank=4)
            assert training.certificate == certificate


@pytest.mark.asyncio
async def test_a_stored_certificate_is_used_where_it_belongs_only(tmp_path):
    """It is that of another service if the form of the answers differs; systematic noise warns once per client."""
    async with bench_of(tmp_path) as bench, bench.client() as service:
        certificate = await service.certify_gradients(rank=4, surrogates=["importance_sampling_sum"])
        (file,) = tmp_path.iterdir()
        assert Certificate.model_validate_json(file.read_bytes()) == certificate
        assert certificate.model_dump().items() >= {"service": bench.url, "model": "tiny", "wire": "protobuf"}.items()
        assert certificate.version is not None
        async with bench.client() as later:
            await trained(later)
            run = await run_to(later, tmp_path / "run", steps=1)
            resumed = await later.create_training_client_from_state(run.checkpoint)
            await resumed.forward_backward_custom(DATA, cosine)
            assert resumed.certificate == certificate
        assert read_run(tmp_path / "run").certificate == certificate.digest
        assert {arrival.message.loss_fn for arrival in bench.recorder.of("B")} == {"importance_sampling"}
        noisy = json.loads(file.read_text())
        noisy["measurements"][0]["noise"] = 0.02
        file.write_text(json.dumps(noisy))
        async with bench.client() as later:
            with pytest.warns(UserWarning, match=r"equal steps of 'tiny' differ by 0\.02"):
                await trained(later)
            await trained(later)
        bench.recorder.always["retrieve_future"] = rewriting(says_nothing)
        async with bench.client() as later:
            with pytest.raises(UnsupportedFeature, match="reports no loss:sum"):
                await trained(later)
        bench.recorder.always.clear()
        file.write_text("{}")
        async with bench.client() as later:
            with pytest.raises(ConfigError, match=re.escape(str(file))):
                await trained(later)


@pytest.mark.asyncio
async def test_where_no_surrogate_passes_nothing_is_sent(tmp_path):
    async with bench_of(tmp_path, twinkle) as bench:
        async with bench.client() as service:
            certificate = await service.certify_gradients(rank=4, surrogates=["cross_entropy", "importance_sampling"])
            assert certificate.surrogate is None
        sent = len(bench.recorder.of("B"))
        async with bench.client() as later:
            with pytest.raises(UnsupportedFeature, match="cross_entropy: scale and sign; importance_sampling: acc"):
                await trained(later)
            assert len(bench.recorder.of("B")) == sent
            await trained(later, surrogate="importance_sampling_per_request")


@pytest.mark.asyncio
async def test_a_service_without_checkpoints_is_measured_on_one_model(tmp_path):
    async with bench_of(tmp_path) as bench:
        bench.recorder.always = {"load_weights": answering(404), "weights_info": answering(404)}
        bench.recorder.always["unload_model"] = answering(404, {"detail": "Not Found"})
        async with bench.client(wire="json") as service:
            certificate = await service.certify_gradients(rank=4)
        assert len({arrival.number[0] for arrival in bench.recorder.of("B")}) == 1
    assert certificate.surrogate == "cross_entropy"
    assert certificate.wire == "json"
    assert certificate.drift is not None
    assert 0 < certificate.drift < 1e-2
    assert ["end with the session" in certificate.notes[0], "from a checkpoint" in certificate.notes[1]] == [True, True]


@pytest.mark.parametrize("kind", ["create_model", "save_weights", "load_weights", "B", "optim_step", "unload_model"])
@pytest.mark.asyncio
async def test_a_cancelled_measurement_leaves_nothing_behind(tmp_path, kind):
    async with bench_of(tmp_path) as bench, bench.client() as service:
        measuring = asyncio.create_task(service.certify_gradients(rank=4))
        await bench.recorder.until(lambda: len(bench.recorder.of(kind)) >= 1)
        measuring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await measuring
        assert await bench.left_behind(service) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_a_failed_measurement_leaves_nothing_behind(tmp_path):
    async with bench_of(tmp_path) as bench, bench.client() as service:
        bench.recorder.faults["B"] = [None] * 6
        bench.recorder.always["B"] = answering(401)
        with pytest.raises(Authentication):
            await service.certify_gradients(rank=4)
        assert await bench.left_behind(service) == []


@pytest.mark.asyncio
async def test_bad_arguments_create_nothing(tmp_path):
    wrong = [
        ({"rank": 0}, "rank"),
        ({"max_models": 0}, "max_models"),
        ({"surrogates": ["auto"]}, "surrogates"),
        ({"model": ""}, "model"),
    ]
    async with bench_of(tmp_path) as bench, bench.client() as service:
        for arguments, name in wrong:
            with pytest.raises(InvalidData, match=name):
                await service.certify_gradients(**arguments)
        assert bench.recorder.of("create_model") == []


@pytest.mark.asyncio
async def test_a_service_recognized_by_the_table_needs_no_certificate(tmp_path):
    async with bench_of(tmp_path, skyrl) as bench:
        bench.recorder.always["retrieve_future"] = rewriting(as_skyrl)
        async with bench.client() as service:
            await trained(service)
        assert {arrival.message.loss_fn for arrival in bench.recorder.of("B")} == {"importance_sampling"}
