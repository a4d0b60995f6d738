"""The gradient of a custom step arrives as computed, also where the service's cross_entropy normalizes."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.client.conftest import Bench
from tests.client.data import bad_datum, datum, nll
from tests.client.normalizing import LINEAR, answers_like_hatchery, answers_like_skyrl, rewriting
from tests.client.recorder import Recorder, answering, chunked, http_recorder, quick_config, sent_weights
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    Datum,
    InvalidData,
    ModelInput,
    PartialFailure,
    PipelineError,
    PrecedingRequestFailed,
    RequestFailed,
    SurrogateMismatch,
    TensorData,
    Unprocessable,
    UnsupportedFeature,
    per_datum,
    telemetry,
)
from tinkex_py.client.surrogate import PER_REQUEST, PER_SEQUENCE, advantages_of
from tinkex_py.config import HOSTED_SERVICE
from tinkex_py.transport import wire
from tinkex_py.types import PackedTensor

DATA = [datum(length, 5) for length in (3, 9, 1, 5)]
SIXTEEN = [datum(2 + index % 5, index) for index in range(16)]
FACTORS = (0.5, 1.0, 2.0, 10.0, -1.0)


def signed(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    """A loss of which no sum of weights says anything: every datum's gradient has both signs or stands alone."""
    return (logprobs * torch.cos(torch.arange(len(logprobs)))).sum()


def scaled(factor: float) -> Any:
    return lambda data, logprobs: factor * signed(data, logprobs)


def sent(messages: Sequence[wire.ForwardBackwardRequest], name: str) -> np.ndarray:
    return np.concatenate(
        [np.frombuffer(item.loss_fn_inputs[name].dense, "<f4") for message in messages for item in message.data]
    )


def messages_of(bench: Bench, kind: str) -> list[Any]:
    return [item for arrival in bench.recorder.of(kind) for item in arrival.message.data]


async def logprobs_of(training: Any, data: Any) -> np.ndarray:
    return (await training.forward(data)).packed["logprobs"].values


@asynccontextmanager
async def skyrl_bench(per_chunk: int | None = None, **settings: Any) -> AsyncIterator[Bench]:
    """A bench on a service that normalizes and is recognised."""
    async with bench_that(answers_like_skyrl, per_chunk, **settings) as bench:
        yield bench


@asynccontextmanager
async def bench_that(
    answers: Callable[[Recorder], None], per_chunk: int | None = None, **settings: Any
) -> AsyncIterator[Bench]:
    async with http_recorder() as (recorder, url):
        answers(recorder)
        if per_chunk is not None:
            recorder.always["config"] = chunked(per_chunk)
        async with AsyncServiceClient(quick_config(url, **settings)) as service:
            yield Bench(service, recorder)


# Both surrogates end at the same weights


@pytest.mark.parametrize(("surrogate", "per_chunk"), [("auto", 3), ("importance_sampling", None)])
@pytest.mark.asyncio
async def test_a_normalizing_service_ends_where_a_summing_one_does(local_bench, surrogate, per_chunk):
    """The plain service gets the gradient in cross_entropy; the layer divides, and importance_sampling undoes it."""
    summing = local_bench()
    async with summing.service, skyrl_bench(per_chunk) as normalizing:
        after: list[np.ndarray] = []
        for bench, options in ((summing, {}), (normalizing, {"surrogate": surrogate})):
            training = await bench.train()
            before = await logprobs_of(training, DATA)
            for _ in range(3):
                await training.forward_backward_custom(DATA, signed, **options)
                await training.optim_step(LINEAR)
            after.append(await logprobs_of(training, DATA))
    assert np.abs(after[0] - before).max() > 0.1  # the steps are large enough to compare
    np.testing.assert_allclose(after[1], after[0], rtol=1e-4, atol=1e-4)
    assert set(losses_sent(normalizing)) == {"importance_sampling"}
    assert {arrival.message.loss_fn for arrival in normalizing.recorder.of("F")} == {"cross_entropy"}
    assert len(normalizing.recorder.of("B")) == (3 if per_chunk is None else 6)


