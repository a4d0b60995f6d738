"""Settings of ready-made terms: validated at construction, and replaced per call and by a spec."""

import pickle

import pytest
import torch

from tests.losses.support import guide_logprobs
from tests.regularizers.support import evaluated
from tinkex_py import Executor, InvalidSpec, Pipeline, Regularizer, RegularizerSpec, per_datum
from tinkex_py.base_losses import (
    CISPO,
    CPO,
    DFT,
    DPO,
    DPOP,
    DRO,
    GMPO,
    GSPO,
    IPO,
    KTO,
    NLL,
    ORPO,
    PPO,
    SAPO,
    TOPR,
    VESPO,
    Choice,
    ClipCov,
    Corrected,
    Distillation,
    Focal,
    Hinge,
    ImportanceSampling,
    KLCov,
    Reinforce,
    SimPO,
    SLiC,
    Unlikelihood,
)
from tinkex_py.errors import InvalidBaseLoss
from tinkex_py.regularizers import (
    L1,
    L2,
    Consistency,
    ElasticNet,
    Entropy,
    GradientPenalty,
    JensenShannon,
    KLDivergence,
    Orthogonality,
    SampledEntropy,
    SampledKL,
)
from tinkex_py.terms.ready_made import ReadyMadeTerm

REFERENCE = {"reference_field": "reference_logprobs"}
PENALIZED = {"fn": L2()}
CLASSES: dict[type[ReadyMadeTerm], tuple[str, dict[str, object]]] = {
    L1: ("l1_sparsity", {}),
    L2: ("l2_weight_decay", {}),
    ElasticNet: ("elastic_net", {}),
    Entropy: ("entropy", {}),
    KLDivergence: ("kl_divergence", REFERENCE),
    JensenShannon: ("jensen_shannon", REFERENCE),
    SampledKL: ("sampled_kl", REFERENCE),
    SampledEntropy: ("sampled_entropy", {}),
    Consistency: ("consistency", {}),
    Orthogonality: ("orthogonality", {}),
    GradientPenalty: ("gradient_penalty", PENALIZED),
    NLL: ("nll", {}),
    DPO: ("dpo", REFERENCE),
    IPO: ("ipo", REFERENCE),
    Hinge: ("hinge", REFERENCE),
    DPOP: ("dpop", REFERENCE),
    SimPO: ("simpo", {}),
    ORPO: ("orpo", {}),
    CPO: ("cpo", {}),
    SLiC: ("slic", {}),
    KTO: ("kto", REFERENCE),
    Choice: ("choice", {}),
    Distillation: ("distillation", REFERENCE),
    ImportanceSampling: ("importance_sampling", {}),
    PPO: ("ppo", {}),
    CISPO: ("cispo", {}),
    Reinforce: ("reinforce", {}),
    SAPO: ("sapo", {}),
    DRO: ("dro", {"beta": 0.05}),
    GSPO: ("gspo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
    GMPO: ("gmpo", {}),
    VESPO: ("vespo", {}),
    TOPR: ("topr", {}),
    ClipCov: ("clip_cov", {}),
    KLCov: ("kl_cov", {}),
    Corrected: ("corrected", {"policy": PPO()}),
    Focal: ("focal", {}),
    DFT: ("dft", {}),
    Unlikelihood: ("unlikelihood", {}),
}


async def later(data, logprobs):
    return logprobs.sum()


@pytest.mark.parametrize("cls", CLASSES)
def test_names_and_specs(cls):
    name, settings = CLASSES[cls]
    term = cls(**settings)
    assert isinstance(term, Regularizer)
    assert RegularizerSpec(fn=term, weight=0.1).name == name
    assert RegularizerSpec(fn=cls(name="mine", **settings), weight=0.1).name == "mine"
    assert RegularizerSpec(fn=term, weight=0.1, name="other").name == "other"
    assert cls.__doc__
    for part in ("formula", "gradient", "shapes", "units", "Source"):
        assert part in cls.__doc__, part


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_settings_are_refused_at_construction(cls):
    _, settings = CLASSES[cls]
    with pytest.raises(TypeError, match="unknown"):
        cls(unknown=1, **settings)
    term = cls(**settings)
    with pytest.raises(TypeError, match="unknown"):
        term.compute([], guide_logprobs(), unknown=1)
    for options, problem in (({"unknown": 1}, "unknown"), ({"name": "mine"}, "name is not an option")):
        with pytest.raises(TypeError, match=problem):
            term.with_options(options)
        with pytest.raises(InvalidSpec, match=problem):
            RegularizerSpec(fn=term, weight=0.1, options=options)
    assert vars(pickle.loads(pickle.dumps(term))).keys() == vars(term).keys()


BAD = [
    (L1, {"reduction": "average"}, "L1: reduction must be 'sum', 'mean', .*, got 'average'"),
    (L1, {"name": ""}, "name must have at least 1 character, got ''"),
    (L1, {"mask": ""}, "mask must have at least 1 character, got ''"),
    (L1, {"target": None}, "target must be a valid string, got None"),
    (L2, {"center": float("nan")}, "center must be a finite number or be a valid string, got nan"),
    (L2, {"center": ""}, "center must .* have at least 1 character, got ''"),
    (L2, {"center": True}, "center must be a valid number .*, got True"),
    (L2, {"clip": 0}, "clip must be greater than 0, got 0"),
    (ElasticNet, {"l1_ratio": 1.5}, "l1_ratio must be less than or equal to 1, got 1.5"),
    (ElasticNet, {"l1_ratio": "half"}, "l1_ratio must be a valid number, got 'half'"),
    (Entropy, {"mode": "max"}, "mode must be 'maximize' or 'minimize', got 'max'"),
    (Entropy, {"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
    (Entropy, {"temperature": float("inf")}, "temperature must be a finite number, got inf"),
    (Entropy, {"normalize": 1}, "normalize must be a valid boolean, got 1"),
    (Entropy, {"over": "rows"}, "over must be 'candidates' or 'tokens', got 'rows'"),
    (KLDivergence, {"direction": "both", **REFERENCE}, "direction must be 'forward' or 'reverse', got 'both'"),
    (KLDivergence, {}, "exactly one of .*, got none"),
    (KLDivergence, {"reference": torch.zeros(2), **REFERENCE}, "exactly one of .*, got reference and reference_field"),
    (KLDivergence, {"reference": 3}, "reference must be a tensor or a function of the datums, got 3"),
    (KLDivergence, {"reference_field": ""}, "reference_field must .*, got ''"),
    (SampledKL, {"estimator": "k4", **REFERENCE}, "estimator must be 'k1', .*, got 'k4'"),
    (Consistency, {"pair_field": 3}, "pair_field must be a valid string, got 3"),
    (Orthogonality, {"axis": 0}, "axis must be 'rows' or 'columns', got 0"),
    (Orthogonality, {"reduction": "mean"}, "reduction must be 'sum', got 'mean'"),
    (GradientPenalty, {"fn": 3}, "GradientPenalty: fn must be callable or have a compute method, got 3"),
    (GradientPenalty, {"fn": L2}, "fn is the class L2: pass an instance"),
    (GradientPenalty, {"fn": later}, "fn must not be async"),
    (GradientPenalty, {"fn": L2(), "target_norm": -1.0}, "target_norm must be greater than or equal to 0, got -1.0"),
    (GradientPenalty, {"fn": L2(), "mode": "interpolated"}, "mode='interpolated' needs a reference_field"),
    (GradientPenalty, {"fn": L2(), **REFERENCE}, "got mode='output' and reference_field='reference_logprobs'"),
    (GradientPenalty, {"fn": L2(), "seed": 0.5}, "seed must be a valid integer, got 0.5"),
    (DPO, {"label_smoothing": 0.6, **REFERENCE}, "label_smoothing must be .*, got 0.6"),
    (DPO, {"reduction": "token-mean", **REFERENCE}, "reduction must be 'mean' or 'sum', got 'token-mean'"),
    (DPO, {}, "DPO: pass exactly one of"),
    (PPO, {"clip_low_threshold": -0.1}, "clip_low_threshold must be greater than or equal to 0, got -0.1"),
    (PPO, {"clip_high_threshold": 0.5}, "clip_low_threshold must not be above clip_high_threshold, got 0.8 and 0.5"),
]


@pytest.mark.parametrize(("cls", "settings", "message"), BAD)
def test_bad_settings_are_named(cls, settings, message):
    with pytest.raises(InvalidSpec, match=message):
        cls(**settings)


@pytest.mark.asyncio
async def test_options_of_a_call_and_of_a_spec_override_those_of_the_object():
    term = L1(reduction="sum")
    assert evaluated(term, [], guide_logprobs(), reduction="mean")[0].item() == pytest.approx(0.98)
    assert evaluated(term, [], guide_logprobs())[0].item() == pytest.approx(4.9)  # the object has not changed
    spec = RegularizerSpec(fn=term, weight=1.0, options={"reduction": "mean"})
    output = await Executor.execute_one(spec, [], guide_logprobs())
    assert output.value == pytest.approx(0.98)


def test_invalid_options_of_a_spec_raise_at_construction():
    with pytest.raises(InvalidSpec, match="temperature must be greater than 0, got -1"):
        RegularizerSpec(fn=Entropy(), weight=0.1, options={"temperature": -1})


def test_reference_and_reference_field_replace_each_other():
    term = KLDivergence(reference_field="a")
    given = torch.zeros(2)
    assert term.with_options({"reference": given}).reference_field is None
    assert term.with_options({"reference": given}).reference is given
    assert term.with_options({"reference": given}).with_options({"reference_field": "b"}).reference is None
    with pytest.raises(InvalidSpec, match="got reference and reference_field"):
        term.with_options({"reference": given, "reference_field": "b"})


def test_a_packed_term_cannot_be_wrapped_in_per_datum():
    with pytest.raises(InvalidSpec, match=r"L1 expects packed logprobs: remove per_datum\(...\)"):
        RegularizerSpec(fn=per_datum(L1()), weight=0.1)
    with pytest.raises(InvalidBaseLoss, match="NLL expects packed logprobs"):
        Pipeline(per_datum(NLL()))


def test_terms_are_values():
    assert L1(mask="weights") == L1(mask="weights")
    assert L1() != L1(reduction="mean")
    assert len({L1(), L1(), L2()}) == 2
    with pytest.raises(AttributeError):
        L1().reduction = "mean"  # type: ignore[misc]


def test_every_setting_counts_in_the_equality_of_terms():
    own, other = torch.zeros(2), torch.zeros(2)
    different = [
        *(DPO(reference_field=field, beta=beta) for field in ("a", "b") for beta in (0.1, 0.2)),
        *(KTO(reference_field="a", desirable_weight=weight) for weight in (1.0, 2.0)),
        *(KLDivergence(reference=tensor) for tensor in (own, other)),
        *(GradientPenalty(fn=fn, target_norm=norm) for fn in (L2(), L1()) for norm in (0.5, 1.0)),
    ]
    assert len(set(different)) == len(different)
    assert DPO(reference_field="a") == DPO(reference_field="a")
    assert KLDivergence(reference=own) == KLDivergence(reference=own)
    assert GradientPenalty(fn=L2()) == GradientPenalty(fn=L2())
