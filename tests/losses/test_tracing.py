"""Tracing: what can run on a service, what cannot and why; the graph computes what the client computes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from tinkex_py import Datum, InvalidData, InvalidSpec, ModelInput, Pipeline, RegularizerSpec, UnsupportedFeature
from tinkex_py.losses import sum_over_datums
from tinkex_py.losses.spec import per_datum
from tinkex_py.losses.tracing import trace_pipeline
from tinkex_py.types import ForwardBackwardOutput

LENGTHS = (4, 7, 3)


def make_data(candidates=None):
    data = []
    for seed, length in enumerate(LENGTHS):
        rng = np.random.default_rng(seed)
        shape = (length,) if candidates is None else (length, candidates)
        fields = {
            "target_tokens": rng.integers(0, 99, shape),
            "advantages": rng.normal(size=length).astype(np.float32),
            "old": rng.normal(-1, 1, shape).astype(np.float32),
        }
        data.append(Datum(model_input=ModelInput.from_ints([1] * length), loss_fn_inputs=fields))
    return data


def make_logprobs(candidates=None):
    rng = np.random.default_rng(9)
    shapes = [(length,) if candidates is None else (length, candidates) for length in LENGTHS]
    return [torch.tensor(rng.normal(-1, 1, shape), dtype=torch.float32) for shape in shapes]


def on_the_service(traced, data, logprobs, weights):
    """The embedded service's own interpreter, one datum at a time: loss, gradients, and metrics put together."""
    from tinkex_py.local.custom_losses import read_graph

    inputs = [{"name": name, "rank": rank} for name, rank in traced.inputs]
    graph = read_graph(json.loads(json.dumps({"name": "p", "inputs": inputs, "graph": traced.graph})))
    metrics, gradients, loss = {}, [], 0.0
    for datum, own in zip(traced.datums(data, weights), logprobs, strict=True):
        leaf = own.clone().requires_grad_()
        values = [
            datum.loss_fn_inputs[name].to_torch().reshape([-1] * rank or [])
            if rank < 2
            else datum.loss_fn_inputs[name].to_torch()
            for name, rank in traced.inputs[1:]
        ]
        value, named = graph.compute([leaf, *values])
        gradients.append(torch.autograd.grad(value, leaf)[0])
        loss += value.item()
        for key, metric in named.items():
            metrics[key] = metrics.get(key, 0.0) + metric / (len(data) if key.endswith(":mean") else 1)
    return loss, gradients, metrics


async def both(pipeline, candidates=None, step=0):
    data, logprobs = make_data(candidates), make_logprobs(candidates)
    traced = trace_pipeline(pipeline, data)
    weights = traced.weights(step)
    loss, gradients, metrics = on_the_service(traced, data, logprobs, weights)
    result = ForwardBackwardOutput(
        loss_fn_output_type="", num_datums=3, packed={}, metrics={"loss:sum": loss, **metrics}
    )
    server = traced.output(result, weights)
    from tinkex_py.losses.logprobs import Logprobs

    client = await pipeline.evaluate(data, Logprobs.from_tensors(logprobs, data), step=step)
    assert server.loss_total == pytest.approx(client.output.loss_total, rel=1e-5)
    assert loss == pytest.approx(client.output.loss_total, rel=1e-4)
    torch.testing.assert_close(torch.cat(gradients), client.gradient, rtol=1e-4, atol=1e-5)
    assert server.base_loss.value == pytest.approx(client.output.base_loss.value, rel=1e-5)
    assert server.base_loss.metrics == pytest.approx(client.output.base_loss.metrics, rel=1e-5)
    assert list(server.regularizers) == list(client.output.regularizers)
    for name, wanted in client.output.regularizers.items():
        got = server.regularizers[name]
        assert (got.weight, got.differentiable) == (wanted.weight, wanted.differentiable)
        for value in ("value", "contribution"):
            assert getattr(got, value) == pytest.approx(getattr(wanted, value), rel=1e-5)
        assert got.custom_metrics == pytest.approx(wanted.custom_metrics, rel=1e-5)
    assert server.regularizer_total == pytest.approx(client.output.regularizer_total, rel=1e-5)
    return traced


@sum_over_datums
def clipped(logprobs, advantages, old, low=0.8, high=1.2):
    ratio = torch.exp(logprobs - old)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages).mean()
    return loss, {"ratio:mean": ratio.mean(), "clipped": (ratio > high).float().sum(), "high": 1.2}


@sum_over_datums
def smoothness(logprobs):
    return (logprobs[1:] - logprobs[:-1]).square().sum() / logprobs.shape[0]


