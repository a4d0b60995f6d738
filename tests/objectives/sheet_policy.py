"""Policy losses, corrections, reductions, token weighting and entropy: sections A, B, C, F and G of the sheet."""

import math
from typing import Any

import torch

from tests.objectives.entries import Batch, Row, Value, batch, evaluated
from tinkex_py import BaseLossOutput, CustomLossOutput, RegularizerOutput
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
    overlong_penalty,
)
from tinkex_py.base_losses.correction import Correction, Drift, binary_kl
from tinkex_py.base_losses.covariance import covariances_of
from tinkex_py.losses.controllers import AdaptiveEntropy
from tinkex_py.regularizers import SampledEntropy, SampledKL
from tinkex_py.terms.numerics import safe_exp


def _logarithms(*numbers: float) -> list[float]:
    return [math.log(number) for number in numbers]


# The batch of sections A, B and G: ratios 1.5, 0.9 | 0.5, 4.
Q = [[-1.0, -1.0], [-1.0, -2.0]]
LP = [[-1.0 + math.log(1.5), -1.0 + math.log(0.9)], [-1.0 + math.log(0.5), -2.0 + math.log(4.0)]]
A = [[1.0, 1.0], [-1.0, -1.0]]
P = batch(LP, logprobs=Q, advantages=A)

NARROW = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
MEAN_OF_MEANS = {"reduction": "seq-mean-token-mean"}
LENGTHS = batch([[-4.0], [-1.0, -2.0, -3.0]])  # of section C
PROBABILITIES = batch([_logarithms(0.5, 0.9)])  # of section F
CANDIDATES = batch([[_logarithms(0.5, 0.2, 0.1)]], weights=[[[1.0, 0.0, 0.0]]])  # of F4
KL = batch([[-1.0, -2.0]], logprobs=[[-1.2, -1.5]], reference_logprobs=[[-0.5, -2.5]])  # of B6
REFERENCE = {"reference_field": "reference_logprobs"}

ROWS = [
    Row("A1", Reinforce(), P, -0.606957, [-1, -1, 1, 1]),
    Row("A2", ImportanceSampling(), P, 2.1, [-1.5, -0.9, 0.5, 4]),
    Row(
        "A3",
        PPO(),
        P,
        2.7,
        [0, -0.9, 0, 4],
        {"clip_fraction": 0.5, "clip_fraction_low": 0.25, "clip_fraction_high": 0.25},
    ),
    Row("A3", PPO(clip_high_threshold=1.28), P, 2.62, what="higher"),
    Row("A3d", PPO(dual_clip=3.0), P, 1.7, [0, -0.9, 0, 0], {"dual_clip_fraction": 0.25}),
    Row("A5", PPO(clip_high_threshold=1.28, reduction="token-mean"), P, 0.655, [0, -0.225, 0, 1]),
    Row("A6", GSPO(**NARROW), P, 0.628427, [0, 0, 1.414214, 1.414214], smooth=False),
    Row("A6", GSPO(**NARROW, **MEAN_OF_MEANS), P, 0.157107, [0, 0, 0.353553, 0.353553], smooth=False, what="mean"),
    Row("A7", GMPO(), P, 0.239369, [0, -0.289681, 0, 0.409365]),
    Row("A8", CISPO(clip_high_threshold=2.0), P, -0.187358, [-1.5, -0.9, 0.5, 2], smooth=False),
    Row("A9", SAPO(reduction="sum"), P, 0.679003, [-1.410022, -0.897754, 0.467070, 0.630445]),
    Row(
        "A10",
        GSPO(**NARROW, reduction="seq-mean-token-sum"),
        P,
        0.314214,
        [0, 0, 0.707107, 0.707107],
        smooth=False,
    ),
    Row("A11", VESPO(reduction="sum"), P, -1.413461, [-0.637762, -0.637762, 1.082682, 1.082682], smooth=False),
    Row("A12", DRO(beta=0.05), P, -0.542513, [-0.979727, -1.005268, 0.965343, 1.069315]),
    Row("A13", TOPR(), P, -0.606957, [-1, -1, 1, 1], smooth=False),
    Row("A13", TOPR(level="token"), P, 0.239616, [-1, -1, 0.5, 1], smooth=False, what="token"),
    Row("A14", NLL(), batch([[-1.0, -2.0, -4.0]], weights=[[1.0, 0.5, -0.25]]), 1, [-1, -0.5, 0.25], masked=False),
]
# Entries whose loss is a correction around another loss.
ROWS += [
    Row(
        "B1",
        Corrected(policy=Reinforce(), corrections=[TruncatedIS(cap=2.0)]),
        P,
        -0.187358,  # that of A8: truncated weights around REINFORCE are CISPO without a lower bound
        [-1.5, -0.9, 0.5, 2],
        smooth=False,
    ),
    Row(
        "B1",
        Corrected(policy=Reinforce(), corrections=[TruncatedIS(cap=2.0, normalize=True)]),
        P,
        -0.152945,  # that of A8 divided by the mean weight 4.9 / 4
        [-1.224490, -0.734694, 0.408163, 1.632653],
        smooth=False,
        together=0,
        what="normalized",
    ),
    Row(
        "B2",
        Corrected(policy=Reinforce(), corrections=[MaskedIS(low=0.49999, high=2.0)]),  # one ratio is 0.5, rounded
        P,
        1.040053,
        [-1.5, -0.9, 0.5, 0],
        {"correction_kept": 0.75},
        smooth=False,
    ),
]

