"""Passes, gradients and optimizer steps of the engine, against plain torch."""

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import EncodedDatum, SampleRequest
from tinkex_py.local.worker import EngineClosing
from tinkex_py.types import AdamParams


def reference_logprobs(bench, datum: EncodedDatum) -> torch.Tensor:
    """One unpadded sequence through the network, targets picked by hand; the active adapter counts."""
    logits = bench.model.network(input_ids=torch.tensor(datum.tokens)[None]).logits[0]
    table = logits.log_softmax(-1)
    targets = torch.tensor(datum.inputs["target_tokens"])
    rows = torch.arange(len(targets))
    return table[rows, targets] if targets.ndim == 1 else table[rows[:, None], targets]


def activate(bench, model_id: str) -> None:
    bench.engine._bank.activate(bench.engine._models[model_id].adapter)


def parameters(bench, model_id: str) -> dict[str, torch.nn.Parameter]:
    return bench.engine._models[model_id].adapter.parameters


def train_a_little(bench, model_id: str, kit) -> None:
    """B is zero in a fresh adapter; one step makes every gradient non-trivial."""
    bench.passed(model_id, [kit.datum(7, 90)])
    bench.engine.optim_step(model_id, AdamParams(learning_rate=0.02))


def test_padded_microbatches_give_the_numbers_of_single_sequences(bench_with, kit):
    bench = bench_with(max_tokens_per_microbatch=24)
    model_id = bench.create("a")
    train_a_little(bench, model_id, kit)
    data = [kit.datum(length, length) for length in (3, 11, 1, 8, 40, 5)]
    before = bench.engine.passes_run
    result = bench.passed(model_id, data, forward_only=True)
    # Sorted lengths 1 3 5 | 8 11 | 40: each group is at most 24 padded tokens, except one long sequence alone.
    assert bench.engine.passes_run - before == 3
    activate(bench, model_id)
    with torch.no_grad():
        expected = [reference_logprobs(bench, datum) for datum in data]
    for got, want in zip(result.logprobs, expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=2e-5)
    assert result.metrics["loss:sum"] == pytest.approx(-sum(float(want.sum()) for want in expected), rel=1e-5)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.5, -2.0, 0.0, 3.0]])
def test_cross_entropy_gradient_is_that_of_the_weighted_sum(bench, kit, weights):
    model_id = bench.create("a")
    train_a_little(bench, model_id, kit)
    datum = kit.datum(4, 5, weights=weights)
    result = bench.passed(model_id, [datum])
    got = bench.engine.gradient(model_id)
    activate(bench, model_id)
    loss = -(torch.tensor(weights) * reference_logprobs(bench, datum)).sum()
    expected = torch.autograd.grad(loss, list(parameters(bench, model_id).values()))
    assert result.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    for key, want in zip(parameters(bench, model_id), expected, strict=True):
        torch.testing.assert_close(got[key], want, rtol=1e-4, atol=1e-5)
    assert any(want.abs().max() > 0.01 for want in expected)


def test_matrix_targets_and_weights(bench, kit):
    model_id = bench.create("a")
    train_a_little(bench, model_id, kit)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 256, (5, 3))
    weights = rng.normal(size=(5, 3)).astype(np.float32)
    datum = EncodedDatum(rng.integers(0, 256, 5), {"target_tokens": targets, "weights": weights})
    plain = kit.datum(4, 1)
    result = bench.passed(model_id, [datum, plain])
    got = bench.engine.gradient(model_id)
    activate(bench, model_id)
    matrix, vector = reference_logprobs(bench, datum), reference_logprobs(bench, plain)
    loss = -(torch.tensor(weights) * matrix).sum() - vector.sum()
    expected = torch.autograd.grad(loss, list(parameters(bench, model_id).values()))
    assert result.logprobs[0].shape == (5, 3)
    np.testing.assert_allclose(result.logprobs[0], matrix.detach().numpy(), atol=2e-5)
    for key, want in zip(parameters(bench, model_id), expected, strict=True):
        torch.testing.assert_close(got[key], want, rtol=1e-4, atol=1e-5)


