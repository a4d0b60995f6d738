"""Losses over K candidates per position, and their data. The sheet's numbers: test_sheet."""

import asyncio

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.objectives import sheet_preference as sheet
from tests.regularizers.support import datum, datums, evaluated, loss_of, random_logprobs
from tinkex_py import Datum, InvalidData, InvalidSpec, ModelInput, NonFiniteLoss, Pipeline
from tinkex_py.base_losses import NLL, Choice, Distillation, ImportanceSampling
from tinkex_py.data import candidates_datum, with_teacher_advantages
from tinkex_py.regularizers import KLDivergence, SampledKL

FIELD = {"reference_field": "reference"}
TEACHER = torch.tensor(sheet.TEACHER, dtype=torch.float64).log()
STUDENT = torch.tensor(sheet.STUDENT, dtype=torch.float64).log()
TOKENS = [11, 12, 13]
ROWS = {str(row): row for row in sheet.ROWS if isinstance(row.term, Choice | Distillation | KLDivergence)}
ENTRIES = {name: row.term for name, row in ROWS.items()}
each_entry = pytest.mark.parametrize("name", ENTRIES)
distilling = pytest.mark.parametrize("name", [name for name in ENTRIES if "Distillation" in name])
each_own_entry = pytest.mark.parametrize("name", [name for name in ENTRIES if "KLDivergence" not in name])


def position(weights=(1.0, 0.0, 0.0), **fields):
    """One position with three candidates."""
    inputs = {"target_tokens": [TOKENS], "weights": [list(weights)], "reference": TEACHER, **fields}
    return [Datum(model_input=ModelInput.from_ints([5]), loss_fn_inputs=inputs)]


def distinct(data):
    """The datums with candidates that differ."""
    return [
        Datum(
            model_input=one.model_input,
            loss_fn_inputs={**one.loss_fn_inputs, "target_tokens": np.tile(TOKENS, (one.model_input.length, 1))},
        )
        for one in data
    ]


def batch():
    """Eight positions of three datums, of which three do not count; candidates have less than all of the mass."""
    weights = random_logprobs(8, 3, seed=2).exp() * torch.tensor([1, 0, 1, 1, 0, 1, 0, 1])[:, None]
    return distinct(datums(candidates=3, reference=random_logprobs(8, 3, seed=1) - 0.1, weights=weights))


@each_entry
def test_derivatives_are_those_of_finite_differences(name):
    leaf = (random_logprobs(8, 3) - 0.2).requires_grad_()
    loss = loss_of(ENTRIES[name], batch())
    assert gradcheck(loss, leaf)
    assert gradgradcheck(loss, leaf)


@each_entry
def test_packed_equals_per_datum(name):
    data, logprobs = batch(), random_logprobs(8, 3) - 0.2
    value, gradient, _ = evaluated(ENTRIES[name], data, logprobs)
    parts = torch.split(logprobs, [3, 1, 4])
    alone = [evaluated(ENTRIES[name], [one], part) for one, part in zip(data, parts, strict=True)]
    assert value.item() == pytest.approx(sum(one.item() for one, _, _ in alone))
    torch.testing.assert_close(gradient, torch.cat([part for _, part, _ in alone]))


@each_entry
def test_positions_outside_of_the_mask_reach_nothing(name):
    data, logprobs = batch(), random_logprobs(8, 3) - 0.2
    outside = torch.cat([one.loss_fn_inputs["weights"].to_torch() for one in data]).sum(-1) == 0
    assert outside.sum() == 3
    value, gradient, _ = evaluated(ENTRIES[name], data, logprobs)
    logprobs[outside] = -torch.inf
    again, same, _ = evaluated(ENTRIES[name], data, logprobs)
    assert again.item() == value.item()
    assert torch.equal(same, gradient)
    assert not gradient[outside].any()


# Choice


def test_the_first_of_equal_candidates_is_the_choice():
    assert float(evaluated(Choice(), position((0.0, 1.0, 0.0)), STUDENT)[2]["accuracy"]) == 0.0
    tied = torch.full((1, 3), -2.0)
    assert [float(evaluated(Choice(), position(row), tied)[2]["accuracy"]) for row in ((1, 0, 0), (0, 1, 0))] == [1, 0]


