"""A policy loss under corrections, with the diagnostics of how far trainer and sampler are apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import InstanceOf

from tinkex_py import base_losses
from tinkex_py.arguments import shown
from tinkex_py.base_losses.correction import Correction, Drift
from tinkex_py.base_losses.named import named_losses
from tinkex_py.base_losses.policy import PolicyLoss
from tinkex_py.losses.spec import TermResult
from tinkex_py.terms.fields import aligned_field
from tinkex_py.terms.ready_made import NonEmptyStr, ReadyMadeTerm
from tinkex_py.types import Datum


@dataclass(frozen=True, kw_only=True)
class Corrected(ReadyMadeTerm):
    """A policy loss whose tokens are weighted or left out, because another policy sampled them.

    With c the product of the factors of all corrections, constants for the gradient, and l the loss of a token under
    `policy`:

    - formula: `reduce(c * l)`, with the reduction and the mask of `policy`
    - gradient: c times that of `policy`
    - shapes: `[N]`
    - units: those of `policy`

    The denominators of means are those without the corrections: a token that is left out takes its gradient away, and
    raises no other.

    The corrections compare the sampler's logprobs (q, `logprobs_field` of `policy`) with `old_field`, the logprobs that
    the trainer had at the start of the step; without it, with the current ones. With `old_field`, the ratio inside of
    `policy` is that of the current model and old. Without it, a policy loss that has the ratio to the sampler already,
    such as `PPO`, cannot be weighted by it again: only corrections that leave out tokens are allowed.

    Metrics of the ratio `x = exp(old - q)`: `ess`, the effective sample size `sum(x)**2 / sum(x**2)`, and
    `ess_fraction`, its share of the tokens; `chi2_token`, the mean of `x**2` minus 1, and `chi2_seq`, the same of the
    products of x over datums; `sampler_kl_k1`, `sampler_kl_k2` and `sampler_kl_k3`, estimates of KL(sampler, trainer);
    `ppl_ratio`, the mean over datums of `exp(mean(q - old))`; `sampler_entropy`, the mean of `-q`. `correction_mean` is
    the mean factor, and `correction_kept` the share of tokens whose factor is not 0. And the metrics of `policy`.

    Source: see the corrections; the diagnostics are those of verl and of the Tinker cookbook.

    Args:
        name: default name, for use as a regularizer.
        policy: the loss, such as `PPO(mask="weights", reduction="token-mean")`. In a configuration file, it and each
            correction are `{term: NAME, options: {...}}`.
        corrections: a list of `TruncatedIS`, `MaskedIS`, `Rejection`, `OffPolicyMask` and `ProbabilityMask`; an empty
            one gives the diagnostics alone.
        old_field: a `loss_fn_inputs` field of every datum, `[T]`: the trainer's logprobs at the start of the step.
    """

    _own: ClassVar[frozenset[str]] = frozenset({"policy", "corrections", "old_field"})

    name: NonEmptyStr = "corrected"
    policy: InstanceOf[PolicyLoss]
    corrections: Sequence[InstanceOf[Correction]] = ()
    old_field: NonEmptyStr | None = None

    def __post_init__(self) -> None:
        policy = _made(self.policy, PolicyLoss)
        if not isinstance(policy, PolicyLoss):
            raise self.invalid(f"policy must be a policy loss, such as PPO(), got {shown(policy)}")
        given = cast("object", self.corrections)
        parts = cast("Sequence[object]", given) if isinstance(given, list | tuple) else [given]
        corrections = tuple(_made(one, Correction) for one in parts)
        if parts is not given or not all(isinstance(one, Correction) for one in corrections):
            raise self.invalid(
                f"corrections must be a list of them, such as [MaskedIS()], got {shown(self.corrections)}"
            )
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "corrections", corrections)
        super().__post_init__()

    def check(self) -> None:
        """Raises InvalidSpec if a correction would count the ratio to the sampler twice."""
        twice = [one for one in self.corrections if one.reweights]
        if twice and self.policy.corrects and self.old_field is None:
            raise self.invalid(
                f"{type(self.policy).__name__} has the ratio to the sampler already, so {type(twice[0]).__name__} "
                "would count it twice: pass old_field=<field with the trainer's logprobs before the step>, use "
                "Reinforce as the policy, or a correction that only leaves out tokens, such as Rejection"
            )
        if self.policy.total is not None and self.coupling is not None:
            raise self.invalid(f"total is for parts of a larger batch, but {self.coupling}: remove total")

    @property
    def reduction(self) -> str:
        """The reduction of `policy`."""
        return self.policy.reduction

    @property
    def total(self) -> float | None:
        """The total of `policy`."""
        return self.policy.total

    @property
    def coupling(self) -> str | None:
        """That of `policy` or of a correction."""
        found = [one.coupling for one in (self.policy, *self.corrections)]
        return next((reason for reason in found if reason is not None), None)

    @property
    def surrogate(self) -> str | None:
        """That of `policy`, or the factors of the corrections."""
        return self.policy.surrogate or ("the factors of the corrections are constants" if self.corrections else None)

    def _total_of(self, data: Sequence[Datum]) -> float | None:
        return self.policy.total_of(data)

    def settings(self) -> dict[str, Any]:
        """Returns the keyword arguments that create an equal term, as plain values."""
        corrections = [_described(one) for one in self.corrections]
        return {**super().settings(), "policy": _described(self.policy), "corrections": corrections}

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the term with some settings replaced, its own or those of `policy`."""
        own = {name: value for name, value in options.items() if name in self._own or name == "name"}
        inner = {name: value for name, value in options.items() if name not in own}
        if inner:
            own["policy"] = own.get("policy", self.policy).with_options(inner)
        return super().with_options(own)

    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult:
        """Computes the loss and its metrics."""
        tokens = self.policy.tokens(data, logprobs, with_sampler=True, by_datum=True)
        old = tokens.logprobs.detach()
        if self.old_field is not None:
            field = aligned_field(data, self.old_field, logprobs)
            old = tokens.positions.select_finite(field, data, f"the field {self.old_field!r}")
        drift = Drift(tokens, old)
        if self.old_field is not None:
            tokens = replace(tokens, sampler=old)
        losses = self.policy.token_losses(tokens)
        factors = torch.ones_like(old)
        for correction in self.corrections:
            factors = factors * correction.factors(drift)
        loss, metrics = tokens.positions.reduce(losses.values * factors, self.policy.reduction)
        shares = {
            **losses.shares,
            "correction_mean": factors,
            "correction_kept": factors != 0,
        }
        return loss, {**diagnostics(drift), **self.policy.measured(tokens, shares), **metrics}