def test_sampled_losses_have_their_formulas(bench, kit):
    model_id = bench.create("a")
    train_a_little(bench, model_id, kit)
    forward = bench.passed(model_id, [kit.datum(4, 5)], forward_only=True).logprobs[0]
    # Ratios 0.5, 1, 1.5, 5 by choice of q = p - log(ratio).
    ratios = np.array([0.5, 1.0, 1.5, 5.0])
    advantages = np.array([1.0, 2.0, 3.0, -1.0])
    datum = kit.datum(4, 5, logprobs=forward - np.log(ratios), advantages=advantages)

    def value(loss_fn: str, **config: float) -> float:
        return bench.passed(model_id, [datum], loss_fn, forward_only=True, **config).metrics["loss:sum"]

    # -(0.5*1 + 1*2 + 1.5*3 + 5*-1)
    assert value("importance_sampling") == pytest.approx(-2.0, abs=1e-4)
    # clipped to 0.8..1.2: min(.5,.8) + 2 + min(4.5,3.6) + min(-5,-1.2)
    assert value("ppo") == pytest.approx(-(0.5 + 2.0 + 3.6 - 5.0), abs=1e-4)
    assert value("ppo", clip_high_threshold=2.0) == pytest.approx(-(0.5 + 2.0 + 4.5 - 5.0), abs=1e-4)
    # clip(r, 0, 4) * p * A
    expected = -float((np.array([0.5, 1.0, 1.5, 4.0]) * forward * advantages).sum())
    assert value("cispo") == pytest.approx(expected, abs=1e-4)


def test_importance_sampling_carries_a_gradient_like_cross_entropy(bench, kit):
    """With q = p, the gradient of -sum(exp(p - q) * A) is that of -sum(A * p)."""
    for name in "ab":
        bench.create(name)
        train_a_little(bench, name, kit)
    weights = [0.5, -1.0, 2.0, 0.25]
    q = bench.passed("a", [kit.datum(4, 5)], forward_only=True).logprobs[0]
    bench.passed("a", [kit.datum(4, 5, logprobs=q, advantages=weights)], "importance_sampling")
    bench.passed("b", [kit.datum(4, 5, weights=weights)])
    a, b = bench.engine.gradient("a"), bench.engine.gradient("b")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_two_interleaved_models_get_the_gradients_they_would_get_alone(bench, kit, keep):
    data = {"a": [kit.datum(6, 1), kit.datum(9, 2)], "b": [kit.datum(5, 3), kit.datum(12, 4)]}
    alone: dict[str, dict[str, torch.Tensor]] = {}
    for name in "ab":
        bench.create(f"{name}-alone", seed=ord(name))
        train_a_little(bench, f"{name}-alone", kit)
        bench.passed(f"{name}-alone", data[name], forward_only=True)
        bench.passed(f"{name}-alone", data[name])
        alone[name] = bench.engine.gradient(f"{name}-alone")
        bench.create(name, seed=ord(name))
        train_a_little(bench, name, kit)
    before = bench.engine.passes_run
    for name in "ab":
        bench.passed(name, data[name], forward_only=True, keep=keep)
    for name in "ba":
        bench.passed(name, data[name])
    assert bench.engine.passes_run - before == (2 if keep else 4)
    for name in "ab":
        got = bench.engine.gradient(name)
        assert any(value.abs().max() > 0.01 for value in got.values())
        for key, want in alone[name].items():
            torch.testing.assert_close(got[key], want, rtol=0, atol=0)


def test_a_kept_graph_serves_one_backward_over_the_same_datums_only(bench, kit):
    model_id = bench.create("a")
    data = [kit.datum(6, 1, weights=[1.0] * 6)]
    other = [kit.datum(6, 1, weights=[-0.5] * 6)]
    bench.passed(model_id, data, forward_only=True, keep=True)
    assert len(bench.engine.graphs) == 1
    before = bench.engine.passes_run
    bench.passed(model_id, other)
    assert (bench.engine.passes_run - before, len(bench.engine.graphs)) == (0, 0)
    bench.passed(model_id, other)
    assert bench.engine.passes_run - before == 1
    bench.passed(model_id, data, forward_only=True, keep=True)
    bench.passed(model_id, [kit.datum(6, 2)])
    assert bench.engine.passes_run - before == 3


def test_an_optimizer_step_makes_kept_graphs_stale(bench, kit):
    model_id, twin = bench.create("a"), bench.create("twin")
    data = [kit.datum(6, 1)]
    for name in (model_id, twin):
        bench.passed(name, data)
    bench.passed(model_id, data, forward_only=True, keep=True)
    for name in (model_id, twin):
        bench.engine.optim_step(name, AdamParams(learning_rate=0.02))
    assert len(bench.engine.graphs) == 0
    assert bench.passed(model_id, data).metrics == bench.passed(twin, data).metrics


