"""A custom step compares the logprobs of its backward pass with those of its forward pass."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.certify.faults import dropout
from tests.client.data import datum, nll
from tests.client.normalizing import LINEAR, rewriting
from tests.client.recorder import Recorder, http_client
from tests.support.layers import innermost
from tinkex_py import InvalidResponse
from tinkex_py.transport import wire

DATA = [datum(length, 5) for length in (3, 5)]


def changing_backwards(recorder: Recorder, change: Any) -> None:
    """Changes the logprobs of backward passes, whose results follow those of forward passes."""
    passes = 0

    def changed(message: wire.ForwardBackwardOutput) -> None:
        nonlocal passes
        passes += 1
        if passes % 2 == 0:
            change(message.loss_fn_outputs[0].fields)

    recorder.always["retrieve_future"] = rewriting(changed)


def by(*differences: float) -> Any:
    """Adds differences to the logprobs, which are 8."""

    def change(fields: Any) -> None:
        values = np.frombuffer(fields["logprobs"].data, "<f4") + np.array(differences, np.float32)
        fields["logprobs"].data = values.astype("<f4").tobytes()

    return change


@pytest.mark.parametrize(
    ("differences", "settings", "expected", "warns"),
    [
        ([0.0] * 8, {}, (0.0, 0.0), False),
        ([5e-4] * 8, {}, (5e-4, 5e-4), False),
        ([0.0] * 6 + [-0.006, 0.006], {}, (1.5e-3, 6e-3), True),  # the mean
        ([0.16] + [0.0] * 7, {"mean_logprob_difference": 0.1}, (0.02, 0.16), True),  # a single one
        ([0.16] + [0.0] * 7, {"mean_logprob_difference": 0.1, "largest_logprob_difference": 0.2}, (0.02, 0.16), False),
        ([float("nan")] + [0.0] * 7, {}, (float("nan"), float("nan")), True),
    ],
)
@pytest.mark.asyncio
async def test_the_differences_are_reported_and_large_ones_warn(differences, settings, expected, warns):
    async with http_client(**settings) as (service, recorder):
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        changing_backwards(recorder, by(*differences))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = await training.forward_backward_custom(DATA, nll)
    found = output.logprob_difference_mean, output.logprob_difference_largest
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert [warning.category for warning in caught] == [UserWarning] * warns
    if warns:
        assert str(caught[0].message).startswith("the logprobs of a custom step's backward pass differ")


def padded(lengths: Sequence[int]) -> Any:
    """Pads the logprobs of `DATA`, whose lengths are 3 and 5, to other lengths."""

    def change(message: wire.ForwardBackwardOutput) -> None:
        field = message.loss_fn_outputs[0].fields["logprobs"]
        rows = np.split(np.frombuffer(field.data, "<f4"), [3])
        long = [
            np.pad(row, (0, length - len(row)), constant_values=-7.0) for row, length in zip(rows, lengths, strict=True)
        ]
        field.data = np.concatenate(long).tobytes()
        field.offsets = np.cumsum([0, *(4 * length for length in lengths)]).tobytes()

    return change


@pytest.mark.asyncio
async def test_padding_to_the_longest_datum_is_cut():
    async with http_client() as (service, recorder):
        outputs = []
        for change in (None, padded([5, 5])):
            if change is not None:
                recorder.always["retrieve_future"] = rewriting(change)
            training = await service.create_lora_training_client("tiny", rank=4, seed=1)
            outputs.append(await training.forward_backward_custom(DATA, nll))
        assert outputs[1].loss_total == outputs[0].loss_total
        assert outputs[1].logprob_difference_largest == 0.0
        recorder.always["retrieve_future"] = rewriting(padded([6, 6]))
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        with pytest.raises(InvalidResponse, match=r"datum 0 have shape \(6,\), its target_tokens \(3,\)"):
            await training.forward_backward_custom(DATA, nll)


@pytest.mark.asyncio
async def test_tokens_of_probability_0_are_left_out():
    def impossible(message: wire.ForwardBackwardOutput) -> None:
        fields = message.loss_fn_outputs[0].fields
        values = np.frombuffer(fields["logprobs"].data, "<f4").copy()
        values[3] = -np.inf
        fields["logprobs"].data = values.tobytes()

    async with http_client() as (service, recorder):
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        recorder.always["retrieve_future"] = rewriting(impossible)
        output = await training.forward_backward_custom(DATA, lambda data, p: -p[p.isfinite()].sum())
    assert (output.logprob_difference_mean, output.logprob_difference_largest) == (0.0, 0.0)


@pytest.mark.asyncio
async def test_a_backward_pass_without_logprobs_is_not_compared():
    async with http_client() as (service, recorder):
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        changing_backwards(recorder, lambda fields: fields.clear())
        output = await training.forward_backward_custom(DATA, nll)
    assert output.logprob_difference_mean is None
    assert output.logprob_difference_largest is None


@pytest.mark.asyncio
async def test_dropout_in_the_backward_pass_warns_in_the_second_step():
    """In the first one, the adapter is 0 whatever its input."""
    async with http_client() as (service, recorder):
        dropout(innermost(recorder.app).state.service.core.engine)
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        first = await training.forward_backward_custom(DATA, nll)
        await training.optim_step(LINEAR)
        with pytest.warns(UserWarning, match="Dropout"):
            second = await training.forward_backward_custom(DATA, nll)
    assert first.logprob_difference_largest == pytest.approx(0.0, abs=1e-5)
    assert second.logprob_difference_mean > 1e-3
