"""The built-in losses against formulas and derivatives written out in plain Python, and through the whole engine."""

import math
from itertools import starmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings as examples, strategies as st

from tinkex_py.errors import InvalidData, UnsupportedFeature
from tinkex_py.local.losses import find_loss
from tinkex_py.types import AdamParams

SETTINGS = {
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.5},
    "dro": {"beta": 0.3},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05},
}
DEFAULTS = {
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": 0.05},
    "gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
}


def by_hand(name, p, q, a, mask, settings):
    """Loss of each token and its derivative by that token's p; sums and derivatives from the published formulas."""
    low, high = settings.get("clip_low_threshold"), settings.get("clip_high_threshold")
    if name == "importance_sampling":
        return [(-math.exp(x - y) * z, -math.exp(x - y) * z) for x, y, z in zip(p, q, a, strict=True)]
    if name == "dro":
        beta = settings["beta"]
        return [(-(x * z - 0.5 * beta * (x - y) ** 2), -(z - beta * (x - y))) for x, y, z in zip(p, q, a, strict=True)]
    if name == "cispo":
        clipped = [min(max(math.exp(x - y), low), high) for x, y in zip(p, q, strict=True)]
        return [(-c * x * z, -c * z) for c, x, z in zip(clipped, p, a, strict=True)]
    if name == "ppo":
        ratios = [math.exp(x - y) for x, y in zip(p, q, strict=True)]
    else:
        differences = [x - y for x, y, m in zip(p, q, mask, strict=True) if m != 0]
        ratios = [math.exp(sum(differences) / len(differences))] * len(p)

    def token(ratio, advantage):
        free, clipped = ratio * advantage, min(max(ratio, low), high) * advantage
        # The clipped branch is constant in p; the free one has d(ratio)/dp = ratio.
        return (-free, -free) if free <= clipped else (-clipped, 0.0)

    return list(starmap(token, zip(ratios, a, strict=True)))


def inputs_of(name, q, a, mask):
    inputs = {"logprobs": torch.tensor(q), "advantages": torch.tensor(a)}
    if name == "gspo":
        inputs["sequence_ratio_mask"] = torch.tensor(mask)
    return inputs


numbers = st.floats(-4, 4, width=32)


@st.composite
def sampled(draw):
    length = draw(st.integers(1, 7))
    p, q = ([-abs(draw(numbers)) for _ in range(length)] for _ in range(2))
    mask = [1.0, *(draw(st.sampled_from([0.0, 1.0, 0.25])) for _ in range(length - 1))]
    return p, q, [draw(numbers) for _ in range(length)], mask


@pytest.mark.parametrize("name", SETTINGS)
@examples(max_examples=40)
@given(case=sampled(), default=st.booleans())
def test_values_and_derivatives_are_those_of_the_formula(name, case, default):
    p, q, a, mask = case
    settings = DEFAULTS[name] if default else SETTINGS[name]
    leaf = torch.tensor(p, dtype=torch.float64, requires_grad=True)
    inputs = {key: value.double() for key, value in inputs_of(name, q, a, mask).items()}
    result = find_loss(name, {} if default else settings).compute(leaf, inputs)
    expected = by_hand(name, p, q, a, mask, settings)
    np.testing.assert_allclose(result.elementwise.numpy(), [value for value, _ in expected], rtol=1e-9, atol=1e-9)
    assert result.value.item() == pytest.approx(sum(value for value, _ in expected), rel=1e-9, abs=1e-9)
    (gradient,) = torch.autograd.grad(result.value, leaf)
    low, high = settings.get("clip_low_threshold"), settings.get("clip_high_threshold")
    for got, (_, want), x, y in zip(gradient.tolist(), expected, p, q, strict=True):
        at_edge = low is not None and any(abs(math.exp(x - y) - edge) < 1e-6 for edge in (low, high))
        assert at_edge or got == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_the_metrics_say_how_far_the_model_has_moved():
    # Ratios 0.5, 1, 2, 5 with advantages 1, 1, 1, -1.
    p = [-1.0, -1.0, -1.0, -1.0]
    q = [-1.0 - math.log(ratio) for ratio in (0.5, 1.0, 2.0, 5.0)]
    inputs = inputs_of("ppo", q, [1.0, 1.0, 1.0, -1.0], None)
    metrics = find_loss("ppo", {}).compute(torch.tensor(p), inputs).metrics
    assert metrics["tokens:sum"] == 4.0
    assert float(metrics["logprob_difference:sum"]) == pytest.approx(math.log(0.5 * 2 * 5))
    # min() takes the clipped branch at 2 > 1.2 with a positive advantage only; -5 < -1.2 stays free.
    assert float(metrics["clipped_tokens:sum"]) == 1.0
    # cispo clips to 0..4 whatever the sign: only 5 is outside.
    assert float(find_loss("cispo", {}).compute(torch.tensor(p), inputs).metrics["clipped_tokens:sum"]) == 1.0


