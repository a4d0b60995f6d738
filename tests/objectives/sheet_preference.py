"""Preference losses, candidates and distillation: sections D and E of the sheet."""

import asyncio
from typing import Any

import torch

from tests.objectives.entries import Batch, Row, Value, batch, evaluated
from tinkex_py import Datum, Pipeline, RegularizerSpec
from tinkex_py.base_losses import (
    CPO,
    DPO,
    DPOP,
    IPO,
    KTO,
    NLL,
    ORPO,
    Choice,
    Distillation,
    Hinge,
    ImportanceSampling,
    SimPO,
    SLiC,
)
from tinkex_py.data import with_role_masks, with_teacher_advantages
from tinkex_py.regularizers import KLDivergence, SampledKL

# One pair of section D, chosen and rejected. In D9 the chosen answer is less likely than under the reference.
REFERENCE = [[-1.2, -0.9], [-1.5, -1.0, -1.4]]
PAIR = batch([[-1.0, -0.5], [-2.0, -1.0, -1.5]], reference=REFERENCE, label=[[1.0], [-1.0]])
BELOW = batch([[-1.4, -0.9], [-2.0, -1.0, -1.5]], reference=REFERENCE)
AGAINST: dict[str, Any] = {"reference_field": "reference"}
PAIRED: dict[str, Any] = {"together": 2, "zero_if_empty": False}

# Three candidates of section E: student, teacher, and a certain target.
STUDENT = [[0.5, 0.2, 0.1]]
TEACHER = [[0.6, 0.2, 0.1]]
CERTAIN = [[1.0, 0.0, 0.0]]
CANDIDATES = batch(
    [torch.tensor(STUDENT, dtype=torch.float64).log()],
    reference=[torch.tensor(TEACHER, dtype=torch.float64).log().numpy()],
    weights=[CERTAIN],
)

SAMPLED = batch([[-1.1, -1.8]], logprobs=[[-1.0, -2.0]], teacher_logprobs=[[-0.5, -2.5]])  # of E6
ON_POLICY = Batch(SAMPLED.logprobs, with_teacher_advantages(SAMPLED.data))

ROWS = [
    Row(
        "D1",
        DPO(**AGAINST, beta=0.5),
        PAIR,
        0.437488,
        [-0.177172, -0.177172, 0.177172, 0.177172, 0.177172],
        {
            "accuracy": 1.0,
            "margin": 0.6,
            "chosen_reward": 0.3,
            "rejected_reward": -0.3,
            "chosen_logprob": -1.5,
            "rejected_logprob": -4.5,
            "pairs": 1.0,
        },
        **PAIRED,
    ),
    Row(
        "D1",
        DPO(**AGAINST, beta=0.5, label_smoothing=0.1),
        PAIR,
        0.497488,
        [-0.127172, -0.127172, 0.127172, 0.127172, 0.127172],
        what="smoothed",
        **PAIRED,
    ),
    Row(
        "D1",
        DPO(**AGAINST, beta=0.5, label_smoothing=0.1, robust=True),
        PAIR,
        0.362488,
        [-0.239672, -0.239672, 0.239672, 0.239672, 0.239672],
        what="robust",
        **PAIRED,
    ),
    Row(
        "D2",
        IPO(**AGAINST, beta=0.5),
        PAIR,
        0.25,
        [-0.5, -0.5, 0.333333, 0.333333, 0.333333],
        {"margin": 0.25},  # beta times the difference of the means, 0.5
        **PAIRED,
    ),
    Row(
        "D2",
        IPO(**AGAINST, beta=0.5, normalize=False),
        PAIR,
        0.04,
        [0.4, 0.4, -0.4, -0.4, -0.4],
        what="sums",
        **PAIRED,
    ),
    Row("D3", Hinge(**AGAINST, beta=0.5), PAIR, 0.4, [-0.5, -0.5, 0.5, 0.5, 0.5], **PAIRED),
    Row("D3", SLiC(margin=4.0, nll_weight=0.0), PAIR, 1.0, [-1.0, -1.0, 1.0, 1.0, 1.0], **PAIRED),
    Row(
        "D4",
        KTO(**AGAINST, beta=0.5, reference_point=0.2),
        PAIR,
        0.425739,
        [-0.061879, -0.061879, 0.060065, 0.060065, 0.060065],
        {"reference_point": 0.2, "desirable_reward": 0.3, "undesirable_reward": -0.3, "sequences": 2.0},
        masked=False,
    ),
    Row(
        "D5",
        SimPO(beta=2.0, gamma=0.5),
        PAIR,
        0.313262,
        [-0.268941, -0.268941, 0.179294, 0.179294, 0.179294],
        **PAIRED,
    ),
    Row(
        "D6",
        ORPO(beta=0.1),
        PAIR,
        0.777825,
        [-0.523017, -0.523017, 0.010422, 0.010422, 0.010422],
        {"log_odds": 1.136871, "nll": 0.75},
        **PAIRED,
    ),
    Row(
        "D7",
        CPO(beta=0.1, nll_weight=1.0),
        PAIR,
        1.304355,
        [-0.542556, -0.542556, 0.042556, 0.042556, 0.042556],
        {"nll": 0.75},
        **PAIRED,
    ),
    Row(
        "D9",
        DPOP(**AGAINST, beta=0.5, penalty=5.0),
        BELOW,
        0.854355,
        [-1.723328, -1.723328, 0.287221, 0.287221, 0.287221],
        {"shortfall": 0.2},
        **PAIRED,
    ),
    Row(
        "E1",
        Distillation(**AGAINST, outside="raw"),
        CANDIDATES,
        0.109393,
        [-0.6, -0.2, -0.1],
        {"mass": 0.8, "teacher_mass": 0.9, "tokens": 1.0},
        what="raw",
    ),
    Row("E1", Distillation(**AGAINST), CANDIDATES, 0.040078, [-0.35, -0.1, -0.05], what="tail"),
    Row(
        "E1",
        Distillation(**AGAINST, outside="renormalize"),
        CANDIDATES,
        0.003765,
        [-0.041667, 0.027778, 0.013889],
        what="renormalized",
    ),
    Row(
        "E1",
        KLDivergence(**AGAINST, normalize=True, mask="weights"),
        CANDIDATES,
        0.003765,
        [-0.041667, 0.027778, 0.013889],
    ),
    Row(
        "E2",
        Distillation(**AGAINST, divergence="reverse"),
        CANDIDATES,
        0.047469,
        [-0.437734, -0.138629, -0.069315],
        what="tail",
    ),
    Row(
        "E2",
        Distillation(**AGAINST, divergence="reverse", outside="renormalize"),
        CANDIDATES,
        0.003832,
        [-0.042732, 0.028488, 0.014244],
        what="renormalized",
    ),
    Row(
        "E2",
        KLDivergence(**AGAINST, direction="reverse", normalize=True, mask="weights"),
        CANDIDATES,
        0.003832,
        [-0.042732, 0.028488, 0.014244],
    ),
    Row(
        "E3",
        Distillation(**AGAINST, divergence="jsd"),
        CANDIDATES,
        0.010771,
        [-0.095748, -0.028768, -0.014384],
        what="half",
    ),
    Row(
        "E3",
        Distillation(**AGAINST, divergence="jsd", beta=0.1),
        CANDIDATES,
        0.003654,
        [-0.031993, -0.009233, -0.004616],
        what="tenth",
    ),
    Row(
        "E4",
        Choice(),
        CANDIDATES,
        0.470004,
        [-0.375, 0.25, 0.125],
        {"accuracy": 1.0, "mass": 0.8, "cross_entropy": 0.470004, "kl": 0.470004, "brier": 0.21875},
    ),
    Row("E4", Choice(score="kl"), CANDIDATES, 0.470004, [-0.375, 0.25, 0.125], what="kl"),
    Row("E4", Choice(label_smoothing=0.3), CANDIDATES, 0.722576, [-0.175, 0.15, 0.025], what="smoothed"),
    Row("E5", Choice(score="brier"), CANDIDATES, 0.21875, [-0.273438, 0.203125, 0.070313]),
    Row("E6", ImportanceSampling(), ON_POLICY, 0.158283, [-0.452419, 0.610701]),
]


