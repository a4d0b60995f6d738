"""Terms on structure: agreement with a paired field, and orthogonality."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch

from tinkex_py.errors import InvalidData
from tinkex_py.losses.output import TOTAL_METRIC
from tinkex_py.losses.spec import TermResult
from tinkex_py.regularizers.norms import NormTerm
from tinkex_py.terms.distributions import Over, distributions, symmetric_kl_parts
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.numerics import safe_sqrt
from tinkex_py.terms.ready_made import NonEmptyStr
from tinkex_py.terms.reduction import Positions, ReducedTerm, Reduction
from tinkex_py.types import Datum
from tinkex_py.types.datum import target_shape

_eigenvalues = cast("Callable[[torch.Tensor], torch.Tensor]", torch.linalg.eigvalsh)  # pyright: ignore


@dataclass(frozen=True, kw_only=True)
class Consistency(ReducedTerm):
    """Distance between the logprobs and a paired field, such as those of another wording of the same prompt.

    With x the logprobs, y the field and w the mask:

    - formula: `mse`: `reduce((x - y)**2)`; `l1`: `reduce(|x - y|)`; `cosine`: `1 - x.y / (|x| |y|)` for each vector,
      which is a position's K candidates of `[N, K]`, or a datum's positions of `[N]`, then reduced over the vectors;
      `kl`: the mean of `KL(x || y)` and `KL(y || x)` for each distribution
    - gradient: `mse`: `2 * w * (x - y)`; `l1`: `w * sign(x - y)`, 0 at 0; `cosine`:
      `-(y / (|x| |y|) - cos * x / |x|**2)`, 0 where x or y is 0 (their cosine counts as 0); `kl`: that of
      `KLDivergence`
    - shapes: `[N]`, `[N, K]`, or any shape that the field has too; `kl` on `[N]` only with `over="tokens"`
    - units: nats squared, nats, none, nats

    The field is a constant: no gradient flows into it.

    Source: the NxPenalties library, "consistency"; S. Laine and T. Aila, "Temporal Ensembling for Semi-Supervised
    Learning".

    Args:
        name: default name of the regularizer.
        reduction: over numbers, vectors or distributions: "mean" or "token-mean", "sum", "seq-mean-token-sum",
            "seq-mean-token-mean". Vectors of `[N]` are one per datum: there every mean is the mean over datums.
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a number. Default: `weights`, if
            the datums have it; None: no mask.
        pair_field: a `loss_fn_inputs` field of every datum, in the shape of its logprobs.
        metric: "mse", "l1", "cosine" or "kl".
        over: for "kl": which numbers form a distribution, as in `KLDivergence`.
    """

    name: NonEmptyStr = "consistency"
    reduction: Reduction = "mean"
    pair_field: NonEmptyStr = "original_logprobs"
    metric: Literal["mse", "l1", "cosine", "kl"] = "mse"
    over: Over = "candidates"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        pair = aligned_field(data, self.pair_field, logprobs)
        if self.metric == "kl":
            positions = distributions(self, self.over, data, logprobs)
            other = positions.select_logprobs(pair, data, f"the field {self.pair_field!r}")
            parts = symmetric_kl_parts(positions.select(logprobs), other)
            return positions.reduce(parts, self.reduction)
        if self.metric == "cosine":
            return self._cosine(data, logprobs, pair)
        positions = self.positions(data, logprobs)
        difference = positions.select(logprobs) - positions.select(pair)
        return positions.reduce(difference.square() if self.metric == "mse" else difference.abs(), self.reduction)

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects the numbers, vectors or distributions that a mean counts."""
        if self.metric == "kl":
            return distributions(self, self.over, data, logprobs)
        return self.positions(data, logprobs, by_row=self.metric == "cosine" and logprobs.ndim > 1)

    def _total_of(self, data: Sequence[Datum]) -> float | None:
        """The vectors of `[T]` are one per datum, so that every mean is one over datums."""
        is_vector = self.metric == "cosine" and bool(data) and len(target_shape(data[0], 0)) == 1
        by_datum = is_vector and self.reduction != "sum"
        return super(Consistency, replace(self, reduction="seq-mean-token-mean") if by_datum else self)._total_of(data)

    def _cosine(self, data: Sequence[Datum], logprobs: torch.Tensor, pair: torch.Tensor) -> TermResult:
        if logprobs.ndim > 1:
            positions = self.positions(data, logprobs, by_row=True)
            x, y = positions.select(logprobs), positions.select(pair)
            return positions.reduce(_cosine_distance((x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)), self.reduction)
        positions = self.positions(data, logprobs, by_datum=True)
        x, y = positions.select(logprobs), positions.select(pair)
        products = [positions.sums(positions.weighted(product)) for product in (x * y, x * x, y * y)]
        return _over_datums(_cosine_distance(*products), positions.sizes(x), self)


