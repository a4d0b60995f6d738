"""Masks by default, logprobs that are none, and the loss of an accumulated step (r26)."""

import warnings

import numpy as np
import pytest
import torch

from tests.regularizers.support import datum, datums, evaluated, random_logprobs
from tinkex_py import AdamParams, AsyncServiceClient, Datum, InvalidData, ModelInput, Pipeline, RegularizerSpec
from tinkex_py.base_losses import CISPO, DPO, NLL, PPO, ImportanceSampling
from tinkex_py.regularizers import (
    L1,
    L2,
    Consistency,
    ElasticNet,
    Entropy,
    JensenShannon,
    KLDivergence,
    Orthogonality,
    SampledEntropy,
    SampledKL,
)
from tinkex_py.runs import TrainSettings, read_steps, scalars, train
from tinkex_py.runs.step import MicroBatch
from tinkex_py.runs.step_loss import step_loss

LENGTHS = (3, 1, 2, 2)
WEIGHTS = [0.0, 1.0, 2.0, 1.0, 0.0, 0.5, 0.0, 1.0]
ALWAYS = (NLL, DPO)  # these always used `weights`
FIELD = {"reference_field": "reference"}
TERMS = [
    (L1, {}, None),
    (L2, {"center": "mean"}, 3),
    (ElasticNet, {"reduction": "token-mean"}, None),
    (Entropy, {}, 3),
    (Entropy, {"over": "tokens"}, None),
    (KLDivergence, FIELD, 3),
    (JensenShannon, FIELD, 3),
    (SampledKL, {**FIELD, "estimator": "k2"}, None),
    (SampledEntropy, {"reduction": "seq-mean-token-mean"}, None),
    (Consistency, {"pair_field": "reference"}, None),
    (Consistency, {"pair_field": "reference", "metric": "cosine"}, None),
    (Orthogonality, {}, 3),
    (NLL, {"reduction": "token-mean"}, None),
    (DPO, FIELD, None),
    (ImportanceSampling, {}, None),
    (PPO, {"reduction": "seq-mean-token-sum"}, None),
    (CISPO, {}, None),
]
each_term = pytest.mark.parametrize(
    ("cls", "options", "candidates"), TERMS, ids=lambda value: getattr(value, "__name__", "")
)


def data_of(candidates, **fields):
    shape = (8,) if candidates is None else (8, candidates)
    reference = random_logprobs(*shape, seed=1)
    return datums(
        LENGTHS, candidates, reference=reference, logprobs=reference, advantages=torch.linspace(-1, 2, 8), **fields
    )