def advantages_of(data: list[Datum]) -> list[float]:
    return data[0].loss_fn_inputs["advantages"].tolist()


def loss_of(term: Any, *datums: int) -> float:
    return evaluated(term, PAIR.part(*datums))[0].item()


def dpo_and_nll() -> list[float]:
    """DPO and, with weight 0.2, the NLL of the chosen answer: value and gradient."""
    nll = NLL(mask="chosen_weights", reduction="seq-mean-token-mean")
    pipeline = Pipeline(DPO(**AGAINST, beta=0.5), [RegularizerSpec(fn=nll, weight=0.2)])
    leaves = [part.clone().requires_grad_() for part in PAIR.logprobs]
    loss = asyncio.run(pipeline.loss(with_role_masks(PAIR.data), leaves))
    loss.backward()
    return [loss.item(), *torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None]).tolist()]


def gradient_against_the_current_model() -> torch.Tensor:
    return evaluated(SampledKL(reference_field="teacher_logprobs", sampler_field="logprobs"), SAMPLED)[1]


def scaled_divergence(beta: float) -> float:
    term = Distillation(**AGAINST, divergence="jsd", beta=beta)
    return evaluated(term, CANDIDATES)[0].item() / beta


VALUES = [
    Value("D4", "desirable", lambda: loss_of(KTO(**AGAINST, beta=0.5, reference_point=0.2), 0), 0.450166),
    Value("D4", "undesirable", lambda: loss_of(KTO(**AGAINST, beta=0.5, reference_point=0.2), 1), 0.401312),
    Value("D8", "composed", dpo_and_nll, [0.587488, -0.277172, -0.277172, 0.177172, 0.177172, 0.177172]),
    Value("E3", "limit", lambda: scaled_divergence(1e-4), 0.040075),
    Value("E6", "advantages", lambda: advantages_of(with_teacher_advantages(SAMPLED.data)), [0.5, -0.5]),
    Value(
        "E6",
        "discounted",
        lambda: advantages_of(with_teacher_advantages(SAMPLED.data, discount=0.5)),
        [0.25, -0.5],
    ),
    Value("E6", "current", gradient_against_the_current_model, [-0.542902, 0.854982]),
]
