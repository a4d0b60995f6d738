"""Entropy, KL divergence and Jensen-Shannon divergence of distributions."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.losses.support import guide_logprobs
from tests.regularizers.support import LENGTHS, datum, datums, evaluated, packed_leaf, random_logprobs
from tinkex_py import Executor, InvalidData, NonFiniteLoss, Pipeline, RegularizerSpec
from tinkex_py.regularizers import Entropy, JensenShannon, KLDivergence

MODEL = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
HALF = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
LOG2 = math.log(2.0)


def two_way(**fields):
    """One position with two candidates."""
    return [datum(1, 2, **fields)]


# --- the numbers of the guide ---------------------------------------------------------------------------------------


def test_entropy_of_the_guides_logprobs():
    value, gradient, metrics = evaluated(Entropy(over="tokens"), [], guide_logprobs())
    assert value.item() == pytest.approx(-1.5035655, rel=1e-6)
    assert gradient.norm().item() == pytest.approx(0.6250894, rel=1e-6)
    assert metrics == {"entropy": pytest.approx(1.5035655), "tokens": 5.0}
    assert evaluated(Entropy(over="tokens", mode="minimize"), [], guide_logprobs())[0] == -value


def test_kl_to_uniform_of_the_guides_logprobs():
    uniform = torch.full((5,), -math.log(5))
    value, gradient, _ = evaluated(KLDivergence(reference=uniform, over="tokens"), [], guide_logprobs())
    assert value.item() == pytest.approx(-0.6294379, rel=1e-6)  # negative: these five are not a distribution
    assert gradient.norm().item() == pytest.approx(0.4472136, rel=1e-6)


@pytest.mark.asyncio
async def test_the_guides_four_specs_in_one_pipeline():
    data = two_way(reference_logprobs=torch.tensor([[0.5, 0.5]]).log())
    field = {"reference_field": "reference_logprobs"}
    specs = [
        RegularizerSpec(fn=KLDivergence(**field, direction="forward"), weight=0.01, name="kl_forward"),
        RegularizerSpec(fn=KLDivergence(**field, direction="reverse"), weight=0.01, name="kl_reverse"),
        RegularizerSpec(fn=KLDivergence(**field, symmetric=True), weight=0.01, name="kl_symmetric"),
        RegularizerSpec(fn=Entropy(mode="maximize", temperature=0.5), weight=0.001, name="entropy_cool"),
    ]
    pipeline = Pipeline(lambda data, p: -p.mean(), specs, track_grad_norms=True)
    output = await pipeline.compute(data, [MODEL.float().reshape(1, 2)])
    values = {name: regularizer.value for name, regularizer in output.regularizers.items()}
    assert values == {
        "kl_forward": pytest.approx(0.1438410, rel=1e-6),
        "kl_reverse": pytest.approx(0.1308120, rel=1e-6),
        "kl_symmetric": pytest.approx(0.1373265, rel=1e-6),
        "entropy_cool": pytest.approx(-0.3250830, rel=1e-6),
    }
    norms = [regularizer.grad_norm for regularizer in output.regularizers.values()]
    assert all(norm > 0 for norm in norms)
    # d/d(log p) of the reverse divergence is p (1 + log p - log q)
    reverse = [p * (1 + math.log(p) - math.log(0.5)) for p in (0.25, 0.75)]
    assert norms[0] == pytest.approx(math.hypot(0.5, 0.5), rel=1e-6)
    assert norms[1] == pytest.approx(math.hypot(*reverse), rel=1e-5)


# --- closed forms ---------------------------------------------------------------------------------------------------


def test_entropy_closed_forms():
    uniform = torch.full((3, 4), -math.log(4), dtype=torch.float64)
    assert evaluated(Entropy(mode="minimize"), [], uniform)[0].item() == pytest.approx(3 * math.log(4))
    assert evaluated(Entropy(mode="minimize", normalize=True), [], uniform)[0].item() == pytest.approx(3.0)
    assert evaluated(Entropy(mode="minimize", reduction="mean"), [], uniform)[0].item() == pytest.approx(math.log(4))
    value, gradient, _ = evaluated(Entropy(), [], MODEL)
    assert value.item() == pytest.approx(-0.5623351, rel=1e-6)
    assert gradient.tolist() == pytest.approx([p * (1 + math.log(p)) for p in (0.25, 0.75)])
    assert evaluated(Entropy(temperature=0.5), [], MODEL)[0].item() == pytest.approx(-0.3250830, rel=1e-6)
    # a high temperature makes the distribution uniform, a low one deterministic
    assert evaluated(Entropy(temperature=1e6), [], MODEL)[0].item() == pytest.approx(-LOG2)
    assert evaluated(Entropy(temperature=1e-2), [], MODEL)[0].item() == pytest.approx(0.0, abs=1e-12)
    assert evaluated(Entropy(normalize=True), [], torch.zeros(2, 1))[0].item() == 0.0


def test_kl_closed_forms_and_gradients():
    value, gradient, _ = evaluated(KLDivergence(reference=HALF), [], MODEL)
    assert value.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert gradient.tolist() == pytest.approx([-0.5, -0.5])
    value, gradient, _ = evaluated(KLDivergence(reference=HALF, direction="reverse"), [], MODEL)
    assert value.item() == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
    assert gradient.tolist() == pytest.approx([p * (1 + math.log(p / 0.5)) for p in (0.25, 0.75)])
    both = evaluated(KLDivergence(reference=HALF, symmetric=True, direction="reverse"), [], MODEL)[0]
    assert both.item() == pytest.approx(0.1373265, rel=1e-6)


def test_jensen_shannon_closed_forms():
    p, q = [0.25, 0.75], [0.5, 0.5]
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    expected = sum(a * math.log(a / c) + b * math.log(b / c) for a, b, c in zip(p, q, m, strict=True)) / 2
    value, gradient, _ = evaluated(JensenShannon(reference=HALF), [], MODEL)
    assert value.item() == pytest.approx(expected)
    assert gradient.tolist() == pytest.approx([a * math.log(a / c) / 2 for a, c in zip(p, m, strict=True)])
    # distributions without a common outcome are log 2 apart, the most there is
    apart = torch.tensor([1.0, 0.0]).log()
    value, gradient, _ = evaluated(JensenShannon(reference=torch.tensor([0.0, 1.0]).log()), [], apart)
    assert value.item() == pytest.approx(LOG2)
    assert torch.isfinite(gradient).all()


# --- which numbers make a distribution ------------------------------------------------------------------------------

FIELD = {"reference_field": "reference_logprobs"}


@pytest.mark.parametrize("term", [Entropy(), KLDivergence(**FIELD), JensenShannon(**FIELD)])
def test_one_number_per_position_is_refused(term):
    data = datums(reference_logprobs=[-1.0] * 8)
    for logprobs in (packed_leaf(random_logprobs(8)), random_logprobs(8)):
        with pytest.raises(InvalidData, match=rf"{type(term).__name__} is .* shape \(8,\): one number per position"):
            term.compute(data, logprobs)
    # also without datums, if the logprobs are a client's
    with pytest.raises(InvalidData, match="one number per position"):
        Entropy().compute([], packed_leaf(random_logprobs(8)))
    result = term.compute(data, packed_leaf(random_logprobs(8)), over="tokens")
    assert torch.isfinite(result[0])


def test_a_tensor_given_directly_is_taken_over_its_last_axis():
    logprobs = random_logprobs(2, 3, 4)
    value = evaluated(Entropy(), [], logprobs)[0].item()
    expected = sum(math.exp(x) * x for x in logprobs.flatten().tolist())
    assert value == pytest.approx(expected)
    mean = evaluated(Entropy(reduction="mean"), [], logprobs)[0].item()
    assert mean == pytest.approx(expected / 6)
    # one distribution with datums that it does not belong to
    assert Entropy().compute(two_way(), MODEL)[0].item() == pytest.approx(-0.5623351, rel=1e-6)
    with pytest.raises(InvalidData, match="at least one axis"):
        Entropy().compute([], torch.tensor(-1.0))
    # the whole vocabulary with datums that have one target per position
    logprobs, reference = random_logprobs(8, 5), random_logprobs(8, 5, seed=3).float().double()
    term = KLDivergence(**FIELD, reduction="seq-mean-token-sum")
    value, _, _ = evaluated(term, datums(reference_logprobs=reference), logprobs)
    assert value.item() == pytest.approx((reference.exp() * (reference - logprobs)).sum().item() / 3)


def softmax_entropy(values, temperature):
    """-H of softmax(values / temperature), by hand."""
    weights = [math.exp(v / temperature) for v in values]
    probabilities = [w / sum(weights) for w in weights]
    return sum(p * math.log(p) for p in probabilities)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (8,)])
def test_temperature_over_tokens_is_per_datum(normalize, lengths):
    logprobs, data = random_logprobs(8), datums(lengths)
    parts = [part.tolist() for part in torch.split(logprobs, list(lengths))]
    scale = [math.log(max(2, length)) if normalize else 1.0 for length in lengths]
    expected = sum(softmax_entropy(part, 0.5) / s for part, s in zip(parts, scale, strict=True))
    term = Entropy(over="tokens", temperature=0.5, normalize=normalize)
    assert evaluated(term, data, logprobs)[0].item() == pytest.approx(expected)


def test_a_low_temperature_over_tokens_does_not_overflow():
    value, gradient, _ = evaluated(Entropy(over="tokens", temperature=1e-3), datums(), random_logprobs(8).float())
    assert value.item() == pytest.approx(0.0, abs=1e-6)  # the most likely token of each datum has probability 1
    assert torch.isfinite(gradient).all()


def test_temperature_over_tokens_excludes_masked_positions():
    logprobs = torch.tensor([-1.0, -torch.inf, -2.0, -0.5])
    data = datums((3, 1), weights=[1.0, 0.0, 1.0, 0.0])
    value, gradient, _ = evaluated(Entropy(over="tokens", temperature=2.0, mask="weights"), data, logprobs)
    assert value.item() == pytest.approx(softmax_entropy([-1.0, -2.0], 2.0), rel=1e-6)
    assert gradient[1] == gradient[3] == 0


# --- the edge of probability ----------------------------------------------------------------------------------------


def test_outcomes_without_probability_add_nothing():
    for smallest in (-torch.inf, -1e4):  # impossible, and underflow
        logprobs = torch.tensor([[0.0, smallest], [math.log(0.5), math.log(0.5)]])
        reference = torch.tensor([[math.log(0.5), math.log(0.5)], [0.0, smallest]])
        terms = [
            (Entropy(), -LOG2),
            (Entropy(mode="minimize"), LOG2),
            (KLDivergence(reference=reference[:1], direction="reverse"), LOG2 + 0.0),
            (KLDivergence(reference=torch.stack([logprobs[0], logprobs[0]])), None),
            (JensenShannon(reference=reference), None),
        ]
        for term, expected in terms:
            value, gradient, _ = evaluated(term, [], logprobs)
            assert torch.isfinite(value), term
            assert torch.isfinite(gradient).all(), term
            assert expected is None or value.item() == pytest.approx(expected, rel=1e-6)
    both = torch.tensor([0.0, -torch.inf])
    for term in (KLDivergence(reference=both), KLDivergence(reference=both, symmetric=True)):
        value, gradient, _ = evaluated(term, [], both)
        assert value == 0
        assert torch.isfinite(gradient).all()


@pytest.mark.asyncio
async def test_an_infinite_divergence_raises():
    certain = torch.tensor([0.0, -torch.inf])
    for direction, reference, model in (("forward", HALF.float(), certain), ("reverse", certain, HALF.float())):
        term = KLDivergence(reference=reference, direction=direction)
        with pytest.raises(NonFiniteLoss, match="'kl_divergence' is inf"):
            await Executor.execute_one(RegularizerSpec(fn=term, weight=0.1), [], model)


# --- properties -----------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 10_000)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6))


@settings(max_examples=20)
@given(shape=SHAPES, seed=SEEDS, other=SEEDS)
def test_divergences_of_distributions(shape, seed, other):
    p, q = random_logprobs(*shape, seed=seed), random_logprobs(*shape, seed=other)
    for options in ({"direction": "forward"}, {"direction": "reverse"}, {"symmetric": True}):
        assert evaluated(KLDivergence(reference=q, **options), [], p)[0] >= -1e-12
        assert evaluated(KLDivergence(reference=p, **options), [], p)[0].item() == pytest.approx(0.0, abs=1e-12)
    forward = evaluated(KLDivergence(reference=q), [], p)[0]
    swapped = evaluated(KLDivergence(reference=p, direction="reverse"), [], q)[0]
    assert forward.item() == pytest.approx(swapped.item(), abs=1e-12)
    js = evaluated(JensenShannon(reference=q, reduction="mean"), [], p)[0].item()
    assert -1e-12 <= js <= LOG2 + 1e-12
    assert js == pytest.approx(evaluated(JensenShannon(reference=p, reduction="mean"), [], q)[0].item(), abs=1e-12)
    entropy = evaluated(Entropy(mode="minimize", reduction="mean"), [], p)[0].item()
    assert -1e-12 <= entropy <= math.log(shape[1]) + 1e-12


@pytest.mark.parametrize("make", [KLDivergence, JensenShannon])
def test_packed_equals_per_datum(make):
    logprobs, reference = random_logprobs(8, 3), random_logprobs(8, 3, seed=1)
    packed, gradient, _ = evaluated(make(reference=reference), datums(candidates=3), logprobs)
    pieces = zip(*(torch.split(tensor, list(LENGTHS)) for tensor in (logprobs, reference)), strict=True)
    alone = [evaluated(make(reference=q), [datum(len(p), 3)], p) for p, q in pieces]
    assert packed.item() == pytest.approx(sum(value.item() for value, _, _ in alone))
    torch.testing.assert_close(gradient, torch.cat([part for _, part, _ in alone]))
