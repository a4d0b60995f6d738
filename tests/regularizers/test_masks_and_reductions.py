"""Masks and reductions, against a plain loop over datums and positions."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.regularizers.support import LENGTHS, datum, datums, evaluated, random_logprobs
from tinkex_py import InvalidData
from tinkex_py.regularizers import L1, Entropy, SampledEntropy
from tinkex_py.terms.reduction import Reduction

REDUCTIONS = get_args(Reduction)
LENGTH = 5.0  # of the reduction "constant"
MASK = [1.0, 0.0, 1.0, 0.0, 2.0, 0.5, 0.0, 1.0]


def by_hand(values, weights, reduction):
    """The definition, datum by datum. `values` and `weights`: one list per datum."""
    if reduction == "constant":
        return by_hand(values, weights, "seq-mean-token-sum") / LENGTH
    sums = [sum(w * v for w, v in zip(ws, vs, strict=True)) for ws, vs in zip(weights, values, strict=True)]
    sizes = [sum(ws) for ws in weights]
    if reduction == "sum":
        return sum(sums)
    if reduction in ("mean", "token-mean"):
        return sum(sums) / sum(sizes) if sum(sizes) else 0.0
    counted = [index for index, size in enumerate(sizes) if size]
    if not counted:
        return 0.0
    if reduction == "seq-mean-token-sum":
        return sum(sums[index] for index in counted) / len(counted)
    return sum(sums[index] / sizes[index] for index in counted) / len(counted)


def of(reduction):
    return {"reduction": reduction, "length": LENGTH if reduction == "constant" else None}


def pieces(numbers, lengths):
    return [list(part) for part in torch.split(torch.as_tensor(numbers, dtype=torch.float64), list(lengths))]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", [None, MASK])
def test_reductions_equal_the_loop(reduction, mask):
    logprobs = random_logprobs(8)
    data = datums(weights=mask or [1.0] * 8)
    term = L1(**of(reduction), mask="weights" if mask else None)
    value, gradient, metrics = evaluated(term, data, logprobs)
    weights = pieces(mask or [1.0] * 8, LENGTHS)
    expected = by_hand(pieces(logprobs.abs(), LENGTHS), weights, reduction)
    assert value.item() == pytest.approx(float(expected), rel=1e-12)
    assert metrics["tokens"] == sum(mask or [1.0] * 8)
    if reduction.startswith("seq-"):
        # datum 1 consists of a masked position
        assert metrics["sequences"] == (2.0 if mask else 3.0)
    if mask:
        assert (gradient[torch.tensor(mask) == 0] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("per_candidate", [False, True])
def test_reductions_of_single_numbers_of_two_axes(reduction, per_candidate):
    logprobs = random_logprobs(8, 3)
    mask = torch.rand(8, 3, generator=torch.Generator().manual_seed(5)).round() if per_candidate else torch.tensor(MASK)
    value, gradient, _ = evaluated(L1(**of(reduction), mask="weights"), datums(candidates=3, weights=mask), logprobs)
    full = mask if per_candidate else mask[:, None].expand(8, 3)
    flat = [3 * length for length in LENGTHS]
    expected = by_hand(pieces(logprobs.abs().flatten(), flat), pieces(full.flatten(), flat), reduction)
    assert value.item() == pytest.approx(float(expected), rel=1e-12)
    assert gradient.shape == logprobs.shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("per_candidate", [False, True])
def test_reductions_of_rows(reduction, per_candidate):
    logprobs = random_logprobs(8, 3)
    mask = torch.tensor(MASK)
    field = mask[:, None] * torch.tensor([0.0, 1.0, 0.0]) if per_candidate else mask
    value, _, _ = evaluated(Entropy(**of(reduction), mask="weights"), datums(candidates=3, weights=field), logprobs)
    rows = [sum(math.exp(x) * x for x in row) for row in logprobs.tolist()]
    counts = [float(w > 0) if per_candidate else w for w in MASK]
    expected = by_hand(pieces(rows, LENGTHS), pieces(counts, LENGTHS), reduction)
    assert value.item() == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_positions_never_reach_the_loss(reduction):
    logprobs = random_logprobs(8)
    spoiled = logprobs.masked_fill(torch.tensor(MASK) == 0, -torch.inf)
    term = L1(**of(reduction), mask="weights")
    value, gradient, _ = evaluated(term, datums(weights=MASK), spoiled)
    clean_value, clean_gradient, _ = evaluated(term, datums(weights=MASK), logprobs)
    assert value == clean_value
    assert torch.equal(gradient, clean_gradient)
    value, gradient, metrics = evaluated(term, datums(weights=[0.0] * 8), logprobs)
    assert value == 0
    assert (gradient == 0).all()
    assert metrics["tokens"] == 0


LISTS = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@settings(max_examples=25)
@given(lengths=LISTS, seed=st.integers(0, 99), reduction=st.sampled_from(REDUCTIONS), data=st.data())
def test_packed_equals_the_loop_for_any_lengths(lengths, seed, reduction, data):
    total = sum(lengths)
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=total, max_size=total))
    logprobs = random_logprobs(total, seed=seed)
    value, _, _ = evaluated(L1(**of(reduction), mask="weights"), datums(lengths, weights=weights), logprobs)
    expected = by_hand(pieces(logprobs.abs(), lengths), pieces(torch.tensor(weights), lengths), reduction)
    assert value.item() == pytest.approx(float(expected), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_order_of_datums_does_not_matter(reduction):
    logprobs, order = random_logprobs(8), [2, 0, 1]
    data, parts = datums(weights=MASK), torch.split(logprobs, list(LENGTHS))
    term = SampledEntropy(**of(reduction), mask="weights")
    value, gradient, _ = evaluated(term, data, logprobs)
    moved, moved_gradient, _ = evaluated(term, [data[i] for i in order], torch.cat([parts[i] for i in order]))
    assert moved.item() == pytest.approx(value.item(), rel=1e-12)
    gradients = torch.split(gradient, list(LENGTHS))
    torch.testing.assert_close(moved_gradient, torch.cat([gradients[i] for i in order]))


def test_without_datums_the_tensor_is_one_sequence():
    x = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    for reduction in REDUCTIONS:
        expected = 10.0 / LENGTH if reduction == "constant" else 10.0 if reduction.endswith("sum") else 2.5
        assert evaluated(L1(**of(reduction)), [], x)[0].item() == expected


def test_data_that_are_no_datums_are_refused():
    unread: list = [object()]
    with pytest.raises(InvalidData, match=r"data\[0\] must be a Datum, got a object"):
        L1().compute(unread, torch.tensor([-1.0, -2.0]))


def test_errors_of_masks():
    logprobs = random_logprobs(8)
    term = L1(mask="weights")
    with pytest.raises(InvalidData, match=r"datum 0 has no 'weights' in loss_fn_inputs \(it has \['target_tokens'\]\)"):
        term.compute(datums(), logprobs)
    for bad, text in ((-1.0, "-1.0"), (math.nan, "nan"), (math.inf, "inf")):
        data = [datum(3, weights=[1.0, 1.0, 1.0]), datum(1, weights=[bad]), datum(4, weights=[1.0] * 4)]
        with pytest.raises(InvalidData, match=f"must contain finite numbers >= 0, but datum 1 has {text}"):
            term.compute(data, logprobs)
    data = datums(weights=MASK)
    data[2] = datum(4, weights=[1.0])
    with pytest.raises(InvalidData, match=r"'weights' of datum 2 has shape \(1,\), but its logprobs have shape \(4,\)"):
        term.compute(data, logprobs)
    with pytest.raises(InvalidData, match=r"covers 8 positions, but the logprobs have shape \(9,\)"):
        term.compute(datums(weights=MASK), random_logprobs(9))
    with pytest.raises(InvalidData, match="cover 8 positions, but the logprobs have 9"):
        L1(reduction="seq-mean-token-sum").compute(datums(), random_logprobs(9))
    scalar = [datum(1, weights=torch.tensor(1.0))]
    with pytest.raises(InvalidData, match="'weights' of datum 0 is a scalar"):
        term.compute(scalar, random_logprobs(1))
