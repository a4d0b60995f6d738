"""Consistency and Orthogonality."""

import math

import pytest
import torch

from tests.regularizers.support import LENGTHS, datum, datums, evaluated, random_logprobs
from tinkex_py import InvalidData
from tinkex_py.regularizers import Consistency, KLDivergence, Orthogonality

PAIR = {"pair_field": "pair"}


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


# --- Consistency ----------------------------------------------------------------------------------------------------


def test_mse_and_l1_closed_forms():
    data = datums((3,), original_logprobs=[0.0, -1.0, -3.0])
    logprobs = torch.tensor([-1.0, -1.0, -1.0])
    value, gradient, metrics = evaluated(Consistency(), data, logprobs)
    assert (value.item(), metrics) == (pytest.approx(5 / 3), {"tokens": 3.0})
    assert gradient.tolist() == pytest.approx([-2 / 3, 0.0, 4 / 3])
    value, gradient, _ = evaluated(Consistency(metric="l1", reduction="sum"), data, logprobs)
    assert (value.item(), gradient.tolist()) == (3.0, [-1.0, 0.0, 1.0])


@pytest.mark.parametrize("reduction", ["sum", "mean", "seq-mean-token-mean"])
def test_cosine_of_one_number_per_position_is_per_datum(reduction):
    logprobs, pair = random_logprobs(8), random_logprobs(8, seed=1).float().double()
    data = datums(pair=pair)
    value, gradient, metrics = evaluated(Consistency(**PAIR, metric="cosine", reduction=reduction), data, logprobs)
    vectors = zip(torch.split(logprobs, list(LENGTHS)), torch.split(pair, list(LENGTHS)), strict=True)
    distances = [1 - cosine(x.tolist(), y.tolist()) for x, y in vectors]
    assert value.item() == pytest.approx(sum(distances) / (1 if reduction == "sum" else 3))
    assert metrics == {"sequences": 3.0}
    # The cosine of a vector does not change along the vector.
    for part, x in zip(torch.split(gradient, list(LENGTHS)), torch.split(logprobs, list(LENGTHS)), strict=True):
        assert (part @ x).item() == pytest.approx(0.0, abs=1e-12)


def test_cosine_of_candidates_is_per_position():
    logprobs, pair = random_logprobs(8, 3), random_logprobs(8, 3, seed=1).float().double()
    value, _, metrics = evaluated(Consistency(**PAIR, metric="cosine"), datums(candidates=3, pair=pair), logprobs)
    rows = zip(logprobs.tolist(), pair.tolist(), strict=True)
    assert value.item() == pytest.approx(sum(1 - cosine(x, y) for x, y in rows) / 8)
    assert metrics == {"tokens": 8.0}


@pytest.mark.parametrize("candidates", [None, 2])
def test_a_zero_vector_has_cosine_0_and_no_gradient(candidates):
    shape = (2,) if candidates is None else (1, 2)
    for x, y in ((torch.zeros(shape), torch.ones(shape)), (torch.ones(shape), torch.zeros(shape))):
        data = datums((shape[0],), candidates=candidates, pair=y)
        value, gradient, _ = evaluated(Consistency(**PAIR, metric="cosine"), data, x)
        assert value == 1.0
        assert (gradient == 0).all()


def test_masked_datums_do_not_enter_the_mean_of_cosines():
    data = datums((2, 2), pair=[1.0, 1.0, 1.0, -1.0], weights=[0.0, 0.0, 1.0, 1.0])
    term = Consistency(**PAIR, metric="cosine", mask="weights")
    value, gradient, metrics = evaluated(term, data, torch.tensor([-torch.inf, 1.0, 1.0, 1.0]))
    assert (value.item(), metrics) == (pytest.approx(1.0), {"sequences": 1.0})
    assert torch.isfinite(gradient).all()


def test_kl_is_the_symmetric_divergence():
    logprobs, pair = random_logprobs(8, 3), random_logprobs(8, 3, seed=1).float().double()
    value, gradient, _ = evaluated(Consistency(**PAIR, metric="kl"), datums(candidates=3, pair=pair), logprobs)
    other = KLDivergence(reference=pair, symmetric=True, reduction="mean")
    expected, slope, _ = evaluated(other, [], logprobs)
    assert value.item() == pytest.approx(expected.item())
    torch.testing.assert_close(gradient, slope)
    data = datums(pair=[-1.0] * 8)
    with pytest.raises(InvalidData, match=r"Consistency is a formula over distributions, .* shape \(8,\)"):
        Consistency(**PAIR, metric="kl").compute(data, random_logprobs(8))
    assert torch.isfinite(Consistency(**PAIR, metric="kl", over="tokens").compute(data, random_logprobs(8))[0])


@pytest.mark.parametrize("metric", ["mse", "l1", "cosine", "kl"])
def test_consistency_is_zero_for_equal_logprobs_and_otherwise_positive(metric):
    logprobs, other = random_logprobs(4, 3).float().double(), random_logprobs(4, 3, seed=1)
    term = Consistency(**PAIR, metric=metric)
    assert evaluated(term, datums((4,), 3, pair=logprobs), logprobs)[0].item() == pytest.approx(0.0, abs=1e-12)
    assert evaluated(term, datums((4,), 3, pair=other), logprobs)[0] > 0


