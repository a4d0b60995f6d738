"""The loss linter: every planted mistake is found by its rule, and correct terms have no findings."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.lint import mistakes
from tests.lint.support import answers, fields_of, pairs, texts, without
from tests.losses.support import recorded
from tests.objectives.entries import Batch, batch
from tests.objectives.test_total import CASES, COUPLED, NEEDED, ON_CANDIDATES, made, sixteen, terms
from tinkex_py import InvalidData, InvalidSpec, Pipeline, RegularizerError, RegularizerSpec, per_datum
from tinkex_py.base_losses import KTO, NLL, PPO, Reinforce
from tinkex_py.lint import LossFinding, assert_no_findings, lint
from tinkex_py.regularizers import L2, SampledKL
from tinkex_py.terms.pairs import PairTerm
from tinkex_py.terms.ready_made import ReadyMadeTerm

REFERENCE = {"reference_field": "reference_logprobs", "mask": "weights"}


@dataclass(frozen=True)
class Planted:
    """A mistake: the term, the rule that is meant for it, and words that its finding must have."""

    term: Any
    rule: str
    words: str
    batch: Batch
    is_base: bool = True
    severity: str = "error"
    base: Any = field(default_factory=lambda: NLL(mask="weights"))
    accumulate: int | None = 1
    given: bool = False

    @property
    def pipeline(self) -> Pipeline:
        if self.is_base:
            return Pipeline(self.term)
        return Pipeline(self.base, [RegularizerSpec(fn=self.term, weight=0.1, name="planted")])

    def __str__(self) -> str:
        return f"{self.rule}-{getattr(self.term, '__name__', type(self.term).__name__)}"


def with_mismatched(given: Batch) -> Batch:
    """The last datums are those of the reference point."""
    fields = fields_of(given)
    return batch(given.logprobs, **{**fields, "label": [*fields["label"][:12], *[[0.0]] * 4]})


def renamed(given: Batch) -> Batch:
    """The reference is a field without "logprob" in its name."""
    fields = fields_of(given)
    return batch(given.logprobs, weights=fields["weights"], base=fields["reference_logprobs"])


PLANTED = [
    Planted(mistakes.likelihood, "sign", "makes the target tokens less likely", texts()),
    Planted(mistakes.policy_with_plus, "sign", "a higher value in 'advantages'", answers()),
    Planted(mistakes.away_from_reference, "sign", "away from the reference", texts(), is_base=False),
    Planted(mistakes.entropy_of_samples, "sign", "falls without bound", texts(), is_base=False),
    Planted(mistakes.own_backward, "sign", "raises this loss", texts()),
    Planted(mistakes.ratio_detached, "gradient", "not the derivative", answers(), is_base=False, severity="warning"),
    Planted(mistakes.detached, "detached", "although other logprobs change it", texts()),
    Planted(mistakes.kept_as_number, "detached", "although other logprobs change it", texts(), is_base=False),
    Planted(mistakes.k1, "estimator", "reads 'reference_logprobs'", texts(), is_base=False),
    Planted(mistakes.k1_to_base, "estimator", "reads 'base'", renamed(texts()), is_base=False),
    Planted(SampledKL(estimator="k1", **REFERENCE), "estimator", "no pull", texts(), is_base=False),
    Planted(mistakes.nll_of_prompts, "mask", "the 6 positions where 'weights' is 0", texts()),
    Planted(mistakes.policy_with_all_positions, "mask", "have a gradient", answers()),
    Planted(mistakes.nll_of_prompts, "mask", "prompts", texts(), is_base=False, severity="warning"),
    Planted(mistakes.mask_by_multiplying, "finite", "-inf where the mask is 0", texts()),
    Planted(mistakes.mean_of_mask, "finite", "leaves no position", texts()),
    Planted(mistakes.log_of_rest, "finite", "logprobs are 0", texts(), is_base=False),
    Planted(mistakes.ratio_without_clamp, "overflow", "'logprobs' is far below", answers()),
    Planted(mistakes.ratio_clamped_too_late, "overflow", "a ratio has no limit", answers()),
    Planted(mistakes.k3_without_clamp, "overflow", "far below 'reference_logprobs'", texts(), is_base=False),
    Planted(mistakes.reinforce, "off-policy", "ignores the sampler's", answers(), severity="warning"),
    Planted(Reinforce(), "off-policy", "nats per token away", answers(sampler_gap=0.5), severity="warning", given=True),
    Planted(mistakes.dpo_swapped, "pairs", "rejected answers likelier", pairs()),
    Planted(mistakes.unpaired_swapped, "pairs", "rejected answers likelier", pairs(labels=True)),
    Planted(mistakes.mean_over_call, "accumulation", "a mean over its call", texts(), accumulate=3),
    Planted(mistakes.mean_over_call, "accumulation", "a mean", texts(), accumulate=None, severity="warning"),
    Planted(mistakes.advantages_scaled_in_the_call, "accumulation", "on the other datums", answers(), accumulate=2),
    Planted(mistakes.Sharded(mistakes.mean_over_call), "accumulation", "sharded over 4 replicas", texts()),
    Planted(KTO(**NEEDED["DPO"]), "accumulation", "the reference point", with_mismatched(sixteen()), accumulate=4),
    Planted(
        L2(mask="weights"),
        "scale",
        "weighs twice as much",
        texts(),
        is_base=False,
        severity="warning",
        base=NLL(mask="weights", reduction="token-mean"),
        accumulate=4,
    ),
    Planted(mistakes.MEAN_OF_MEANS, "length", "favors short good answers", texts(), severity="warning"),
    Planted(mistakes.with_dropout, "random", "two calls", texts(), severity="warning"),
]


async def findings_of(planted: Planted) -> list[LossFinding]:
    logprobs = planted.batch.logprobs if planted.given else None
    return await lint(planted.pipeline, planted.batch.data, logprobs, accumulate=planted.accumulate)


@pytest.mark.asyncio
@pytest.mark.parametrize("planted", PLANTED, ids=str)
async def test_planted_mistakes_are_found_by_the_rule_meant_for_them(planted: Planted) -> None:
    findings = await findings_of(planted)
    (found,) = [one for one in findings if one.rule == planted.rule]
    assert found.term == ("base_loss" if planted.is_base else "planted")
    assert found.severity == planted.severity
    assert planted.words in found.problem
    assert found.way_out


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("term", "given"),
    [
        (mistakes.nll, texts()),
        (mistakes.Sharded(mistakes.nll), texts()),
        (mistakes.policy, answers()),
        (mistakes.k2, texts()),
        (mistakes.dpo, pairs()),
        (mistakes.dpo, pairs(labels=True)),
        (mistakes.PER_ANSWER, texts()),
    ],
)
async def test_correct_custom_terms_have_no_findings(term: Any, given: Batch) -> None:
    await assert_no_findings(Pipeline(term), given.data)
    await assert_no_findings(Pipeline(term), given.data, given.logprobs, accumulate=3)
    spec = RegularizerSpec(fn=term, weight=0.1, name="own")
    await assert_no_findings(Pipeline(NLL(mask="weights"), [spec]), given.data)


def usual_data(cls: type[ReadyMadeTerm]) -> Batch:
    candidates = 3 if cls.__name__ in ON_CANDIDATES else None
    given = sixteen(candidates=candidates, with_empty=not issubclass(cls, PairTerm))
    return with_mismatched(given) if cls is KTO else given


def with_defaults(cls: type[ReadyMadeTerm]) -> ReadyMadeTerm:
    mask = {} if cls.__name__ in ("Corrected", "GradientPenalty") else {"mask": "own"}
    return cls(**{**NEEDED.get(cls.__name__, {}), **mask})


def named(term: ReadyMadeTerm) -> str:
    return f"{type(term).__name__}-{getattr(term, 'reduction', '')}"


@pytest.mark.asyncio
@pytest.mark.parametrize("term", [*map(with_defaults, terms()), *COUPLED], ids=named)
async def test_ready_made_terms_have_no_findings(term: ReadyMadeTerm) -> None:
    given = usual_data(type(term))
    await assert_no_findings(Pipeline(term), given.data)
    spec = RegularizerSpec(fn=term, weight=0.1, name="own")
    await assert_no_findings(Pipeline(NLL(mask="own"), [spec]), given.data, accumulate=1)


MEANS = [term for cls, reduction in CASES if reduction != "constant" and (term := made(cls, reduction)) is not None]


@pytest.mark.asyncio
@pytest.mark.parametrize("term", MEANS, ids=named)
async def test_ready_made_means_can_be_accumulated(term: ReadyMadeTerm) -> None:
    """With the logprobs of a model; those of the policy losses are far from the sampler's."""
    given = usual_data(type(term))
    logprobs = None if isinstance(term, Reinforce) else given.logprobs  # it is for the sampler itself
    await assert_no_findings(Pipeline(term), given.data, logprobs, accumulate=4)