@dataclass(frozen=True, kw_only=True)
class Orthogonality(NormTerm):
    """Pulls vectors apart until they are orthogonal.

    The vectors are the rows or columns of the matrix of all positions, `[N, K]`. With G their Gram matrix, which
    contains the products of all pairs:

    - formula: `soft`: the sum of squares of G off its diagonal; `hard`: `||G - I||**2`, the sum of all squares;
      `spectral`: the largest absolute eigenvalue of `G - I`
    - gradient: with X the vectors as rows, `soft`: `4 * (G - diag(G)) X`; `hard`: `4 * (G - I) X`; `spectral`:
      `2 * s * v v^T X` with v the eigenvector and s its eigenvalue's sign; through the normalization where there is
      one; 0 for a zero vector
    - shapes: `[N, K]`, or any shape with at least two axes given directly, as rows over its last axis
    - units: none with `normalize`, else nats to the fourth power (`spectral`: squared)

    Only the smaller of the two Gram matrices is computed, so N may be large. More vectors than dimensions cannot be
    orthogonal: then none of the three reaches 0.

    Source: the NxPenalties library, "orthogonality"; N. Bansal, X. Chen and Z. Wang, "Can We Gain More from
    Orthogonality Regularizations in Training Deep CNNs?" (soft orthogonality, and spectral restricted isometry).

    Args:
        name: default name of the regularizer.
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a position, any other number keeps
            it. Default: `weights`, if the datums have it; None: no mask.
        target: "logprobs", "probs", or the name of a field, as in `L1`.
        reduction: only "sum".
        mode: "soft", "hard" or "spectral".
        axis: "rows": the vectors are the positions; "columns": they are the candidates.
        normalize: divide each vector by its norm first. None: only with "soft", which then is a sum of squared
            cosines. The others also pull the norms to 1.
    """

    weights_are_factors: ClassVar[bool] = False

    name: NonEmptyStr = "orthogonality"
    reduction: Literal["sum"] = "sum"
    mode: Literal["soft", "hard", "spectral"] = "soft"
    axis: Literal["rows", "columns"] = "rows"
    normalize: bool | None = None

    @property
    def coupling(self) -> str | None:
        """The vectors of all datums are compared with each other."""
        return "the vectors of all datums are compared with each other"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metric is the number of vectors."""
        target = self.target_tensor(data, logprobs)
        if target.ndim < 2:
            raise InvalidData(
                f"Orthogonality needs one vector per position, [N, K], but the {self.target} have shape "
                f"{tuple(target.shape)}: pass [T, K] targets"
            )
        _, rows = self.selected(data, logprobs, by_row=True)
        vectors = rows if self.axis == "rows" else rows.T
        if self.normalize if self.normalize is not None else self.mode == "soft":
            vectors = _normalized(vectors)
        penalty = _spectral(vectors) if self.mode == "spectral" else _gram_squares(vectors, hard=self.mode == "hard")
        return penalty, {"vectors": vectors.shape[0]}


def _cosine_distance(product: torch.Tensor, square_x: torch.Tensor, square_y: torch.Tensor) -> torch.Tensor:
    scale = square_x * square_y
    defined = scale > 0
    return 1.0 - product * torch.where(defined, scale, 1.0).rsqrt() * defined


def _over_datums(values: torch.Tensor, sizes: torch.Tensor, term: ReducedTerm) -> tuple[torch.Tensor, dict[str, float]]:
    counted = sizes > 0
    metrics = {"sequences": float(counted.sum().item())}
    if term.total is not None:
        metrics[TOTAL_METRIC] = term.total
    added = (values * counted).sum()
    return (added if term.reduction == "sum" else added / (term.total or metrics["sequences"] or 1.0)), metrics


def _normalized(vectors: torch.Tensor) -> torch.Tensor:
    lengths = safe_sqrt(vectors.square().sum(1, keepdim=True))
    return vectors / torch.where(lengths > 0, lengths, 1.0)


def _gram_squares(vectors: torch.Tensor, *, hard: bool) -> torch.Tensor:
    """Returns the sum of squares of the Gram matrix without its diagonal; `hard`: minus the identity."""
    count, dimensions = vectors.shape
    if count <= dimensions:
        gram = vectors @ vectors.T
        wanted = torch.ones_like(gram.diagonal()) if hard else gram.diagonal()
        return (gram - torch.diag(wanted)).square().sum()
    # X X^T and X^T X have the same sum of squares, and the diagonal needs neither.
    squares = (vectors.T @ vectors).square().sum()
    diagonal = vectors.square().sum(1)
    return squares - 2.0 * diagonal.sum() + count if hard else squares - diagonal.square().sum()


def _spectral(vectors: torch.Tensor) -> torch.Tensor:
    """Returns the largest absolute eigenvalue of the Gram matrix minus the identity."""
    count, dimensions = vectors.shape
    if not count:
        return vectors.sum()
    gram = vectors @ vectors.T if count <= dimensions else vectors.T @ vectors
    deviations = (_eigenvalues(gram) - 1.0).abs()
    # The larger Gram matrix has the same eigenvalues and zeros.
    return deviations.amax() if count <= dimensions else torch.cat([deviations, deviations.new_ones(1)]).amax()
