"""Losses against numbers of TRL's and verl's own functions on random data: `make compare` makes `numbers.json`."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.objectives.compare.__main__ import NUMBERS
from tests.objectives.entries import Batch, batch, evaluated
from tinkex_py.base_losses import (
    CISPO,
    CPO,
    DPO,
    DRO,
    GMPO,
    GSPO,
    IPO,
    KTO,
    NLL,
    ORPO,
    PPO,
    SAPO,
    VESPO,
    Corrected,
    Distillation,
    Hinge,
    ImportanceSampling,
    KLCov,
    MaskedIS,
    OffPolicyMask,
    ProbabilityMask,
    Reinforce,
    Rejection,
    SimPO,
    SLiC,
    TruncatedIS,
    group_advantages,
)
from tinkex_py.regularizers import SampledKL
from tinkex_py.terms.ready_made import ReadyMadeTerm

FOUND: dict[str, Any] = json.loads(NUMBERS.read_text())
GIVEN: dict[str, Any] = FOUND["batch"]
HALF = len(GIVEN["mask"]) // 2
PAIRED = [row for pair in range(HALF) for row in (pair, pair + HALF)]  # chosen, rejected, chosen, ...

MASK = {"mask": "weights"}
MEAN = {**MASK, "reduction": "token-mean"}
OF_ANSWERS = {**MASK, "reduction": "seq-mean-token-mean"}
HIGHER = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}
REFERENCE = {**MASK, "reference_field": "reference_logprobs"}
SEQUENCE = {**MASK, "clip_low_threshold": 0.9, "clip_high_threshold": 1.15}


@dataclass(frozen=True)
class Compared:
    """A loss here and a function there.

    Attributes:
        library: "trl" or "verl".
        case: the name of the function and its settings.
        entry: the name in the sheet.
        term: the loss, or losses with weights.
        has_value: whether the values are equal too; a surrogate may have another value with the same gradient.
        rel: largest relative difference.
    """

    library: str
    case: str
    entry: str
    term: ReadyMadeTerm | Sequence[tuple[ReadyMadeTerm, float]]
    has_value: bool = True
    rel: float = 1e-9

    def __str__(self) -> str:
        return f"{self.library}-{self.case}"

    @property
    def rows(self) -> list[int]:
        return PAIRED if self.entry.startswith("D") else list(range(2 * HALF))

    @property
    def given(self) -> Batch:
        def picked(name: str) -> list[Any]:
            return [GIVEN[name][row] for row in self.rows]

        label = [[1.0] if row < HALF else [-1.0] for row in self.rows]
        chosen = [[own * (row < HALF) for own in GIVEN["mask"][row]] for row in self.rows]
        if self.case.startswith("gkd"):
            return batch(picked("student"), teacher=picked("teacher"), weights=picked("mask"))
        return batch(
            picked("logprobs"),
            logprobs=picked("sampler"),
            reference_logprobs=picked("reference"),
            advantages=picked("advantages"),
            weights=picked("mask"),
            chosen_weights=chosen,
            label=label,
        )


def corrected(*corrections: Any, reduction: str = "token-mean") -> Corrected:
    return Corrected(policy=Reinforce(**MASK, reduction=reduction), corrections=corrections)  # type: ignore[arg-type]


def rejected(statistic: str, low: float | None, high: float) -> Corrected:
    bounds = {"high": high} if low is None else {"low": low, "high": high}
    return corrected(Rejection(statistic=statistic, **bounds), reduction="sum")  # type: ignore[arg-type]


def moved(**bounds: Any) -> Corrected:
    return Corrected(policy=ImportanceSampling(**MEAN), corrections=[ProbabilityMask(**bounds)])


def distilled(divergence: str, **settings: float) -> Distillation:
    common = {**MEAN, "reference_field": "teacher", "outside": "renormalize"}
    return Distillation(**common, divergence=divergence, **settings)  # type: ignore[arg-type]


def kl(**settings: Any) -> list[tuple[ReadyMadeTerm, float]]:
    term = SampledKL(reference_field="reference_logprobs", estimator="k3", **MEAN, **settings)
    return [(PPO(**HIGHER, **MEAN), 1.0), (term, 0.3)]


VERL = [
    ("vanilla token-sum", "A3", PPO(**HIGHER, **MASK)),
    ("vanilla token-mean", "A5", PPO(**HIGHER, **MEAN)),
    ("vanilla seq-mean-token-sum", "C1", PPO(**HIGHER, **MASK, reduction="seq-mean-token-sum")),
    ("vanilla seq-mean-token-mean", "C1", PPO(**HIGHER, **OF_ANSWERS)),
    ("vanilla seq-mean-token-sum-norm", "C1", PPO(**HIGHER, **MASK, reduction="constant", length=GIVEN["length"])),
    ("vanilla dual", "A3d", PPO(**MEAN, dual_clip=1.5)),
    ("gpg", "A1", Reinforce(**MEAN)),
    ("gspo", "A6", GSPO(**SEQUENCE, reduction="seq-mean-token-mean")),
    ("geo_mean", "A7", GMPO(**MASK, clip_low_threshold=math.exp(-0.3), clip_high_threshold=math.exp(0.4))),
    ("cispo", "A8", CISPO(**MEAN, clip_low_threshold=0.7, clip_high_threshold=1.4)),
    ("sapo", "A9", SAPO(**MASK)),
    ("dro", "A12", DRO(**MEAN, beta=0.3)),
    ("kl_cov", "G3", KLCov(**MEAN, kl_share=0.2, kl_weight=0.5)),
    ("tis token", "B1", corrected(TruncatedIS(cap=1.2))),
    ("tis sequence", "B1", corrected(TruncatedIS(cap=1.2, level="sequence"))),
    ("tis normalized", "B1", corrected(TruncatedIS(cap=1.2, normalize=True))),
    ("icepop", "B2", corrected(MaskedIS(low=0.8, high=1.3))),
    ("reject k3 mean", "B3", rejected("k3-mean", None, 0.06)),
    ("reject k3 max", "B3", rejected("k3-max", None, 0.3)),
    ("reject geometric", "B3", rejected("geometric", 0.8, 1.25)),
    ("reject product", "B3", rejected("product", 0.5, 2.0)),
    ("reject token", "B3", rejected("token", 0.8, 1.25)),
    *(
        (f"kl {name}", "B6", SampledKL(**MEAN, reference_field="reference_logprobs", estimator=name))
        for name in ("k1", "k2", "k3", "k3+", "abs")
    ),
]
TRL = [
    ("grpo", "A3", PPO(**HIGHER, **OF_ANSWERS)),
    ("bnpo", "C1", PPO(**HIGHER, **MEAN)),
    ("dr_grpo", "C1", PPO(**HIGHER, **MASK, reduction="constant", length=GIVEN["length"])),
    ("dapo", "A5", PPO(**HIGHER, **MEAN)),
    ("delta", "A3d", PPO(**HIGHER, **MEAN, dual_clip=1.5)),
    ("cispo", "A8", CISPO(**MEAN, clip_high_threshold=1.3)),
    ("vespo", "A11", VESPO(**MEAN)),
    ("sequence", "A6", GSPO(**SEQUENCE, reduction="seq-mean-token-mean")),
    ("luspo", "A10", GSPO(**SEQUENCE, reduction="seq-mean-token-sum")),
    ("gmpo", "A7", GMPO(**MASK, clip_low_threshold=math.exp(-0.3), clip_high_threshold=math.exp(0.4))),
    ("off-policy mask", "B4", Corrected(policy=PPO(**HIGHER, **MEAN), corrections=[OffPolicyMask(limit=0.02)])),
    ("beta", "B6", kl()),
    ("bias-corrected beta", "B6", kl(sampler_field="logprobs")),
    ("sigmoid", "D1", DPO(**REFERENCE, beta=0.5)),
    ("robust", "D1", DPO(**REFERENCE, beta=0.5, label_smoothing=0.1, robust=True)),
    ("ipo", "D2", IPO(**REFERENCE, beta=0.5)),
    ("hinge", "D3", Hinge(**REFERENCE, beta=0.5)),
    ("cpo hinge", "D3", [(SLiC(**MASK, margin=20.0, nll_weight=0.0), 0.05)]),
    (
        "kto",
        "D4",
        KTO(**REFERENCE, beta=0.5, reference_point=0.25, desirable_weight=1.5, undesirable_weight=0.5),
    ),
    ("simpo", "D5", SimPO(**MASK, beta=2.0, gamma=0.5)),
    ("cpo", "D7", CPO(**MASK, beta=0.5, nll_weight=0.0)),
    (
        "sigmoid and sft",
        "D8",
        [(DPO(**REFERENCE, beta=0.5), 1.0), (NLL(mask="chosen_weights", reduction="token-mean"), 0.2)],
    ),
    ("gkd 0.0", "E1", distilled("forward")),
    ("gkd 1.0", "E2", distilled("reverse")),
    ("gkd 0.25", "E3", distilled("jsd", beta=0.25)),
    ("gkd 0.5", "E3", distilled("jsd", beta=0.5)),
]
COMPARED = [
    *(Compared("verl", *row) for row in VERL),
    *(Compared("trl", *row) for row in TRL),
    # The service's ratio is differentiated here; verl detaches it.
    Compared("verl", "dppo_tv", "B5", moved(low=0.05, high=0.04), has_value=False),
    Compared("verl", "dppo_kl", "B5", moved(low=0.02, high=0.01, measure="kl"), has_value=False),
    # Parts of these are float32 in TRL.
    Compared("trl", "sapo", "A9", SAPO(**MASK), rel=1e-6),
    Compared("trl", "orpo", "D6", ORPO(**MASK, beta=0.1), rel=1e-5),
]


def drift() -> list[float]:
    names = ("sampler_kl_k1", "sampler_kl_k3", "chi2_token", "chi2_seq", "ppl_ratio")
    metrics = evaluated(corrected(), COMPARED[0].given)[2]
    return [float(metrics[name]) for name in names]


VALUES: list[tuple[str, str, Callable[[], list[float]]]] = [
    *(
        (f"advantages {how}", "A4", lambda how=how: group_advantages(GIVEN["rewards"], groups=3, normalize=how))
        for how in ("std", "none", "leave-one-out")
    ),
    ("drift", "B7", drift),
]


@pytest.mark.parametrize("compared", COMPARED, ids=str)
def test_losses(compared: Compared, record_property: Callable[[str, object], None]) -> None:
    found = FOUND[compared.library]["cases"][compared.case]
    terms = [(compared.term, 1.0)] if isinstance(compared.term, ReadyMadeTerm) else compared.term
    results = [(evaluated(term, compared.given), weight) for term, weight in terms]
    value = sum(weight * own[0].item() for own, weight in results)
    gradient: Any = sum(weight * own[1] for own, weight in results)
    expected = torch.tensor([found["gradient"][row] for row in compared.rows], dtype=torch.float64)
    torch.testing.assert_close(gradient.reshape(expected.shape), expected, rtol=compared.rel, atol=1e-9)
    assert expected.any()
    if compared.has_value:
        assert value == pytest.approx(found["loss"], rel=compared.rel, abs=1e-9)
    record_property(compared.library, compared.entry)


@pytest.mark.parametrize(("case", "entry", "compute"), VALUES, ids=[case for case, *_ in VALUES])
def test_other_numbers(
    case: str, entry: str, compute: Callable[[], list[float]], record_property: Callable[[str, object], None]
) -> None:
    assert compute() == pytest.approx(FOUND["verl"]["cases"][case]["values"], rel=1e-6)
    record_property("verl", entry)


def test_every_number_is_compared() -> None:
    known = {("verl", case) for case, *_ in VALUES} | {(one.library, one.case) for one in COMPARED}
    assert known == {(library, case) for library in ("trl", "verl") for case in FOUND[library]["cases"]}
