"""Means over a whole accumulation: 4 + 12 datums give the gradient of 16, for every ready-made term."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from tests.objectives.entries import Batch, batch, evaluated
from tinkex_py import ConfigError, InvalidSpec, Pipeline, RegularizerSpec, base_losses, regularizers
from tinkex_py.base_losses import Corrected, ImportanceSampling, Reinforce, Rejection, TruncatedIS
from tinkex_py.runs.accumulation import check_can_accumulate, over_step
from tinkex_py.terms.pairs import PairTerm
from tinkex_py.terms.ready_made import ReadyMadeTerm

MEANS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant")
REFERENCE = {"reference_field": "reference_logprobs"}
NEEDED: dict[str, dict[str, Any]] = {
    "Corrected": {"policy": Reinforce(), "corrections": [TruncatedIS(), Rejection(statistic="geometric", low=0.5)]},
    "DRO": {"beta": 0.05},
    "GSPO": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "Consistency": {"pair_field": "reference_logprobs"},
    "GradientPenalty": {"fn": regularizers.L2(mask=None), "target_norm": 0.3},
    "KTO": {**REFERENCE, "reference_point": 0.1},
    "Choice": {"targets_field": "targets"},
    "EAFT": {"targets_field": "targets"},
    **dict.fromkeys(("DPO", "DPOP", "Hinge", "IPO", "Distillation"), REFERENCE),
    **dict.fromkeys(("KLDivergence", "JensenShannon", "SampledKL"), REFERENCE),
}
ON_CANDIDATES = ("Choice", "Distillation", "EAFT", "Entropy", "KLDivergence", "JensenShannon", "Orthogonality")
COUPLED: list[ReadyMadeTerm] = [
    regularizers.Orthogonality(),
    regularizers.L2(center="mean", reduction="mean"),
    regularizers.GradientPenalty(fn=regularizers.L2(reduction="mean")),
    Corrected(policy=Reinforce(reduction="mean"), corrections=[TruncatedIS(normalize=True)]),
    base_losses.KTO(**REFERENCE),
    base_losses.ClipCov(reduction="mean"),
    base_losses.KLCov(reduction="mean"),
]


def terms() -> list[type[ReadyMadeTerm]]:
    found = [getattr(package, name) for package in (base_losses, regularizers) for name in package.__all__]
    return [cls for cls in found if inspect.isclass(cls) and issubclass(cls, ReadyMadeTerm)]


def sixteen(*, candidates: int | None = None, with_empty: bool = True) -> Batch:
    """16 datums of 1 to 6 positions; the mask leaves some out, one datum entirely, and weighs others."""
    random = np.random.default_rng(7)
    lengths = random.integers(1, 7, 16)

    def numbers(length: int) -> Any:
        shape = (length,) if candidates is None else (length, candidates)
        values = random.normal(size=shape) - 1.0
        return -np.abs(values) if candidates is None else values - np.log(np.exp(values).sum(-1, keepdims=True))

    masks = [random.choice([0.0, 0.5, 1.0, 1.0], length) for length in lengths]
    masks[5] = np.zeros(lengths[5])
    if not with_empty:
        masks = [np.maximum(mask, 0.5) for mask in masks]
    return batch(
        [numbers(length) for length in lengths],
        logprobs=[numbers(length) for length in lengths],
        reference_logprobs=[numbers(length) for length in lengths],
        advantages=[np.full(length, random.normal()) for length in lengths],
        targets=[np.exp(numbers(length)) for length in lengths],
        label=[[label] for label in (1.0, -1.0, 1.0, 1.0) * 4],
        own=masks,
    )


def made(cls: type[ReadyMadeTerm], reduction: str) -> ReadyMadeTerm | None:
    """The term with this mean, or its own mean if it has no such; None if it only sums."""
    settings = {**NEEDED.get(cls.__name__, {}), "reduction": reduction, "mask": "own"}
    if reduction == "constant":
        settings["length"] = 5.0
    if cls is Corrected:
        inner = {name: value for name, value in settings.items() if name not in NEEDED["Corrected"]}
        return cls(**NEEDED["Corrected"]).with_options(inner)
    if cls.__name__ == "GradientPenalty":
        del settings["mask"]
    try:
        return cls(**settings)
    except (InvalidSpec, TypeError):
        return cls(**{**settings, "reduction": "mean"}) if reduction == "token-mean" else None


CASES = [
    (cls, reduction)
    for cls in terms()
    for reduction in MEANS
    if cls not in map(type, COUPLED[:1] + COUPLED[4:]) and made(cls, reduction) is not None
]


@pytest.mark.parametrize(("cls", "reduction"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_four_and_twelve_datums_give_the_gradient_of_sixteen(cls: type[ReadyMadeTerm], reduction: str) -> None:
    term = made(cls, reduction)
    assert term is not None
    candidates = 3 if cls.__name__ in ON_CANDIDATES else None
    check_parts(term, sixteen(candidates=candidates, with_empty=not issubclass(cls, PairTerm)))


OWN = {"mask": "own"}
PAIR = {**OWN, "pair_field": "reference_logprobs"}
OTHER_SETTINGS: list[tuple[ReadyMadeTerm, int | None]] = [
    *((regularizers.L2(**OWN, reduction=reduction), 3) for reduction in MEANS[:3]),
    (regularizers.L1(**OWN, target="probs", reduction="mean"), 3),
    *((regularizers.Entropy(**OWN, over="tokens", reduction=reduction), None) for reduction in MEANS[:3]),
    *((regularizers.Consistency(**PAIR, metric="cosine", reduction=reduction), 3) for reduction in MEANS[:3]),
    *((regularizers.Consistency(**PAIR, metric="cosine", reduction=reduction), None) for reduction in MEANS[:3]),
    (regularizers.Consistency(**PAIR, metric="kl"), 3),
    (regularizers.Consistency(**PAIR, metric="kl", over="tokens"), None),
    (regularizers.SampledKL(**OWN, **REFERENCE, sampler_field="logprobs", reduction="mean"), None),
    (base_losses.NLL(**OWN, reduction="mean"), 3),
]


@pytest.mark.parametrize(("term", "candidates"), OTHER_SETTINGS, ids=lambda value: getattr(value, "name", None))
def test_so_do_other_settings(term: ReadyMadeTerm, candidates: int | None) -> None:
    check_parts(term, sixteen(candidates=candidates))


def check_parts(term: ReadyMadeTerm, whole: Batch) -> None:
    assert term.coupling is None
    value, gradient, _ = evaluated(term, whole)
    known = term.with_options({"total": term.total_of(whole.data)})
    parts = [whole.part(*range(4)), whole.part(*range(4, 16))]
    values, gradients, metrics = zip(*(evaluated(known, part) for part in parts), strict=True)
    assert sum(values).item() == pytest.approx(value.item(), rel=1e-6)
    assert gradient.any()
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-6, atol=1e-12)
    assert all(own["total_of_step"] == term.total_of(whole.data) for own in metrics)


def test_the_total_is_that_of_the_mask() -> None:
    whole = sixteen()
    masks = [datum.loss_fn_inputs["own"].to_numpy() for datum in whole.data]
    tokens, answers = sum(mask.sum() for mask in masks), sum(mask.any() for mask in masks)
    for reduction, expected in zip(MEANS, (tokens, answers, answers, answers), strict=True):
        assert made(ImportanceSampling, reduction).total_of(whole.data) == pytest.approx(expected)
    assert ImportanceSampling().total_of(whole.data) is None
    assert base_losses.DPO(**REFERENCE).total_of(whole.data) == 8


@pytest.mark.parametrize("term", COUPLED, ids=lambda term: type(term).__name__)
def test_terms_that_couple_datums_cannot_be_split(term: ReadyMadeTerm) -> None:
    assert term.coupling
    pipeline = Pipeline("nll", [RegularizerSpec(fn=term, weight=1.0, name="whole")])
    with pytest.raises(ConfigError, match=r"the term 'whole' \(\w+\) couples them: .*Use accumulate=1"):
        check_can_accumulate(pipeline)
    if term.total_of(sixteen().data) is not None:
        with pytest.raises(InvalidSpec, match="total"):
            term.with_options({"total": 16.0})


@pytest.mark.asyncio
async def test_the_pipeline_of_a_step_has_the_totals_of_the_step() -> None:
    whole = sixteen()
    first, rest = whole.part(*range(4)), whole.part(*range(4, 16))

    def plain(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.square().sum()

    pipeline = Pipeline(
        ImportanceSampling(mask="own", reduction="token-mean"),
        [
            RegularizerSpec(fn=regularizers.SampledKL(**REFERENCE, mask="own"), weight=0.1, name="sum"),
            RegularizerSpec(
                fn=regularizers.L2(mask="own"), weight=0.1, name="mean", options={"reduction": "seq-mean-token-mean"}
            ),
            RegularizerSpec(fn=plain, weight=0.1),
        ],
        combine="sum",
        track_grad_norms=True,
    )
    of_step = over_step(pipeline, [first.data, rest.data])
    outputs = [await of_step.compute(part.data, part.packed) for part in (first, rest)]
    expected = await pipeline.compute(whole.data, whole.packed)
    assert sum(output.loss_total for output in outputs) == pytest.approx(expected.loss_total)
    for name in ("sum", "mean", "plain"):
        assert sum(output.regularizers[name].value for output in outputs) == pytest.approx(
            expected.regularizers[name].value
        )
    assert of_step.options == pipeline.options
    assert over_step(pipeline, [whole.data]) is pipeline


def test_the_measured_entropy_does_not_depend_on_the_total() -> None:
    whole = sixteen()
    for reduction in MEANS[:3]:
        term = regularizers.SampledEntropy(mask="own", reduction=reduction)
        _, _, metrics = evaluated(term, whole)
        _, _, known = evaluated(term.with_options({"total": 50.0}), whole)
        assert known["entropy"].item() == pytest.approx(metrics["entropy"].item())


def test_a_total_that_was_given_stays() -> None:
    pipeline = Pipeline(base_losses.NLL(reduction="mean", mask="own", total=99))
    assert over_step(pipeline, [sixteen().data] * 2) is pipeline


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "constant"}, "reduction='constant' needs length="),
        ({"reduction": "mean", "length": 5}, "the other reductions have none"),
        ({"total": 4}, "reduction='sum' is no mean: remove total"),
        ({"reduction": "mean", "total": 0}, "total must be greater than 0, got 0"),
        ({"reduction": "constant", "length": -1.0}, "length must be greater than 0"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        base_losses.NLL(**settings)
