"""Settings of ready-made terms: checked at once, named in the error, overridable per call and by a spec."""

import pickle

import pytest
import torch

from tests.losses.support import guide_logprobs
from tests.regularizers.support import datums, evaluated
from tinkex_py import Executor, InvalidSpec, Pipeline, Regularizer, RegularizerSpec, per_datum
from tinkex_py.base_losses import CISPO, DPO, NLL, PPO, ImportanceSampling
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
    ImportanceSampling: ("importance_sampling", {}),
    PPO: ("ppo", {}),
    CISPO: ("cispo", {}),
}


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
    with pytest.raises(TypeError, match="unheard_of"):
        cls(unheard_of=1, **settings)
    with pytest.raises(TypeError, match="unheard_of"):
        cls(**settings).compute([], guide_logprobs(), unheard_of=1)
    with pytest.raises(TypeError, match="the name is not an option"):
        cls(**settings).with_options({"name": "mine"})
    with pytest.raises(InvalidSpec, match="unheard_of"):
        RegularizerSpec(fn=cls(**settings), weight=0.1, options={"unheard_of": 1})


@pytest.mark.parametrize("cls", CLASSES)
def test_they_travel_between_processes(cls):
    _, settings = CLASSES[cls]
    again = pickle.loads(pickle.dumps(cls(**settings)))
    assert vars(again).keys() == vars(cls(**settings)).keys()