PACKED = {
    "nll": lambda data, logprobs: -logprobs.sum(),
    "not summed": lambda data, logprobs: -logprobs,
    "l1": lambda data, logprobs: 0.5 * logprobs.abs().sum() / 3,
    "two sums": lambda data, logprobs: logprobs.exp().sum() - 2 * torch.sum(logprobs.square()),
    "where": lambda data, logprobs: torch.where(logprobs > -1.0, logprobs, logprobs.detach() * 0.5).sum(),
    "entropy": lambda data, logprobs: (logprobs.exp() * logprobs).sum(),
    "constant inside": lambda data, logprobs: (logprobs + torch.tensor(1.5)).pow(2).sum(),
    "softplus": lambda data, logprobs: F.softplus(logprobs).sum(),
    "metrics": lambda data, logprobs: (-logprobs.sum(), {"squares": logprobs.square().sum(), "answer": 42}),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("case", PACKED)
async def test_packed_sums_over_positions_run_on_the_service(case):
    await both(Pipeline(PACKED[case]))
    await both(Pipeline(PACKED[case]), candidates=2)


@pytest.mark.asyncio
async def test_a_composed_loss_with_fields_options_and_a_schedule():
    regularizers = [
        RegularizerSpec(fn=smoothness, weight=0.3, name="smooth"),
        RegularizerSpec(fn=lambda data, logprobs: logprobs.abs().sum(), weight=lambda step: 0.1 * step, name="l1"),
        RegularizerSpec(fn=clipped, weight=2.0, name="again", options={"high": 1.05}),
        RegularizerSpec(fn=lambda data, logprobs: logprobs.detach().sum(), weight=1.0, name="constant"),
        RegularizerSpec(fn=smoothness, weight=1.0, name="off", enabled=False),
        RegularizerSpec(fn=smoothness, weight=0.0, name="watched"),
    ]
    first = await both(Pipeline(clipped, regularizers), step=1)
    later = await both(Pipeline(clipped, regularizers), step=7)
    assert first.digest == later.digest
    assert [name for name, _ in first.inputs[:3]] == ["logprobs", "advantages", "old"]


@pytest.mark.asyncio
async def test_sum_over_datums_on_the_client():
    data, logprobs = make_data(), make_logprobs()
    output = await Pipeline(clipped).compute(data, logprobs)
    results = [
        clipped.fn.fn(own, *(datum.loss_fn_inputs[name].to_torch() for name in ("advantages", "old")))
        for datum, own in zip(data, logprobs, strict=True)
    ]
    assert output.base_loss.value == pytest.approx(sum(loss.item() for loss, _ in results), rel=1e-6)
    ratios = [float(metrics["ratio:mean"]) for _, metrics in results]
    assert output.base_loss.metrics["ratio:mean"] == pytest.approx(sum(ratios) / 3, rel=1e-6)
    assert output.base_loss.metrics["clipped"] == sum(float(metrics["clipped"]) for _, metrics in results)
    matrix = await Pipeline(sum_over_datums(lambda logprobs: logprobs)).compute(make_data(2), make_logprobs(2))
    assert matrix.base_loss.value == pytest.approx(sum(float(own.sum()) for own in make_logprobs(2)), rel=1e-6)


def captured():
    table = torch.ones(4)
    return lambda data, logprobs: (logprobs * table).sum()


def branching(data, logprobs):
    return logprobs.sum() if logprobs.mean() > 0 else -logprobs.sum()


def without_grad(data, logprobs):
    with torch.no_grad():
        scale = logprobs.exp()
    return (scale * logprobs).sum()


async def asynchronous(data, logprobs):
    return logprobs.sum()


REASONS = {
    "mean": (lambda data, logprobs: -logprobs.mean(), r"mean\(\) does not sum over positions"),
    "softmax": (lambda data, logprobs: logprobs.softmax(-1).square().sum(), r"softmax\(\)"),
    "norm": (lambda data, logprobs: logprobs.norm(), r"norm\(\)"),
    "shift": (lambda data, logprobs: logprobs.sum() + 1.0, r"add\(\)"),
    "inverse": (lambda data, logprobs: 1.0 / logprobs.sum(), r"truediv\(\)"),
    "square of the sum": (lambda data, logprobs: logprobs.sum().square(), r"square\(\)"),
    "sum times rows": (lambda data, logprobs: (logprobs * logprobs.sum()).sum(), r"mul\(\)"),
    "slice": (lambda data, logprobs: logprobs[1:].sum(), r"getitem\(\)"),
    "length": (lambda data, logprobs: logprobs.sum() / logprobs.shape[0], r"getattr\(\)"),
    "sorted": (lambda data, logprobs: logprobs.sort().values.sum(), r"sort\(\)"),
    "reads data": (lambda data, logprobs: logprobs.sum() / len(data), "it reads the datums: accept the fields"),
    "iterates data": (lambda data, logprobs: sum(1 for _ in data) * logprobs.sum(), "it reads the datums"),
    "per_datum": (per_datum(lambda data, logprobs: logprobs[0].sum()), r"receives all datums at once \(per_datum\)"),
    "async": (asynchronous, "term 'base_loss' is async"),
    "branch": (branching, "tracing it failed with TraceError"),
    "number": (lambda data, logprobs: float(logprobs.sum()) * logprobs.sum(), "tracing it failed with TypeError"),
    "numpy": (lambda data, logprobs: torch.tensor(np.asarray(logprobs)).sum(), "tracing it failed with|not computed"),
    "item": (lambda data, logprobs: logprobs.sum() * logprobs.max().item(), r"max\(\)|item\(\)"),
    "in place": (sum_over_datums(lambda logprobs: logprobs.clone().add_(1.0).sum()), r"calls add_\(\), which changes"),
    "captured": (captured(), r"does not sum|captured tensor of shape \(4,\)"),
    "captured in a sum": (
        sum_over_datums(lambda logprobs: (logprobs * torch.ones(4)).sum()),
        r"captured tensor of shape \(4,\)",
    ),
    "no_grad": (without_grad, r"uses torch.no_grad\(\)"),
    "constant loss": (lambda data, logprobs: torch.tensor(1.0), "its loss is a Tensor that is not computed"),
    "metric": (lambda data, logprobs: (logprobs.sum(), {"worst": logprobs.exp()}), "its metric 'worst' is not a sum"),
    "mean metric": (lambda data, logprobs: (logprobs.sum(), {"a:mean": logprobs.sum()}), "'a:mean' is not a sum"),
    "text metric": (lambda data, logprobs: (logprobs.sum(), {"a": "b"}), "its metric 'a' must be a number, got a str"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_run_on_the_service_says_why(case):
    term, reason = REASONS[case]
    with pytest.raises(UnsupportedFeature, match=reason):
        trace_pipeline(Pipeline(term), make_data())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"on_error": "skip"}, "on_error='skip'"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"fn": asynchronous}, "term 'r' is async"),
        ({"fn": lambda data, logprobs: logprobs.mean()}, r"term 'r' cannot run on the service: mean\(\)"),
    ],
)
def test_specs_that_need_the_client_say_why(spec, reason):
    fields = {"fn": smoothness, "weight": 1.0, "name": "r", **spec}
    with pytest.raises(UnsupportedFeature, match=reason):
        trace_pipeline(Pipeline(PACKED["nll"], [RegularizerSpec(**fields)]), make_data())