@pytest.mark.parametrize("per_chunk", [3])
@pytest.mark.asyncio
async def test_a_service_that_divides_each_request_ends_where_a_summing_one_does(local_bench, per_chunk):
    """Two unequal calls per step, whose gradients that service adds up."""
    summing = local_bench()
    async with summing.service, bench_that(answers_like_hatchery, per_chunk) as normalizing:
        after: list[np.ndarray] = []
        for bench in (summing, normalizing):
            training = await bench.train()
            before = await logprobs_of(training, DATA)
            for _ in range(2):
                await training.forward_backward_custom(DATA, signed)
                await training.forward_backward_custom(DATA[:1], scaled(3.0))
                await training.optim_step(LINEAR)
            after.append(await logprobs_of(training, DATA))
    assert np.abs(after[0] - before).max() > 0.1
    np.testing.assert_allclose(after[1], after[0], rtol=1e-4, atol=1e-4)
    assert set(losses_sent(normalizing)) == {"importance_sampling"}


@pytest.mark.parametrize("answers", [answers_like_skyrl, answers_like_hatchery])
@pytest.mark.asyncio
async def test_cross_entropy_is_wrong_on_a_normalizing_service(http_bench, answers):
    """Shows that the tests above can fail: the scale of the loss is lost."""
    answers(http_bench.recorder)
    after: list[np.ndarray] = []
    for factor in (1.0, 7.0):
        training = await http_bench.train()
        await training.forward_backward_custom(
            DATA, lambda data, logprobs, factor=factor: -factor * logprobs.sum(), surrogate="cross_entropy"
        )
        await training.optim_step(LINEAR)
        after.append(await logprobs_of(training, DATA))
    np.testing.assert_allclose(after[0], after[1], rtol=1e-5)


@pytest.mark.asyncio
async def test_what_importance_sampling_sends():
    async with skyrl_bench(per_chunk=2) as bench:
        training = await bench.train()
        await training.forward_backward_custom(DATA, signed, sequences_per_step=20)
        seen = await logprobs_of(training, DATA)
        messages = [arrival.message for arrival in bench.recorder.of("B")]
    assert [len(message.data) for message in messages] == [2, 2]
    for message in messages:
        for item in message.data:
            assert set(item.loss_fn_inputs) == {"target_tokens", "logprobs", "advantages"}
    lengths = np.repeat([3, 9, 1, 5], [3, 9, 1, 5])
    np.testing.assert_allclose(sent(messages, "advantages"), -np.cos(np.arange(18)) * lengths * 20, rtol=1e-6)
    np.testing.assert_allclose(sent(messages, "logprobs"), seen, rtol=1e-5)


@pytest.mark.asyncio
async def test_the_json_wire_carries_the_same_advantages(local_bench):
    bench = local_bench(wire="json")
    async with bench.service:
        training = await bench.train()
        await training.forward_backward_custom(DATA, signed, surrogate="importance_sampling")
    (backward,) = bench.recorder.of("B")
    given = backward.json["forward_backward_input"]
    assert given["loss_fn"] == "importance_sampling"
    advantages = [item["loss_fn_inputs"]["advantages"]["data"] for item in given["data"]]
    lengths = np.repeat([3, 9, 1, 5], [3, 9, 1, 5])
    np.testing.assert_allclose(np.concatenate(advantages), -np.cos(np.arange(18)) * lengths * 4, rtol=1e-6)
    assert all(set(item["loss_fn_inputs"]) == {"target_tokens", "logprobs", "advantages"} for item in given["data"])


# Accumulation


