"""Pipelines as plain data: every ready-made part comes back equal, and what is code is refused."""

import dataclasses
import hashlib
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tenacity
import torch

from tests.objectives.test_sheet import ROWS
from tinkex_py import (
    Datum,
    InvalidSpec,
    Pipeline,
    PipelineError,
    RegularizerSpec,
    WeightController,
    base_losses,
    controllers,
    regularizers,
    schedules,
)
from tinkex_py.base_losses import (
    CISPO,
    DFT,
    DPO,
    GSPO,
    NLL,
    PPO,
    Corrected,
    MaskedIS,
    OffPolicyMask,
    ProbabilityMask,
    Reinforce,
    Rejection,
    TruncatedIS,
)
from tinkex_py.losses.combiners import MOST_TERMS
from tinkex_py.losses.options import DEFAULTS
from tinkex_py.regularizers import L1, L2, GradientPenalty, KLDivergence, SampledKL
from tinkex_py.runs.config import pipeline_of, read_config
from tinkex_py.terms.ready_made import CheckedSettings, ReadyMadeTerm

FIELD = {"reference_field": "reference_logprobs"}
TERMS: list[ReadyMadeTerm] = [
    *(row.term for row in ROWS),
    *(PPO(reduction=reduction, total=9) for reduction in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")),
    PPO(reduction="constant", length=128, mask=None, name="mine"),
    DFT(reduction="mean", mask="here"),
    Corrected(
        policy=CISPO(clip_high_threshold=2.0, reduction="token-mean"),
        corrections=[
            TruncatedIS(cap=3.0, floor=0.1, level="sequence", normalize=True),
            MaskedIS(low=0.1, high=4.0),
            Rejection(statistic="geometric", low=0.9, high=1.1),
            OffPolicyMask(limit=0.2),
            ProbabilityMask(low=0.1, measure="kl", either_way=True),
        ],
        old_field="old",
    ),
    L1(target="probs"),
    L2(center="mean"),
    regularizers.ElasticNet(l1_ratio=0.25),
    regularizers.Entropy(temperature=2.0),
    KLDivergence(**FIELD, normalize=True),
    regularizers.JensenShannon(**FIELD, over="tokens"),
    regularizers.Consistency(pair_field="other", metric="l1"),
    regularizers.Orthogonality(mode="hard"),
    regularizers.SampledEntropy(sampler_field="logprobs", reduction="token-mean"),
    GradientPenalty(fn=Corrected(policy=PPO()), mode="interpolated", **FIELD, seed=3),
]
WEIGHTS: list[Any] = [
    0.1,
    schedules.Constant(0.5),
    schedules.Linear(1.0, 0.0, 10),
    schedules.Cosine(1.0, 0.1, 20),
    schedules.WarmUp(3, schedules.WarmUp(4, 0.5)),
    schedules.Piecewise({0: 1.0, 10: 0.25}),
    controllers.AdaptiveKL(initial=0.1, target=0.02, maximum=5),
    controllers.AdaptiveEntropy(target=0.4, delta=0.01),
    controllers.TargetGradientRatio(ratio=0.2),
    controllers.GradNormBalance(alpha=0.5),
    controllers.DWA(window=3),
    controllers.UncertaintyWeighting(rate=0.1, minimum=0.01),
    controllers.FAMO(lower_bound=-2.0),
    controllers.DualAscent(at_most=0.1, rate=0.5, maximum=math.inf),
    controllers.DualAscent(at_least=0.0),
    controllers.LogDualAscent(at_most=0.05, initial=0.5),
    controllers.PIDMultiplier(at_least=-1.0, p=0.2),
]


def bounded(**fields: Any) -> RegularizerSpec:
    return RegularizerSpec(**{"fn": SampledKL(**FIELD, reduction="token-mean"), "name": "kl", **fields})


def copied(pipeline: Pipeline) -> Pipeline:
    copy = Pipeline.from_json(pipeline.to_json())
    assert copy.to_json() == pipeline.to_json()
    assert copy.fingerprint == pipeline.fingerprint
    return copy


def settings_of(weight: Any) -> Any:
    if not isinstance(weight, WeightController):
        return weight
    return type(weight), {name: value for name, value in vars(weight).items() if not name.startswith("_")}


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
def test_terms(term: ReadyMadeTerm) -> None:
    assert copied(Pipeline(term)).base_loss == term
    (spec,) = copied(Pipeline(NLL(), [RegularizerSpec(fn=term, weight=0.1, name="own")])).regularizers
    assert (spec.fn, spec.name) == (dataclasses.replace(term, name=type(term).name), "own")


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: type(weight).__name__)
def test_weights(weight: Any) -> None:
    (spec,) = copied(Pipeline(NLL(), [bounded(weight=weight)])).regularizers
    assert settings_of(spec.weight) == settings_of(weight)


