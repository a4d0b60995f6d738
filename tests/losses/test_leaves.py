"""Rules 1 and 2 of running terms: one leaf per term over shared memory, and packed means packed."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.losses.support import datum, guide_logprobs, l1, nll, packed, recorded, spec
from tinkex_py import InPlaceMutation, InvalidData, Pipeline, RegularizerError, packed_field, per_datum, split
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.types import PackedTensor

pytestmark = pytest.mark.asyncio

ARRAYS = [np.array([-0.5, -1.2]), np.array([-0.8, -2.1, -0.3])]
PAIRS = [np.array([[-0.5, -1.2], [-0.3, -0.4]]), np.array([[-0.8, -2.1]])]


def write_no_grad(logprobs: torch.Tensor) -> None:
    with torch.no_grad():
        logprobs.mul_(2)


def write_detached(logprobs: torch.Tensor) -> None:
    logprobs.detach().mul_(2)


def write_slice(logprobs: torch.Tensor) -> None:
    with torch.no_grad():
        logprobs[0:2] = -9.0


def write_data(logprobs: torch.Tensor) -> None:
    logprobs.data.mul_(2)


def write_numpy(logprobs: torch.Tensor) -> None:
    logprobs.detach().numpy()[...] = -9.0


def write_nan_bits(logprobs: torch.Tensor) -> None:
    logprobs.data.fill_(math.nan)


KNOWN_WRITERS = [write_no_grad, write_detached, write_slice]
UNKNOWN_WRITERS = [write_data, write_numpy]


def writing(write: Any, is_async: bool = False) -> Any:
    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        write(logprobs)
        return logprobs.sum() * 0 + 1.0

    async def later(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(0)
        return term(data, logprobs)

    return later if is_async else term


@pytest.mark.parametrize(("is_async", "on_error"), [(False, "raise"), (True, "skip")])
@pytest.mark.parametrize("write", KNOWN_WRITERS)
async def test_rule_1_the_writer_is_named(write: Any, on_error: str, is_async: bool):
    specs = [
        spec(l1, "innocent"),
        spec(writing(write, is_async), "writer", on_error=on_error),
        spec(l1, "also_innocent"),
    ]
    with recorded("tinkex.custom_loss.exception") as events, pytest.raises(InPlaceMutation) as caught:
        await Pipeline(nll, specs).compute([], guide_logprobs())
    assert caught.value.name == "writer"
    assert "'writer'" in str(caught.value)
    assert events[0].metadata["reason"] == "InPlaceMutation"


@pytest.mark.parametrize(("is_async", "on_error"), [(False, "skip"), (True, "raise")])
@pytest.mark.parametrize("write", UNKNOWN_WRITERS)
async def test_rule_1_an_unknown_writer_is_found(write: Any, on_error: str, is_async: bool):
    specs = [spec(writing(write, is_async), "writer", on_error=on_error)]
    with pytest.raises(InPlaceMutation, match="unknown"):
        await Pipeline(nll, specs).compute([], guide_logprobs())


@pytest.mark.parametrize("write", [*KNOWN_WRITERS, *UNKNOWN_WRITERS])
async def test_rule_1_holds_for_packed_leaves_and_views_per_datum(write: Any):
    with pytest.raises(InPlaceMutation):
        await Pipeline(writing(write)).evaluate([], packed(ARRAYS))

    def term(data: Any, logprobs: list[torch.Tensor]) -> torch.Tensor:
        write(logprobs[1])
        return logprobs[0].sum()

    with pytest.raises(RegularizerError) as caught:
        await Pipeline(nll, [spec(per_datum(term), "writer")]).evaluate([], packed(ARRAYS))
    refused_by_torch = isinstance(caught.value.__cause__, RuntimeError)  # views of a split are read-only to it
    assert isinstance(caught.value, InPlaceMutation) or refused_by_torch


@pytest.mark.parametrize("other", [torch.zeros(5), torch.zeros(7)])
@pytest.mark.parametrize("weight", [0.0, 1.0])
async def test_rule_1_other_numbers_put_under_a_leaf_are_a_change(other: torch.Tensor, weight: float):
    def replaces(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        logprobs.data = other
        return logprobs.pow(2).sum()

    with pytest.raises(InPlaceMutation) as caught:
        await Pipeline(nll, [spec(replaces, "writer", weight)]).evaluate([], packed(ARRAYS))
    assert caught.value.name == "writer"


async def test_rule_1_a_write_that_breaks_the_backward_is_still_a_write():
    def saved_then_written(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        loss = logprobs.pow(2).sum()
        write_no_grad(logprobs)
        return loss

    with pytest.raises(InPlaceMutation) as caught:
        await Pipeline(nll, [spec(saved_then_written, "writer")]).compute([], guide_logprobs())
    assert caught.value.name == "writer"


@pytest.mark.parametrize("write", [write_no_grad, write_data])
async def test_rule_1_terms_that_were_skipped_are_checked_too(write: Any):
    def writes_and_fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        write(logprobs)
        raise ValueError("skip me")

    with pytest.raises(InPlaceMutation):
        await Pipeline(nll, [spec(writes_and_fails, "writer", on_error="skip")]).compute([], guide_logprobs())


async def test_rule_1_no_innocent_term_is_blamed():
    """What the first one wrote makes the second one's loss NaN; the error must not send the reader to the second."""

    def poisons(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        write_nan_bits(logprobs)
        return torch.tensor(1.0)

    pipeline = Pipeline(poisons, [spec(l1, "innocent")], parallel=False)
    with pytest.raises(InPlaceMutation) as caught:
        await pipeline.compute([], guide_logprobs())
    assert caught.value.name != "innocent"


async def test_rule_1_the_same_number_written_again_is_no_change_past_autograd():
    """The comparison is of bits, so that NaN in the logprobs is no mutation by itself."""
    logprobs = torch.tensor([-0.5, math.nan, -0.1])
    output = await Pipeline(lambda d, p: p[0:1].sum()).compute([], logprobs)
    assert output.loss_total == -0.5


async def test_rule_1_leaves_share_memory_and_nothing_else():
    leaves: list[torch.Tensor] = []

    def keeps(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        leaves.append(logprobs)
        return logprobs.sum()

    shared = packed(ARRAYS)
    await Pipeline(keeps, [spec(keeps, "other")]).evaluate([], shared)
    first, second = leaves
    assert first.data_ptr() == second.data_ptr() == shared.buffer.data_ptr()
    assert first.is_leaf
    assert second.is_leaf
    assert first is not second
    before = second._version
    write_no_grad(first)
    assert second._version == before


async def test_rule_1_a_write_into_any_part_of_an_answer_in_chunks_is_seen():
    parts = [np.array([-0.5, -1.2], np.float32), np.zeros(0, np.float32), np.array([-0.8], np.float32)]
    for place in range(3):
        answer = PackedTensor(parts, np.array([0, 1, 3]), [(), ()])
        shared = Logprobs.from_packed(answer)
        assert shared.buffer.tolist() == answer.values.tolist()

        def write(data: Any, logprobs: torch.Tensor, place: int = place) -> torch.Tensor:
            logprobs.data[place] = -0.1
            return logprobs.sum()

        with pytest.raises(InPlaceMutation):
            await Pipeline(write).evaluate([], shared)
    assert [part.tolist() for part in parts] == [[np.float32(-0.5), np.float32(-1.2)], [], [np.float32(-0.8)]]


# Rule 2


def iterate(logprobs: torch.Tensor) -> Any:
    return [part.sum() for part in logprobs]


GUARDED = {
    "iteration": iterate,
    "integer": lambda p: p[0],
    "negative": lambda p: p[-1],
    "numpy integer": lambda p: p[np.int64(1)],
    "0-d tensor": lambda p: p[torch.tensor(1)],
    "zip": lambda p: list(zip([1, 2], p, strict=False)),
    "enumerate": lambda p: list(enumerate(p)),
    "star": lambda p: [*p],
    "unpacking": lambda p: (lambda first, *rest: first)(*p),
    "sum": sum,
    "map": lambda p: list(map(torch.sum, p)),
    "stack": lambda p: torch.stack(list(p)),
}


@pytest.mark.parametrize("use", GUARDED)
async def test_rule_2_packed_is_no_list_of_datums(use: str):
    for arrays in (ARRAYS, PAIRS):
        with pytest.raises(RegularizerError, match="per_datum") as caught:
            await Pipeline(lambda d, p: torch.as_tensor(GUARDED[use](p)).sum()).evaluate([], packed(arrays))
        cause = caught.value.__cause__
        assert isinstance(cause, TypeError)
        assert str(cause).startswith("packed logprobs are not a list of datums: wrap the function in per_datum(...)")
        assert caught.value.name == "base_loss"


ALLOWED = {
    "slice": lambda p: p[1:3].sum(),
    "mask": lambda p: p[p < -0.45].sum(),
    "ellipsis": lambda p: p[...].sum(),
    "newaxis": lambda p: p[None].sum(),
    "index tensor": lambda p: p[torch.tensor([0, 1])].sum(),
    "list index": lambda p: p[[0, 1]].sum(),
    "arithmetic": lambda p: (2 * p + 1).exp().sum(),
    "where": lambda p: torch.where(p > -1, p, 0.0).sum(),
    "plain after an operation": lambda p: (p * 1)[0].sum() + sum(row.sum() for row in p * 1),
    "repr": lambda p: (repr(p), str(p), f"{p}", p.sum())[-1],
    "tolist": lambda p: p.sum() * len(p.tolist()),
    "numpy": lambda p: p.sum() * float(p.detach().numpy().mean()),
    "clone in place": lambda p: p.clone().mul_(2).sum(),
    "functional gradient": lambda p: torch.func.grad(lambda q: q.pow(2).sum())(p).sum() + p.sum(),
    "gradient penalty": lambda p: torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)[0].pow(2).sum(),
    "log_softmax": lambda p: torch.log_softmax(p, dim=-1).exp().pow(2).sum(),
    "cat": lambda p: torch.cat([p, p]).sum(),
    "reshape": lambda p: p.reshape(-1)[0] + p.sum(),
}


@pytest.mark.parametrize("arrays", [ARRAYS, PAIRS], ids=["T", "TK"])
async def test_rule_2_every_other_use_works_as_on_a_plain_tensor(arrays: Any):
    for name, use in ALLOWED.items():
        loss = await Pipeline(lambda d, p, use=use: use(p)).evaluate([], packed(arrays))
        plain = torch.from_numpy(np.concatenate(arrays)).float().requires_grad_()
        expected = use(plain)
        (gradient,) = torch.autograd.grad(expected, plain)
        assert loss.output.loss_total == pytest.approx(expected.item(), rel=1e-6), name
        assert torch.allclose(loss.gradient, gradient, rtol=1e-6), name
        assert type(loss.gradient) is torch.Tensor, name


async def test_rule_2_results_of_operations_are_plain_tensors():
    kinds: list[type] = []

    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        kinds.extend(type(part) for part in (logprobs + 1, logprobs[0:1], logprobs.detach(), logprobs.sum()))
        return logprobs.sum()

    await Pipeline(term).evaluate([], packed(ARRAYS))
    assert kinds == [torch.Tensor] * 4


async def test_rule_2_a_tensor_given_directly_stays_plain():
    kinds: list[type] = []

    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        kinds.append(type(logprobs))
        return sum(logprobs) + logprobs[0]  # type: ignore[return-value]

    assert (await Pipeline(term).compute([], guide_logprobs())).loss_total == pytest.approx(-5.4, rel=1e-6)
    assert kinds == [torch.Tensor]


async def test_rule_2_a_list_of_tensors_is_guarded():
    with pytest.raises(RegularizerError, match="per_datum"):
        await Pipeline(lambda d, p: p[0]).compute([], [torch.zeros(2), torch.zeros(1)])


async def test_rule_2_a_loss_written_for_the_official_sdk_runs_under_per_datum():
    def official(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        loss = torch.tensor(0.0)
        for one, values in zip(data, logprobs, strict=True):
            weights = torch.tensor(one.loss_fn_inputs["weights"].tolist())
            loss = loss - (weights * values).sum()
        return loss, {"loss": loss.item()}

    data = [datum(len(array)) for array in ARRAYS]
    weights = [[0.5, 1.0], [0.0, 2.0, 3.0]]
    data = [
        type(one)(model_input=one.model_input, loss_fn_inputs={**one.loss_fn_inputs, "weights": row})
        for one, row in zip(data, weights, strict=True)
    ]
    loss = await Pipeline(per_datum(official)).evaluate(data, packed(ARRAYS))
    assert loss.gradient.tolist() == [-0.5, -1.0, 0.0, -2.0, -3.0]
    assert loss.output.base_loss.metrics["loss"] == pytest.approx(0.25 + 1.2 + 4.2 + 0.9, rel=1e-6)


async def test_rule_2_packed_field_and_split_are_inverse():
    data = [
        type(one)(model_input=one.model_input, loss_fn_inputs={**one.loss_fn_inputs, "mask": [float(i)] * length})
        for i, (one, length) in enumerate((datum(length), length) for length in (2, 3))
    ]
    mask = packed_field(data, "mask")
    assert mask.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert [part.tolist() for part in split(data, mask)] == [[0.0, 0.0], [1.0, 1.0, 1.0]]
    with pytest.raises(InvalidData, match=r"datum 0.*'nothing'"):
        packed_field(data, "nothing")
    with pytest.raises(InvalidData):
        packed_field([], "mask")
    with pytest.raises(InvalidData, match="5 positions"):
        split(data, torch.zeros(4))
    for call in (lambda: split([5], torch.zeros(1)), lambda: packed_field(["x"], "mask")):  # type: ignore[list-item]
        with pytest.raises(InvalidData, match=r"data\[0\] must be a Datum"):
            call()
    with pytest.raises(InvalidData, match="list"):
        split(data, [0.1, 0.2])  # type: ignore[arg-type]
    with pytest.raises(InvalidData, match="datum 1"):
        packed_field([datum(2, 2), datum(2, 3)], "target_tokens")
