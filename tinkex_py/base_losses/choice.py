"""A choice between candidates: a distribution over a few tokens at a position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from tinkex_py.errors import InvalidData
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.distributions import check_distinct, distributions, kl_parts
from tinkex_py.terms.fields import aligned_field, described_position
from tinkex_py.terms.ready_made import NonEmptyStr
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.types import Datum
from tinkex_py.values import Number


@dataclass(frozen=True, kw_only=True)
class Choice(ReducedTerm):
    """Trains the model to choose between K candidates, whatever the rest of the vocabulary.

    With s the probabilities of the candidates, renormalized by `log_softmax` over the K logprobs of a position, and t
    the target probabilities:

    - formula: `cross_entropy`: `-sum(t * log s)`; `kl`: `sum(t * (log t - log s))`; `brier`: `sum((s - t)**2)`, from 0
      to 2; then reduced
    - gradient: `cross_entropy` and `kl`: `s - t`; `brier`: `2 * s * (s - t - sum(s * (s - t)))`
    - shapes: `[N, K]`
    - units: nats; `brier` none

    `tinkex_py.data.candidates_datum` makes datums for it. A candidate that the model excludes (logprob -inf) needs the
    target 0.

    Metrics: `accuracy`, the share of positions where the likeliest candidate is that of the targets (the first one of
    equal ones); `mass`, the mean probability of all candidates together, before they are renormalized; `cross_entropy`,
    `kl` and `brier`, their means; and the denominators.

    Source: soft targets as in G. Hinton et al., "Distilling the Knowledge in a Neural Network"; G. W. Brier,
    "Verification of Forecasts Expressed in Terms of Probability".

    Args:
        name: default name, for use as a regularizer.
        reduction: over positions: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a position. A row of `[T, K]` has
            weight 1 if any of its numbers is not 0. Default: `weights`, if the datums have it; None: no mask.
        targets_field: the field with the target probabilities, `[T, K]`, numbers >= 0. Those of a position are divided
            by their sum.
        score: what to minimize: "cross_entropy", "kl" or "brier".
        label_smoothing: share of the targets that is spread evenly over the K candidates, from 0 to 1.
    """

    mask_is_optional: ClassVar[bool] = True

    name: NonEmptyStr = "choice"
    targets_field: NonEmptyStr = "weights"
    score: Literal["cross_entropy", "kl", "brier"] = "cross_entropy"
    label_smoothing: Annotated[Number, Field(ge=0, le=1)] = 0.0

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects what a mean counts."""
        return distributions(self, "candidates", data, logprobs)

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss. Its metrics are means over the selected positions, and the denominators."""
        positions = distributions(self, "candidates", data, logprobs)
        check_distinct(data, positions)
        targets = self._targets(data, logprobs, positions)
        selected = positions.select(logprobs)
        log_chosen = selected.log_softmax(-1)
        scores = {
            "cross_entropy": -(targets * log_chosen.masked_fill(targets == 0, 0.0)).sum(-1),
            "kl": kl_parts(targets.log(), log_chosen).sum(-1),
            "brier": (log_chosen.exp() - targets).square().sum(-1),
        }
        loss, denominators = positions.reduce(scores[self.score], self.reduction)
        with torch.no_grad():
            right = selected.argmax(-1) == targets.argmax(-1)
            means = {"accuracy": right.to(selected.dtype), "mass": selected.exp().sum(-1), **scores}
            metrics = {name: positions.reduce(values, "mean")[0] for name, values in means.items()}
        return loss, {**metrics, **denominators}

    def _targets(self, data: Sequence[Datum], logprobs: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Returns the target distributions of the selected positions, `[M, K]`."""
        given = positions.select(aligned_field(data, self.targets_field, logprobs))
        sums = given.sum(-1, keepdim=True)
        wrong = ~((given >= 0).all(-1) & (sums.squeeze(-1) > 0) & torch.isfinite(sums.squeeze(-1)))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0].item())
            place = row if positions.kept is None else int(positions.kept[row])
            shown = ", ".join(f"{number.item():g}" for number in given[row])
            raise InvalidData(
                f"the targets {self.targets_field!r} at {described_position(data, [place])} are [{shown}]: pass "
                "numbers >= 0, at least one above 0"
            )
        targets = given / sums
        share = self.label_smoothing
        return (1.0 - share) * targets + share / targets.shape[-1] if share else targets