@pytest.mark.parametrize("name", ["cross_entropy", *SETTINGS])
def test_gradients_of_the_adapter_are_those_of_the_written_out_loss(bench, kit, name):
    """Reference: the loss of the formula as a weighted sum of logprobs, each weight derived by hand."""
    model_id = bench.create("a")
    bench.passed(model_id, [kit.datum(7, 90)])
    bench.engine.optim_step(model_id, AdamParams(learning_rate=0.02))
    lengths = (4, 6)
    fields, expected, values = [], [], []
    for index, length in enumerate(lengths):
        rng = np.random.default_rng(index)
        p = bench.passed(model_id, [kit.datum(length, index)], forward_only=True).logprobs[0]
        q, a = p + rng.normal(0, 0.5, length), rng.normal(size=length)
        mask = np.array([0.0, 1.0, 1.0, *[0.0] * (length - 3)])
        if name == "cross_entropy":
            fields.append({"weights": a})
            pairs = [(-w * x, -w) for w, x in zip(a, p, strict=True)]
        else:
            fields.append({"logprobs": q, "advantages": a, "sequence_ratio_mask": mask})
            pairs = by_hand(name, p.tolist(), q.tolist(), a.tolist(), mask.tolist(), SETTINGS[name])
        values.append([value for value, _ in pairs])
        expected.append([derivative for _, derivative in pairs])
    data = [kit.datum(length, index, **fields[index]) for index, length in enumerate(lengths)]
    result = bench.passed(model_id, data, name, **SETTINGS.get(name, {}))
    got = bench.engine.gradient(model_id)
    assert result.metrics["loss:sum"] == pytest.approx(sum(map(sum, values)), rel=1e-4, abs=1e-4)
    if name == "cross_entropy":
        assert result.elementwise_loss is None
    else:
        for array, want in zip(result.elementwise_loss, values, strict=True):
            np.testing.assert_allclose(array, want, rtol=1e-4, atol=1e-4)
    parameters = bench.engine._models[model_id].adapter.parameters
    logprobs = [
        bench.model.network(input_ids=torch.tensor(datum.tokens)[None])
        .logits[0]
        .log_softmax(-1)[torch.arange(len(datum.tokens)), torch.tensor(datum.inputs["target_tokens"])]
        for datum in data
    ]
    total = sum(
        (row * torch.tensor(weights, dtype=torch.float32)).sum()
        for row, weights in zip(logprobs, expected, strict=True)
    )
    wanted = torch.autograd.grad(total, list(parameters.values()))
    for key, want in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(got[key], want, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ppo", {"clip_low_threshold": 1.3}, "clip_low_threshold=1.3 is above clip_high_threshold=1.2"),
        ("dro", {"beta": math.inf}, "must be a finite number, not inf"),
        ("dro", {"beta": "much"}, "must be a finite number, not 'much'"),
        ("gspo", {"beta": 1.0}, r"has no option 'beta'. Known: \['clip_high_threshold', 'clip_low_threshold'\]"),
    ],
)
def test_settings_that_cannot_be_used_are_named(name, config, message):
    with pytest.raises(InvalidData, match=message):
        find_loss(name, config)


def test_what_is_not_published_is_not_invented(bench, kit):
    with pytest.raises(UnsupportedFeature, match="'stable_reinforce': its formula is not published"):
        find_loss("stable_reinforce", {"kl_coeff": 0.1})
    model_id = bench.create("a")
    ones = {"logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}
    with pytest.raises(InvalidData, match="takes clip_low_threshold as one number in loss_fn_config only"):
        bench.passed(model_id, [kit.datum(2, 0, **ones, clip_low_threshold=[0.5, 0.9])], "ppo")
    data = [kit.datum(2, 0, **ones, sequence_ratio_mask=mask) for mask in ([1.0, 0.0], [0.0, 0.0])]
    with pytest.raises(InvalidData, match=r"data\[1\]: sequence_ratio_mask has only zeros"):
        bench.passed(model_id, data, "gspo")
    with pytest.raises(InvalidData, match=r"data\[0\]: advantages has a value that is not finite"):
        bench.passed(model_id, [kit.datum(2, 0, logprobs=[-1.0, -1.0], advantages=[1.0, math.nan])], "dro")
    assert bench.engine.gradient(model_id) == {}