BAD = [
    (L1, {"reduction": "average"}, "reduction must be one of 'sum', 'mean', .*, got 'average'"),
    (L1, {"name": ""}, "name must be a non-empty str, got ''"),
    (L1, {"mask": ""}, "mask must be a non-empty str or None, got ''"),
    (L1, {"target": None}, "target must be a non-empty str, got None"),
    (L2, {"center": float("nan")}, "center must be a finite number, got nan"),
    (L2, {"center": ""}, "center must be a non-empty str, got ''"),
    (L2, {"center": True}, "center must be a finite number, got True"),
    (L2, {"clip": 0}, "clip must be a finite number > 0, got 0"),
    (ElasticNet, {"l1_ratio": 1.5}, "l1_ratio must be a finite number >= 0 and <= 1, got 1.5"),
    (ElasticNet, {"l1_ratio": "half"}, "l1_ratio must be .*, got 'half'"),
    (Entropy, {"mode": "max"}, "mode must be one of 'maximize', 'minimize', got 'max'"),
    (Entropy, {"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
    (Entropy, {"temperature": float("inf")}, "temperature must be a finite number > 0, got inf"),
    (Entropy, {"normalize": 1}, "normalize must be one of True, False, got 1"),
    (Entropy, {"over": "rows"}, "over must be one of 'candidates', 'tokens', got 'rows'"),
    (KLDivergence, {"direction": "both", **REFERENCE}, "direction must be one of 'forward', 'reverse', got 'both'"),
    (KLDivergence, {"symmetric": "yes", **REFERENCE}, "symmetric must be .*, got 'yes'"),
    (KLDivergence, {}, "exactly one of .*, got none"),
    (KLDivergence, {"reference": torch.zeros(2), **REFERENCE}, "exactly one of .*, got reference and reference_field"),
    (KLDivergence, {"reference": 3}, "reference must be a tensor or a function of the datums, got 3"),
    (KLDivergence, {"reference_field": ""}, "reference_field must be .*, got ''"),
    (JensenShannon, {"over": "all", **REFERENCE}, "over must be .*, got 'all'"),
    (SampledKL, {"estimator": "k4", **REFERENCE}, "estimator must be one of 'k1', .*, got 'k4'"),
    (SampledEntropy, {"mode": "penalty"}, "mode must be .*, got 'penalty'"),
    (Consistency, {"metric": "l2"}, "metric must be one of 'mse', 'l1', 'cosine', 'kl', got 'l2'"),
    (Consistency, {"pair_field": 3}, "pair_field must be a non-empty str, got 3"),
    (Orthogonality, {"mode": "strict"}, "mode must be one of 'soft', 'hard', 'spectral', got 'strict'"),
    (Orthogonality, {"axis": 0}, "axis must be one of 'rows', 'columns', got 0"),
    (Orthogonality, {"reduction": "mean"}, "reduction must be one of 'sum', got 'mean'"),
    (Orthogonality, {"normalize": "no"}, "normalize must be one of True, False, None, got 'no'"),
    (GradientPenalty, {"fn": 3}, "GradientPenalty: fn must be callable or have a compute method, got 3"),
    (GradientPenalty, {"fn": L2}, "fn is the class L2: pass an instance"),
    (GradientPenalty, {"fn": L2(), "mode": "input"}, "mode must be one of 'output', 'interpolated', got 'input'"),
    (GradientPenalty, {"fn": L2(), "target_norm": -1.0}, "target_norm must be a finite number >= 0, got -1.0"),
    (GradientPenalty, {"fn": L2(), "mode": "interpolated"}, "reference_field must be given with .*, got None"),
    (GradientPenalty, {"fn": L2(), **REFERENCE}, "reference_field must be given with .*, got 'reference_logprobs'"),
    (GradientPenalty, {"fn": L2(), "seed": 0.5}, "seed must be an int or None, got 0.5"),
    (GradientPenalty, {"fn": L2(), "reduction": "token-mean"}, "reduction must be .*, got 'token-mean'"),
    (NLL, {"mask": 3}, "mask must be a non-empty str or None, got 3"),
    (DPO, {"beta": 0, **REFERENCE}, "beta must be a finite number > 0, got 0"),
    (DPO, {"label_smoothing": 0.6, **REFERENCE}, "label_smoothing must be .*, got 0.6"),
    (DPO, {"reduction": "token-mean", **REFERENCE}, "reduction must be one of 'mean', 'sum', got 'token-mean'"),
    (DPO, {}, "DPO needs exactly one of"),
    (ImportanceSampling, {"logprobs_field": None}, "logprobs_field must be a non-empty str, got None"),
    (PPO, {"clip_low_threshold": -0.1}, "clip_low_threshold must be a finite number >= 0, got -0.1"),
    (PPO, {"clip_high_threshold": 0.5}, "clip_low_threshold must not be above clip_high_threshold, got 0.8 and 0.5"),
    (CISPO, {"advantages_field": ""}, "advantages_field must be a non-empty str, got ''"),
]


@pytest.mark.parametrize(("cls", "settings", "message"), BAD)
def test_bad_settings_are_named(cls, settings, message):
    with pytest.raises(InvalidSpec, match=message):
        cls(**settings)


async def later(data, logprobs):
    return logprobs.sum()


def test_an_async_term_has_no_gradient_to_penalize():
    with pytest.raises(InvalidSpec, match="must not be async"):
        GradientPenalty(fn=later)


@pytest.mark.asyncio
async def test_options_of_a_call_and_of_a_spec_override_those_of_the_object():
    term = L1(reduction="sum")
    assert evaluated(term, [], guide_logprobs(), reduction="mean")[0].item() == pytest.approx(0.98)
    assert evaluated(term, [], guide_logprobs())[0].item() == pytest.approx(4.9)  # the object has not changed
    spec = RegularizerSpec(fn=term, weight=1.0, options={"reduction": "mean"})
    output = await Executor.execute_one(spec, [], guide_logprobs())
    assert output.value == pytest.approx(0.98)


def test_bad_options_of_a_spec_are_refused_when_it_is_made():
    with pytest.raises(InvalidSpec, match="temperature must be a finite number > 0, got -1"):
        RegularizerSpec(fn=Entropy(), weight=0.1, options={"temperature": -1})


def test_a_reference_given_in_one_way_replaces_that_of_the_other():
    term = KLDivergence(reference_field="a")
    given = torch.zeros(2)
    assert term.with_options({"reference": given}).reference_field is None
    assert term.with_options({"reference": given}).reference is given
    assert term.with_options({"reference": given}).with_options({"reference_field": "b"}).reference is None
    with pytest.raises(InvalidSpec, match="got reference and reference_field"):
        term.with_options({"reference": given, "reference_field": "b"})


def test_a_packed_term_is_not_put_under_per_datum():
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


def test_the_settings_are_in_the_signature():
    import inspect

    parameters = inspect.signature(L2().compute).parameters
    assert list(parameters) == ["data", "logprobs", "reduction", "mask", "target", "center", "clip"]
    assert parameters["reduction"].default == "sum"
    assert datums()[0].loss_fn_inputs["target_tokens"].shape == (3,)
