"""Maximum likelihood."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.reduction import ReducedTerm
from tinkex_py.types import Datum


@dataclass(frozen=True, kw_only=True)
class NLL(ReducedTerm):
    """Negative log-likelihood of the target tokens.

    With x the logprobs and w the weights:

    - formula: `reduce(-x)`; by default `-sum(w * x)`, the services' `cross_entropy`
    - gradient: `-w`, divided by the denominator of the reduction
    - shapes: `[N]`, `[N, K]`, or any shape with `data=[]`
    - units: nats

    Source: the Tinker API's `cross_entropy`.

    Args:
        name: the term's name, if it is used as a regularizer and its spec gives none.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field, `[T]` or `[T, K]`, of numbers >= 0. Data without it counts fully, as on the
            services; but all datums must have it or none. None ignores the data.
    """

    name: str = "nll"
    mask: str | None = "weights"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the denominators are its metrics."""
        positions = self.positions(data, logprobs, mask_optional=True)
        return positions.reduce(-positions.select(logprobs), self.reduction)