@pytest.mark.asyncio
async def test_four_and_twelve_are_sixteen(http_bench):
    answers_like_skyrl(http_bench.recorder)
    after: list[np.ndarray] = []
    for parts in ([SIXTEEN], [SIXTEEN[:4], SIXTEEN[4:]]):
        training = await http_bench.train()
        for part in parts:
            await training.forward_backward_custom(part, lambda data, p: p.square().sum(), sequences_per_step=16)
        await training.optim_step(LINEAR)
        after.append(await logprobs_of(training, SIXTEEN))
    before = await logprobs_of(await http_bench.train(), SIXTEEN)
    assert np.abs(after[0] - before).max() > 0.1
    np.testing.assert_allclose(after[1], after[0], rtol=1e-4, atol=1e-4)


@pytest.mark.asyncio
async def test_an_optimizer_step_on_another_number_of_datums_is_not_sent(http_bench):
    answers_like_skyrl(http_bench.recorder)
    training = await http_bench.train()
    step, _, update, later = await asyncio.gather(
        training.forward_backward_custom(SIXTEEN[:4], signed),
        training.forward_backward_custom(SIXTEEN[4:], signed),
        training.optim_step(),
        training.optim_step(),
        return_exceptions=True,
    )
    assert isinstance(update, SurrogateMismatch), update
    assert re.search(r"divides by the 16 datums .* scaled for 4 and 12 .*sequences_per_step=16", str(update))
    assert isinstance(later, PrecedingRequestFailed)
    assert step.loss_total == pytest.approx(step.base_loss.value)
    assert http_bench.kinds(training) == ["F", "B", "F", "B"] or http_bench.kinds(training) == ["F", "F", "B", "B"]


@pytest.mark.asyncio
async def test_too_few_datums_can_be_completed(http_bench):
    answers_like_skyrl(http_bench.recorder)
    training = await http_bench.train()
    await training.forward_backward_custom(SIXTEEN[:4], signed, sequences_per_step=16)
    with pytest.raises(SurrogateMismatch, match="send the other 12 datums with sequences_per_step=16 first"):
        await training.optim_step()
    await training.forward_backward_custom(SIXTEEN[4:], signed, sequences_per_step=16)
    await training.optim_step(LINEAR)
    await training.forward_backward_custom(SIXTEEN[:4], signed)  # the count starts again
    await training.optim_step(LINEAR)


@pytest.mark.asyncio
async def test_datums_of_the_services_own_losses_count_too(http_bench):
    answers_like_skyrl(http_bench.recorder)
    training = await http_bench.train()
    await training.forward_backward(SIXTEEN[4:])
    await training.forward_backward_custom(SIXTEEN[:4], signed)
    with pytest.raises(SurrogateMismatch, match="16 datums"):
        await training.optim_step()


@pytest.mark.asyncio
async def test_what_the_service_refused_does_not_count():
    async with skyrl_bench(per_chunk=2) as bench:
        training = await bench.train()
        with pytest.raises(PartialFailure):
            await training.forward_backward([*DATA[:2], bad_datum(), DATA[3]])
        with pytest.raises(RequestFailed):
            await training.forward_backward([bad_datum()])
        await training.forward_backward_custom(DATA[2:], signed)
        with pytest.raises(SurrogateMismatch, match="4 datums .* scaled for 2"):
            await training.optim_step()
        await training.forward_backward_custom(DATA[2:], signed, sequences_per_step=6)
        with pytest.raises(SurrogateMismatch, match="6 datums .* scaled for 2"):
            await training.optim_step()


@pytest.mark.asyncio
async def test_a_refused_optimizer_step_clears_nothing():
    async with skyrl_bench() as bench:
        training = await bench.train()
        await training.forward_backward_custom(DATA, signed)
        bench.recorder.faults["optim_step"] = [answering(422)]
        with pytest.raises(Unprocessable):
            await training.optim_step()
        # Its number was refused on the way, so the service waits; that a backward pass is handed over is enough.
        backward = asyncio.create_task(training.forward_backward(DATA))
        await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 2)
        backward.cancel()
        with pytest.raises(SurrogateMismatch, match="8 datums .* scaled for 4"):
            await training.optim_step()
        with pytest.raises(asyncio.CancelledError):
            await backward