def test_the_kl_of_a_choice_is_its_cross_entropy_without_the_entropy_of_the_targets():
    targets = (0.2, 0.5, 0.3)
    cross, slope, _ = evaluated(Choice(), position(targets), STUDENT)
    kl, same, _ = evaluated(Choice(score="kl"), position(targets), STUDENT)
    entropy = -sum(t * np.log(t) for t in targets)
    assert cross.item() - kl.item() == pytest.approx(entropy, abs=1e-6)
    torch.testing.assert_close(slope, same)
    at_target = torch.tensor([targets], dtype=torch.float64).log() - 3.0
    assert evaluated(Choice(score="kl"), position(targets), at_target)[0].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("score", ["cross_entropy", "kl", "brier"])
def test_an_option_that_the_model_excludes(score):
    without = torch.tensor([[-1.0, -torch.inf, -2.0]], dtype=torch.float64)
    value, gradient, _ = evaluated(Choice(score=score), position(), without)
    chosen = np.exp(-1.0) / (np.exp(-1.0) + np.exp(-2.0))
    expected = 2 * (1 - chosen) ** 2 if score == "brier" else -np.log(chosen)
    assert value.item() == pytest.approx(expected)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1] == 0
    if score != "brier":
        with pytest.raises(NonFiniteLoss):
            asyncio.run(Pipeline(Choice(score=score)).compute(position((0.0, 1.0, 0.0)), [without]))


def test_one_candidate_is_no_choice():
    one = Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": [[7]], "weights": [[1.0]]})
    value, gradient, _ = evaluated(Choice(), [one], torch.tensor([[-3.0]]))
    assert value == 0
    assert gradient == 0


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ([0.5, -0.5, 1.0], r"\[0.5, -0.5, 1\]"),
        ([0.0, 0.0, 0.0], r"\[0, 0, 0\]"),
        ([float("nan"), 0.0, 1.0], "nan"),
        ([float("inf"), 0.0, 1.0], "inf"),
    ],
)
def test_targets_that_are_no_distribution(row, shown):
    data = position(targets=[row])
    with pytest.raises(InvalidData, match=rf"the targets 'targets' at position 0 of datum 0 are .*{shown}.*>= 0"):
        Choice(targets_field="targets", mask=None).compute(data, STUDENT)


@each_own_entry
def test_a_candidate_twice_is_an_error(name):
    data = position(target_tokens=[[4, 9, 4]])
    with pytest.raises(InvalidData, match="the candidates at position 0 of datum 0 contain the token 4 twice"):
        ENTRIES[name].compute(data, STUDENT)


@each_entry
def test_targets_of_one_token_are_refused(name):
    with pytest.raises(InvalidData, match="is a formula over distributions"):
        evaluated(ENTRIES[name], [datum(2, weights=[1.0, 1.0], reference=[-1.0, -1.0])], random_logprobs(2))


# A datum of candidates


def test_a_datum_of_candidates():
    made = candidates_datum(ModelInput.from_ints([5, 6]), TOKENS, [0.25, 0.0, 0.75])
    assert made.model_input.to_ints() == [5, 6]
    assert made.loss_fn_inputs["target_tokens"].tolist() == [TOKENS, TOKENS]
    assert made.loss_fn_inputs["weights"].tolist() == [[0.0, 0.0, 0.0], [0.25, 0.0, 0.75]]
    assert candidates_datum([5, 6], TOKENS, [0.25, 0.0, 0.75]) == made


def test_only_the_last_position_is_a_choice():
    data = [candidates_datum([5, 6], TOKENS, [1.0, 0.0, 0.0])]
    logprobs = torch.cat([torch.full((1, 3), -torch.inf, dtype=torch.float64), STUDENT])
    value, gradient, metrics = evaluated(Choice(), data, logprobs)
    assert value.item() == pytest.approx(ROWS["E4-Choice"].loss, abs=2e-6)
    assert gradient[0].tolist() == [0.0, 0.0, 0.0]
    assert metrics["tokens"] == 1.0