def test_a_kept_graph_that_no_backward_pass_uses_is_freed(bench, kit):
    """A custom step whose terms failed asks for a graph and never comes back for it."""

    def alive() -> int:
        gc.collect()
        return sum(1 for tensor in gc.get_objects() if type(tensor) is torch.Tensor and tensor.grad_fn is not None)

    model_id = bench.create("a")
    before = alive()
    for length in (3, 4, 5, 6):
        bench.passed(model_id, [kit.datum(length, 1)], forward_only=True, keep=True)
    assert len(bench.engine.graphs) == 2
    bench.engine.optim_step(model_id, AdamParams())
    assert alive() == before


def test_kept_graphs_are_bounded_in_number_and_bytes(bench_with, kit):
    bench = bench_with(graph_budget_bytes=2 * 10**6)
    for name in "abc":
        bench.create(name)
    for seed in range(4):
        bench.passed("a", [kit.datum(6, seed)], forward_only=True, keep=True)
    assert len(bench.engine.graphs) == 2
    for name in "abc":
        bench.passed(name, [kit.datum(30, 1)], forward_only=True, keep=True)
        assert 0 < bench.engine.graphs.size <= 2 * 10**6
    held = len(bench.engine.graphs)
    # About 10 kB per token: this one alone is over the budget, is not kept and pushes nobody out.
    result = bench.passed("a", [kit.datum(900, 1)], forward_only=True, keep=True)
    assert len(bench.engine.graphs) == held
    assert math.isfinite(result.metrics["loss:sum"])


def test_gradients_add_up_until_the_step_consumes_them(bench, kit):
    model_id, twin = bench.create("a"), bench.create("twin")
    first, second = kit.datum(6, 1), kit.datum(9, 2)
    bench.passed(model_id, [first])
    bench.passed(model_id, [kit.datum(3, 3)], forward_only=True)
    bench.passed(model_id, [second])
    bench.passed(twin, [first, second])
    one, two = bench.engine.gradient(model_id), bench.engine.gradient(twin)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)
    bench.engine.optim_step(model_id, AdamParams())
    assert bench.engine.gradient(model_id) == {}


def test_a_failed_pass_leaves_no_gradient_behind(bench_with, kit):
    bench = bench_with(max_tokens_per_microbatch=8)
    model_id = bench.create("a")
    huge = kit.datum(9, 2, weights=[3e38] * 9)
    with pytest.raises(InvalidData, match="nothing was added"):
        bench.passed(model_id, [kit.datum(4, 1), huge])
    assert bench.engine.gradient(model_id) == {}


BAD_DATUMS = {
    "no target": (EncodedDatum(np.arange(3), {}), "needs target_tokens"),
    "empty": (EncodedDatum(np.arange(0), {"target_tokens": np.arange(0)}), "model_input is empty"),
    "lengths": (EncodedDatum(np.arange(3), {"target_tokens": np.arange(4)}), r"shape \(4,\), but model_input has 3"),
    "rank": (EncodedDatum(np.arange(1), {"target_tokens": np.zeros((1, 1, 1), np.int64)}), "does not accept"),
    "token": (EncodedDatum(np.array([1, 258]), {"target_tokens": np.arange(2)}), "token 258 is not in 0..257"),
    "target": (EncodedDatum(np.arange(2), {"target_tokens": np.array([-1, 0])}), "token -1 is not in"),
    "weights": (
        EncodedDatum(np.arange(2), {"target_tokens": np.arange(2), "weights": np.ones(3, np.float32)}),
        r"weights has shape \(3,\)",
    ),
    "too long": (
        EncodedDatum(np.zeros(2049, np.int64), {"target_tokens": np.zeros(2049, np.int64)}),
        "2049 tokens, but 'tiny' supports at most 2048",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_DATUMS))
def test_bad_datums_are_named(bench, kit, case):
    datum, message = BAD_DATUMS[case]
    model_id = bench.create("a")
    with pytest.raises(InvalidData, match=message) as caught:
        bench.passed(model_id, [kit.datum(2, 0), datum])
    assert "data[1]" in str(caught.value)