def test_the_tables_have_every_ready_made_part() -> None:
    found = [getattr(module, name) for module in (base_losses, regularizers) for name in dir(module)]
    parts = {cls for cls in found if isinstance(cls, type) and issubclass(cls, CheckedSettings)}
    corrected = [term for term in TERMS if isinstance(term, Corrected)]
    assert parts == {type(part) for part in (*TERMS, *(one for term in corrected for one in term.corrections))}
    classes = [cls for module in (schedules, controllers) for cls in vars(module).values() if isinstance(cls, type)]
    weights = {cls for cls in classes if issubclass(cls, WeightController) and not inspect.isabstract(cls)}
    weights |= {cls for cls in classes if dataclasses.is_dataclass(cls) and "__call__" in vars(cls)}
    assert weights == {type(weight) for weight in WEIGHTS} - {float}


def test_specs_options_and_combiners() -> None:
    shared = controllers.FAMO()
    specs = [
        bounded(at_most=0.05, on_error="skip", timeout=math.inf),
        RegularizerSpec(fn=L2(), weight=shared, name="a", enabled=False, max_grad_norm=2.0),
        RegularizerSpec(fn=L1(), weight=shared, name="b", options={"reduction": "mean"}, runs_in="thread"),
    ]
    options = {"timeout": None, "parallel": False, "max_threads": 3, "cancel_grace": 1.0, "track_grad_norms": True}
    copy = copied(Pipeline("dapo", specs, **options))
    assert copy.options == {**DEFAULTS, **options}
    kl, first, second = copy.regularizers
    assert (kl.at_most, kl.on_error, kl.timeout) == (0.05, "skip", math.inf)
    assert (first.enabled, first.max_grad_norm, second.runs_in) == (False, 2.0, "thread")
    assert second.fn == L1(reduction="mean")
    assert first.weight is second.weight  # one controller, which balances both
    for method in ("sum", "pcgrad", "upgrad", "mgda", "cagrad", "nash_mtl", "aligned_mtl"):
        assert copied(Pipeline(NLL(), combine=method)).combine == method  # type: ignore[arg-type]


def test_the_fingerprint_is_a_hash_of_what_is_not_default() -> None:
    text = '{"base": {"term": "NLL"}, "combine": "sum", "regularizers": []}'
    assert Pipeline(NLL()).fingerprint == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_what_the_fingerprint_ignores() -> None:
    plain = Pipeline(PPO(), [bounded(at_most=0.05)])
    spelled = {
        "combine": "sum",
        "timeout": 5,
        "regularizers": [
            {
                "weight": {"maximum": 100, "at_most": 0.05, "controller": "DualAscent", "rate": 2, "initial": 0.0},
                "options": {"reduction": "token-mean", "estimator": "k3+", **FIELD},
                "term": "SampledKL",
                "timeout": 3,
                "name": "kl",
            }
        ],
        "base": {"options": {"clip_high_threshold": 1.2, "reduction": "sum", "clip_low_threshold": 0.8}, "term": "ppo"},
    }
    assert Pipeline.from_json(json.dumps(spelled)).fingerprint == plain.fingerprint


OTHERS = [
    Pipeline(PPO(clip_high_threshold=1.3), [bounded(at_most=0.05)]),
    Pipeline(GSPO(clip_low_threshold=0.9, clip_high_threshold=1.1), [bounded(at_most=0.05)]),
    Pipeline(PPO(), [bounded(at_most=0.06)]),
    Pipeline(PPO(), [bounded(at_least=0.05)]),
    Pipeline(PPO(), [bounded(weight=0.05)]),
    Pipeline(PPO(), [bounded(at_most=0.05, max_grad_norm=1.0)]),
    Pipeline(PPO(), [bounded(at_most=0.05, enabled=False)]),
    Pipeline(PPO(), [bounded(at_most=0.05, name="other")]),
    Pipeline(PPO(), [bounded(at_most=0.05)], combine="pcgrad"),
    Pipeline(PPO()),
]


def test_what_the_fingerprint_tells_apart() -> None:
    hashes = {other.fingerprint for other in OTHERS}
    assert len(hashes) == len(OTHERS)
    assert Pipeline(PPO(), [bounded(at_most=0.05)]).fingerprint not in hashes