def test_options_that_need_the_client_say_why():
    for options, reason in (({"track_grad_norms": True}, "track_grad_norms=True"), ({"combine": "pcgrad"}, "pcgrad")):
        with pytest.raises(UnsupportedFeature, match=reason):
            trace_pipeline(Pipeline(PACKED["nll"], **options), make_data())
    many = [RegularizerSpec(fn=smoothness, weight=1.0, name=f"r{index}") for index in range(16)]
    with pytest.raises(UnsupportedFeature, match="have 17 inputs, but a service accepts at most 16"):
        trace_pipeline(Pipeline(PACKED["nll"], many), make_data())


def test_data_that_does_not_fit_one_graph():
    data = make_data()
    lacking = sum_over_datums(lambda logprobs, missing: logprobs.sum())
    with pytest.raises(InvalidData, match="datum 0 has no 'missing'"):
        trace_pipeline(Pipeline(lacking), data)
    with pytest.raises(UnsupportedFeature, match=r"'target_tokens' has \[1, 2\] dimensions in different datums"):
        trace_pipeline(Pipeline(PACKED["nll"]), [data[0], make_data(2)[1]])


def many_functions(logprobs, advantages):
    parts = [
        F.softplus(logprobs),
        F.logsigmoid(logprobs),
        F.relu(advantages - logprobs),
        torch.special.xlogy(logprobs.exp(), advantages.exp()),
        torch.linalg.vector_norm(logprobs),
        F.pad(logprobs, (1, 0))[1:],
        torch.norm(logprobs) ** 2,
        torch.where(advantages > 0, logprobs, -logprobs) @ advantages,
        logprobs[logprobs.shape[0] - 1],
    ]
    return sum((part.sum() for part in parts[1:]), parts[0].sum()), {}


def test_functions_have_the_names_that_the_official_sdk_gives_them():
    official = encode_graph(trace_loss(many_functions, {"logprobs": 1, "advantages": 1}, "s")).model_dump()
    ours = trace_pipeline(Pipeline(sum_over_datums(many_functions)), make_data()).graph
    named = [{node["target"] for node in graph["nodes"] if node["op"] == "call_function"} for graph in (official, ours)]
    assert len(named[0]) > 12
    assert named[0] <= named[1]


def test_captured_numbers_count_at_every_step():
    captured = {"scale": 1.0}
    pipeline = Pipeline(lambda data, logprobs: captured["scale"] * logprobs.sum())

    def digest(scale):
        captured["scale"] = scale
        return trace_pipeline(pipeline, make_data()).digest

    assert digest(1.0) == digest(1.0) != digest(2.0)


@pytest.mark.parametrize(
    "fn",
    [lambda: 0, lambda *logprobs: 0, lambda logprobs, **fields: 0, lambda *, logprobs: 0, asynchronous, 3],
)
def test_functions_of_a_datum_have_named_parameters(fn):
    with pytest.raises(InvalidSpec, match="sum_over_datums"):
        sum_over_datums(fn)


def test_options_of_a_function_of_a_datum_are_checked_early():
    with pytest.raises(InvalidSpec, match="unknown"):
        RegularizerSpec(fn=clipped, weight=1.0, name="r", options={"unknown": 1})
    RegularizerSpec(fn=clipped, weight=1.0, name="r", options={"high": math.inf})
