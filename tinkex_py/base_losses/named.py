"""Base losses by name: those of services, and those of papers that are another loss with other settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tinkex_py import base_losses
from tinkex_py.errors import InvalidBaseLoss, InvalidSpec, did_you_mean
from tinkex_py.terms.ready_made import ReadyMadeTerm

_UNPUBLISHED = "stable_reinforce"
_SERVICE_LOSSES = ("cispo", "cross_entropy", "dro", "gspo", "importance_sampling", "ppo")


@dataclass(frozen=True)
class NamedLoss:
    """A class, and the settings that make it the loss of this name."""

    cls: type[ReadyMadeTerm]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


_VARIANTS = {
    "cross_entropy": NamedLoss(base_losses.NLL),
    "grpo": NamedLoss(base_losses.PPO, {"reduction": "seq-mean-token-mean"}),
    "dapo": NamedLoss(base_losses.PPO, {"clip_high_threshold": 1.28, "reduction": "token-mean"}),
    "luspo": NamedLoss(
        base_losses.GSPO,
        {"clip_low_threshold": 0.998, "clip_high_threshold": 1.0025, "reduction": "seq-mean-token-sum"},
    ),
}


@cache
def named_losses() -> Mapping[str, NamedLoss]:
    """Returns all base losses by name: the default `name` of each class, and the variants."""
    classes: list[object] = [getattr(base_losses, name) for name in dir(base_losses)]
    terms = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, ReadyMadeTerm)]
    own = {cls.name: NamedLoss(cls) for cls in terms if cls is not base_losses.Corrected}
    return {**own, **_VARIANTS}


def base_loss_named(name: str) -> ReadyMadeTerm:
    """Creates a base loss from its name.

    Raises:
        InvalidBaseLoss: there is none of this name, or it has settings without a default.
    """
    found = named_losses().get(name)
    if found is None:
        if name == _UNPUBLISHED:
            raise InvalidBaseLoss(
                f"base_loss: {name!r} cannot be computed here, because its formula is not published: run it on the "
                f"service with forward_backward(data, {name!r})"
            )
        raise InvalidBaseLoss(
            f"base_loss: no base loss is named {name!r}{did_you_mean(name, named_losses())}; use one of "
            f"{', '.join(sorted(named_losses()))}, or pass a term"
        )
    try:
        return found.cls(**found.settings)
    except (TypeError, InvalidSpec) as error:
        raise InvalidBaseLoss(
            f"base_loss: {name!r} has settings that the name does not tell: pass {found.cls.__name__}(...) of "
            f"tinkex_py.base_losses ({error})"
        ) from error


def service_loss(name: str, settings: Mapping[str, Any]) -> ReadyMadeTerm:
    """Creates the loss that a service computes under a name: a plain sum, in which only cross_entropy reads `weights`.

    Args:
        name: as in the protocol, such as "ppo".
        settings: its `loss_fn_config`.

    Raises:
        InvalidBaseLoss: the loss cannot be computed here, or a setting is missing or unknown.
    """
    if name not in _SERVICE_LOSSES:
        base_loss_named(name)  # says why, if it is known
        raise InvalidBaseLoss(f"base_loss: {name!r} is not a loss of services: use one of {', '.join(_SERVICE_LOSSES)}")
    mask = {} if name == "cross_entropy" else {"mask": None}
    try:
        return named_losses()[name].cls(**mask, **settings)
    except (TypeError, InvalidSpec) as error:
        raise InvalidBaseLoss(f"base_loss: the settings of {name!r} do not fit: {error}") from error