def test_bad_losses_are_named(bench, kit):
    model_id = bench.create("a")
    with pytest.raises(InvalidData, match=r"unknown loss_fn 'nope'. Known: cispo, cross_entropy, custom, dro"):
        bench.passed(model_id, [kit.datum(2, 0)], "nope")
    with pytest.raises(InvalidData, match="no option 'beta'"):
        bench.passed(model_id, [kit.datum(2, 0)], beta=1.0)
    with pytest.raises(InvalidData, match="needs logprobs"):
        bench.passed(model_id, [kit.datum(2, 0)], "ppo")
    with pytest.raises(InvalidData, match="no data"):
        bench.passed(model_id, [])


def test_adamw_follows_its_formula(bench, kit):
    """Loshchilov and Hutter, algorithm 2, in float64 over three steps with parameters that change on the way."""
    model_id = bench.create("a", rank=2)
    settings = [
        AdamParams(learning_rate=0.01, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1),
        AdamParams(learning_rate=0.02, beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.0, grad_clip_norm=1.5),
        AdamParams(learning_rate=0.03, grad_clip_norm=1e9),
    ]
    weights = {key: value.detach().double().clone() for key, value in parameters(bench, model_id).items()}
    first = {key: torch.zeros_like(value) for key, value in weights.items()}
    second = {key: torch.zeros_like(value) for key, value in weights.items()}
    for step, values in enumerate(settings, start=1):
        bench.passed(model_id, [kit.datum(6, step)])
        gradient = {key: value.double() for key, value in bench.engine.gradient(model_id).items()}
        norm = math.sqrt(sum(float((value**2).sum()) for value in gradient.values()))
        metrics = bench.engine.optim_step(model_id, values)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
        scale = min(1.0, values.grad_clip_norm / norm) if values.grad_clip_norm else 1.0
        assert (scale < 1) == (step == 2)
        for key, value in weights.items():
            grad = gradient[key] * scale
            first[key] = values.beta1 * first[key] + (1 - values.beta1) * grad
            second[key] = values.beta2 * second[key] + (1 - values.beta2) * grad**2
            value.mul_(1 - values.learning_rate * values.weight_decay)
            # torch corrects with the current betas, as the paper does for constant ones.
            corrected = first[key] / (1 - values.beta1**step)
            root = (second[key] / (1 - values.beta2**step)).sqrt() + values.eps
            value.sub_(values.learning_rate * corrected / root)
        for key, value in parameters(bench, model_id).items():
            torch.testing.assert_close(value.detach().double(), weights[key], rtol=1e-4, atol=1e-5)


def test_a_step_without_gradients_changes_nothing(bench):
    model_id = bench.create("a")
    before = {key: value.detach().clone() for key, value in parameters(bench, model_id).items()}
    assert bench.engine.optim_step(model_id, AdamParams(learning_rate=1.0)) == {"grad_norm": 0.0}
    assert all(torch.equal(value, before[key]) for key, value in parameters(bench, model_id).items())


def test_a_step_on_infinite_gradients_is_refused_and_drops_them(bench, kit):
    model_id = bench.create("a")
    bench.passed(model_id, [kit.datum(4, 1)])
    adapter = bench.engine._models[model_id].adapter
    next(iter(adapter.gradients.values())).fill_(math.inf)
    before = {key: value.detach().clone() for key, value in adapter.parameters.items()}
    with pytest.raises(InvalidData, match="gradient norm is inf"):
        bench.engine.optim_step(model_id, AdamParams())
    assert bench.engine.gradient(model_id) == {}
    assert all(torch.equal(value, before[key]) for key, value in adapter.parameters.items())


@pytest.mark.parametrize(
    ("kinds", "touched"),
    [
        ({"train_mlp": False, "train_unembed": False}, {"self_attn"}),
        ({"train_attn": False, "train_unembed": False}, {"mlp"}),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
        ({}, {"self_attn", "mlp", "lm_head"}),
    ],
)
def test_lora_settings_choose_the_layers(bench, kinds, touched):
    model_id = bench.create("a", rank=4, **kinds)
    names = {part for key in parameters(bench, model_id) for part in key.split(".")}
    assert names & {"self_attn", "mlp", "lm_head"} == touched
    assert all(min(value.shape) == 4 for value in parameters(bench, model_id).values())


