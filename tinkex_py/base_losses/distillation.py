"""Distillation: divergences from a teacher that is known at K candidates per position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from tinkex_py.errors import InvalidData
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.distributions import check_distinct, distributions, kl_parts, with_tail
from tinkex_py.terms.fields import described_position
from tinkex_py.terms.ready_made import NonEmptyStr
from tinkex_py.terms.reduction import Positions
from tinkex_py.terms.reference import ReferenceTerm
from tinkex_py.types import Datum
from tinkex_py.values import Number


@dataclass(frozen=True, kw_only=True, eq=False)
class Distillation(ReferenceTerm):
    """Divergence of the model from a teacher whose probabilities are known for K tokens of each position.

    With s the model's and t the teacher's probabilities of these tokens, usually the teacher's likeliest:

    - formula: forward `sum(t * (log t - log s))`, mode-covering; reverse `sum(s * (log s - log t))`, mode-seeking; jsd
      `beta * KL(t || m) + (1 - beta) * KL(s || m)` with `m = beta * t + (1 - beta) * s`; then reduced
    - gradient: forward with a tail `-t + t_rest * s / s_rest`, renormalized `s - t`, raw `-t`; reverse with a tail
      `s * (log(s / t) - log(s_rest / t_rest))`, renormalized `s * (log(s / t) - KL)`
    - shapes: `[N, K]`
    - units: nats

    The K probabilities do not add up to 1. `outside` says what becomes of the rest: "tail" adds one outcome for all
    other tokens, in model and teacher; "renormalize" divides both by their sums; "raw" takes the numbers as they are,
    which is the services' `cross_entropy` with the teacher's probabilities as weights, up to a constant. Without the
    rest the reverse divergence is negative and lowest where model and teacher differ, so it has no "raw".

    A token that the teacher lacks (logprob -inf) is left out on both sides.

    Metrics: `mass` and `teacher_mass`, the mean probability of the K tokens together; and the denominators.
    `tinkex_py.data.teacher_datums` makes datums for it.

    Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network"; Y. Gu et al., "MiniLLM" (reverse); R.
    Agarwal et al., "On-Policy Distillation of Language Models" (equation 1, jsd); the tail as in TRL.

    Args:
        name: default name, for use as a regularizer.
        reduction: over positions: "sum", "mean" or "token-mean", "seq-mean-token-sum", "seq-mean-token-mean".
        mask: a `loss_fn_inputs` field of every datum, `[T]` or `[T, K]`; 0 excludes a position. A row of `[T, K]` has
            weight 1 if any of its numbers is not 0. Default: `weights`, if the datums have it; None: no mask.
        reference: the teacher: as in `KLDivergence`, such as `forward` of a client with the teacher's weights.
        reference_field: a field of every datum with the teacher's logprobs, `[T, K]`. Exactly one of `reference` and
            `reference_field` is required.
        divergence: "forward", "reverse" or "jsd".
        beta: for "jsd": the teacher's share of the mixture, between 0 and 1. The value goes to 0 at both ends: use
            "forward" or "reverse" there.
        outside: "tail", "renormalize" or "raw".
    """

    mask_is_optional: ClassVar[bool] = True

    name: NonEmptyStr = "distillation"
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    beta: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    outside: Literal["tail", "renormalize", "raw"] = "tail"

    def check(self) -> None:
        """Raises InvalidSpec if the settings contradict each other."""
        super().check()
        if self.outside == "raw" and self.divergence != "forward":
            raise self.invalid(
                f"divergence={self.divergence!r} of numbers that do not add up to 1 is lowest where model and teacher "
                "differ: pass outside='tail' or outside='renormalize'"
            )

    def counted(self, data: Sequence[Datum], logprobs: torch.Tensor) -> Positions:
        """Selects what a mean counts."""
        return distributions(self, "candidates", data, logprobs)

    def loss_against(self, reference: torch.Tensor, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss. Its metrics are means over the selected positions, and the denominators."""
        positions = distributions(self, "candidates", data, logprobs)
        check_distinct(data, positions)
        teacher = self._select_reference(positions, reference, data)
        missing = self._missing(teacher, positions, data)
        student = positions.select(logprobs).masked_fill(missing, -torch.inf)
        with torch.no_grad():
            masses = {"mass": student.exp().sum(-1), "teacher_mass": teacher.exp().sum(-1)}
            metrics = {name: positions.reduce(values, "mean")[0] for name, values in masses.items()}
        if self.outside == "tail":
            student, teacher = with_tail(student), with_tail(teacher)
        elif self.outside == "renormalize":
            student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        loss, denominators = positions.reduce(self._parts(student, teacher), self.reduction)
        return loss, {**metrics, **denominators}

    def _missing(self, teacher: torch.Tensor, positions: Positions, data: Sequence[Datum]) -> torch.Tensor:
        """Returns which candidates the teacher lacks, `[M, K]`."""
        missing = teacher == -torch.inf
        least = 2 if self.outside == "renormalize" else 1  # one alone would always be certain
        counts = (~missing).sum(-1)
        few = torch.nonzero(counts < least)
        if few.numel():
            row = int(few[0].item())
            place = row if positions.kept is None else int(positions.kept[row])
            raise InvalidData(
                f"the teacher has {int(counts[row])} candidates at {described_position(data, [place])}: Distillation "
                f"with outside={self.outside!r} needs at least {least}"
            )
        return missing

    def _parts(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Returns the summands of each divergence."""
        if self.divergence == "forward":
            return kl_parts(teacher, student)
        if self.divergence == "reverse":
            return kl_parts(student, teacher)
        smallest = torch.finfo(student.dtype).min
        student, teacher = student.clamp(min=smallest), teacher.clamp(min=smallest)
        share = student.new_tensor(self.beta)
        middle = torch.logaddexp(student + torch.log1p(-share), teacher + share.log())
        return self.beta * kl_parts(teacher, middle) + (1.0 - self.beta) * kl_parts(student, middle)