@pytest.mark.parametrize(
    ("prompt", "candidates", "targets", "message"),
    [
        ([], TOKENS, [1, 0, 0], "prompt is empty"),
        ([0.5], TOKENS, [1, 0, 0], "prompt must be a ModelInput or token ids"),
        ([1], [], [], "candidate_ids must be a flat list of at least one number"),
        ([1], [4, 9, 4], [1, 0, 0], "candidate_ids must differ, but 4 occurs 2 times"),
        ([1], [4, -9, 5], [1, 0, 0], r"candidate_ids must be in \[0, 2\*\*31\), got -9"),
        ([1], [4.5, 9.0], [1, 0], "candidate_ids must be token ids"),
        ([1], TOKENS, [1, 0], "target_probs must have one number for each of the 3 candidate_ids, got 2"),
        ([1], TOKENS, [0.5, 0.6, -0.1], r"target_probs must be numbers >= 0 that add up to 1, got \[0.5, 0.6, -0.1\]"),
        ([1], TOKENS, [0.5, 0.4, 0.0], "target_probs must be numbers >= 0 that add up to 1"),
        ([1], TOKENS, [float("nan"), 0, 1], "target_probs must be numbers >= 0 that add up to 1"),
    ],
)
def test_candidates_that_cannot_be_used(prompt, candidates, targets, message):
    with pytest.raises(InvalidData, match=message):
        candidates_datum(prompt, candidates, targets)


# Distillation


@distilling
def test_the_divergence_from_oneself_is_0_and_without_a_pull(name):
    if ENTRIES[name].outside == "raw":
        return  # it is 0, but pulls all candidates up
    value, gradient, _ = evaluated(
        ENTRIES[name], position(reference=STUDENT.float().double()), STUDENT.float().double()
    )
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max() < 1e-7


def test_raw_distillation_is_the_services_cross_entropy_with_the_probabilities_as_weights():
    value, gradient, _ = evaluated(Distillation(**FIELD, outside="raw"), position(), STUDENT)
    cross, same, _ = evaluated(NLL(), position(TEACHER[0].exp().tolist()), STUDENT)
    torch.testing.assert_close(gradient, same, atol=1e-6, rtol=0)
    entropy = -(TEACHER.exp() * TEACHER).sum()
    assert value.item() == pytest.approx(cross.item() - entropy.item(), abs=1e-6)


@distilling
def test_a_candidate_that_the_teacher_lacks_is_left_out(name):
    """The same as without it, where the tail has its mass."""
    lacking = torch.tensor([[*sheet.TEACHER[0], 0.0]], dtype=torch.float64).log()
    student = torch.tensor([[*sheet.STUDENT[0], 0.15]], dtype=torch.float64).log()
    data = position(target_tokens=[[*TOKENS, 14]], weights=[1.0] * 4, reference=lacking)
    value, gradient, _ = evaluated(ENTRIES[name], data, student)
    assert value.item() == pytest.approx(ROWS[name].loss, abs=2e-6)
    assert gradient[0].tolist() == pytest.approx([*ROWS[name].grad, 0.0], abs=2e-6)


@distilling
@pytest.mark.parametrize("mass", [1.0, 1.0 - 1e-7, 1e-30])
def test_extreme_masses_stay_finite(name, mass):
    student = torch.tensor([[0.5, 0.3, 0.2]]).log() + np.log(mass)
    teacher = torch.tensor([[0.2, 0.3, 0.5]]).log()
    value, gradient, _ = evaluated(ENTRIES[name], position(reference=teacher), student)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", [f"E1-Distillation-{what}" for what in ("raw", "tail", "renormalized")])
def test_a_student_that_excludes_what_the_teacher_allows_fails_the_step(name):
    student = torch.tensor([[-1.0, -torch.inf, -2.0]])
    with pytest.raises(NonFiniteLoss):
        asyncio.run(Pipeline(ENTRIES[name]).compute(position(), [student]))