# --- Orthogonality --------------------------------------------------------------------------------------------------


def squares_by_hand(vectors, *, hard):
    size = range(len(vectors))
    gram = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in vectors] for x in vectors]
    if hard:
        return sum((gram[i][j] - (i == j)) ** 2 for i in size for j in size)
    return sum(gram[i][j] ** 2 for i in size for j in size if i != j)


@pytest.mark.parametrize("shape", [(3, 5), (6, 2)])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_modes_equal_their_definitions(shape, axis, normalize):
    x = random_logprobs(*shape)
    vectors = x if axis == "rows" else x.T
    if normalize:
        vectors = torch.tensor([[a / math.hypot(*v) for a in v] for v in vectors.tolist()], dtype=x.dtype)
    deviation = vectors @ vectors.T - torch.eye(vectors.shape[0], dtype=x.dtype)
    expected = {
        "soft": squares_by_hand(vectors.tolist(), hard=False),
        "hard": squares_by_hand(vectors.tolist(), hard=True),
        "spectral": torch.linalg.matrix_norm(deviation, 2).item(),
    }
    for mode, number in expected.items():
        value, _, metrics = evaluated(Orthogonality(mode=mode, axis=axis, normalize=normalize), [], x)
        assert value.item() == pytest.approx(number, rel=1e-10)
        assert metrics == {"vectors": len(vectors)}


C, S = math.cos(0.3), math.sin(0.3)


@pytest.mark.parametrize(
    ("vectors", "soft", "hard", "spectral"),
    [
        ([[C, S], [-S, C]], 0.0, 0.0, 0.0),
        # Both products are 1; the Gram matrix minus I has the eigenvalues 1 and -1.
        ([[1.0, 0.0], [1.0, 0.0]], 2.0, 2.0, 1.0),
        # With more vectors than dimensions, one eigenvalue is 0.
        ([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 0.0, 1.0, 1.0),
        # Norms count for hard and spectral.
        ([[2.0, 0.0], [0.0, 1.0]], 0.0, 9.0, 3.0),
    ],
)
def test_orthogonality_by_hand(vectors, soft, hard, spectral):
    x = torch.tensor(vectors, dtype=torch.float64)
    for mode, number in (("soft", soft), ("hard", hard), ("spectral", spectral)):
        assert evaluated(Orthogonality(mode=mode), [], x)[0].item() == pytest.approx(number, abs=1e-12)


def test_documented_gradients():
    x = random_logprobs(3, 4)
    gram = x @ x.T
    values, vectors = torch.linalg.eigh(gram)
    index = int((values - 1).abs().argmax())
    v = vectors[:, index : index + 1]
    expected = {
        "soft": 4 * (gram - torch.diag(gram.diagonal())) @ x,
        "hard": 4 * (gram - torch.eye(3, dtype=x.dtype)) @ x,
        "spectral": 2 * torch.sign(values[index] - 1) * v @ v.T @ x,
    }
    for mode, slopes in expected.items():
        torch.testing.assert_close(evaluated(Orthogonality(mode=mode, normalize=False), [], x)[1], slopes)


@pytest.mark.parametrize("mode", ["soft", "hard", "spectral"])
def test_zero_and_equal_vectors_give_finite_gradients(mode):
    x = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [-3.0, -1.0]])
    for normalize in (True, False):
        value, gradient, _ = evaluated(Orthogonality(mode=mode, normalize=normalize), [], x)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()
        assert (gradient[0] == 0).all()
    assert torch.isfinite(evaluated(Orthogonality(mode=mode), [], torch.full((3, 2), -1.0))[1]).all()
    assert evaluated(Orthogonality(mode=mode), [], torch.zeros(0, 2))[0] == 0


def test_many_positions_need_no_large_matrix():
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))  # 20 000 ** 2 floats would be 1.6 GB
    value, gradient, _ = evaluated(Orthogonality(), [], x)
    assert value.item() == pytest.approx(20_000**2 / 4, rel=0.02)  # squared cosines of random directions: 1 / 4 each
    assert torch.isfinite(gradient).all()


def test_masked_positions_and_other_shapes():
    x = random_logprobs(8, 3)
    mask = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    value, _, metrics = evaluated(Orthogonality(mask="weights"), datums(candidates=3, weights=mask), x)
    kept, _, _ = evaluated(Orthogonality(), [], x[torch.tensor(mask) == 1])
    assert (value.item(), metrics["vectors"]) == (pytest.approx(kept.item()), 5)
    deep = random_logprobs(2, 4, 3)
    flat, _, _ = evaluated(Orthogonality(), [], deep.reshape(8, 3))
    assert evaluated(Orthogonality(), [], deep)[0].item() == pytest.approx(flat.item())
    with pytest.raises(InvalidData, match=r"one vector per position, \[N, K\], but the logprobs have shape \(2,\)"):
        Orthogonality().compute([datum(2)], random_logprobs(2))
