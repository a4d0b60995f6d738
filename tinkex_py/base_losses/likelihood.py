"""Maximum likelihood of given answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.ready_made import NonEmptyStr
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
        name: default name, for use as a regularizer.
        reduction: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field, `[T]` or `[T, K]`, of numbers >= 0. If no datum has it, all positions have
            weight 1, as on the services. Default: `weights`, which may also be negative with reduction "sum". None: no
            mask.
    """

    weights_have_signs: ClassVar[bool] = True
    mask_is_optional: ClassVar[bool] = True

    name: NonEmptyStr = "nll"

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss; its metrics are the denominators."""
        positions = self.positions(data, logprobs)
        return positions.reduce(-positions.select(logprobs), self.reduction)