def function(data: list[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    return -logprobs.sum()


class OwnKL(controllers.AdaptiveKL):
    pass


class OwnNLL(NLL):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pipeline(function), "base_loss is function, which is code .* module:name in a configuration file"),
        (lambda: Pipeline(OwnNLL()), "base_loss is OwnNLL"),
        (lambda: Pipeline(NLL(), [bounded(fn=function, weight=1)]), "regularizer 'kl' is function"),
        (lambda: Pipeline(DPO(reference=function)), r"base_loss: DPO.reference is function.* reference_field="),
        (lambda: Pipeline(KLDivergence(reference=torch.zeros(2))), "KLDivergence.reference is Tensor"),
        (lambda: Pipeline(GradientPenalty(fn=function)), "base_loss: GradientPenalty.fn is function"),
        (lambda: Pipeline(NLL(), [bounded(weight=lambda step: 0.1)]), "regularizer 'kl': weight is .*lambda"),
        (lambda: Pipeline(NLL(), [bounded(weight=schedules.WarmUp(2, lambda step: 0.1))]), "weight is .*lambda"),
        (lambda: Pipeline(NLL(), [bounded(weight=OwnKL(initial=1, target=1))]), "weight is .*OwnKL"),
        (
            lambda: Pipeline(NLL(), [bounded(weight=1, is_async=True, retry=tenacity.AsyncRetrying())]),
            "retry is AsyncRetrying",
        ),
    ],
)
def test_code_is_not_data(make: Any, message: str) -> None:
    pipeline = make()
    with pytest.raises(InvalidSpec, match=message):
        pipeline.to_json()
    with pytest.raises(InvalidSpec, match=message):
        _ = pipeline.fingerprint


def regularizer(text: str) -> str:
    return '{"base": {"term": "NLL"}, "regularizers": [{"term": "L2", ' + text + "}]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "text of the pipeline is not JSON .* pass what Pipeline.to_json"),
        ("[]", r"must be an object with a 'base', got \[\]"),
        ("{}", "must be an object with a 'base'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"base": {"term": "os:system"}}', "'os:system' is not a ready-made term, and data must not"),
        ('{"base": {"term": "NNL"}}', r"base.term: no term is named 'NNL' \(did you mean 'NLL'\?\)"),
        ('{"base": {"term": "TruncatedIS"}}', "no term is named 'TruncatedIS'"),
        ('{"base": {"term": "NLL", "opts": {}}}', "no setting is named 'base.opts'"),
        ('{"base": {"term": "NLL"}, "combin": "sum"}', r"no setting is named 'combin' \(did you mean 'combine'\?\)"),
        ('{"base": {"term": "NLL"}, "combine": "max"}', "the pipeline: combine: .*got 'max'"),
        ('{"base": {"term": "NLL", "options": {"reduction": "x"}}}', "base: NLL: reduction must be"),
        ('{"base": {"term": "GradientPenalty", "options": {"fn": {"term": "x"}}}}', "base.options.fn.term: no term"),
        ('{"base": {"term": "GradientPenalty", "options": {"fn": {"term": "a:b"}}}}', "'a:b' is not a ready-made"),
        ('{"base": {"term": "PPO", "options": {"clip_high_threshold": NaN}}}', "NaN, which is not a number of JSON"),
        (regularizer('"weight": {"same_as": "kl"}'), "regularizers.0.weight: same_as must name a regularizer before"),
        (regularizer('"weight": {"controller": "Constraint"}'), "controller must be one of .*got 'Constraint'"),
        (regularizer('"weight": {"controller": ["x"]}'), "controller must be one of"),
        (regularizer('"weight": {"schedule": "Piecewise", "values": {"0": 1, "x": 1}}'), "every step in values"),
        (regularizer('"weight": 1, "at_most": 2'), "weight and a bound exclude each other"),
        (regularizer('"weight": 1, "fn": 2'), "fn must be callable"),
    ],
)
def test_text_of_others_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        Pipeline.from_json(text)


def test_limits_of_pipelines_hold_for_data() -> None:
    many = [{"term": "L2", "name": str(index), "weight": 1} for index in range(MOST_TERMS)]
    with pytest.raises(PipelineError, match="at most 8 terms"):
        Pipeline.from_json(json.dumps({"base": {"term": "NLL"}, "regularizers": many, "combine": "mgda"}))


def test_a_configuration_file_has_the_same_form(tmp_path: Path) -> None:
    weight = schedules.WarmUp(3, schedules.Piecewise({0: 1.0, 5: 0.5}))
    policy = Corrected(policy=Reinforce(reduction="token-mean"), corrections=[TruncatedIS(cap=1.5)])
    pipeline = Pipeline(policy, [bounded(weight=weight), RegularizerSpec(fn=L2(), weight=0.1)], timeout=7.0)
    (tmp_path / "run.yaml").write_text(f"model: tiny\ndata: {{path: x.jsonl}}\nloss: {pipeline.to_json()}\n")
    read = pipeline_of(read_config(tmp_path / "run.yaml").loss)
    assert read.to_json() == pipeline.to_json()
    assert read.fingerprint == pipeline.fingerprint