# prime-rl's default loss is a composition: DPPO's mask around importance sampling, and a pull to the sampler.
DPPO = Corrected(policy=ImportanceSampling(), corrections=[ProbabilityMask(low=0.15, high=0.15)])
ROWS += [
    Row(
        "B5",
        Corrected(policy=CISPO(clip_high_threshold=3.0), corrections=[ProbabilityMask(low=0.15, high=0.15)]),
        P,
        -0.846292,
        [0, -0.9, 0, 3],
        smooth=False,
        what="verl",
    ),
    Row("B6", SampledKL(**REFERENCE, estimator="k3", sampler_field="logprobs"), KL, 0.246263, [-0.610701, 0.303265]),
    Row(
        "B6",
        SampledKL(**REFERENCE, sampler_field="logprobs"),
        KL,
        0.246263,
        [-0.610701, 0.303265],
        smooth=False,
        what="plus",
    ),
    Row("B6", SampledKL(**REFERENCE), KL, 0.148721 + 0.106531, [-0.5, 0.5], smooth=False, what="on-policy"),
    Row(
        "B7",
        Corrected(policy=PPO(dual_clip=3.0)),
        P,
        1.7,
        None,
        {
            "mean_ratio": 1.725,
            "ess": 2.465562,
            "ess_fraction": 0.616390,
            "chi2_token": 3.8275,
            "chi2_seq": 1.91125,
            "ppl_ratio": 0.783885,
            "sampler_kl_k1": -0.248313,
            "sampler_kl_k2": 0.322221,
            "sampler_kl_k3": 0.476687,
            "clip_fraction_high": 0.25,
            "clip_fraction_low": 0.25,
            "dual_clip_fraction": 0.25,
        },
    ),
    Row("C1", NLL(), LENGTHS, 10, [-1, -1, -1, -1]),
    Row("C1", NLL(reduction="token-mean"), LENGTHS, 2.5, [-0.25, -0.25, -0.25, -0.25], what="token-mean"),
    Row("C1", NLL(reduction="seq-mean-token-sum"), LENGTHS, 5, [-0.5, -0.5, -0.5, -0.5], what="seq-mean-token-sum"),
    Row("C1", NLL(reduction="constant", length=5), LENGTHS, 1, [-0.1, -0.1, -0.1, -0.1], what="constant"),
    Row("C1", NLL(**MEAN_OF_MEANS), LENGTHS, 3, [-0.5, -0.166667, -0.166667, -0.166667], what="seq-mean-token-mean"),
    Row("G3", KLCov(), P, 2.793147, [-1.5, -0.9, -0.5, 4], {"kl_cov_fraction": 0.25}, together=0, what="kl"),
    Row(
        "G3",
        ClipCov(clip_low_threshold=0.4, clip_high_threshold=1.6, cov_low=0.3, cov_high=0.5),
        P,
        3.6,
        [0, -0.9, 0.5, 4],
        {"cov_clip_fraction": 0.25},
        together=0,
        what="clip",
    ),
    Row("F1", Focal(), PROBABILITIES, 0.174340, [-0.596574, -0.028965]),
    Row("F2", DFT(), PROBABILITIES, 0.441398, [-0.5, -0.9], smooth=False),
    Row("F3", Unlikelihood(), PROBABILITIES, 2.995732, [1, 9]),
    Row(
        "F4",
        EAFT(),
        CANDIDATES,
        0.567998,
        [-0.819448, 0, 0],
        {"entropy": 0.900256, "token_weight": 0.819448},
        smooth=False,
        masked=False,  # its mask is the field of the targets
    ),
    Row(
        "F4",
        EAFT(entropy_field="entropies", candidates=3),
        batch([_logarithms(0.5)], entropies=[[0.900256]]),
        0.567998,
        [-0.819448],
        smooth=False,
        what="field",
    ),
]


