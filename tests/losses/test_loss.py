"""`Pipeline.loss`: the composed loss as a tensor that autograd goes through, on any device."""

import asyncio
from typing import Any

import pytest
import torch

from tests.losses.devices import DEVICES
from tests.losses.support import async_l2, datum, entropy, guide_logprobs, guide_specs, l1, nll, recorded, spec
from tinkex_py import NonFiniteLoss, Pipeline, PipelineError, RegularizerError, per_datum, split
from tinkex_py.losses.logprobs import Logprobs

pytestmark = pytest.mark.asyncio

WEIGHTS = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.3, 0.7], [-0.4, 0.1]])


def composed() -> Pipeline:
    return Pipeline(nll, [spec(l1, "l1", 0.01), spec(async_l2, "l2", 0.3), spec(entropy, "entropy", 0.7)])


def written_out(logprobs: torch.Tensor) -> torch.Tensor:
    return (
        -logprobs.mean()
        + 0.01 * logprobs.abs().sum()
        + 0.3 * logprobs.pow(2).sum()
        + 0.7 * (logprobs.exp() * logprobs).sum()
    )


def model(parameters: torch.Tensor) -> torch.Tensor:
    """Logprobs with a graph of their own, `[4]`."""
    return torch.log_softmax(WEIGHTS.to(parameters) @ parameters, dim=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
async def test_backward_reaches_what_made_the_logprobs(device: str, dtype: torch.dtype):
    if device == "mps" and dtype is torch.float64:
        pytest.skip("there are no float64 numbers on this device")
    own = torch.tensor([0.3, -0.2], device=device, dtype=dtype, requires_grad=True)
    loss = await composed().loss([], model(own))
    assert (loss.device.type, loss.dtype, loss.shape) == (device, dtype, ())
    loss.backward()
    other = own.detach().clone().requires_grad_()
    expected = written_out(model(other))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=1e-7)


