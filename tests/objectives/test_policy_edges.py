"""Policy losses and their corrections where the sheet has no number: by name, at the limits, and wrong input."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objectives.entries import Batch, batch, evaluated
from tests.objectives.sheet_policy import NARROW, P
from tinkex_py import AsyncServiceClient, Datum, InvalidData, InvalidSpec, ModelInput, Pipeline
from tinkex_py.base_losses import (
    CISPO,
    DFT,
    DRO,
    EAFT,
    GMPO,
    GSPO,
    NLL,
    PPO,
    SAPO,
    TOPR,
    VESPO,
    ClipCov,
    Corrected,
    Focal,
    ImportanceSampling,
    KLCov,
    MaskedIS,
    OffPolicyMask,
    ProbabilityMask,
    Reinforce,
    Rejection,
    TruncatedIS,
    Unlikelihood,
    group_advantages,
    in_varied_groups,
    overlong_penalty,
)
from tinkex_py.base_losses.named import named_losses
from tinkex_py.errors import InvalidBaseLoss
from tinkex_py.local.losses import find_loss
from tinkex_py.losses import replay
from tinkex_py.regularizers import SampledEntropy, SampledKL
from tinkex_py.runs.config import LossSection, pipeline_of
from tinkex_py.terms.ready_made import ReadyMadeTerm

POLICIES = [
    Reinforce(),
    ImportanceSampling(),
    PPO(),
    PPO(dual_clip=3.0),
    CISPO(),
    SAPO(),
    DRO(beta=0.05),
    GSPO(**NARROW),
    GMPO(),
    VESPO(),
    TOPR(),
    TOPR(level="token"),
    ClipCov(),
    KLCov(),
    Corrected(policy=Reinforce(), corrections=[TruncatedIS()]),
    Corrected(policy=PPO(), corrections=[Rejection(statistic="geometric", high=2.0)]),
]
each_policy = pytest.mark.parametrize("term", POLICIES, ids=lambda term: term.name)


def one(lp: float, q: float, advantage: float, **fields: float) -> Batch:
    return batch([[lp]], logprobs=[[q]], advantages=[[advantage]], **{name: [[v]] for name, v in fields.items()})


# By name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cross_entropy", NLL()),
        ("importance_sampling", ImportanceSampling()),
        ("ppo", PPO()),
        ("cispo", CISPO()),
        ("grpo", PPO(reduction="seq-mean-token-mean")),
        ("dapo", PPO(clip_high_threshold=1.28, reduction="token-mean")),
        ("luspo", GSPO(clip_low_threshold=0.998, clip_high_threshold=1.0025, reduction="seq-mean-token-sum")),
        ("reinforce", Reinforce()),
        ("gmpo", GMPO()),
        ("sapo", SAPO()),
        ("vespo", VESPO()),
        ("topr", TOPR()),
        ("nll", NLL()),
        ("dft", DFT()),
    ],
)
def test_names_of_base_losses(name: str, expected: ReadyMadeTerm) -> None:
    assert Pipeline(name).base_loss == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("poo", r"no base loss is named 'poo' \(did you mean 'ppo'\?\)"),
        ("stable_reinforce", "formula is not published: run it on the service"),
        ("dro", r"pass DRO\(\.\.\.\)"),
        ("gspo", r"pass GSPO\(\.\.\.\)"),
        ("dpo", r"pass DPO\(\.\.\.\)"),
    ],
)
def test_names_without_a_loss(name: str, message: str) -> None:
    with pytest.raises(InvalidBaseLoss, match=message):
        Pipeline(name)


def test_every_class_has_its_name() -> None:
    for name, loss in named_losses().items():
        assert loss.cls.name == name or loss.settings or name == "cross_entropy"


def test_names_in_configuration_files() -> None:
    section = LossSection.model_validate({"base": {"term": "dapo", "options": {"mask": "weights", "dual_clip": 3.0}}})
    expected = PPO(clip_high_threshold=1.28, reduction="token-mean", mask="weights", dual_clip=3.0)
    assert pipeline_of(section).base_loss == expected


@pytest.mark.asyncio
async def test_a_step_by_name_is_that_of_the_class_and_of_the_service() -> None:
    def datum(seed: int) -> Datum:
        values = torch.linspace(-2.0, -0.5, 4) - 0.1 * seed
        inputs = {"target_tokens": [2, 3, 4, 5], "logprobs": values, "advantages": [1.0, -1.0, 0.5, 0.0]}
        return Datum(model_input=ModelInput.from_ints([1, 2, 3, 4]), loss_fn_inputs=inputs)

    data = [datum(0), datum(1)]
    async with AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=4, seed=1)
        by_name = await training.forward_backward_custom(data, "ppo", track_grad_norms=True)
        by_class = await training.forward_backward_custom(data, PPO(), track_grad_norms=True)
        built_in = await training.forward_backward(data, "ppo")
    assert by_name.base_loss == by_class.base_loss
    assert by_name.loss_total == pytest.approx(built_in.metrics["loss:sum"], rel=1e-5)


SERVICE = [
    ("importance_sampling", {}, ImportanceSampling()),
    ("ppo", {}, PPO()),
    ("cispo", {}, CISPO()),
    ("dro", {"beta": 0.1}, DRO(beta=0.1)),
    ("gspo", NARROW, GSPO(**NARROW)),
]


@pytest.mark.parametrize(
    ("name", "settings", "term"), SERVICE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_losses_of_the_service_are_the_same_here(name: str, settings: Any, term: ReadyMadeTerm) -> None:
    """The embedded service's own formulas, datum by datum; those of sequence_ratio_mask too."""
    generator = torch.Generator().manual_seed(3)
    rows = [-torch.rand(3, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    fields = {
        "logprobs": [(row[1] * 1.5).tolist() for row in rows],
        "advantages": [[1.0, -1.0, 0.5, 0.0, 2.0], [-1.0, 1.0, 1.0, 1.0, -2.0]],
        "sequence_ratio_mask": [[0.0, 0.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 0.0, 0.0]],
    }
    given = batch([row[0] for row in rows], **fields)
    value, gradient, _ = evaluated(term, given)
    loss, expected, slopes = find_loss(name, settings), 0.0, []
    for part, datum in zip(given.logprobs, given.data, strict=True):
        leaf = part.clone().requires_grad_()
        inputs = {field: datum.loss_fn_inputs[field].to_torch().double() for field in fields}
        own = loss.compute(leaf, inputs).value
        expected += own.item()
        slopes += torch.autograd.grad(own, leaf)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, torch.cat(slopes))


OLD = (ImportanceSampling, PPO, CISPO, Corrected)
NEW = [term for term in POLICIES if type(term) not in OLD]


@pytest.mark.parametrize("term", [*NEW, Focal(), DFT(), Unlikelihood()], ids=lambda term: term.name)
def test_new_losses_use_weights_as_their_mask_without_a_warning(term: ReadyMadeTerm) -> None:
    values = {"logprobs": [[-1.0, -2.0, -1.5]], "advantages": [[1.0, 1.0, 1.0]], "weights": [[0.0, 1.0, 1.0]]}
    _, gradient, _ = evaluated(term, batch([[-1.1, -2.1, -1.6]], **values))
    assert gradient[0] == 0
    assert gradient.any()


# At the limits


@each_policy
@pytest.mark.parametrize("difference", [-200.0, -1.0, 0.0, 19.0, 21.0, 200.0])
@pytest.mark.parametrize("advantage", [-10.0, 0.0, 1.0])
def test_nothing_overflows(term: ReadyMadeTerm, difference: float, advantage: float) -> None:
    value, gradient, metrics = evaluated(term, one(-250.0, -250.0 - difference, advantage))
    assert math.isfinite(value.item())
    assert torch.isfinite(gradient).all()
    assert all(math.isfinite(float(number)) for number in metrics.values())
    if not isinstance(term, DRO | KLCov):  # they also pull to the sampler
        assert gradient.item() * advantage <= 0  # it never pushes against the advantage


@each_policy
@pytest.mark.parametrize("field", ["model", "logprobs", "advantages"])
def test_a_number_that_is_not_finite_is_named(term: ReadyMadeTerm, field: str) -> None:
    lp = [[-1.0], [-1.0, -math.inf if field == "model" else -1.0]]
    given = batch(
        lp,
        logprobs=[[-1.0], [-1.0, -math.inf if field == "logprobs" else -1.0]],
        advantages=[[1.0], [1.0, math.nan if field == "advantages" else 1.0]],
    )
    if field == "logprobs" and isinstance(term, Reinforce):
        assert math.isfinite(evaluated(term, given)[0].item())  # it reads none
        return
    with pytest.raises(InvalidData, match=r"has (-inf|nan) at position 1 of datum 1: leave the position out"):
        evaluated(term, given)


@each_policy
def test_candidates_are_refused(term: ReadyMadeTerm) -> None:
    given = batch([[[-1.0, -2.0]]], logprobs=[[[-1.0, -2.0]]], advantages=[[[1.0, 1.0]]])
    with pytest.raises(InvalidData, match=r"needs sampled tokens, .*: pass \[T\] targets"):
        evaluated(term, given)


def test_certain_tokens_do_not_count_for_eaft() -> None:
    """By hand: no entropy, no gradient; evenly spread, that of NLL. Excluded candidates have no part in either."""
    rows = [[0.0, -torch.inf, -torch.inf], [math.log(0.25)] * 3, [math.log(0.3), math.log(0.3), -torch.inf]]
    given = batch([rows], weights=[[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    _, gradient, metrics = evaluated(EAFT(), given)
    share = math.log(2) / math.log(3)
    expected = [0, 0, 0, 0, -1, 0, 0, -share, 0]
    assert gradient.reshape(-1).tolist() == pytest.approx(expected, abs=1e-12)
    assert metrics["entropy"].item() == pytest.approx((math.log(3) + math.log(2)) / 3)
    alpha = evaluated(EAFT(alpha=0.0), batch([rows[1:]], weights=[[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))[1]
    assert alpha.reshape(-1).tolist() == [-1, 0, 0, 0, -1, 0]


@pytest.mark.parametrize(
    ("term", "given", "message"),
    [
        (EAFT(), batch([[-1.0]]), r"the entropy of at least 2 candidates, but the logprobs have shape \(1,\)"),
        (EAFT(), batch([[[-1.0]]], weights=[[[1.0]]]), "at least 2 candidates"),
        (EAFT(entropy_field="h"), batch([[[-1.0, -2.0]]], h=[[[1.0, 1.0]]]), "EAFT needs sampled tokens"),
        (EAFT(entropy_field="h"), batch([[-1.0]], h=[[-0.5]]), "'h' has -0.5, but entropies are at least 0"),
        (EAFT(entropy_field="h"), batch([[-torch.inf]], h=[[0.5]]), "the model's output has -inf"),
    ],
)
def test_data_that_have_no_entropy_are_refused(term: EAFT, given: Batch, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        evaluated(term, given)


@pytest.mark.parametrize("term", [Focal(), DFT(), Unlikelihood()], ids=repr)
def test_token_weighting_refuses_candidates(term: ReadyMadeTerm) -> None:
    with pytest.raises(InvalidData, match="needs sampled tokens"):
        evaluated(term, batch([[[-1.0, -2.0]]]))


@pytest.mark.parametrize(
    ("term", "expected"),
    [(Focal(), 0.0), (Focal(gamma=1.0), 0.0), (Focal(gamma=0.0), -1.0), (DFT(), -1.0), (Unlikelihood(), 1e5)],
    ids=repr,
)
def test_a_certain_token(term: ReadyMadeTerm, expected: float) -> None:
    """At p = 1, and a little above, as engines round."""
    for lp in (0.0, 1e-7):
        value, gradient, _ = evaluated(term, batch([[lp]]))
        assert math.isfinite(value.item())
        assert gradient.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_an_impossible_token() -> None:
    given = batch([[-1.0], [-1.0, -math.inf]])
    value, gradient, _ = evaluated(Unlikelihood(), given)
    assert math.isfinite(value.item())
    assert gradient[2] == 0  # it is as unlikely as can be
    for term in (Focal(), DFT()):
        with pytest.raises(InvalidData, match="the model's output has -inf at position 1 of datum 1"):
            evaluated(term, given)


def test_unlikelihood_keeps_its_slope_at_the_floor() -> None:
    for p in (1 - 0.99e-5, 1 - 1.01e-5):  # just below and above the floor of 1 - p
        value, gradient, _ = evaluated(Unlikelihood(), batch([[math.log(p)]]))
        assert value.item() == pytest.approx(-math.log(max(1 - p, 1e-5)), rel=1e-6)
        assert gradient.item() == pytest.approx(p / max(1 - p, 1e-5), rel=1e-6)


def test_the_dual_clip_is_the_cap_of_trl() -> None:
    """A cap on the ratio before the minimum, for ratios on both sides and both signs of the advantage."""
    for difference in (-3.0, -0.1, 0.1, 0.5, 1.0, 1.2, 3.0):
        for advantage in (-2.0, 2.0):
            value, _, _ = evaluated(PPO(dual_clip=3.0), one(-4.0 + difference, -4.0, advantage))
            ratio = math.exp(difference)
            capped, clipped = min(ratio, 3.0), min(max(ratio, 0.8), 1.2)
            assert value.item() == pytest.approx(-min(capped * advantage, clipped * advantage))


def test_gspo_takes_the_ratio_from_its_mask() -> None:
    given = batch(
        [[-1.0, -1.0 + math.log(1.5), -1.0]],
        logprobs=[[-1.0, -1.0, -1.0]],
        advantages=[[1.0, 1.0, 1.0]],
        answer=[[0.0, 1.0, 0.0]],
    )
    wide = {"clip_low_threshold": 0.1, "clip_high_threshold": 10.0}
    assert evaluated(GSPO(**wide), given)[0].item() == pytest.approx(-3 * 1.5 ** (1 / 3))
    assert evaluated(GSPO(**wide, ratio_mask="answer"), given)[0].item() == pytest.approx(-3 * 1.5)


def test_gspo_without_a_ratio_is_refused() -> None:
    given = batch([[-1.0], [-1.0]], logprobs=[[-1.0], [-1.0]], advantages=[[1.0], [1.0]], own=[[1.0], [0.0]])
    with pytest.raises(InvalidData, match="'own' of datum 1 has only zeros"):
        evaluated(GSPO(**NARROW, ratio_mask="own"), given)
    value, gradient, _ = evaluated(GSPO(**NARROW, ratio_mask="own", mask="own"), given)  # nothing of it is selected
    assert value.item() == -1.0
    assert gradient.tolist() == [-1.0, 0.0]


def test_one_advantage_per_datum_where_the_formula_needs_it() -> None:
    given = batch([[-1.0, -1.0]], logprobs=[[-1.0, -1.0]], advantages=[[1.0, -1.0]])
    with pytest.raises(InvalidData, match="GMPO needs one advantage per datum"):
        evaluated(GMPO(), given)
    with pytest.raises(InvalidData, match="one sign per datum, but those of datum 0"):
        evaluated(Corrected(policy=Reinforce(), corrections=[OffPolicyMask(limit=0.1)]), given)


# Corrections


@pytest.mark.parametrize(
    "policy", [ImportanceSampling(), PPO(), CISPO(), SAPO(), GSPO(**NARROW), GMPO(), VESPO()], ids=repr
)
def test_the_ratio_to_the_sampler_is_not_counted_twice(policy: Any) -> None:
    for correction in (TruncatedIS(), MaskedIS()):
        with pytest.raises(
            InvalidSpec, match=r"has the ratio to the sampler already, .*count it twice: pass old_field="
        ):
            Corrected(policy=policy, corrections=[correction])
        Corrected(policy=policy, corrections=[correction], old_field="old")
    for correction in (Rejection(statistic="product", high=3.0), OffPolicyMask(limit=1e-4), ProbabilityMask()):
        Corrected(policy=policy, corrections=[correction])


def test_old_logprobs_split_the_ratio_in_two() -> None:
    """The trainer had 1.5 times the sampler's probability, and the model has 1.1 times the trainer's."""
    given = one(-2.0 + math.log(1.5 * 1.1), -2.0, 1.0, old=-2.0 + math.log(1.5))
    term = Corrected(policy=PPO(), corrections=[TruncatedIS(cap=1.2)], old_field="old")
    value, gradient, metrics = evaluated(term, given)
    assert value.item() == pytest.approx(-1.1 * 1.2)
    assert gradient.item() == pytest.approx(-1.1 * 1.2)
    assert metrics["mean_ratio"].item() == pytest.approx(1.1)
    assert metrics["correction_mean"].item() == pytest.approx(1.2)
    assert metrics["sampler_kl_k1"].item() == pytest.approx(-math.log(1.5), rel=1e-6)
    assert evaluated(PPO(), given)[0].item() == pytest.approx(-1.2)  # clipped: the whole ratio is 1.65


def test_what_is_rejected_raises_nothing_else() -> None:
    """The mean over two datums stays one over two."""
    policy = Reinforce(reduction="seq-mean-token-mean")
    term = Corrected(policy=policy, corrections=[Rejection(statistic="product", high=1.5)])  # of P, the second is 2
    value, gradient, metrics = evaluated(term, P)
    _, whole, _ = evaluated(policy, P)
    assert gradient.tolist() == [*whole[:2].tolist(), 0.0, 0.0]
    assert metrics["correction_kept"].item() == 0.5
    assert (metrics["tokens"], metrics["sequences"]) == (4.0, 2.0)
    assert value.item() == pytest.approx(0.5 * (0.594535 + 1.105361) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("statistic", "bounds", "kept"),
    [
        ("any-token", {"low": 0.6}, [True, False]),  # a veto: one token has 0.5
        ("any-token", {"high": 2.0}, [True, False]),  # one has 4
        ("any-token", {"low": 0.4, "high": 5.0}, [True, True]),
        ("k3-max", {"high": 0.1}, [True, False]),  # 1.5 - 1 - log 1.5 = 0.094535; 4 - 1 - log 4 = 1.613706
        ("k3-max", {"high": 0.09}, [False, False]),
        ("k3-max", {"high": 1.62}, [True, True]),
        ("geometric", {"low": 1.2}, [False, True]),
        ("product", {"low": 1.4}, [False, True]),
    ],
)
def test_rejections_of_whole_datums(statistic: Any, bounds: dict[str, float], kept: list[bool]) -> None:
    term = Corrected(policy=Reinforce(), corrections=[Rejection(statistic=statistic, **bounds)])
    _, gradient, _ = evaluated(term, P)
    assert [bool(part.all()) for part in gradient.split(2)] == kept
    assert [bool(part.any()) for part in gradient.split(2)] == kept


def test_corrections_multiply() -> None:
    corrections = [TruncatedIS(cap=2.0), Rejection(statistic="token", low=0.6)]
    _, gradient, metrics = evaluated(Corrected(policy=Reinforce(), corrections=corrections), P)
    assert gradient.tolist() == pytest.approx([-1.5, -0.9, 0.0, 2.0])
    assert metrics["correction_mean"].item() == pytest.approx((1.5 + 0.9 + 2.0) / 4)


def test_probability_masks_by_divergence_and_either_way() -> None:
    """The binary divergences on P are 0.068, 0.003, 0.094, 0.361; the differences 0.184, -0.037, -0.184, 0.406."""
    for mask, kept in (
        (ProbabilityMask(measure="kl", low=0.09, high=0.06), [False, True, False, True]),
        (ProbabilityMask(measure="kl", low=0.1, high=0.07), [True, True, True, True]),
        (ProbabilityMask(low=0.2, high=0.18), [False, True, True, True]),
        (ProbabilityMask(low=0.15, high=0.15, either_way=True), [False, True, False, False]),
    ):
        _, gradient, _ = evaluated(Corrected(policy=Reinforce(), corrections=[mask]), P)
        assert gradient.bool().tolist() == kept, mask


def test_options_of_a_corrected_loss_reach_the_policy() -> None:
    term = Corrected(policy=PPO(), corrections=[])
    assert term.with_options({"reduction": "token-mean", "total": 3}).policy == PPO(reduction="token-mean", total=3)
    assert term.with_options({"old_field": "old"}).old_field == "old"
    assert term.with_options({"policy": CISPO(), "mask": None}).policy == CISPO(mask=None)
    assert term.reduction == "sum"
    with pytest.raises(TypeError, match="unknown"):
        term.with_options({"unknown": 1})


def test_a_corrected_loss_is_plain_data() -> None:
    term = Corrected(
        policy=PPO(reduction="token-mean", mask="weights"),
        corrections=[MaskedIS(high=3.0), Rejection(statistic="token", low=0.1)],
        old_field="old",
    )
    settings = json.loads(json.dumps(term.settings()))
    assert Corrected(**settings) == term
    section = LossSection.model_validate({"base": {"term": "Corrected", "options": settings}})
    assert pipeline_of(section).base_loss == term
    by_name = Corrected(policy={"term": "dapo", "options": {"mask": None}})  # type: ignore[arg-type]
    assert by_name.policy == PPO(clip_high_threshold=1.28, reduction="token-mean", mask=None)


@pytest.mark.asyncio
async def test_a_recorded_step_with_a_correction_replays(tmp_path: Path) -> None:
    pipeline = Pipeline(Corrected(policy=Reinforce(reduction="token-mean"), corrections=[TruncatedIS()]))
    output = await pipeline.compute(P.data, P.packed, record=tmp_path / "record")
    assert await replay(tmp_path / "record") == output


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Corrected(policy={"term": "NLL"}), "policy must be a policy loss, .*, got {'term': 'NLL'}"),
        (lambda: TruncatedIS(cap=0.5, floor=1.0), "floor must not be above cap, got 1.0 and 0.5"),
        (lambda: TruncatedIS(cap=0), "cap must be greater than 0"),
        (lambda: MaskedIS(low=6.0), "low must not be above high, got 6.0 and 5.0"),
        (lambda: Rejection(statistic="product"), "pass low=, high= or both"),
        (lambda: Rejection(statistic="k1"), "statistic must be 'token', .*, got 'k1'"),
        (lambda: OffPolicyMask(limit=-1), "limit must be greater than or equal to 0, got -1"),
        (lambda: ProbabilityMask(measure="js"), "measure must be 'tv' or 'kl', got 'js'"),
        (lambda: Corrected(policy=NLL()), "policy must be .*, got NLL"),
        (lambda: Corrected(policy=PPO(), corrections=[3]), r"corrections must be a list of them, .*, got \[3\]"),
        (
            lambda: Corrected(policy=PPO(), corrections=TruncatedIS()),
            "corrections must be a list of them, .*, got TruncatedIS",
        ),
        (lambda: PPO(dual_clip=1.1), "dual_clip must be above 1 and above clip_high_threshold, got 1.1"),
        (lambda: GMPO(clip_low_threshold=0.0), "clip_low_threshold must be above 0"),
        (lambda: Focal(gamma=0.5), "gamma must be 0 or at least 1, got 0.5"),
        (
            lambda: SampledKL(reference_field="r", sampler_field="q", estimator="k2"),
            "has the gradient of no divergence",
        ),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        make()


def test_clip_cov_draws_from_its_seed() -> None:
    """A tenth of 200 tokens, none of which PPO clips: two seeds draw differently, one seed twice the same."""
    generator = torch.Generator().manual_seed(5)
    lp = -torch.rand(200, generator=generator, dtype=torch.float64) - 1.0
    advantages = torch.randn(200, generator=generator).tolist()
    given = batch([lp], logprobs=[lp.tolist()], advantages=[advantages])
    drawn = []
    for seed in (0, 0, 1):
        term = ClipCov(clip_share=0.1, cov_low=-10.0, cov_high=10.0, seed=seed)
        _, gradient, metrics = evaluated(term, given)
        assert metrics["cov_clip_fraction"].item() == pytest.approx(0.1)
        drawn.append((gradient == 0).nonzero().reshape(-1).tolist())
    assert len(drawn[0]) == 20
    assert drawn[0] == drawn[1] != drawn[2]


# Sampled KL and entropy of another policy's tokens


def test_the_gradients_of_another_policys_tokens_are_unbiased() -> None:
    """The exact mean over the tokens of q, against the derivatives of the divergence and the entropy in the logits."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    p = logits.log_softmax(0)
    (kl,) = torch.autograd.grad((p.exp() * (p - reference)).sum(), logits, retain_graph=True)
    (entropy,) = torch.autograd.grad((p.exp() * p).sum(), logits, retain_graph=True)
    given = batch([p.detach()], logprobs=[q.log().tolist()], reference_logprobs=[reference.tolist()])
    terms = [SampledKL(reference_field="reference_logprobs", sampler_field="logprobs", estimator=kind, mask=None)
             for kind in ("k1", "k3", "k1+", "k2+", "k3+")]  # fmt: skip
    for term, expected in [(term, kl) for term in terms] + [(SampledEntropy(sampler_field="logprobs"), entropy)]:
        _, slopes, _ = evaluated(term, given)
        (mean,) = torch.autograd.grad(p, logits, grad_outputs=q * slopes, retain_graph=True)
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-7)


# Advantages


def test_groups_by_name_and_by_size() -> None:
    rewards = [1.0, 5.0, 0.0, 5.0, 0.0, 5.0]
    by_name = group_advantages(rewards, ["a", "b", "a", "b", "a", "b"], normalize="none")
    assert by_name == pytest.approx([2 / 3, 0, -1 / 3, 0, -1 / 3, 0])
    by_size = group_advantages([1.0, 0.0, 0.0, 5.0, 5.0, 5.0], 3, normalize="none")
    assert by_size == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
    assert in_varied_groups(rewards, ["a", "b", "a", "b", "a", "b"]) == [True, False] * 3


@pytest.mark.parametrize("normalize", ["std", "none", "leave-one-out"])
def test_groups_that_teach_nothing(normalize: Any) -> None:
    assert group_advantages([3.0, 0.1, 0.1, 0.1], ["alone", "same", "same", "same"], normalize=normalize) == [0.0] * 4
    assert group_advantages([], [], normalize=normalize) == []


def test_eps_is_added_to_the_deviation() -> None:
    advantage = 0.5 / (math.sqrt(0.5) + 0.5)
    assert group_advantages([1.0, 0.0], 2, eps=0.5) == pytest.approx([advantage, -advantage])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (([1.0, math.nan], 2), {}, r"rewards\[1\] must be a finite number, got nan"),
        (([1.0, "a"], 2), {}, r"rewards\[1\] must be a finite number, got 'a'"),
        ((3.0, 1), {}, "rewards must be a sequence of numbers, got 3.0"),
        (([1.0, 2.0, 3.0], 2), {}, "groups=2 must divide the number of rewards, which is 3"),
        (([1.0], 0), {}, "groups must be an int >= 1, got 0"),
        (([1.0, 2.0], ["a"]), {}, "groups has 1 entries for 2 rewards"),
        (([1.0, 2.0], None), {}, "groups must be the size of all groups or a group per reward, got None"),
        (([1.0], 1), {"normalize": "rloo"}, "normalize must be one of 'std', 'none', 'leave-one-out', got 'rloo'"),
        (([1.0], 1), {"eps": -1}, "eps must be a finite number >= 0, got -1"),
        (([1.0], 1), {"ddof": 2}, "ddof must be 0 or 1, got 2"),
    ],
)
def test_wrong_rewards_and_groups(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        group_advantages(*arguments, **settings)


def test_the_overlong_penalty() -> None:
    assert [overlong_penalty(n, limit=10, cache=4) for n in (0, 6, 7, 10, 11)] == [0.0, 0.0, -0.25, -1.0, -1.0]
    with pytest.raises(InvalidData, match="cache must be at most limit, got 5 and 4"):
        overlong_penalty(1, limit=4, cache=5)
    with pytest.raises(InvalidData, match="tokens must be an int >= 0"):
        overlong_penalty(-1)