def _described(part: PolicyLoss | Correction) -> dict[str, Any]:
    return {"term": type(part).__name__, "options": part.settings()}


def _made(given: object, kind: type[object]) -> object:
    """Creates a policy loss or a correction from `_described`; everything else is returned as it is."""
    if not isinstance(given, Mapping):
        return given
    described = cast("Mapping[str, Any]", given)
    name, options = str(described.get("term")), described.get("options", {})
    if named := named_losses().get(name):
        options = {**named.settings, **options}
    cls: object = getattr(base_losses, name, None) if named is None else named.cls
    if not (isinstance(cls, type) and issubclass(cls, kind) and described.keys() <= {"term", "options"}):
        return described
    return cls(**options)


def diagnostics(drift: Drift) -> dict[str, torch.Tensor]:
    """Returns how far the trainer is from the sampler; nothing without tokens."""
    positions, x, log_x = drift.tokens.positions, drift.ratio, drift.log_ratio
    counted = positions.sizes(x) != 0
    if not bool(counted.any()):
        return {}
    mean, square = positions.mean(x), positions.mean(x.square())
    ess_fraction = mean.square() / square
    return {
        "ess": ess_fraction * positions.tokens(x),
        "ess_fraction": ess_fraction,
        "chi2_token": square - 1.0,
        "chi2_seq": drift.product[counted].square().mean() - 1.0,
        "sampler_kl_k1": -positions.mean(log_x),
        "sampler_kl_k2": 0.5 * positions.mean(log_x.square()),
        "sampler_kl_k3": positions.mean(drift.k3),
        "ppl_ratio": (-positions.means(log_x)[counted]).exp().mean(),
        "sampler_entropy": -positions.mean(drift.tokens.sampler),
    }
