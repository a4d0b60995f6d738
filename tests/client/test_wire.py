"""The dialect over HTTP: what a service is sent, whatever it reads."""

import asyncio
from typing import Any

import pytest

from tests.client.data import datum, nll
from tests.client.recorder import Arrival, answering
from tinkex_py import InvalidData, Unprocessable

pytestmark = pytest.mark.asyncio
DATA = [datum(3, 1), datum(2, 2), datum(4, 3)]
PROBE = "probe-nonexistent"


def flags(**told: Any) -> Any:
    return answering(200, told)


def passes(bench: Any) -> list[Arrival]:
    """Passes over data, without the probes."""
    return [one for one in bench.recorder.of("F", "B") if PROBE.encode() not in one.body]


def probes(bench: Any) -> list[Arrival]:
    return [one for one in bench.recorder.of("F", "B") if PROBE.encode() in one.body]


async def one_step(bench: Any) -> float:
    training = await bench.train(seed=5)
    await training.forward_backward_custom(DATA, nll)
    await training.optim_step()
    return (await training.forward(DATA)).metrics["loss:sum"]


async def test_without_flags_the_encoding_is_probed_once(local_bench):
    bench = local_bench()
    bench.recorder.always["config"] = flags()
    async with bench.service:
        await asyncio.gather(one_step(bench), one_step(bench))
    assert len(probes(bench)) == 1
    assert len(passes(bench)) == 6
    assert all(one.is_protobuf for one in passes(bench))


async def refuse_protobuf(arrival: Arrival, serve: Any, send: Any) -> None:
    """As a service that reads JSON only."""
    if arrival.is_protobuf:
        await answering(415, {"detail": "JSON only"})(arrival, serve, send)
    else:
        await serve(send)


@pytest.mark.parametrize("told", [{}, {"proto_write_fwdbwd": True}], ids=["found out", "told wrongly"])
async def test_a_service_of_json_only(local_bench, told):
    """Found out by the probe; and if all signs were wrong, a refused body goes again in JSON with the same number."""
    bench, usual = local_bench(), local_bench()
    bench.recorder.always.update({"config": flags(**told), "F": refuse_protobuf, "B": refuse_protobuf})
    async with bench.service, usual.service:
        loss = await one_step(bench)
        assert loss == pytest.approx(await one_step(usual), rel=1e-6)
    refused = [one for one in passes(bench) if one.is_protobuf]
    written = [one for one in passes(bench) if not one.is_protobuf]
    assert [(one.path.rsplit("/", 1)[-1], one.number[1]) for one in written] == [
        ("forward", 1),
        ("forward_backward", 2),
        ("forward", 4),
    ]
    if told:
        assert [one.number[1] for one in refused] == [1]
        assert probes(bench) == []
    else:
        assert refused == []
        assert len(probes(bench)) == 1


async def test_a_refusal_of_the_content_is_no_reason_to_write_it_otherwise(local_bench):
    bench = local_bench()
    async with bench.service:
        training = await bench.train()
        bench.recorder.faults["B"] = [answering(422, {"detail": "loss_fn is not known"})]
        with pytest.raises(Unprocessable):
            await training.forward_backward(DATA)
        assert len(bench.recorder.of("B")) == 1


async def test_the_encoding_of_the_config_takes_precedence(local_bench):
    bench = local_bench(wire="protobuf")
    bench.recorder.always.update({"config": flags(proto_write_fwdbwd=False), "B": refuse_protobuf})
    async with bench.service:
        training = await bench.train()
        with pytest.raises(Exception, match="JSON only"):
            await training.forward_backward(DATA)
        assert len(bench.recorder.of("B")) == 1


async def test_numbers_that_json_cannot_hold_are_refused_before_a_number_is_taken(local_bench):
    bench = local_bench()
    bench.recorder.always["config"] = flags(proto_write_fwdbwd=False)
    async with bench.service:
        training = await bench.train()
        bad = datum(2, 1, mask=[1.0, float("nan")])
        step, update = await asyncio.gather(
            training.forward_backward([bad]), training.optim_step(), return_exceptions=True
        )
        assert isinstance(step, InvalidData)
        assert "wire='protobuf'" in str(step)
        assert type(update).__name__ == "PrecedingRequestFailed"
        assert bench.recorder.of("B", "optim_step") == []


async def test_compressed_passes_where_the_service_asks_for_it(local_bench):
    bench, usual = local_bench(), local_bench()
    bench.recorder.always["config"] = flags(proto_write_fwdbwd=True, proto_compress_fwdbwd=True)
    async with bench.service, usual.service:
        assert await one_step(bench) == await one_step(usual)
    sent = bench.recorder.of("F", "B")
    assert len(sent) == 3
    assert {arrival.headers["content-encoding"] for arrival in sent} == {"zstd"}
    assert {len(arrival.message.data) for arrival in sent} == {3}


@pytest.mark.parametrize("status", [404, 405])
async def test_a_service_from_before_client_config(local_bench, status):
    bench = local_bench()
    bench.recorder.always["config"] = answering(status)
    async with bench.service:
        await one_step(bench)
    assert len(probes(bench)) == 1
    assert [one.number[1] for one in passes(bench)] == [1, 2, 4]
