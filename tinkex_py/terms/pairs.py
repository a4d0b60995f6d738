"""Losses on pairs of answers to one prompt, of which one is preferred: what they share."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from tinkex_py.data.pairs import pair_indices
from tinkex_py.errors import InvalidData
from tinkex_py.losses.output import TOTAL_METRIC
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.ready_made import ADDED, NonEmptyStr
from tinkex_py.terms.reduction import Positions, ReducedTerm
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum

SelectReference = Callable[[Positions], torch.Tensor] | None
PairLosses = tuple[torch.Tensor, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Answers:
    """One side of the pairs: weighted sums over the tokens of each answer that the mask selects.

    Attributes:
        datums: their indices.
        score: sums of the logprobs, minus those of the reference if there is one, `[pairs]`.
        logprob: sums of the logprobs, `[pairs]`.
        tokens: sums of the weights, `[pairs]`.
    """

    datums: Sequence[int]
    score: torch.Tensor
    logprob: torch.Tensor
    tokens: torch.Tensor

    def per_token(self, sums: torch.Tensor) -> torch.Tensor:
        """Divides sums over the answers by the tokens of each; raises InvalidData if the mask leaves none."""
        if bool((self.tokens == 0).any()):
            empty = int(torch.nonzero(self.tokens == 0)[0].item())
            raise InvalidData(
                f"the mask leaves no token of datum {self.datums[empty]}, whose mean over tokens is needed: leave its "
                "pair out, or pass another mask"
            )
        return sums / self.tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class PairTerm(ReducedTerm):
    """A loss on pairs of datums.

    Args:
        name: default name, for use as a regularizer.
        reduction: "mean" or "sum" over pairs.
        mask: see `ReducedTerm`.
        pair_field: see `pair_indices`.
    """

    mask_is_optional: ClassVar[bool] = True

    reduction: Literal["mean", "sum"] = "mean"
    pair_field: NonEmptyStr | None = field(default=None, metadata=ADDED)

    def _total_of(self, data: Sequence[Datum]) -> float | None:
        return None if self.reduction == "sum" else len(data) / 2

    @abstractmethod
    def _reward(self, answers: Answers) -> torch.Tensor:
        """Returns the reward of each answer, `[pairs]`. Its difference is the margin of a pair."""

    @abstractmethod
    def _losses(self, chosen: Answers, rejected: Answers) -> PairLosses:
        """Returns the loss of each pair, `[pairs]`, and values per pair whose means are metrics."""

    def _pair_loss(
        self, data: Sequence[Datum], logprobs: torch.Tensor, select_reference: SelectReference
    ) -> TermResult:
        """Computes the loss and its metrics.

        Args:
            data: the datums.
            logprobs: packed, `[N]`.
            select_reference: returns the logprobs of the reference at the selected positions; None: no reference.
        """
        self.check_sampled(data, logprobs, "pass [T] targets")
        sides = pair_indices(data, self.pair_field, reader=type(self).__name__)
        positions = self.positions(data, logprobs, by_datum=True)
        selected = positions.select(logprobs)
        logprob = positions.sums(positions.weighted(selected))
        score, tokens = logprob, positions.sizes(selected)
        if select_reference is not None:
            score = positions.sums(positions.weighted(selected - select_reference(positions)))
        chosen, rejected = (Answers(side, score[side], logprob[side], tokens[side]) for side in sides)
        losses, measured = self._losses(chosen, rejected)
        with torch.no_grad():
            chosen_reward, rejected_reward = self._reward(chosen), self._reward(rejected)
            margin = chosen_reward - rejected_reward
            values = {
                "accuracy": (margin > 0).to(margin.dtype),
                "margin": margin,
                "chosen_reward": chosen_reward,
                "rejected_reward": rejected_reward,
                "chosen_logprob": chosen.logprob,
                "rejected_logprob": rejected.logprob,
                **measured,
            }
            metrics = {name: each.detach().mean() for name, each in values.items()}
        pairs = float(len(chosen.datums))
        loss = losses.sum() / (1.0 if self.reduction == "sum" else self.total or pairs)
        return loss, {**metrics, "pairs": pairs, **({} if self.total is None else {TOTAL_METRIC: self.total})}


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferencedPairTerm(PairTerm, ReferenceTerm):
    """A loss on pairs that compares the model with a reference."""

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss and its metrics."""
        return self._pair_loss(data, logprobs, lambda positions: self._select_reference(positions, reference, data))


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceFreePairTerm(PairTerm):
    """A loss on pairs that needs no reference."""

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss and its metrics."""
        return self._pair_loss(data, logprobs, None)