def _factors(correction: Correction) -> torch.Tensor:
    tokens = Reinforce().tokens(P.data, P.packed, with_sampler=True, by_datum=True)
    return correction.factors(Drift(tokens, tokens.logprobs))


def _tokens(term: Any, given: Batch) -> list[float]:
    """The loss of each token, from datums that hold only that token."""
    return [evaluated(term, given.part(at))[0].item() for at in range(len(given.data))]


def _dppo_with_square() -> list[Any]:
    square = SampledKL(reference_field="logprobs", estimator="k2")
    pairs = [evaluated(DPPO, P), evaluated(square, P)]
    return [
        pairs[0][0] + 2e-3 * pairs[1][0],  # k2 is half the square, so tau = 1e-3 is a weight of 2e-3
        *(pairs[0][1] + 2e-3 * pairs[1][1]),
    ]


def _calls(total: float | None) -> float:
    term = NLL(reduction="token-mean", total=total)
    return sum(evaluated(term, LENGTHS.part(at))[0].item() for at in range(2))


def _mean_slope_in_logits(logits: list[float]) -> torch.Tensor:
    """The slope of the entropy, as the mean over the tokens that the model samples."""
    leaf = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    logprobs = leaf.log_softmax(0)
    slopes = evaluated(SampledEntropy(), batch([logprobs.detach()]))[1]
    (mean,) = torch.autograd.grad(logprobs, leaf, grad_outputs=logprobs.detach().exp() * slopes)
    return -mean


def _adapted() -> tuple[list[float], list[float]]:
    """The coefficients after the steps, and what the next steps apply."""
    controller = AdaptiveEntropy(target=0.5, delta=0.005)
    coefficients, weights = [], []
    for entropy in (0.4, 0.45, 0.6, 0.55):
        metrics = {"entropy": entropy, "tokens": 1.0}
        own = RegularizerOutput(name="bonus", value=0.0, weight=controller.weight_of("bonus"), contribution=0.0)
        controller.update(
            [
                CustomLossOutput(
                    loss_total=0.0,
                    base_loss=BaseLossOutput(value=0.0),
                    regularizers={"bonus": own.model_copy(update={"custom_metrics": metrics})},
                    regularizer_total=0.0,
                )
            ]
        )
        coefficients.append(controller.state_dict()["coefficients"]["bonus"])
        weights.append(controller.weight_of("bonus"))
    return coefficients, weights


SINGLE = batch(
    [[one] for part in LP for one in part],
    logprobs=[[one] for part in Q for one in part],
    advantages=[[one] for part in A for one in part],
)
EACH = batch([_logarithms(0.5), _logarithms(0.9)])
OLD = batch([[-2.0, -1.5]], logprobs=[[-1.0, -1.0]], advantages=[[-1.0, -1.0]])
REWARDS = [1.0, 0.0, 0.0, 0.0]
GEOMETRIC = Rejection(statistic="geometric", low=0.8, high=1.3)

