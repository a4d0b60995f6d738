"""Entropy of distributions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tinkex_py.losses.spec import TermResult
from tinkex_py.regularizers.distributions import OVERS, Distributions, Over, entropy_parts
from tinkex_py.terms.reduction import ReducedTerm
from tinkex_py.types import Datum

Mode = Literal["maximize", "minimize"]
MODES: tuple[Mode, ...] = ("maximize", "minimize")


@dataclass(frozen=True, kw_only=True)
class Entropy(ReducedTerm):
    """Entropy of each distribution, to be raised or lowered.

    With `H = -sum(p * log p)` over the outcomes of one distribution:

    - formula: `reduce(-H)` to maximize, `reduce(H)` to minimize; the pipeline always lowers the loss
    - gradient of `-H`: `p * (1 + log p)`, 0 where p is 0; through the softmax if a temperature is set
    - shapes: `[N, K]`, or any tensor given directly, over its last axis; `[N]` only with `over="tokens"`
    - units: nats; with `normalize` a number from 0 to 1 if the probabilities sum to 1

    The probabilities are taken as they are: nothing makes K candidates sum to 1, except a temperature.

    Source: the regularizers guide, "Entropy Regularization" and "entropy temperature".

    Args:
        name: the regularizer's name, if its spec gives none.
        reduction: over distributions: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 leaves a position out.
        mode: "maximize" or "minimize" the entropy.
        temperature: at 1.0 the logprobs as they are, else `log_softmax(logprobs / temperature)`: sharper below 1.0,
            flatter above. Must be > 0.
        normalize: divide by `log n`, the largest entropy of n outcomes (by log 2 for a single outcome).
        over: "candidates": the last axis is a distribution. "tokens": all numbers of a datum are taken as one, which
            is the guide's formula; see "What [T] logprobs are" in the guide to the ready-made terms.
    """

    name: str = "entropy"
    mode: Mode = "maximize"
    temperature: float = 1.0
    normalize: bool = False
    over: Over = "candidates"

    def check(self) -> None:
        """Raises InvalidSpec if a setting cannot be used."""
        super().check()
        self._check_choice("mode", MODES)
        self._check_number("temperature", above=0)
        self._check_flag("normalize")
        self._check_choice("over", OVERS)

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """The formula; the entropy itself and the denominators are its metrics."""
        by_datum = self.normalize or self.temperature != 1.0
        distributions = Distributions.of(self, self.over, data, logprobs, by_datum=by_datum)
        log_p = distributions.positions.select(logprobs)
        if self.temperature != 1.0:
            log_p = distributions.log_softmax(log_p / self.temperature)
        parts = entropy_parts(log_p)
        if self.normalize:
            parts = parts / distributions.largest_entropy(log_p)
        entropy, metrics = distributions.reduce(parts, self.reduction)
        return (-entropy if self.mode == "maximize" else entropy), {"entropy": entropy.detach(), **metrics}
