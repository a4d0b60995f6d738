"""Losses on pairs and single answers: batches, masks, pairs by number, edge cases. The sheet's numbers: test_sheet."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.objectives import sheet_preference as sheet
from tests.regularizers.support import datum, datums, evaluated, loss_of, random_logprobs
from tinkex_py import InvalidData, InvalidSpec
from tinkex_py.base_losses import CPO, DPO, DPOP, KTO, ORPO, Hinge, SimPO, SLiC
from tinkex_py.data import with_role_masks

FIELD = {"reference_field": "reference"}
ROWS = {str(row): row for row in sheet.ROWS if row.entry.startswith("D")}
ENTRIES = {name: row.term for name, row in ROWS.items()}
PAIR_TERMS = {name: term for name, term in ENTRIES.items() if not isinstance(term, KTO)}
OVER_TOKENS = [name for name, term in ENTRIES.items() if isinstance(term, SimPO | ORPO | CPO)]
OVER_SUMS = [name for name, term in ENTRIES.items() if isinstance(term, DPO | Hinge | SLiC | DPOP)]
each_entry = pytest.mark.parametrize("name", ENTRIES)
each_pair_term = pytest.mark.parametrize("name", PAIR_TERMS)

# Three pairs of different lengths, with prompts of weight 0.
LENGTHS = (3, 2, 1, 4, 2, 2)
WEIGHTS = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.0, 1.0]


def with_label(one, label, name="label"):
    return type(one)(model_input=one.model_input, loss_fn_inputs={**one.loss_fn_inputs, name: [float(label)]})


def batch(**fields):
    data = datums(LENGTHS, reference=random_logprobs(14, seed=1), weights=WEIGHTS, **fields)
    return [with_label(one, label) for one, label in zip(data, (1, -1, 1, 0, -1, 0), strict=True)]


@each_entry
def test_derivatives_are_those_of_finite_differences(name):
    leaf = random_logprobs(14).requires_grad_()
    loss = loss_of(ENTRIES[name], batch())
    assert gradcheck(loss, leaf)
    assert gradgradcheck(loss, leaf)


@each_pair_term
def test_a_tie_is_not_accurate(name):
    alike = datums((2, 2), reference=[-1.0] * 4)
    _, _, metrics = evaluated(PAIR_TERMS[name], alike, torch.full((4,), -1.0))
    assert metrics["margin"] == 0
    assert metrics["accuracy"] == 0


@each_pair_term
def test_pairs_of_a_batch_are_those_of_pairs_alone(name):
    """The mean over three pairs is the mean of the losses of each pair in a call of its own."""
    term, data, logprobs = PAIR_TERMS[name], batch(), random_logprobs(14)
    value, gradient, _ = evaluated(term, data, logprobs)
    parts = torch.split(logprobs, list(LENGTHS))
    alone = [evaluated(term, data[at : at + 2], torch.cat(parts[at : at + 2])) for at in (0, 2, 4)]
    assert value.item() == pytest.approx(sum(one.item() for one, _, _ in alone) / 3)
    torch.testing.assert_close(gradient, torch.cat([part for _, part, _ in alone]) / 3)
    total, _, _ = evaluated(term, data, logprobs, reduction="sum")
    assert total.item() == pytest.approx(3 * value.item())


@each_pair_term
def test_pairs_by_number_in_any_order(name):
    """Numbers of pairs give the same loss for datums in another order."""
    term, data, logprobs = PAIR_TERMS[name], batch(), random_logprobs(14)
    value, gradient, _ = evaluated(term, data, logprobs)
    numbered = [with_label(one, number, "pair") for one, number in zip(data, (1, -1, 7, -7, 3, -3), strict=True)]
    order = [4, 1, 3, 0, 2, 5]
    parts = torch.split(logprobs, list(LENGTHS))
    shuffled = evaluated(
        term, [numbered[at] for at in order], torch.cat([parts[at] for at in order]), pair_field="pair"
    )
    assert shuffled[0].item() == pytest.approx(value.item())
    expected = torch.split(gradient, list(LENGTHS))
    torch.testing.assert_close(shuffled[1], torch.cat([expected[at] for at in order]))


@each_entry
def test_positions_outside_of_the_mask_reach_nothing(name):
    logprobs = random_logprobs(14)
    value, gradient, _ = evaluated(ENTRIES[name], batch(), logprobs)
    outside = torch.tensor([weight == 0 for weight in WEIGHTS])
    logprobs[outside] = -torch.inf
    again, same, _ = evaluated(ENTRIES[name], batch(), logprobs)
    assert again.item() == value.item()
    assert torch.equal(same, gradient)
    assert not gradient[outside].any()


@each_entry
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
def test_huge_margins_stay_finite(name, scale):
    reference = torch.full((14,), -1.0)
    for sign in (1.0, -1.0):
        model = -1.0 + sign * scale * torch.tensor([1.0, -1.0]).repeat(7)
        logprobs = model.clamp(max=0.0)
        data = [with_label(one, 1 - 2 * (at % 2)) for at, one in enumerate(datums(LENGTHS, reference=reference))]
        value, gradient, _ = evaluated(ENTRIES[name], data, logprobs)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", [*OVER_TOKENS, "D2-IPO"])
def test_a_mean_over_no_token_is_an_error(name):
    data = datums((2, 2), reference=[-1.0] * 4, weights=[1.0, 1.0, 0.0, 0.0])
    chosen_is_empty = [data[1], data[0]]
    with pytest.raises(InvalidData, match="the mask leaves no token of datum 0, whose mean over tokens is needed"):
        PAIR_TERMS[name].compute(chosen_is_empty, random_logprobs(4))


@pytest.mark.parametrize("name", [*OVER_SUMS, "D2-IPO-sums"])
def test_a_sum_over_no_token_is_0(name):
    data = datums((2, 2), reference=[-1.0] * 4, weights=[1.0, 1.0, 0.0, 0.0])
    _, _, metrics = evaluated(PAIR_TERMS[name], data, random_logprobs(4))
    assert metrics["rejected_reward"] == 0


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1, -1, 2, 3], r"pair 2 has no rejected answer among the 4 datums"),
        ([1, -1, -2, 3], r"pair 2 has no chosen answer"),
        ([1, -1, 1, -2], r"datums 0 and 2 both have 1 in 'pair'"),
        ([1, -1, 0, 2], r"'pair' of datum 2 is 0: SimPO needs n for the chosen and -n"),
        ([1, -1, 1.5, 2], r"'pair' of datum 2 is 1.5"),
        ([1, -1, float("nan"), 2], r"'pair' of datum 2 is nan"),
    ],
)
def test_wrong_numbers_of_pairs(numbers, message):
    data = [with_label(datum(1), number, "pair") for number in numbers]
    with pytest.raises(InvalidData, match=message):
        SimPO(pair_field="pair").compute(data, random_logprobs(4))


def test_wrong_data():
    with pytest.raises(InvalidData, match=r"SimPO needs datums in pairs \(chosen, rejected, .*\), got 3"):
        SimPO().compute([datum(1)] * 3, random_logprobs(3))
    with pytest.raises(InvalidData, match="SimPO needs datums in pairs, got none"):
        SimPO(pair_field="pair").compute([], random_logprobs(3))
    with pytest.raises(InvalidData, match="datum 0 has no 'pair' in loss_fn_inputs"):
        SimPO(pair_field="pair").compute([datum(1)] * 2, random_logprobs(2))
    with pytest.raises(InvalidData, match=r"'pair' of datum 0 has shape \(2,\): pass one number per datum"):
        SimPO(pair_field="pair").compute([datum(1, pair=[1, 2])] * 2, random_logprobs(2))
    with pytest.raises(InvalidData, match="ORPO needs sampled tokens"):
        ORPO().compute([datum(1, 3)] * 2, random_logprobs(2, 3))
    with pytest.raises(InvalidSpec, match=r"robust=True divides by .* got label_smoothing=0.5"):
        DPO(**FIELD, label_smoothing=0.5, robust=True)


# Masks for one side


def test_masks_for_one_side():
    data = datums((2, 2, 1, 1), weights=[0.0, 1.0, 0.5, 1.0, 1.0, 1.0])
    masked = with_role_masks(data)
    both = [[one.loss_fn_inputs[f"{side}_weights"].tolist() for one in masked] for side in ("chosen", "rejected")]
    assert both == [[[0.0, 1.0], [0.0, 0.0], [1.0], [0.0]], [[0.0, 0.0], [0.5, 1.0], [0.0], [1.0]]]
    numbered = [with_label(datum(1), number, "pair") for number in (-1, 2, 1, -2)]
    chosen = [one.loss_fn_inputs["chosen_weights"].tolist() for one in with_role_masks(numbered, pair_field="pair")]
    assert chosen == [[0.0], [1.0], [1.0], [0.0]]
    with pytest.raises(InvalidData, match="with_role_masks needs datums in pairs .* got 1"):
        with_role_masks(data[:1])


# KTO


def test_kto_takes_its_reference_point_from_mismatched_datums():
    data, logprobs = sheet.PAIR.data, sheet.PAIR.packed
    mismatched = [with_label(one, 0) for one in datums((1, 2), reference=[-1.0, -2.0, -1.0])]
    # h is 0.5 and -0.1: their mean is 0.2
    more = torch.cat([logprobs, torch.tensor([-0.5, -2.0, -1.1], dtype=torch.float64)])
    value, gradient, metrics = evaluated(KTO(**FIELD, beta=0.5), [*data, *mismatched], more)
    row = ROWS["D4-KTO"]
    assert value.item() == pytest.approx(row.loss, abs=2e-6)
    assert gradient.tolist() == pytest.approx([*row.grad, 0.0, 0.0, 0.0], abs=2e-6)
    assert metrics["reference_point"] == pytest.approx(0.2, abs=1e-6)
    assert metrics["sequences"] == 2.0


@pytest.mark.parametrize(("label", "side"), [(1, "desirable"), (-1, "undesirable")])
def test_the_weights_of_kto(label, side):
    data = [with_label(datum(2, reference=[-1.0, -2.0]), label)]
    term, logprobs = KTO(**FIELD, reference_point=0.0), random_logprobs(2)
    value, _, metrics = evaluated(term, data, logprobs)
    doubled, _, _ = evaluated(term, data, logprobs, **{f"{side}_weight": 2.0})
    assert doubled.item() == pytest.approx(2 * value.item())
    assert [name for name in metrics if name.endswith("_reward")] == [f"{side}_reward"]


def test_the_reference_point_is_at_least_0():
    data, logprobs = sheet.PAIR.data, sheet.PAIR.packed
    mismatched = [with_label(datum(1, reference=[-1.0]), 0)]
    below = torch.cat([logprobs, torch.tensor([-3.0], dtype=torch.float64)])
    metrics = evaluated(KTO(**FIELD), [*data, *mismatched], below)[2]
    assert metrics["reference_point"] == 0


def test_kto_refuses_what_it_cannot_use():
    term, one = KTO(**FIELD), datum(1, reference=[-1.0])
    with pytest.raises(InvalidData, match="KTO has no reference point: add datums whose 'label' is 0"):
        term.compute([with_label(one, 1)], random_logprobs(1))
    with pytest.raises(InvalidData, match="'label' of datum 0 is 2: KTO needs 1 for a desirable answer"):
        term.compute([with_label(one, 2)], random_logprobs(1))
    with pytest.raises(InvalidData, match="at least one datum whose 'label' is 1 or -1, got 1"):
        term.compute([with_label(one, 0)], random_logprobs(1))
    with pytest.raises(InvalidData, match="datum 0 has no 'label'"):
        term.compute([one], random_logprobs(1))