@pytest.mark.asyncio
async def test_findings_say_term_rule_and_way_out_in_the_failure_of_a_test() -> None:
    pipeline = Pipeline(NLL(mask="weights"), [RegularizerSpec(fn=mistakes.k1, weight=0.1)])
    with pytest.raises(AssertionError, match=r"(?s)findings:\nerror: k1: estimator: .*Use SampledKL"):
        await assert_no_findings(pipeline, texts().data)
    await assert_no_findings(pipeline, texts().data, ignore=["estimator", "sign"])


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_few_datums_are_enough(count: int) -> None:
    given = pairs().part(*range(count))
    await assert_no_findings(Pipeline(mistakes.nll), given.data)
    assert "sign" in [found.rule for found in await lint(Pipeline(mistakes.likelihood), given.data)]
    if count == 2:  # one pair, which cannot be cut
        await assert_no_findings(Pipeline(mistakes.dpo), given.data)
        assert "pairs" in [found.rule for found in await lint(Pipeline(mistakes.dpo_swapped), given.data)]


@pytest.mark.asyncio
async def test_a_loss_that_depends_on_places_is_no_loss_on_pairs() -> None:
    await assert_no_findings(Pipeline(per_datum(mistakes.rewards_by_place)), texts().data)


@pytest.mark.asyncio
async def test_terms_without_weight_and_disabled_terms_are_not_checked() -> None:
    off = [
        RegularizerSpec(fn=mistakes.k1, weight=0.0, name="metric"),
        RegularizerSpec(fn=mistakes.k1, weight=1.0, name="off", enabled=False),
    ]
    assert await lint(Pipeline(NLL(mask="weights"), off), texts().data) == []


