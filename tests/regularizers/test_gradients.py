"""First and second derivatives of every ready-made term, against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.regularizers.support import datums, loss_of, random_logprobs
from tinkex_py import per_datum
from tinkex_py.base_losses import CISPO, DPO, NLL, PPO, ImportanceSampling
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

WEIGHTS = [1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 0.0, 1.0]
FIELD = {"reference_field": "reference"}
PAIR = {"pair_field": "reference", "mask": "weights"}
BETWEEN = {"mode": "interpolated", "reference_field": "reference"}


def cubic(data, logprobs):
    return logprobs.pow(3).sum(), {"ignored": 1}


def coupled(data, logprobs):
    """Its second derivative is not diagonal."""
    return (logprobs.exp().sum() ** 2).reshape(1)


ON_BOTH = [
    L1(target="probs", reduction="mean"),
    L2(center="mean", clip=1.0, reduction="seq-mean-token-mean"),
    L2(target="probs", mask="weights", reduction="token-mean"),
    ElasticNet(l1_ratio=0.7, reduction="seq-mean-token-sum", mask="weights"),
    NLL(reduction="seq-mean-token-mean"),
    Entropy(over="tokens", temperature=1.5, mask="weights", reduction="mean"),
    Entropy(over="tokens", temperature=0.5, normalize=True),
    KLDivergence(**FIELD, over="tokens", direction="reverse"),
    JensenShannon(**FIELD, over="tokens", reduction="mean"),
    Consistency(**PAIR, metric="mse", reduction="seq-mean-token-mean"),
    Consistency(**PAIR, metric="l1"),
    Consistency(**PAIR, metric="cosine", reduction="seq-mean-token-sum"),
    Consistency(**PAIR, metric="cosine", reduction="sum"),
    Consistency(**PAIR, metric="kl", over="tokens", reduction="sum"),
    GradientPenalty(fn=cubic, **BETWEEN, seed=3),
]
ON_TOKENS = [
    *(
        SampledKL(**FIELD, estimator=kind, mask="weights", reduction="seq-mean-token-mean")
        for kind in ("k1", "k2", "k3")
    ),
    SampledKL(**FIELD, estimator="abs"),
    ImportanceSampling(mask="weights", reduction="token-mean"),
    PPO(mask="weights", reduction="seq-mean-token-sum"),
    DPO(**FIELD),
    DPO(**FIELD, beta=2.0, label_smoothing=0.2, reduction="sum"),
    GradientPenalty(fn=cubic),
    GradientPenalty(fn=coupled, target_norm=0.0, reduction="sum"),
    GradientPenalty(fn=coupled, **BETWEEN, seed=4, target_norm=0.5),
    GradientPenalty(fn=Entropy(over="tokens")),
    GradientPenalty(fn=KLDivergence(**FIELD, direction="reverse", over="tokens")),
    GradientPenalty(fn=per_datum(lambda data, parts: sum(part.exp().sum() ** 2 for part in parts))),
]
ON_CANDIDATES = [
    Entropy(),
    Entropy(mode="minimize", temperature=0.7, normalize=True, reduction="seq-mean-token-mean"),
    KLDivergence(**FIELD),
    KLDivergence(**FIELD, direction="reverse", mask="weights", reduction="token-mean"),
    KLDivergence(**FIELD, symmetric=True, reduction="seq-mean-token-sum"),
    JensenShannon(**FIELD, mask="weights"),
    Consistency(**PAIR, metric="kl", reduction="seq-mean-token-mean"),
    Orthogonality(mask="weights"),
    Orthogonality(mode="hard", axis="columns", target="probs", mask="weights"),
]
# The largest eigenvalue has a second derivative that gradgradcheck cannot separate from those of its neighbours.
ONCE = [Orthogonality(mode="spectral", axis=axis, target="probs", mask="weights") for axis in ("rows", "columns")]
CASES = [
    *((term, None) for term in [*ON_BOTH, *ON_TOKENS]),
    *((term, 3) for term in [*ON_BOTH, *ON_CANDIDATES, *ONCE]),
]


@pytest.mark.filterwarnings("ignore:.*no mask= is given:FutureWarning")
@pytest.mark.parametrize(("term", "candidates"), CASES, ids=lambda value: type(value).__name__)
def test_derivatives(term, candidates):
    shape = (8,) if candidates is None else (8, candidates)
    reference = random_logprobs(*shape, seed=1)
    fields = {"reference": reference}
    if candidates is None:
        fields |= {"logprobs": reference, "advantages": torch.linspace(-1, 2, 8)}
    loss = loss_of(term, datums((3, 1, 2, 2), candidates, weights=WEIGHTS, **fields))
    leaf = random_logprobs(*shape).requires_grad_()
    assert gradcheck(loss, leaf)
    if term not in ONCE:
        assert gradgradcheck(loss, leaf)


def test_terms_with_a_constant_factor_have_the_documented_gradient():
    """CISPO and SampledEntropy are not the derivative of their value."""
    data = datums((8,), logprobs=random_logprobs(8, seed=1), advantages=torch.linspace(-1, 2, 8))
    leaf = random_logprobs(8).requires_grad_()
    ratio = (leaf - data[0].loss_fn_inputs["logprobs"].to_torch()).exp().detach()
    advantages = data[0].loss_fn_inputs["advantages"].to_torch()
    for term, expected in (
        (CISPO(clip_low_threshold=0.8, clip_high_threshold=1.2), -ratio.clamp(0.8, 1.2) * advantages),
        (SampledEntropy(), leaf.detach()),
    ):
        (gradient,) = torch.autograd.grad(loss_of(term, data)(leaf), leaf)
        torch.testing.assert_close(gradient, expected)