VALUES = [
    Value("P", "lp", lambda: LP, [-0.594535, -1.105361, -1.693147, -0.613706]),
    Value(
        "O1",
        "tangent",
        lambda: safe_exp(torch.tensor(25.0, dtype=torch.float64)),
        2910991172.4587,
    ),
    Value("A3", "tokens", lambda: _tokens(PPO(), SINGLE), [-1.2, -0.9, 0.8, 4]),
    Value("A4", "centred", lambda: group_advantages(REWARDS, 4, normalize="none"), [0.75, -0.25, -0.25, -0.25]),
    Value("A4", "adv", lambda: group_advantages(REWARDS, 4, eps=0), [1.5, -0.5, -0.5, -0.5]),
    Value(
        "A4",
        "adv_pop",
        lambda: group_advantages(REWARDS, 4, eps=0, ddof=0),
        [1.732051, -0.577350, -0.577350, -0.577350],
    ),
    Value(
        "A4",
        "rloo",
        lambda: group_advantages(REWARDS, 4, normalize="leave-one-out"),
        [1, -0.333333, -0.333333, -0.333333],
    ),
    Value("A5", "penalties", lambda: [overlong_penalty(length) for length in (16000, 18432, 21000)], [0, -0.5, -1]),
    Value("A9", "tokens", lambda: _tokens(SAPO(), SINGLE), [-2.489837, -1.900083, 1.415938, 3.652986]),
    Value("B1", "token_2", lambda: _factors(TruncatedIS(cap=2.0)), [1.5, 0.9, 0.5, 2]),
    Value(
        "B1",
        "sequence_1_5",
        lambda: _factors(TruncatedIS(cap=1.5, level="sequence")),
        [1.35, 1.35, 1.5, 1.5],
    ),
    Value(
        "B1",
        "batch_normalized",
        lambda: _factors(TruncatedIS(cap=2.0, normalize=True)),
        [1.224490, 0.734694, 0.408163, 1.632653],
    ),
    Value("B2", "weights", lambda: _factors(MaskedIS(low=0.49999, high=2.0)), [1.5, 0.9, 0.5, 0]),
    Value("B3", "keep_geo", lambda: _factors(GEOMETRIC), [1, 1, 0, 0]),
    Value("B3", "keep_product", lambda: _factors(Rejection(statistic="product", low=0.5, high=1.5)), [1, 1, 0, 0]),
    # The means are 0.049948 and 0.903426.
    Value("B3", "k3_mean", lambda: _factors(Rejection(statistic="k3-mean", high=0.05)), [1, 1, 0, 0]),
    Value("B3", "k3_mean_low", lambda: _factors(Rejection(statistic="k3-mean", high=0.0499)), [0, 0, 0, 0]),
    Value("B3", "k3_mean_high", lambda: _factors(Rejection(statistic="k3-mean", high=0.90343)), [1, 1, 1, 1]),
    Value("B3", "keep_token", lambda: _factors(Rejection(statistic="token", low=0.49999, high=4.00001)), [1, 1, 1, 1]),
    # verl reads the bounds 0.5, 4 on the inverse ratio: 0.25 to 2 here.
    Value("B3", "keep_token_verl", lambda: _factors(Rejection(statistic="token", low=0.25, high=2.0)), [1, 1, 1, 0]),
    Value(
        "B4",
        "keep",
        lambda: evaluated(Corrected(policy=Reinforce(), corrections=[OffPolicyMask(limit=0.5)]), OLD)[1],
        [0, 0],
    ),
    Value(
        "B4",
        "keep_of_a_larger_limit",  # the drift is 0.75
        lambda: evaluated(Corrected(policy=Reinforce(), corrections=[OffPolicyMask(limit=0.7501)]), OLD)[1],
        [1, 1],
    ),
    Value("B5", "keep", lambda: _factors(ProbabilityMask(low=0.15, high=0.15)), [0, 1, 0, 1]),
    Value(
        "B5",
        "binary_kl",
        lambda: binary_kl(torch.tensor(Q).reshape(-1).double(), P.packed),
        [0.068213, 0.003003, 0.093546, 0.360613],
    ),
    Value(
        "B5",
        "loss_and_grad",
        _dppo_with_square,
        [3.102578, 0.000811, -0.900211, -0.001386, 4.002773],
    ),
    Value("C2", "sum_of_means", lambda: _calls(None), 6),
    Value("C2", "with_known_total", lambda: _calls(4), 2.5),
    Value("F1", "tokens", lambda: _tokens(Focal(), EACH), [0.173287, 0.001054]),
    Value("F2", "tokens", lambda: _tokens(DFT(), EACH), [0.346574, 0.094824]),
    Value(
        "F3",
        "tokens",
        lambda: _tokens(Unlikelihood(), EACH),
        [0.693147, 2.302585],
    ),
    Value("G2", "coefficient", lambda: _adapted()[0], [0.005, 0.01, 0.005, 0]),
    Value("G2", "applied_next", lambda: _adapted()[1], [0.005, 0.01, 0, 0]),
    Value(
        "G3",
        "cov",
        lambda: covariances_of(ImportanceSampling().tokens(P.data, P.packed, with_sampler=True)),
        [0.407152, -0.103673, 0.691460, -0.387981],
    ),
    Value(
        "G1",
        "mean_of_right",
        lambda: _mean_slope_in_logits([0.3, -1.0, 0.8, 0.1]),
        [0.0219, 0.100699, -0.184312, 0.061713],
    ),
    Value(
        "G1",
        "bonus_loss",
        lambda: 0.01 * evaluated(SampledEntropy(reduction="mean"), batch([[-0.5, -2.0]]))[0],
        -0.0125,
    ),
    Value(
        "G1",
        "grad_logprobs",
        lambda: 0.01 * evaluated(SampledEntropy(reduction="mean"), batch([[-0.5, -2.0]]))[1],
        [-0.0025, -0.01],
    ),
]
