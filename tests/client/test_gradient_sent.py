"""What a custom step sends is the gradient of the hand-written total loss, and nothing else."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.client.data import datum
from tests.client.recorder import Arrival, chunked, sent_weights
from tinkex_py import AdamParams, Datum, ModelInput, RegularizerSpec, TensorData, per_datum
from tinkex_py.losses import packed_field
from tinkex_py.transport import wire

pytestmark = pytest.mark.asyncio
TOLERANCE = 1e-6


def relative_error(sent: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(sent.astype(np.float64) - reference) / np.linalg.norm(reference))


def gradient_of(total: Callable[[list[torch.Tensor]], torch.Tensor], seen: Sequence[torch.Tensor]) -> np.ndarray:
    """autograd.grad of the hand-written total loss in double precision, laid end to end."""
    leaves = [part.detach().double().requires_grad_() for part in seen]
    parts = torch.autograd.grad(total(leaves), leaves)
    return np.concatenate([part.reshape(-1).numpy() for part in parts])


# The packed terms, and the same total written by hand on one tensor per datum.
def masked_nll(data: Any, logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    weights = packed_field(data, "weights")
    return -(weights * logprobs).sum(), {"tokens": float(weights.sum())}


def absolute(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.abs().sum()


async def entropy(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs.exp() * logprobs).sum()


def ratio(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    reference = packed_field(data, "reference_logprobs")
    return ((logprobs - reference) ** 2).mean() + torch.logsumexp(logprobs.reshape(-1), 0)


SPECS = [
    RegularizerSpec(fn=absolute, weight=0.3, name="l1"),
    RegularizerSpec(fn=entropy, weight=0.7, name="entropy"),
    RegularizerSpec(fn=ratio, weight=1.9, name="ratio"),
]


def total_by_hand(data: Sequence[Any]) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    def total(parts: list[torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([part.reshape(-1) for part in parts])
        inputs = [item.loss_fn_inputs for item in data]
        weights = torch.cat([torch.from_numpy(item["weights"].to_numpy().copy()).reshape(-1) for item in inputs])
        reference = torch.cat([item["reference_logprobs"].to_torch().reshape(-1) for item in inputs])
        base = -(weights.double() * flat).sum()
        squared = ((flat - reference.double()) ** 2).mean() + flat.exp().sum().log()
        return base + 0.3 * flat.abs().sum() + 0.7 * (flat.exp() * flat).sum() + 1.9 * squared

    return total


def with_reference(length: int, seed: int, candidates: int | None = None) -> Any:
    shape = (length,) if candidates is None else (length, candidates)
    reference = -np.random.default_rng(seed).random(shape, dtype=np.float32) * 5
    return datum(length, seed, candidates, reference_logprobs=reference)


DATA = {
    "[T], one datum": [with_reference(6, 1)],
    "[T], lengths differ": [with_reference(length, 2) for length in (3, 9, 1, 5)],
    "[T, K]": [with_reference(length, 3, candidates=3) for length in (4, 2, 7)],
    "[T, 1]": [with_reference(length, 3, candidates=1) for length in (4, 2)],
}


async def sent_and_seen(bench: Any, data: Any, *, per_chunk: int | None, wrap: bool = False) -> Any:
    """One custom step: the backward messages, and the logprobs that the terms saw, per datum."""
    if per_chunk is not None:
        bench.recorder.always["config"] = chunked(per_chunk)
    seen: list[torch.Tensor] = []

    def base(data: Any, logprobs: torch.Tensor) -> Any:
        seen.extend(part.detach().clone() for part in torch.split(logprobs, [d.model_input.length for d in data]))
        return masked_nll(data, logprobs)

    async with bench.service:
        training = await bench.train()
        output = await training.forward_backward_custom(data, base, regularizers=SPECS, track_grad_norms=True)
    return [arrival.message for arrival in bench.recorder.of("B")], seen, output


@pytest.mark.parametrize("per_chunk", [None, 2, 1])
@pytest.mark.parametrize("name", DATA)
async def test_the_weights_sent_are_minus_the_gradient_of_the_total(local_bench, name, per_chunk):
    data = DATA[name]
    messages, seen, output = await sent_and_seen(local_bench(), data, per_chunk=per_chunk)
    assert len(messages) == (1 if per_chunk is None else -(-len(data) // per_chunk))
    total = total_by_hand(data)
    reference = gradient_of(total, seen)
    sent = -sent_weights(messages)
    assert relative_error(sent, reference) <= TOLERANCE
    assert relative_error(-sent, reference) > 1.9  # the same check fails for a flipped sign
    assert output.loss_total == pytest.approx(total([part.double() for part in seen]).item(), rel=1e-5)
    assert output.total_grad_norm == pytest.approx(np.linalg.norm(reference), rel=1e-5)


async def test_per_datum_terms_may_see_datums_of_mixed_shapes(local_bench):
    data = [datum(4, 1), datum(3, 2, candidates=2), datum(5, 3, candidates=4)]
    seen: list[torch.Tensor] = []

    @per_datum
    def base(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        seen.extend(part.detach().clone() for part in logprobs)
        assert [part.shape for part in logprobs] == [(4,), (3, 2), (5, 4)]
        return sum(((index + 1) * part**2).sum() for index, part in enumerate(logprobs))

    @per_datum
    async def spread(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([part.exp().mean() for part in logprobs]).var()

    def total(parts: list[torch.Tensor]) -> torch.Tensor:
        means = torch.stack([part.exp().mean() for part in parts])
        squares = 1 * (parts[0] ** 2).sum() + 2 * (parts[1] ** 2).sum() + 3 * (parts[2] ** 2).sum()
        return squares + 0.5 * ((means - means.mean()) ** 2).sum() / 2

    bench = local_bench()
    bench.recorder.always["config"] = chunked(2)
    async with bench.service:
        training = await bench.train()
        await training.forward_backward_custom(
            data, base, regularizers=[RegularizerSpec(fn=spread, weight=0.5, name="spread")]
        )
    messages = [arrival.message for arrival in bench.recorder.of("B")]
    assert [len(message.data) for message in messages] == [2, 1]
    sent, reference = -sent_weights(messages), gradient_of(total, seen)
    assert relative_error(sent, reference) <= TOLERANCE
    assert relative_error(-sent, reference) > 1.9


async def test_large_batches_get_the_same_gradient(bench):
    """Above some size encoding and sums leave the loop's thread, and 1,024 datums fill a chunk."""
    data = [datum(15 + index % 3, index) for index in range(1100)]
    seen: list[torch.Tensor] = []

    def base(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        seen.append(logprobs.detach().clone())
        return (logprobs**2 * packed_field(data, "weights")).sum()

    training = await bench.train()
    await training.forward_backward_custom(data, base, regularizers=[SPECS[0], SPECS[1]])
    messages = [arrival.message for arrival in bench.recorder.of("B")]
    assert [len(message.data) for message in messages] == [1024, 76]
    weights = packed_field(data, "weights").double()
    assert len(weights) > 16_384

    def total(parts: list[torch.Tensor]) -> torch.Tensor:
        (flat,) = parts
        return (flat**2 * weights).sum() + 0.3 * flat.abs().sum() + 0.7 * (flat.exp() * flat).sum()

    reference = gradient_of(total, seen)
    assert relative_error(-sent_weights(messages), reference) <= TOLERANCE
    assert relative_error(sent_weights(messages), reference) > 1.9


async def test_sparse_targets(bench):
    """The dense gradient comes back also where the datum's tensors are CSR."""
    pattern = {"shape": (3, 8), "sparse_crow_indices": [0, 1, 1, 2], "sparse_col_indices": [0, 7]}
    sparse = Datum(
        model_input=ModelInput.from_ints([5, 6, 7]),
        loss_fn_inputs={
            "target_tokens": TensorData(data=[65, 66], dtype="int64", **pattern),
            "weights": TensorData(data=[2.0, 3.0], dtype="float32", **pattern),
        },
    )
    training = await bench.train()
    await training.forward_backward_custom([sparse], masked_nll)
    (forward,), (backward,) = bench.recorder.of("F"), bench.recorder.of("B")
    expected = np.zeros((3, 8), np.float32)
    expected[0, 0], expected[2, 7] = 2.0, 3.0
    for arrival in (forward, backward):
        assert np.array_equal(sent_weights([arrival.message]).reshape(3, 8), expected)
        assert arrival.message.data[0].loss_fn_inputs["target_tokens"].WhichOneof("encoding") == "sparse_csr"


def without_what_may_differ(arrival: Arrival) -> bytes:
    message = arrival.message
    message.ClearField("seq_id")
    message.ClearField("forward_only")
    for item in message.data:
        item.loss_fn_inputs["weights"].ClearField("dense")
    return message.SerializeToString(deterministic=True)


async def test_forward_and_backward_differ_in_weights_number_and_kind_only(local_bench):
    data = [
        datum(length, 4, reference_logprobs=np.zeros(length, np.float32), mask=np.ones(length, np.float32))
        for length in (3, 5, 2)
    ]
    bench = local_bench()
    bench.recorder.always["config"] = chunked(2)
    async with bench.service:
        training = await bench.train()
        await training.forward_backward_custom(data, masked_nll)
        assert bench.kinds(training) == ["F", "F", "B", "B"]
    forward, backward = bench.recorder.of("F"), bench.recorder.of("B")
    for first, second in zip(forward, backward, strict=True):
        assert without_what_may_differ(first) == without_what_may_differ(second)
        assert len(first.body) == len(second.body) + 2  # forward_only takes two bytes, everything else as many
        for arrival in (first, second):
            assert arrival.message.loss_fn == "cross_entropy"
            assert not arrival.message.loss_fn_config
            for item in arrival.message.data:
                assert set(item.loss_fn_inputs) == {"target_tokens", "weights"}
    given = np.concatenate([item.loss_fn_inputs["weights"].to_numpy() for item in data])
    assert np.array_equal(sent_weights([arrival.message for arrival in forward]), given)
    tokens = [
        np.frombuffer(item.model_input[0].encoded_text.tokens, "<i4").tolist()
        for arrival in backward
        for item in arrival.message.data
    ]
    assert tokens == [item.model_input.to_ints() for item in data]


async def test_later_changes_of_the_list_do_not_reach_the_terms(bench):
    training = await bench.train()
    data = [datum(3, 1), datum(2, 2)]
    seen: list[int] = []

    def counting(batch: Any, logprobs: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return -logprobs.sum()

    step = asyncio.create_task(training.forward_backward_custom(data, counting))
    await bench.recorder.until(lambda: len(bench.recorder.of("F")) == 1)
    data.clear()
    await step
    assert seen == [2]


async def test_datums_without_weights_are_fine_in_a_custom_step(bench):
    plain = Datum(model_input=ModelInput.from_ints([5, 6, 7]), loss_fn_inputs={"target_tokens": [6, 7, 8]})
    training = await bench.train()
    await training.forward_backward_custom([plain], lambda data, logprobs: -2 * logprobs.sum())
    (forward,), (backward,) = bench.recorder.of("F"), bench.recorder.of("B")
    assert sent_weights([backward.message]).tolist() == [2.0, 2.0, 2.0]
    assert sent_weights([forward.message]).tolist() == [0.0, 0.0, 0.0]
    assert forward.message.data[0].loss_fn_inputs["target_tokens"].dtype == wire.DTYPE_INT64


async def test_the_service_got_the_gradient_not_only_the_wire(http_bench):
    """Training moves the adapters as if the total loss were differentiated on the service itself."""
    data = [datum(5, 1), datum(3, 2)]
    adam = AdamParams(learning_rate=5e-3)
    builtin, custom = await http_bench.train(seed=7), await http_bench.train(seed=7)
    losses: list[tuple[float, float]] = []
    for _ in range(5):
        first, second, *_ = await asyncio.gather(
            builtin.forward_backward(data),
            custom.forward_backward_custom(data, masked_nll),
            builtin.optim_step(adam),
            custom.optim_step(adam),
        )
        losses.append((first.metrics["loss:sum"], second.loss_total))
    np.testing.assert_allclose([one for one, _ in losses], [other for _, other in losses], rtol=1e-4)
    assert losses[-1][0] < 0.9 * losses[0][0]
    assert http_bench.kinds(custom) == ["F", "B", "optim_step"] * 5