@pytest.mark.asyncio
async def test_a_term_says_what_is_intended() -> None:
    def cispo(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        own, sampler, advantages = mistakes.selected(data, logprobs, "logprobs", "advantages")
        return -((own - sampler).clamp(-20, 2).exp().detach() * advantages * own).sum()

    (found,) = await lint(Pipeline(cispo), answers().data)
    assert (found.rule, found.severity) == ("gradient", "warning")
    cispo.surrogate = "the ratio is a constant"  # type: ignore[attr-defined]
    await assert_no_findings(Pipeline(cispo), answers().data)


@pytest.mark.asyncio
async def test_async_terms_and_terms_in_float32_are_checked_too() -> None:
    async def slow(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return mistakes.likelihood(data, logprobs)

    def single(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        weights = torch.cat([datum.loss_fn_inputs["weights"].to_torch() for datum in data])
        return torch.dot(torch.where(weights != 0, logprobs, 0.0), weights.float())

    for term in (slow, single):
        assert "sign" in [found.rule for found in await lint(Pipeline(term), texts().data)]


@pytest.mark.asyncio
async def test_no_events_and_no_changed_data() -> None:
    given = texts()
    before = fields_of(given)
    with recorded() as events:
        await lint(Pipeline(mistakes.mean_of_mask), given.data)
    assert events == []
    for name, values in fields_of(given).items():
        assert all(map(np.array_equal, values, before[name]))


@pytest.mark.asyncio
async def test_unusable_input_is_refused() -> None:
    with pytest.raises(InvalidData, match="data is empty"):
        await lint(Pipeline(NLL()), [])
    with pytest.raises(InvalidData, match="accumulate"):
        await lint(Pipeline(NLL()), texts().data, accumulate=0)
    with pytest.raises(InvalidSpec, match="no rule is named 'masks'"):
        await lint(Pipeline(NLL()), texts().data, ignore=["masks"])
    with pytest.raises(RegularizerError, match="advantages"):
        await lint(Pipeline(PPO(mask=None)), texts().data)
    nothing = without(texts(), "weights")
    with_infinity = [part.clone() for part in nothing.logprobs]
    with_infinity[0][0] = -torch.inf
    (found,) = await lint(Pipeline(NLL()), nothing.data, with_infinity)
    assert (found.rule, found.severity) == ("finite", "error")
