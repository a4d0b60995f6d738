"""Consistency and Orthogonality."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.autograd import gradcheck, gradgradcheck

from tests.regularizers.support import LENGTHS, datum, datums, evaluated, finite_differences, loss_of, random_logprobs
from tinkex_py import InvalidData
from tinkex_py.regularizers import Consistency, KLDivergence, Orthogonality

PAIR = {"pair_field": "pair"}
REDUCTIONS = ("sum", "mean", "seq-mean-token-sum", "seq-mean-token-mean")


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


# --- Consistency ----------------------------------------------------------------------------------------------------


def test_mse_and_l1_closed_forms():
    data = datums((3,), pair=[0.0, -1.0, -3.0])
    logprobs = torch.tensor([-1.0, -1.0, -1.0])
    value, gradient, metrics = evaluated(Consistency(**PAIR), data, logprobs)
    assert (value.item(), metrics) == (pytest.approx(5 / 3), {"tokens": 3.0})
    assert gradient.tolist() == pytest.approx([-2 / 3, 0.0, 4 / 3])
    value, gradient, _ = evaluated(Consistency(**PAIR, metric="l1", reduction="sum"), data, logprobs)
    assert (value.item(), gradient.tolist()) == (3.0, [-1.0, 0.0, 1.0])


def test_the_field_has_the_name_of_the_original_unless_told_otherwise():
    data = datums((2,), original_logprobs=[-1.0, -2.0])
    assert evaluated(Consistency(), data, torch.tensor([-1.0, -4.0]))[0].item() == 2.0


@pytest.mark.parametrize("reduction", ["sum", "mean", "seq-mean-token-mean"])
def test_cosine_of_one_number_per_position_is_per_datum(reduction):
    logprobs, pair = random_logprobs(8), random_logprobs(8, seed=1).float().double()
    data = datums(pair=pair)
    value, gradient, metrics = evaluated(Consistency(**PAIR, metric="cosine", reduction=reduction), data, logprobs)
    vectors = zip(torch.split(logprobs, list(LENGTHS)), torch.split(pair, list(LENGTHS)), strict=True)
    distances = [1 - cosine(x.tolist(), y.tolist()) for x, y in vectors]
    assert value.item() == pytest.approx(sum(distances) / (1 if reduction == "sum" else 3))
    assert metrics == {"sequences": 3.0}
    # along itself a vector's cosine does not change
    for part, x in zip(torch.split(gradient, list(LENGTHS)), torch.split(logprobs, list(LENGTHS)), strict=True):
        assert (part @ x).item() == pytest.approx(0.0, abs=1e-12)


def test_cosine_of_candidates_is_per_position():
    logprobs, pair = random_logprobs(8, 3), random_logprobs(8, 3, seed=1).float().double()
    data = datums(candidates=3, pair=pair)
    value, _, metrics = evaluated(Consistency(**PAIR, metric="cosine"), data, logprobs)
    rows = zip(logprobs.tolist(), pair.tolist(), strict=True)
    assert value.item() == pytest.approx(sum(1 - cosine(x, y) for x, y in rows) / 8)
    assert metrics == {"tokens": 8.0}


@pytest.mark.parametrize("candidates", [None, 2])
def test_a_zero_vector_has_cosine_0_and_no_gradient(candidates):
    shape = (2,) if candidates is None else (1, 2)
    for x, y in ((torch.zeros(shape), torch.ones(shape)), (torch.ones(shape), torch.zeros(shape))):
        lengths = (2,) if candidates is None else (1,)
        data = datums(lengths, candidates=candidates, pair=y)
        value, gradient, _ = evaluated(Consistency(**PAIR, metric="cosine"), data, x)
        assert value == 1.0
        assert (gradient == 0).all()


def test_datums_that_do_not_count_do_not_enter_the_mean_of_cosines():
    data = datums((2, 2), pair=[1.0, 1.0, 1.0, -1.0], weights=[0.0, 0.0, 1.0, 1.0])
    term = Consistency(**PAIR, metric="cosine", mask="weights")
    value, gradient, metrics = evaluated(term, data, torch.tensor([-torch.inf, 1.0, 1.0, 1.0]))
    assert (value.item(), metrics) == (pytest.approx(1.0), {"sequences": 1.0})
    assert torch.isfinite(gradient).all()


def test_kl_is_the_symmetric_divergence():
    logprobs, pair = random_logprobs(8, 3), random_logprobs(8, 3, seed=1).float().double()
    value, gradient, _ = evaluated(Consistency(**PAIR, metric="kl"), datums(candidates=3, pair=pair), logprobs)
    other = KLDivergence(reference=pair, symmetric=True, reduction="mean")
    wanted, slope, _ = evaluated(other, [], logprobs)
    assert value.item() == pytest.approx(wanted.item())
    torch.testing.assert_close(gradient, slope)


def test_kl_of_one_number_per_position_is_refused():
    data = datums(pair=[-1.0] * 8)
    with pytest.raises(InvalidData, match=r"Consistency is a formula over distributions, .* shape \(8,\)"):
        Consistency(**PAIR, metric="kl").compute(data, random_logprobs(8))
    assert torch.isfinite(Consistency(**PAIR, metric="kl", over="tokens").compute(data, random_logprobs(8))[0])


@pytest.mark.parametrize("metric", ["mse", "l1", "cosine", "kl"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("candidates", [None, 3])
def test_gradients_of_consistency(metric, reduction, candidates):
    shape = (8,) if candidates is None else (8, candidates)
    logprobs, pair = random_logprobs(*shape), random_logprobs(*shape, seed=1)
    data = datums(candidates=candidates, pair=pair, weights=[1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 0.0, 1.0])
    over = "tokens" if candidates is None else "candidates"
    term = Consistency(**PAIR, metric=metric, reduction=reduction, mask="weights", over=over)
    assert gradcheck(loss_of(term, data), logprobs.clone().requires_grad_())
    _, gradient, _ = evaluated(term, data, logprobs)
    torch.testing.assert_close(gradient, finite_differences(loss_of(term, data), logprobs), rtol=1e-5, atol=1e-7)


@given(seed=st.integers(0, 999), metric=st.sampled_from(["mse", "l1", "cosine", "kl"]))
def test_consistency_is_zero_with_itself_and_else_positive(seed, metric):
    logprobs = random_logprobs(4, 3, seed=seed).float().double()
    other = random_logprobs(4, 3, seed=seed + 1)
    term = Consistency(**PAIR, metric=metric)
    assert evaluated(term, datums((4,), 3, pair=logprobs), logprobs)[0].item() == pytest.approx(0.0, abs=1e-12)
    assert evaluated(term, datums((4,), 3, pair=other), logprobs)[0] > 0


# --- Orthogonality --------------------------------------------------------------------------------------------------


def gram_by_hand(vectors):
    return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in vectors] for x in vectors]


def squares_by_hand(vectors, *, hard):
    gram = gram_by_hand(vectors)
    size = range(len(gram))
    if hard:
        return sum((gram[i][j] - (i == j)) ** 2 for i in size for j in size)
    return sum(gram[i][j] ** 2 for i in size for j in size if i != j)


@pytest.mark.parametrize("shape", [(3, 5), (6, 2), (4, 4)])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("normalize", [True, False])
def test_soft_and_hard_equal_the_sums_over_pairs(shape, axis, normalize):
    x = random_logprobs(*shape)
    vectors = (x if axis == "rows" else x.T).tolist()
    if normalize:
        vectors = [[a / math.hypot(*v) for a in v] for v in vectors]
    for mode in ("soft", "hard"):
        term = Orthogonality(mode=mode, axis=axis, normalize=normalize)
        value, _, metrics = evaluated(term, [], x)
        assert value.item() == pytest.approx(squares_by_hand(vectors, hard=mode == "hard"), rel=1e-10)
        assert metrics == {"vectors": len(vectors)}


@pytest.mark.parametrize("shape", [(3, 5), (6, 2)])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_spectral_equals_the_largest_singular_value(shape, axis):
    x = random_logprobs(*shape)
    vectors = x if axis == "rows" else x.T
    deviation = vectors @ vectors.T - torch.eye(vectors.shape[0], dtype=x.dtype)
    wanted = torch.linalg.matrix_norm(deviation, 2)
    value, _, _ = evaluated(Orthogonality(mode="spectral", axis=axis), [], x)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-10)


def test_orthonormal_vectors_cost_nothing_and_parallel_ones_most():
    c, s = math.cos(0.3), math.sin(0.3)
    turned = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    for mode in ("soft", "hard", "spectral"):
        assert evaluated(Orthogonality(mode=mode), [], turned)[0].item() == pytest.approx(0.0, abs=1e-12)
    parallel = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # both products are 1; the Gram matrix minus I has the eigenvalues 1 and -1
    assert evaluated(Orthogonality(), [], parallel)[0].item() == 2.0
    assert evaluated(Orthogonality(mode="hard"), [], parallel)[0].item() == 2.0
    assert evaluated(Orthogonality(mode="spectral"), [], parallel)[0].item() == pytest.approx(1.0)
    # more vectors than dimensions: an eigenvalue 0 is 1 away from where it should be
    assert evaluated(Orthogonality(mode="spectral"), [], torch.eye(3, 2))[0].item() == 1.0
    # length counts for hard and spectral, not for soft
    long = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert evaluated(Orthogonality(), [], long)[0].item() == 0.0
    assert evaluated(Orthogonality(mode="hard"), [], long)[0].item() == 9.0
    assert evaluated(Orthogonality(mode="spectral"), [], long)[0].item() == 3.0


def test_documented_gradients():
    x = random_logprobs(3, 4)
    gram = x @ x.T
    _, gradient, _ = evaluated(Orthogonality(normalize=False), [], x)
    torch.testing.assert_close(gradient, 4 * (gram - torch.diag(gram.diagonal())) @ x)
    _, gradient, _ = evaluated(Orthogonality(mode="hard"), [], x)
    torch.testing.assert_close(gradient, 4 * (gram - torch.eye(3, dtype=x.dtype)) @ x)
    _, gradient, _ = evaluated(Orthogonality(mode="spectral"), [], x)
    values, vectors = torch.linalg.eigh(gram)
    index = int((values - 1).abs().argmax())
    v = vectors[:, index : index + 1]
    torch.testing.assert_close(gradient, 2 * torch.sign(values[index] - 1) * v @ v.T @ x)


@pytest.mark.parametrize("mode", ["soft", "hard", "spectral"])
def test_a_zero_vector_gets_no_gradient_and_no_nan(mode):
    x = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [-3.0, -1.0]])
    for normalize in (True, False):
        value, gradient, _ = evaluated(Orthogonality(mode=mode, normalize=normalize), [], x)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert (gradient[0] == 0).all()
    equal = torch.full((3, 2), -1.0)
    assert torch.isfinite(evaluated(Orthogonality(mode=mode), [], equal)[1]).all()
    assert evaluated(Orthogonality(mode=mode), [], torch.zeros(0, 2))[0] == 0


@pytest.mark.parametrize("mode", ["soft", "hard", "spectral"])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("target", ["logprobs", "probs"])
def test_gradients_of_orthogonality(mode, axis, target):
    data = datums(candidates=3, weights=[1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 0.0, 1.0])
    term = Orthogonality(mode=mode, axis=axis, target=target, mask="weights")
    logprobs = random_logprobs(8, 3)
    assert gradcheck(loss_of(term, data), logprobs.clone().requires_grad_())
    _, gradient, _ = evaluated(term, data, logprobs)
    torch.testing.assert_close(gradient, finite_differences(loss_of(term, data), logprobs), rtol=1e-5, atol=1e-6)


def test_second_derivatives_of_the_smooth_ones():
    x = random_logprobs(3, 4).requires_grad_()
    for term in (Orthogonality(), Orthogonality(mode="hard")):
        assert gradgradcheck(loss_of(term), x)


def test_many_positions_need_no_large_matrix():
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))  # 20 000 ** 2 floats would be 1.6 GB
    value, gradient, _ = evaluated(Orthogonality(), [], x)
    assert value.item() == pytest.approx(20_000**2 / 4, rel=0.02)  # squared cosines of random directions: 1 / 4 each
    assert torch.isfinite(gradient).all()


def test_masked_positions_and_other_forms():
    x = random_logprobs(8, 3)
    mask = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    value, _, metrics = evaluated(Orthogonality(mask="weights"), datums(candidates=3, weights=mask), x)
    kept, _, _ = evaluated(Orthogonality(), [], x[torch.tensor(mask) == 1])
    assert (value.item(), metrics["vectors"]) == (pytest.approx(kept.item()), 5)
    deep = random_logprobs(2, 4, 3)
    flat, _, _ = evaluated(Orthogonality(), [], deep.reshape(8, 3))
    assert evaluated(Orthogonality(), [], deep)[0].item() == pytest.approx(flat.item())


def test_one_number_per_position_is_no_vector():
    with pytest.raises(InvalidData, match=r"one vector per position, \[N, K\], but the logprobs have shape \(2,\)"):
        Orthogonality().compute([datum(2)], random_logprobs(2))