async def test_the_value_is_loss_total_and_the_gradient_the_combined_one():
    pipeline = Pipeline(nll, guide_specs(), combine="pcgrad", track_grad_norms=True)
    logprobs = guide_logprobs().requires_grad_()
    with recorded("tinkex.custom_loss.stop") as events:
        loss = await pipeline.loss([], logprobs, step=3)
    evaluated = await pipeline.evaluate([], Logprobs.from_tensors(guide_logprobs()), step=3)
    assert loss.item() == pytest.approx(evaluated.output.loss_total, rel=1e-7)
    assert events[0].measurements["loss_total"] == evaluated.output.loss_total
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.equal(gradient, evaluated.gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_the_loss_of_half_precision_logprobs_is_float32(dtype: torch.dtype):
    logprobs = guide_logprobs().to(dtype).requires_grad_()
    loss = await Pipeline(l1).loss([], logprobs)
    assert loss.dtype is torch.float32
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.dtype is dtype
    assert logprobs.grad.tolist() == [-1.0] * 5


async def test_a_list_has_a_gradient_for_each_datum():
    flat = torch.tensor([-0.5, -1.2, -0.8]).requires_grad_()
    table = torch.tensor([[-0.1, -0.2]]).requires_grad_()

    def term(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        return logprobs[0].pow(2).sum() + 3 * logprobs[1].sum()

    data = [datum(3), datum(1, 2)]
    loss = await Pipeline(per_datum(term)).loss(data, [flat * 2, table])
    loss.backward()
    assert flat.grad is not None
    assert table.grad is not None
    torch.testing.assert_close(flat.grad, 8 * flat.detach())
    assert table.grad.tolist() == [[3.0, 3.0]]


async def test_the_gradient_is_delivered_once():
    logprobs = guide_logprobs().requires_grad_()
    calls = 0

    def counted(data: Any, given: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return l1(data, given)

    loss = await Pipeline(counted).loss([], logprobs)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert calls == 1
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0] * 5


async def test_a_second_derivative_is_a_typed_error():
    own = torch.tensor([0.3, -0.2], requires_grad=True)
    loss = 2 * await Pipeline(async_l2).loss([], model(own))
    (gradient,) = torch.autograd.grad(loss, own, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(PipelineError, match="first derivative only"):
        gradient.pow(2).sum().backward()


async def test_logprobs_without_a_graph_give_a_plain_number():
    loss = await Pipeline(l1).loss([], guide_logprobs())
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(4.9, rel=1e-6)


async def test_the_callers_grad_mode_decides_about_the_result_only():
    logprobs = guide_logprobs().requires_grad_()
    with torch.no_grad():
        assert not (await composed().loss([], logprobs)).requires_grad
    first, second = await asyncio.gather(composed().loss([], logprobs), composed().loss([], logprobs))
    (first + second).backward()
    assert logprobs.grad is not None
    (expected,) = torch.autograd.grad(2 * written_out(logprobs), logprobs)
    torch.testing.assert_close(logprobs.grad, expected)


async def test_failures_are_those_of_compute():
    def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise KeyError("own")

    logprobs = guide_logprobs().requires_grad_()
    with pytest.raises(RegularizerError, match="KeyError"):
        await Pipeline(fails).loss([], logprobs)
    with pytest.raises(NonFiniteLoss):
        await Pipeline(lambda d, p: p.sum() / 0).loss([], logprobs)
    with pytest.raises(PipelineError, match="no term depends on the logprobs"):
        await Pipeline(lambda d, p: torch.tensor(1.0)).loss([], logprobs)
    with pytest.raises(PipelineError, match="floating point"):
        await Pipeline(nll).loss([], torch.tensor([1, 2]))


# One tensor together with datums


def of_the_first_datum(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs[0].sum()


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
async def test_a_tensor_that_has_the_positions_of_the_datums_is_packed(shape: tuple[int, ...]):
    data = [datum(2), datum(3)] if len(shape) == 1 else [datum(2, 2), datum(3, 2)]
    logprobs = torch.full(shape, -0.5).requires_grad_()
    for evaluate in (Pipeline(of_the_first_datum).compute, Pipeline(of_the_first_datum).loss):
        with pytest.raises(RegularizerError, match=r"logprobs\[0:1\]") as caught:
            await evaluate(data, logprobs)
        assert isinstance(caught.value.__cause__, TypeError)
    loss = await Pipeline(lambda d, p: p[0:1].sum() + per_datum_sum(d, p)).loss(data, logprobs)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.reshape(5, -1)[:, 0].tolist() == [2.0, 1.0, 2.0, 2.0, 2.0]


def per_datum_sum(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    first, second = split(data, logprobs)
    return first.sum() + 2 * second.sum()


@pytest.mark.parametrize(
    ("data", "size"),
    [([], 5), ([datum(2), datum(2)], 5), ([datum(2), datum(4)], 5), (["no datum"] * 5, 5)],
    ids=["no datums", "too few positions", "too many positions", "something else"],
)
async def test_any_other_tensor_stays_plain(data: Any, size: int):
    output = await Pipeline(of_the_first_datum).compute(data, torch.full((size,), -0.5))
    assert output.loss_total == -0.5


# Devices


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("combine", ["sum", "pcgrad"])
@pytest.mark.parametrize("size", [5, 300_000])
async def test_a_device_gives_the_numbers_of_the_cpu(device: str, combine: Any, size: int):
    logprobs = -torch.rand(size, generator=torch.Generator().manual_seed(size))
    specs = [spec(l1, "l1", 0.5), spec(async_l2, "l2", 0.25, max_grad_norm=1.0)]
    pipeline = Pipeline(entropy, specs, track_grad_norms=True, combine=combine)
    here = await pipeline.evaluate([], Logprobs.from_tensors(logprobs))
    there = await pipeline.evaluate([], Logprobs.from_tensors(logprobs.to(device)))
    assert there.gradient.device.type == device
    torch.testing.assert_close(there.gradient.cpu(), here.gradient)
    assert there.output.loss_total == pytest.approx(here.output.loss_total, rel=1e-5)
    assert there.output.total_grad_norm == pytest.approx(here.output.total_grad_norm, rel=1e-5)
    shares = [own.share_of_total for own in here.output.diagnosis.values()]
    assert [own.share_of_total for own in there.output.diagnosis.values()] == pytest.approx(shares, rel=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("past_autograd", [False, True])
async def test_a_write_is_found_on_every_device(device: str, past_autograd: bool):
    def writes(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        (logprobs.data if past_autograd else logprobs.detach()).mul_(2)
        return logprobs.sum()

    with pytest.raises(RegularizerError, match="unknown" if past_autograd else "'writer'"):
        await Pipeline(nll, [spec(writes, "writer")]).compute([], torch.full((5,), -0.5, device=device))