@pytest.mark.asyncio
async def test_where_nothing_is_divided_the_number_does_not_matter(bench):
    training = await bench.train()
    await training.forward_backward_custom(SIXTEEN[:4], signed)
    await training.forward_backward_custom(SIXTEEN[4:], signed, sequences_per_step=99)
    await training.optim_step()
    assert {arrival.message.loss_fn for arrival in bench.recorder.of("B")} == {"cross_entropy"}


# Targets of more dimensions


CANDIDATES = [datum(length, length, candidates=3) for length in (4, 2, 7)]


def bent(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs between positions and candidates."""
    return (logprobs * torch.cos(torch.arange(logprobs.numel())).reshape(logprobs.shape)).sum()


@pytest.mark.parametrize("answers", [answers_like_skyrl, answers_like_hatchery])
@pytest.mark.parametrize("per_chunk", [None, 4])
@pytest.mark.asyncio
async def test_candidates_are_sent_one_by_one_where_only_one_target_is_possible(local_bench, answers, per_chunk):
    """K datums of [T] end at the weights at which a service that takes [T, K] ends."""
    summing = local_bench()
    async with summing.service, bench_that(answers, per_chunk) as normalizing:
        after: list[np.ndarray] = []
        for bench in (summing, normalizing):
            training = await bench.train()
            before = await logprobs_of(training, DATA)
            for _ in range(2):
                output = await training.forward_backward_custom(CANDIDATES, bent)
                await training.optim_step(LINEAR)
            after.append(np.append(await logprobs_of(training, DATA), output.loss_total))
    assert np.abs(after[0][:-1] - before).max() > 0.1
    np.testing.assert_allclose(after[1], after[0], rtol=1e-4, atol=1e-4)
    assert set(losses_sent(normalizing)) == {"importance_sampling"}
    shapes = {tuple(item.loss_fn_inputs["target_tokens"].shape) for item in messages_of(normalizing, "B")}
    assert shapes == {(4,), (2,), (7,)}
    assert len(messages_of(normalizing, "B")) == 2 * 3 * len(CANDIDATES)


@pytest.mark.asyncio
async def test_candidates_in_parts_of_a_step(local_bench):
    """The number of datums in a step is given in datums of the caller."""
    summing = local_bench()
    async with summing.service, skyrl_bench() as normalizing:
        after: list[np.ndarray] = []
        for bench in (summing, normalizing):
            training = await bench.train()
            await training.forward_backward_custom(CANDIDATES[:1], bent, sequences_per_step=3)
            await training.forward_backward_custom(CANDIDATES[1:], bent, sequences_per_step=3)
            await training.optim_step(LINEAR)
            after.append(await logprobs_of(training, DATA))
    np.testing.assert_allclose(after[1], after[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("answers", "options"), [(answers_like_skyrl, {}), (answers_like_hatchery, {"sequences_per_step": 3})]
)
@pytest.mark.asyncio
async def test_datums_with_different_numbers_of_candidates(local_bench, answers, options):
    data = [datum(4, 1), datum(3, 2, candidates=2), datum(5, 3, candidates=1)]

    @per_datum
    def base(data: Any, logprobs: Any) -> torch.Tensor:
        assert [part.shape for part in logprobs] == [(4,), (3, 2), (5, 1)]
        return sum(bent(data, part) for part in logprobs)

    summing = local_bench()
    async with summing.service, bench_that(answers) as normalizing:
        after: list[np.ndarray] = []
        for bench in (summing, normalizing):
            training = await bench.train()
            await training.forward_backward_custom(data, base, **options)
            await training.optim_step(LINEAR)
            after.append(await logprobs_of(training, DATA))
    np.testing.assert_allclose(after[1], after[0], rtol=1e-4, atol=1e-4)


def sparse(length: int) -> Any:
    """A datum whose target at position i is candidate i."""
    targets = TensorData(
        data=[1] * length,
        dtype="int64",
        shape=(length, length),
        sparse_crow_indices=range(length + 1),
        sparse_col_indices=range(length),
    )
    return Datum(model_input=ModelInput.from_ints([1] * length), loss_fn_inputs={"target_tokens": targets})


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([datum(3, 1), datum(4, 2, candidates=3)], {"sequences_per_step": 4}, "datums with 1 and 3 candidates"),
        ([sparse(3)], {}, r"target_tokens of datum 0 have shape \(3, 3\) and are sparse"),
        ([datum(3, 1, candidates=0)], {}, r"target_tokens of datum 0 have shape \(3, 0\): pass dense targets"),
    ],
)
@pytest.mark.asyncio
async def test_candidates_that_cannot_be_sent_one_by_one_are_refused(http_bench, data, options, message):
    answers_like_skyrl(http_bench.recorder)
    training = await http_bench.train()
    await training.forward_backward_custom(DATA, signed)  # from now on the service is known
    await training.optim_step()
    sent = len(http_bench.recorder.of("F", "B"))
    for surrogate in ("importance_sampling", "auto"):
        with pytest.raises(UnsupportedFeature, match=message):
            await training.forward_backward_custom(data, nll, surrogate=surrogate, **options)
    assert len(http_bench.recorder.of("F", "B")) == sent


@pytest.mark.asyncio
async def test_a_service_that_is_not_known_is_measured_with_one_target_per_position(http_bench):
    answers_like_skyrl(http_bench.recorder)
    training = await http_bench.train()
    await training.forward_backward_custom([datum(4, 2, candidates=3)], bent)
    measuring, forward = (arrival.message.data for arrival in http_bench.recorder.of("F"))
    assert [list(item.loss_fn_inputs["target_tokens"].shape) for item in measuring] == [[4], [4]]
    assert [list(item.loss_fn_inputs["target_tokens"].shape) for item in forward] == [[4]] * 3


@pytest.mark.asyncio
async def test_a_service_that_sums_takes_candidates(http_bench):
    training = await http_bench.train()
    data = [datum(4, 2, candidates=3), datum(2, 1, candidates=3)]
    for _ in range(2):
        await training.forward_backward_custom(data, lambda data, p: -2 * p.sum())
    assert http_bench.kinds(training) == ["F", "F", "B", "F", "B"]  # the first one measured
    assert set(sent_weights([http_bench.recorder.of("B")[0].message])) == {2.0}


# The choice


@pytest.fixture
def choices() -> Iterator[list[str]]:
    """What the events of the choice say."""
    told: list[str] = []
    handler = telemetry.attach(
        lambda event: told.append(event.metadata["surrogate"]), events="tinkex.custom_loss.surrogate"
    )
    yield told
    telemetry.detach(handler)


def losses_sent(bench: Bench) -> list[str]:
    return [arrival.message.loss_fn for arrival in bench.recorder.of("B")]


@pytest.mark.asyncio
async def test_a_service_that_sums_is_known_by_its_loss(http_bench, choices):
    training = await http_bench.train()
    for _ in range(2):
        await training.forward_backward_custom(DATA, signed)
    assert choices == ["cross_entropy"]
    first, second = (sent_weights([arrival.message]) for arrival in http_bench.recorder.of("F"))
    assert set(first) == {2.0, 3.0, 4.0}
    given = np.concatenate([item.loss_fn_inputs["weights"].to_numpy() for item in DATA])
    assert np.array_equal(second, given)  # known by then
    for arrival in http_bench.recorder.of("B"):
        np.testing.assert_allclose(sent_weights([arrival.message]), -np.cos(np.arange(18)), rtol=1e-6)
    assert losses_sent(http_bench) == ["cross_entropy", "cross_entropy"]


@pytest.mark.asyncio
async def test_a_known_service_is_recognised_by_the_table(http_bench, choices):
    answers_like_skyrl(http_bench.recorder)
    training = await http_bench.train()
    for _ in range(2):
        await training.forward_backward_custom(DATA, signed)
        await training.optim_step(LINEAR)
    assert choices == ["importance_sampling"]
    assert losses_sent(http_bench) == ["importance_sampling"] * 2


@pytest.mark.asyncio
async def test_the_embedded_service_is_known_before_its_first_forward(bench, choices):
    training = await bench.train()
    await training.forward_backward_custom(DATA, signed)
    assert choices == []
    given = np.concatenate([item.loss_fn_inputs["weights"].to_numpy() for item in DATA])
    assert np.array_equal(sent_weights([bench.recorder.of("F")[0].message]), given)


NORMALIZED = {
    "by the sum of the weights": lambda loss, weights, lengths: loss / weights.sum(),
    "by the number of datums": lambda loss, weights, lengths: loss / len(lengths),
    "by the number of tokens": lambda loss, weights, lengths: loss / sum(lengths),
    "weights ignored": lambda loss, weights, lengths: loss / 2.9,
    "no loss on a forward": lambda loss, weights, lengths: 0.0,
    "not a number": lambda loss, weights, lengths: float("nan"),
}


@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.asyncio
async def test_a_service_that_normalizes_gets_no_backward(http_bench, choices, name):
    lengths = [3, 9, 1, 5]
    weights = 2.0 + np.arange(18) % 3

    def change(message: wire.ForwardBackwardOutput) -> None:
        message.metrics["loss:sum"] = NORMALIZED[name](message.metrics["loss:sum"], weights, lengths)

    http_bench.recorder.always["retrieve_future"] = rewriting(change)
    training = await http_bench.train()
    step, update = await asyncio.gather(
        training.forward_backward_custom(DATA, signed), training.optim_step(), return_exceptions=True
    )
    assert isinstance(step, UnsupportedFeature), step
    host = http_bench.service.config.base_url.removeprefix("http://")
    assert str(step).startswith(f"{host} does not support the gradients of custom losses. ")
    assert "loss:sum" in str(step)
    assert isinstance(update, PrecedingRequestFailed)
    with pytest.raises(UnsupportedFeature):
        await training.forward_backward_custom(DATA, signed)
    assert http_bench.kinds(training) == ["F"]  # the second time it was known before anything was sent
    await training.forward_backward_custom(DATA, signed, surrogate="cross_entropy")
    assert losses_sent(http_bench) == ["cross_entropy"]


@pytest.mark.asyncio
async def test_one_datum_does_not_determine_the_surrogate(http_bench, choices):
    """A division by the number of datums shows with the second datum only."""
    http_bench.recorder.always["retrieve_future"] = rewriting(divide_by_datums)
    training = await http_bench.train()
    await training.forward_backward_custom(DATA[:1], signed)
    assert choices == []
    with pytest.raises(UnsupportedFeature):
        await training.forward_backward_custom(DATA, signed)


def divide_by_datums(message: wire.ForwardBackwardOutput) -> None:
    message.metrics["loss:sum"] /= sum(record.num_datums for record in message.loss_fn_outputs)


@pytest.mark.parametrize("metrics", [{}, {"loss:avg": 0.0}, {"loss:mean": 1.0}])
@pytest.mark.asyncio
async def test_without_a_reported_loss_nothing_is_sent_unless_the_service_is_trusted(http_bench, choices, metrics):
    """A mean is no proof of a sum, whatever its value."""

    def change(message: wire.ForwardBackwardOutput) -> None:
        message.metrics.clear()
        message.metrics.update(metrics)

    http_bench.recorder.always["retrieve_future"] = rewriting(change)
    training = await http_bench.train()
    for _ in range(2):
        with pytest.raises(UnsupportedFeature, match="reports no loss:sum.*`tinkex-py check --gradients`"):
            await training.forward_backward_custom(DATA, signed)
    assert http_bench.kinds(training) == ["F"]
    assert choices == []
    http_bench.service._session.surrogates.refusal = None
    http_bench.service._session.surrogates.trusted = True  # as the address of the hosted service makes it
    await training.forward_backward_custom(DATA, signed)
    assert choices == ["cross_entropy"]


def test_the_hosted_service_is_trusted():
    for address, trusted in ((HOSTED_SERVICE, True), ("https://elsewhere.example", False)):
        service = AsyncServiceClient(quick_config(address))
        assert service._session.surrogates.trusted is trusted


# Scale and sign


@pytest.mark.asyncio
async def test_scale_and_sign_arrive(http_bench):
    answers_like_skyrl(http_bench.recorder)
    training = await http_bench.train()
    norms: dict[float, float] = {}
    for factor in FACTORS:
        await training.forward_backward_custom(DATA, scaled(factor))
        step = await training.optim_step(AdamParams(learning_rate=0.0))
        norms[factor] = step.metrics["grad_norm"]
    for factor, norm in norms.items():
        assert norm == pytest.approx(abs(factor) * norms[1.0], rel=1e-5)
    changes: list[float] = []
    for factor in (1.0, -1.0):
        training = await http_bench.train()
        before = float(signed(DATA, torch.from_numpy((await logprobs_of(training, DATA)).copy())))
        await training.forward_backward_custom(DATA, scaled(factor))
        await training.optim_step(LINEAR)
        changes.append(float(signed(DATA, torch.from_numpy((await logprobs_of(training, DATA)).copy()))) - before)
    assert changes[0] < -0.1
    assert changes[1] > 0.1


# Bad input


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"surrogate": "ppo"}, "surrogate must be one of 'auto', 'cross_entropy', 'importance_sampling', "),
    ({"sequences_per_step": 0}, "sequences_per_step must be an int >= 1, got 0"),
    ({"sequences_per_step": True}, "got True"),
    ({"sequences_per_step": 4.5}, "got 4.5"),
    ({"sequences_per_step": 3}, "sequences_per_step=3 is less than the 4 datums of this call alone"),
    ({"surrogate": "cross_entropy", "execution": "server"}, "has no effect with execution='server'"),
]


@pytest.mark.asyncio
async def test_bad_options_send_nothing(bench):
    training = await bench.train()
    for options, message in BAD_OPTIONS:
        step, update = await asyncio.gather(
            training.forward_backward_custom(DATA, signed, **options), training.optim_step(), return_exceptions=True
        )
        assert isinstance(step, InvalidData), step
        assert message in str(step)
        assert isinstance(update, PrecedingRequestFailed)
    assert bench.kinds(training) == []


def packed(*rows: Sequence[float]) -> PackedTensor:
    return PackedTensor.from_arrays([np.array(row, np.float32) for row in rows])


def test_advantages_by_hand():
    advantages = advantages_of(np.array([1.0, -2.0, 0.5], np.float32), packed([-1, -1], [-3]), np.array([20.0, 10.0]))
    assert advantages.dtype == np.float32
    assert advantages.tolist() == [-20.0, 40.0, -5.0]


def test_divisors_by_hand():
    requests = [[datum(2), datum(1)], [datum(4)]]
    assert PER_SEQUENCE.divisors(requests, 10).tolist() == [20.0, 10.0, 40.0]
    assert PER_REQUEST.divisors(requests, 10).tolist() == [3.0, 3.0, 4.0]


def test_what_importance_sampling_cannot_carry():
    with pytest.raises(PipelineError, match="exceeds the range of float32"):
        advantages_of(np.array([1e38], np.float32), packed([-1.0]), np.array([10.0]))
