"""Sources of the logprobs of a reference."""

import asyncio
import functools

import numpy as np
import pytest
import torch

from tests.regularizers.support import LENGTHS, datum, datums, evaluated, packed_leaf, random_logprobs
from tinkex_py import ForwardBackwardOutput, InvalidData, Pipeline, RegularizerError, RegularizerSpec, execute
from tinkex_py.losses.spec import is_async_term
from tinkex_py.regularizers import KLDivergence, SampledKL
from tinkex_py.types import PackedTensor, TensorData

LOGPROBS = random_logprobs(8, 3)
REFERENCE = random_logprobs(8, 3, seed=1).float().double()
DATA = datums(candidates=3, reference_logprobs=REFERENCE)
PARTS = [part.float() for part in torch.split(REFERENCE, list(LENGTHS))]


def kl_by_loop() -> float:
    """KL(reference || model), summed over positions, number by number."""
    pairs = zip(REFERENCE.flatten().tolist(), LOGPROBS.flatten().tolist(), strict=True)
    return sum(np.exp(q) * (q - p) for q, p in pairs)


def packed(data):
    return REFERENCE


def as_list(data):
    return PARTS


def as_arrays(data):
    return [part.numpy() for part in PARTS]


def as_tensor_data(data):
    return [TensorData.from_torch(part) for part in PARTS]


def as_forward_output(data):
    arrays = [part.numpy() for part in PARTS]
    return ForwardBackwardOutput(num_datums=3, packed={"logprobs": PackedTensor.from_arrays(arrays)})


def needs_grad(data):
    assert not torch.is_grad_enabled()
    return REFERENCE.clone().requires_grad_()


SYNC = [packed, as_list, as_arrays, as_tensor_data, as_forward_output, needs_grad]


@pytest.mark.parametrize("reference", [REFERENCE, *SYNC])
def test_every_form_gives_the_same(reference):
    value, gradient, metrics = evaluated(KLDivergence(reference=reference), DATA, LOGPROBS)
    assert value.item() == pytest.approx(kl_by_loop(), rel=1e-12)
    torch.testing.assert_close(gradient, -REFERENCE.exp())
    assert metrics == {"tokens": 8.0}


def test_a_field_gives_the_same():
    field = "reference_logprobs"
    without_targets = [d.model_copy(update={"loss_fn_inputs": {field: d.loss_fn_inputs[field]}}) for d in DATA]
    for data in (DATA, without_targets):
        value, _, _ = evaluated(KLDivergence(reference_field=field), data, LOGPROBS)
        assert value.item() == pytest.approx(kl_by_loop(), rel=1e-12)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("coroutine function", packed),
        ("partial", as_list),
        ("callable object", as_forward_output),
        ("returns an awaitable", as_tensor_data),
    ],
)
async def test_async_references(kind, form):
    async def reference(data, shift=0.0):
        await asyncio.sleep(0)
        return form(data)

    def plain(data):
        return reference(data)

    class Client:
        async def __call__(self, data):
            return form(data)

    references = {
        "coroutine function": reference,
        "partial": functools.partial(reference, shift=1.0),
        "callable object": Client(),
        "returns an awaitable": plain,
    }
    term = KLDivergence(reference=references[kind])
    assert is_async_term(term) == (kind != "returns an awaitable")
    output = await Pipeline(lambda data, p: -p.mean(), [RegularizerSpec(fn=term, weight=1.0)]).compute(
        DATA, list(torch.split(LOGPROBS, list(LENGTHS)))
    )
    assert output.regularizers["kl_divergence"].value == pytest.approx(kl_by_loop(), rel=1e-9)
    assert output.regularizers["kl_divergence"].differentiable


@pytest.mark.asyncio
async def test_an_async_reference_may_come_as_an_option():
    async def reference(data):
        return REFERENCE

    spec = RegularizerSpec(fn=KLDivergence(reference_field="nowhere"), weight=1.0, options={"reference": reference})
    output = await Pipeline(lambda data, p: -p.mean(), [spec]).compute(DATA, LOGPROBS)
    assert output.regularizers["kl_divergence"].value == pytest.approx(kl_by_loop(), rel=1e-9)
    loss, _ = await execute(KLDivergence(reference=reference), DATA, LOGPROBS, direction="reverse")
    assert loss.item() > 0


@pytest.mark.asyncio
async def test_an_error_of_the_reference_names_the_term():
    async def offline(data):
        raise ConnectionError("no route")

    spec = RegularizerSpec(fn=KLDivergence(reference=offline), weight=1.0)
    with pytest.raises(RegularizerError, match="'kl_divergence' failed with ConnectionError: no route"):
        await Pipeline(lambda data, p: -p.mean(), [spec]).compute(DATA, LOGPROBS)


def test_a_tensor_may_be_one_distribution_for_all_positions():
    prior = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    value, _, _ = evaluated(KLDivergence(reference=prior), DATA, LOGPROBS)
    expected, _, _ = evaluated(KLDivergence(reference=prior.expand(8, 3).clone()), DATA, LOGPROBS)
    assert value == expected


@pytest.mark.parametrize("given", [lambda tensor: tensor, lambda tensor: lambda data: tensor])
def test_no_gradient_flows_into_the_reference(given):
    reference = REFERENCE.clone().requires_grad_()
    leaf = packed_leaf(LOGPROBS)
    loss, _ = KLDivergence(reference=given(reference), direction="reverse").compute(DATA, leaf)
    loss.backward()
    assert reference.grad is None


def errors():
    flat = random_logprobs(8)
    yield KLDivergence(reference=REFERENCE[:7]), DATA, r"have shape \(7, 3\), those of the model \(8, 3\)"
    yield KLDivergence(reference=lambda data: REFERENCE[:7]), DATA, r"have shape \(7, 3\), those of the model \(8, 3\)"
    yield KLDivergence(reference=lambda data: PARTS[:2]), DATA, "returned 2 tensors for 3 datums"
    yield (
        KLDivergence(reference=lambda data: [PARTS[0], PARTS[0], PARTS[2]]),
        DATA,
        r"shape \(3, 3\) for datum 1, those of the model \(1, 3\)",
    )
    yield KLDivergence(reference=lambda data: "abc"), DATA, "the reference returned a str: return a tensor"
    yield KLDivergence(reference=lambda data: ForwardBackwardOutput(num_datums=3)), DATA, "without 'logprobs'"
    yield KLDivergence(reference_field="nowhere"), DATA, "datum 0 has no 'nowhere'"
    missing = [DATA[0], datum(1, 3), DATA[2]]
    yield KLDivergence(reference_field="reference_logprobs"), missing, "datum 1 has no 'reference_logprobs'"
    narrow = [DATA[0], datum(1, 3, reference_logprobs=[[0.5, 0.5]]), DATA[2]]
    yield (
        KLDivergence(reference_field="reference_logprobs"),
        narrow,
        r"'reference_logprobs' of datum 1 has shape \(1, 2\), but its logprobs have shape \(1, 3\)",
    )
    yield SampledKL(reference=flat), DATA, r"have shape \(8,\), those of the model \(8, 3\)"
    one = [datum(8, 3, reference_logprobs=[-1.0])]
    yield KLDivergence(reference_field="reference_logprobs"), one, r"of datum 0 has shape \(1,\), but .* \(8, 3\)"


@pytest.mark.parametrize(("term", "data", "message"), list(errors()))
def test_errors(term, data, message):
    with pytest.raises(InvalidData, match=message):
        term.compute(data, LOGPROBS)