def test_one_candidate_and_its_tail_are_a_binary_divergence():
    one = Datum(
        model_input=ModelInput.from_ints([1]),
        loss_fn_inputs={"target_tokens": [[7]], "weights": [[1.0]], "reference": [[np.log(0.6)]]},
    )
    half = torch.tensor([[0.5]], dtype=torch.float64).log()
    value, _, _ = evaluated(Distillation(**FIELD), [one], half)
    assert value.item() == pytest.approx(0.6 * np.log(0.6 / 0.5) + 0.4 * np.log(0.4 / 0.5), abs=1e-6)
    with pytest.raises(InvalidData, match=r"the teacher has 1 candidates at position 0 of datum 0: .* at least 2"):
        Distillation(**FIELD, outside="renormalize").compute([one], half)
    with pytest.raises(InvalidData, match="KLDivergence with normalize=True is 0 for a single candidate"):
        KLDivergence(**FIELD, normalize=True, mask="weights").compute([one], half)


def test_settings_that_contradict_each_other():
    for divergence in ("reverse", "jsd"):
        with pytest.raises(InvalidSpec, match=f"divergence='{divergence}' of numbers that do not add up to 1"):
            Distillation(**FIELD, divergence=divergence, outside="raw")
    with pytest.raises(InvalidSpec, match="beta must be greater than 0, got 0"):
        Distillation(**FIELD, divergence="jsd", beta=0.0)


def test_the_normalized_kl_divergence_over_tokens_is_per_datum():
    term = KLDivergence(**FIELD, over="tokens", normalize=True, mask=None)
    logprobs, data = random_logprobs(8), datums(reference=random_logprobs(8, seed=1))
    value, _, _ = evaluated(term, data, logprobs)
    parts = [
        (one.loss_fn_inputs["reference"].to_torch().double().log_softmax(0), part.log_softmax(0))
        for one, part in zip(data, torch.split(logprobs, [3, 1, 4]), strict=True)
    ]
    assert value.item() == pytest.approx(sum((q.exp() * (q - p)).sum().item() for q, p in parts), abs=1e-6)


# On-policy distillation


def on_policy(**fields):
    (sampled,) = sheet.SAMPLED.data
    return [Datum(model_input=sampled.model_input, loss_fn_inputs={**sampled.loss_fn_inputs, **fields})]


def advantages_of(data):
    return data[0].loss_fn_inputs["advantages"].tolist()


def test_on_samples_of_the_current_model_it_is_the_sampled_kl():
    data = with_teacher_advantages(on_policy())
    model = data[0].loss_fn_inputs["logprobs"].to_torch().double()
    _, policy, _ = evaluated(ImportanceSampling(), data, model)
    _, divergence, _ = evaluated(SampledKL(reference_field="teacher_logprobs"), data, model)
    torch.testing.assert_close(policy, divergence)


def test_advantages_are_added_and_prompts_get_none():
    own = on_policy(advantages=[1.0, 2.0], weights=[0.0, 1.0])
    assert advantages_of(with_teacher_advantages(own, coefficient=2.0)) == [1.0, 1.0]
    assert advantages_of(with_teacher_advantages(own, coefficient=2.0, discount=1.0)) == [1.0, 1.0]
    unscored = on_policy(teacher_logprobs=[-np.inf, -2.5], weights=[0.0, 1.0])
    assert advantages_of(with_teacher_advantages(unscored)) == [0.0, -0.5]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"teacher_logprobs": [-np.inf, -1.0]}, {}, "a logprob of datum 0 is not finite at a position that counts"),
        ({"teacher_logprobs": [-1.0]}, {}, r"'teacher_logprobs' of datum 0 has shape \(1,\)"),
        ({"advantages": [1.0]}, {}, r"'advantages' of datum 0 has shape \(1,\)"),
        ({}, {"coefficient": 0.0}, "coefficient must be a finite number > 0, got 0.0"),
        ({}, {"discount": 1.5}, "discount must be a number from 0 to 1, got 1.5"),
    ],
)
def test_advantages_that_cannot_be_computed(fields, options, message):
    with pytest.raises(InvalidData, match=message):
        with_teacher_advantages(on_policy(**fields), **options)
