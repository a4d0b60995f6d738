"""Custom steps that run on the service: one round trip, the same numbers, and the reason where they cannot."""

import asyncio

import pytest
import torch

from tests.client.data import datum, nll
from tests.client.recorder import answering
from tinkex_py import (
    AdamParams,
    InvalidData,
    Pipeline,
    PipelineError,
    PrecedingRequestFailed,
    RegularizerSpec,
    RequestFailed,
    UnsupportedFeature,
    sum_over_datums,
    telemetry,
)

pytestmark = pytest.mark.asyncio


@sum_over_datums
def policy(logprobs, advantages, old):
    ratio = torch.exp(logprobs - old)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum(), {"ratio:mean": ratio.mean()}


def l1(data, logprobs):
    return logprobs.abs().sum()


def spread(data, logprobs):
    return logprobs.std()


def rows(lengths=(5, 9, 3), seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        datum(
            length,
            seed,
            advantages=torch.randn(length, generator=random).numpy(),
            old=(torch.randn(length, generator=random) - 5).numpy(),
        )
        for length in lengths
    ]


@pytest.fixture
def uploading(local_bench):
    return lambda **settings: local_bench({"custom_losses": True}, **settings)


@pytest.mark.parametrize("settings", [{}, {"wire": "json"}])
async def test_a_step_is_one_round_trip_with_the_same_numbers(uploading, settings):
    made = uploading(**settings)
    async with made.service:
        trainings = [await made.train(), await made.train()]
        regularizers = [
            RegularizerSpec(fn=l1, weight=0.02, name="l1"),
            RegularizerSpec(fn=policy, weight=lambda step: 0.1 * (step + 1), name="again"),
        ]
        pipeline = Pipeline(policy, regularizers)
        outputs = []
        for step in range(4):
            outputs = [
                await training.forward_backward_custom(rows(seed=step), pipeline, execution=execution)
                for training, execution in zip(trainings, ("client", "server"), strict=True)
            ]
            client, server = (output.model_dump(exclude={"service_output"}) for output in outputs)
            assert server["base_loss"]["value"] == pytest.approx(client["base_loss"]["value"], rel=1e-4)
            assert server["base_loss"]["metrics"] == pytest.approx(client["base_loss"]["metrics"], rel=1e-4)
            assert server["loss_total"] == pytest.approx(client["loss_total"], rel=1e-4)
            for name, wanted in client["regularizers"].items():
                assert server["regularizers"][name]["value"] == pytest.approx(wanted["value"], rel=1e-4)
                assert server["regularizers"][name]["weight"] == wanted["weight"]
            steps = [await training.optim_step(AdamParams(learning_rate=1e-2)) for training in trainings]
            assert steps[1].metrics["grad_norm"] == pytest.approx(steps[0].metrics["grad_norm"], rel=1e-3)
        forward = [(await training.forward(rows())).packed["logprobs"].values for training in trainings]
        torch.testing.assert_close(*map(torch.tensor, forward), rtol=1e-3, atol=1e-3)
        assert made.kinds(trainings[0]) == ["F", "B", "optim_step"] * 4 + ["F"]
        assert made.kinds(trainings[1]) == ["B", "optim_step"] * 4 + ["F"]
        uploads = [arrival for arrival in made.recorder.arrivals if arrival.path.endswith("create_custom_loss")]
        assert len(uploads) == 1


async def test_chunks_add_up(uploading):
    flags = {"proto_write_fwdbwd": True, "custom_loss_server_side": True}
    outputs = []
    for told in ({}, {"fwdbwd_max_chunk_len": 1}):
        made = uploading()
        made.recorder.always["config"] = answering(200, {**flags, **told})
        async with made.service:
            training = await made.train()
            outputs.append(await training.forward_backward_custom(rows(), policy, execution="server"))
            assert made.kinds(training) == ["B"] * (3 if told else 1)
    want, got = outputs
    assert got.loss_total == pytest.approx(want.loss_total, rel=1e-5)
    assert got.base_loss.metrics["ratio:mean"] == pytest.approx(want.base_loss.metrics["ratio:mean"], rel=1e-5)


async def test_weights_follow_the_steps_before_even_when_all_is_sent_at_once(uploading):
    made = uploading()
    async with made.service:
        training = await made.train()
        seen = []

        def weight(step):
            seen.append(step)
            return 0.1 * step

        specs = [RegularizerSpec(fn=l1, weight=weight, name="l1")]

        def step():
            return training.forward_backward_custom(rows(), nll, regularizers=specs, execution="server")

        first, _, second, _ = await asyncio.gather(step(), training.optim_step(), step(), training.optim_step())
        assert first.regularizers["l1"].weight == 0.0
        assert second.regularizers["l1"].weight == pytest.approx(0.1)
        assert set(seen) == {0, 1}