def test_a_fresh_adapter_changes_nothing_and_its_seed_decides(bench, kit):
    data = [kit.datum(5, 1)]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        bench.create(name, seed=seed)
    base = bench.engine
    losses = {name: bench.passed(name, data, forward_only=True).metrics["loss:sum"] for name in "abc"}
    assert losses["a"] == losses["b"] == losses["c"]
    a, b, c = (base._models[name].adapter.weights() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_unloading_frees_the_adapter_and_others_stay(bench, kit):
    for name in "ab":
        bench.create(name)
        train_a_little(bench, name, kit)
    data = [kit.datum(5, 1)]
    before = bench.passed("b", data, forward_only=True).metrics
    activate(bench, "a")  # so that its weights are in the network
    weights = [weakref.ref(parameter) for parameter in parameters(bench, "a").values()]
    bench.engine.unload_model("a")
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert bench.passed("b", data, forward_only=True).metrics == before
    with pytest.raises(InvalidData, match="'a' is not loaded"):
        bench.passed("a", data)
    bench.engine.unload_model("b")
    bench.create("c")
    assert bench.passed("c", data).metrics["loss:sum"] != before["loss:sum"]


def test_models_are_added_without_a_look_at_those_that_are_there(bench, kit, monkeypatch):
    """peft goes through every adapter of every layer for one that is added: there is one for each kind of settings."""
    bench.create("a")
    train_a_little(bench, "a", kit)
    data = [kit.datum(5, 1)]
    before = bench.passed("a", data, forward_only=True).metrics
    walks: list[None] = []
    named_modules = torch.nn.Module.named_modules

    def counted(self: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        walks.append(None)
        return named_modules(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "named_modules", counted)
        for number in range(20):
            bench.create(f"more-{number}", seed=number)
        assert walks == []
        bench.create("another-rank", rank=4)
        assert walks
    assert bench.passed("a", data, forward_only=True).metrics == before
    bank = bench.engine._bank
    assert sorted(rank for rank, _ in bank._forms) == [4, 8]
    size = sum(parameter.numel() for parameter in bench.model.network.parameters())
    bench.engine.unload_model("another-rank")
    assert [rank for rank, _ in bank._forms] == [8]
    assert sum(parameter.numel() for parameter in bench.model.network.parameters()) <= size
    assert bench.passed("a", data, forward_only=True).metrics == before
    bench.create("another-rank-again", rank=4)
    assert bench.passed("a", data, forward_only=True).metrics == before


def test_a_step_between_whose_passes_models_of_other_settings_are_made(bench, kit):
    """peft switches the gradients of all other adapters off when it adds one, uses one, or uses none."""
    data = [kit.datum(6, 1), kit.datum(4, 2)]
    bench.create("a")
    train_a_little(bench, "a", kit)
    gradients: list[dict[str, torch.Tensor]] = []
    for disturbed in (False, True):
        bench.passed("a", data, forward_only=True, keep=True)
        if disturbed:
            bench.create("b", rank=2)
            bench.create("c", train_mlp=False)
            train_a_little(bench, "c", kit)
            bench.engine.sample(None, SampleRequest(prompt=np.array([1, 2]), max_tokens=1))
        bench.passed("a", data)
        gradients.append(bench.engine._models["a"].adapter.take_gradients())
    alone, between = gradients
    assert len(alone) == 30
    assert all(torch.equal(alone[key], between[key]) for key in alone)


def test_a_closing_service_ends_a_pass_early_and_adds_nothing(bench, kit):
    model_id = bench.create("a")
    bench.closing.set()
    with pytest.raises(EngineClosing):
        bench.passed(model_id, [kit.datum(4, 1)])
    assert bench.engine.gradient(model_id) == {}


def test_adapters_beside_a_tied_output_layer_leave_the_embedding_alone(bench, kit):
    """With tied weights, an adapted output layer must not change what the input embedding gives."""
    network = bench.model.network
    network.config.tie_word_embeddings = True
    network.lm_head.weight = network.model.embed_tokens.weight
    model_id = bench.create("a", train_attn=False, train_mlp=False)
    embedding = network.model.embed_tokens.weight.detach().clone()
    first = bench.passed(model_id, [kit.datum(6, 1)]).metrics["loss:sum"]
    bench.engine.optim_step(model_id, AdamParams(learning_rate=0.05))
    assert bench.passed(model_id, [kit.datum(6, 1)]).metrics["loss:sum"] < first
    assert torch.equal(network.model.embed_tokens.weight, embedding)
    assert network.config.tie_word_embeddings is True