def warned(term, data, logprobs):
    """The loss, and the categories of the warnings of two calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = [
            evaluated(term, data, logprobs, **options)[0].item() for options in ({}, {"reduction": term.reduction})
        ]
    assert values[0] == values[1]
    return values[0], [warning.category for warning in caught]


@each_term
def test_weights_are_the_mask_unless_another_is_named(cls, options, candidates):
    logprobs = random_logprobs(8) if candidates is None else random_logprobs(8, candidates)
    data = data_of(candidates, weights=WEIGHTS)
    term = cls(**options)
    value, categories = warned(term, data, logprobs)
    assert categories == ([] if cls in ALWAYS else [FutureWarning])  # once per term
    masked, unmasked = (warned(cls(mask=mask, **options), data, logprobs) for mask in ("weights", None))
    assert masked == (value, [])
    assert unmasked[1] == []
    assert unmasked[0] != value
    # without weights, and where all are 1, nothing changes and nothing warns
    for same in (data_of(candidates), data_of(candidates, weights=[1.0] * 8)):
        assert warned(cls(**options), same, logprobs) == (unmasked[0], [])


@each_term
def test_negative_weights_are_no_mask(cls, options, candidates):
    logprobs = random_logprobs(8) if candidates is None else random_logprobs(8, candidates)
    signed = [-weight if weight == 1 else weight for weight in WEIGHTS]
    data = data_of(candidates, weights=signed, gate=[float(weight != 0) for weight in signed])
    with pytest.raises(
        InvalidData, match=r"the mask 'weights' must contain finite numbers >= 0, but datum 0 has -1\.0"
    ):
        cls(mask="weights", **options).compute(data, logprobs)
    if cls is NLL:
        with pytest.raises(InvalidData, match="reduction='token-mean' would divide by their sum"):
            cls(**options).compute(data, logprobs)
        value, categories = warned(NLL(), data, logprobs)
        assert value == pytest.approx(-(torch.tensor(signed) * logprobs).sum().item())
        assert categories == []
        return
    value, categories = warned(cls(**options), data, logprobs)
    assert value == warned(cls(mask="gate", **options), data, logprobs)[0]
    assert categories == [UserWarning, *([] if cls is DPO else [FutureWarning])]


def test_weights_that_only_keep_positions_change_nothing_where_they_are_no_factors():
    data = data_of(3, weights=[0.5] * 8)
    logprobs = random_logprobs(8, 3)
    assert warned(Orthogonality(), data, logprobs) == warned(Orthogonality(mask=None), data, logprobs)


def test_the_warning_names_the_term_and_both_ways_out():
    with pytest.warns(FutureWarning, match=r"PPO 'mine': no mask= .* mask=None for that result, or mask='weights'"):
        PPO(name="mine").compute(data_of(None, weights=WEIGHTS), random_logprobs(8))


def test_default_weights_must_fit():
    for fields, problem in (
        ({"weights": [float("nan")] * 8}, "must contain finite numbers, but datum 0 has nan"),
        ({"weights": [1.0] * 8}, "covers 8 positions, but the logprobs have shape"),
    ):
        with pytest.raises(InvalidData, match=problem):
            L1().compute(datums(LENGTHS, **fields), random_logprobs(9 if "covers" in problem else 8))
    some = [datum(3, weights=[1.0] * 3), datum(1)]
    with pytest.raises(InvalidData, match="datum 1 has no 'weights' in loss_fn_inputs, but other datums have it"):
        L1().compute(some, random_logprobs(4))


def packed_probabilities(data):
    return random_logprobs(8).exp()


async def later(data):
    return packed_probabilities(data)


PROBABILITIES = [
    (KLDivergence(reference=torch.tensor([0.2, 0.3, 0.5])), 3, "the reference has 0.2 at position 0 of datum 0, cand"),
    (
        JensenShannon(reference=torch.full((8, 3), 0.25)),
        3,
        "the reference has 0.25 at position 0 of datum 0, candidate 0",
    ),
    (
        SampledKL(reference=packed_probabilities),
        None,
        "the reference has .* at position 0 of datum 0, but logprobs are",
    ),
    (SampledKL(reference_field="spoiled"), None, "the field 'spoiled' has 0.01 at position 1 of datum 3, but"),
    (DPO(reference_field="spoiled"), None, "the field 'spoiled' has 0.01 at position 1 of datum 3, but"),
    (
        Consistency(pair_field="spoiled", metric="kl", over="tokens"),
        None,
        "'spoiled' has 0.01 at position 1 of datum 3",
    ),
    (PPO(logprobs_field="spoiled"), None, "the field 'spoiled' has 0.01 at position 1 of datum 3, but"),
]


@pytest.mark.parametrize(("term", "candidates", "problem"), PROBABILITIES)
def test_probabilities_are_no_logprobs(term, candidates, problem):
    logprobs = random_logprobs(8) if candidates is None else random_logprobs(8, candidates)
    data = data_of(candidates, spoiled=[-1.0] * 7 + [0.01])
    with pytest.raises(InvalidData, match=problem):
        term.compute(data, logprobs)


@pytest.mark.asyncio
async def test_probabilities_of_an_async_reference_are_no_logprobs():
    with pytest.raises(InvalidData, match="pass logarithms, not probabilities"):
        await SampledKL(reference=later).compute([], random_logprobs(8))


def test_only_positions_that_count_must_be_logprobs():
    """Trainers fill positions outside of the answer with numbers such as 1.0, and engines round up."""
    reference = [1.0, -0.5, 1e-4, -0.1, 1.0, -2.0, 1.0, -1.0]
    term = SampledKL(reference_field="padded", mask="weights")
    value, _, _ = evaluated(term, data_of(None, weights=WEIGHTS, padded=reference), random_logprobs(8))
    assert torch.isfinite(value)


REDUCED = ("sum", "token-mean", "mean", "seq-mean-token-sum", "seq-mean-token-mean")


def split_pipeline(reduction):
    options = {"reduction": reduction, "mask": "weights"}
    return Pipeline(
        NLL(**options),
        [
            RegularizerSpec(fn=L2(mask="weights"), weight=0.5, options={"reduction": reduction}),
            RegularizerSpec(fn=Consistency(pair_field="reference", metric="cosine", **options), weight=2.0),
            RegularizerSpec(fn=DPO(**FIELD), weight=1.0),
            RegularizerSpec(fn=DPO(**FIELD, reduction="sum"), weight=1.0, name="dpo_sum"),
            RegularizerSpec(fn=answer_mean, weight=1.0),
        ],
    )


def answer_mean(data, logprobs):
    counts = torch.tensor(np.concatenate([item.loss_fn_inputs["weights"].to_numpy() for item in data]) != 0)
    return -logprobs[0:][counts].mean()


@pytest.mark.asyncio
@pytest.mark.parametrize("reduction", REDUCED)
async def test_r26_the_loss_of_a_step_is_that_of_one_call(reduction):
    lengths = (4, 1, 2, 3, 6, 2, 1, 1)
    logprobs = random_logprobs(sum(lengths))
    weights = torch.ones(sum(lengths))
    weights[[0, 2, 5, 11]] = torch.tensor([0.0, 2.0, 0.0, 0.5])
    data = datums(lengths, weights=weights, reference=random_logprobs(sum(lengths), seed=1))
    pieces, pipeline = torch.split(logprobs, list(lengths)), split_pipeline(reduction)
    whole = await pipeline.compute(data, list(pieces))
    parts = [
        MicroBatch(tuple(data[start:end]), await pipeline.compute(data[start:end], list(pieces[start:end])))
        for start, end in ((0, 2), (2, 6), (6, 8))
    ]
    loss = step_loss(pipeline, parts)
    assert loss["loss/base"] == pytest.approx(whole.base_loss.value, rel=1e-6)
    for name, term in whole.regularizers.items():
        assert loss[f"term/{name}/value"] == pytest.approx(term.value, rel=1e-6), name
        assert loss[f"term/{name}/contribution"] == pytest.approx(term.contribution, rel=1e-6), name
    assert loss["loss/regularizers"] == pytest.approx(whole.regularizer_total, rel=1e-6)
    assert loss["loss/total"] == pytest.approx(whole.loss_total, rel=1e-6)
    assert step_loss(pipeline, parts[:1]) == {}


def short_datum(tokens):
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})


@pytest.mark.asyncio
@pytest.mark.parametrize("reduction", ["token-mean", "sum"])
async def test_r26_a_run_reports_the_loss_of_the_step(tmp_path, reduction):
    long, short = short_datum([1, 2, 3, 4]), short_datum([5, 6])
    async with AsyncServiceClient.local(model="tiny") as service:

        async def reported(batches):
            async def made():
                return await service.create_lora_training_client("tiny", rank=4, seed=1)

            settings = TrainSettings(steps=1, accumulate=len(batches), checkpoint_every=None)
            folder = tmp_path / str(len(batches))
            pipeline = Pipeline(NLL(reduction=reduction))
            await train(
                service,
                made,
                batches,
                pipeline,
                folder=folder,
                settings=settings,
                optimizer=AdamParams(learning_rate=0.0),
            )
            return scalars(read_steps(folder)[-1])["loss/total"]

        assert await reported([[long], [short]]) == pytest.approx(await reported([[long, short]]), rel=1e-5)