async def test_auto_runs_on_the_service_where_it_can_and_tells_why_not(uploading):
    made = uploading()
    told = []
    handler = telemetry.attach(
        lambda event: told.append(event.metadata["explanation"]), events="tinkex.custom_loss.not_on_service"
    )
    async with made.service:
        training = await made.train()
        specs = [RegularizerSpec(fn=spread, weight=0.1, name="spread")]
        for _ in range(2):
            await training.forward_backward_custom(rows(), nll, regularizers=specs, execution="auto")
        await training.forward_backward_custom(rows(), nll, track_grad_norms=True, execution="auto")
        await training.forward_backward_custom(rows(), policy, execution="auto")
        assert made.kinds(training) == ["F", "B", "F", "B", "F", "B", "B"]
    telemetry.detach(handler)
    assert told == [
        (
            "term 'spread' cannot run on the service: std() does not sum over positions, so the loss would have "
            "another value one datum at a time: use sum(), or write the term with sum_over_datums"
        ),
        "track_grad_norms=True needs the gradient of every term, which the service does not return",
    ]


async def test_server_says_why_not_and_sends_nothing(uploading, tmp_path):
    made = uploading()
    async with made.service:
        training = await made.train()
        for options, reason in (
            ({"base_loss": spread}, r"std\(\) does not sum"),
            ({"base_loss": nll, "track_grad_norms": True}, "track_grad_norms=True"),
            ({"base_loss": nll, "record": tmp_path / "r"}, "record=... needs the terms on the client"),
            (
                {"base_loss": sum_over_datums(lambda logprobs: torch.fft.fft(logprobs).abs().sum())},
                "the service refuses",
            ),
        ):
            for _ in range(2):
                with pytest.raises(UnsupportedFeature, match=reason):
                    await training.forward_backward_custom(rows(), execution="server", **options)
        missing = sum_over_datums(lambda logprobs, other: logprobs.sum())
        with pytest.raises(InvalidData, match="no 'other'"):
            await training.forward_backward_custom(rows(), missing, execution="server")
        with pytest.raises(PipelineError, match="nothing to train on"):
            await training.forward_backward_custom(rows(), lambda data, p: p.detach().sum(), execution="server")
        with pytest.raises(InvalidData, match="execution must be one of 'client', 'auto', 'server', got 'here'"):
            await training.forward_backward_custom(rows(), nll, execution="here")
        assert made.kinds(training) == []
        uploads = [arrival for arrival in made.recorder.arrivals if arrival.path.endswith("create_custom_loss")]
        assert len(uploads) == 1
        await training.forward_backward_custom(rows(), nll, execution="server")
        assert training.accumulated == 1


async def test_a_service_without_uploads(bench):
    training = await bench.train()
    with pytest.raises(UnsupportedFeature, match="takes no uploaded losses"):
        await training.forward_backward_custom(rows(), nll, execution="server")
    await training.forward_backward_custom(rows(), nll, execution="auto")
    assert bench.kinds(training) == ["F", "B"]


async def test_a_step_that_cannot_run_breaks_what_was_started_with_it(uploading):
    made = uploading()
    async with made.service:
        training = await made.train()
        step = training.forward_backward_custom(rows(), spread, execution="server")
        failed, broken = await asyncio.gather(step, training.optim_step(), return_exceptions=True)
        assert isinstance(failed, UnsupportedFeature)
        assert isinstance(broken, PrecedingRequestFailed)
        assert made.kinds(training) == []


async def test_a_loss_that_fails_on_the_service_is_the_users(uploading):
    made = uploading()
    async with made.service:
        training = await made.train()
        infinite = sum_over_datums(lambda logprobs: logprobs.sum() / (logprobs - logprobs).sum())
        with pytest.raises(RequestFailed, match="must be one finite number") as caught:
            await training.forward_backward_custom(rows(), infinite, execution="server")
        assert caught.value.category == "user"
        await training.forward_backward_custom(rows(), nll, execution="server")


async def test_all_training_clients_of_a_service_share_an_upload(uploading):
    made = uploading()
    async with made.service:
        trainings = [await made.train() for _ in range(3)]
        await asyncio.gather(
            *(training.forward_backward_custom(rows(), policy, execution="server") for training in trainings)
        )
        uploads = [arrival for arrival in made.recorder.arrivals if arrival.path.endswith("create_custom_loss")]
        assert len(uploads) == 1


async def test_events_of_a_step_on_the_service(uploading):
    made = uploading()
    names = []
    handler = telemetry.attach(
        lambda event: names.append(event.name), events=["tinkex.custom_loss.*", "tinkex.regularizer.*"]
    )
    async with made.service:
        training = await made.train()
        specs = [RegularizerSpec(fn=l1, weight=0.1, name="l1")]
        await training.forward_backward_custom(rows(), nll, regularizers=specs, execution="server")
    telemetry.detach(handler)
    assert names == ["tinkex.custom_loss.start", "tinkex.custom_loss.stop"]
