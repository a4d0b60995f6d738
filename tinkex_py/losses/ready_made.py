"""What all ready-made terms share: they are frozen settings with a formula."""

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

from tinkex_py.errors import InvalidSpec
from tinkex_py.types import Datum

if TYPE_CHECKING:
    import torch

    from tinkex_py.losses.spec import TermFunction, TermResult


@dataclass(frozen=True, kw_only=True)
class ReadyMadeTerm(ABC):
    """A term whose settings are the fields of a frozen dataclass.

    Subclasses are dataclasses of the same kind: each field is a setting, `check` refuses bad ones, and `loss` is the
    formula. Settings may be overridden per call or by `RegularizerSpec.options`.

    Args:
        name: the regularizer's name, if its spec gives none.
    """

    name: str

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:  # noqa: B027  # most terms have something to check, none must
        """Raises InvalidSpec if a setting cannot be used."""

    @abstractmethod
    def loss(self, data: Sequence[Datum], logprobs: "torch.Tensor") -> "TermResult":
        """The formula."""

    @property
    def compute(self) -> "TermFunction":
        """`compute(data, logprobs, **settings)`: the formula; settings given here override those of the object."""

        def compute(data: Sequence[Datum], logprobs: "torch.Tensor", **settings: Any) -> "TermResult":
            return self.with_options(settings).loss(data, logprobs)

        return self.with_settings_in_signature(compute)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same term with some settings replaced.

        Raises:
            InvalidSpec: a value cannot be used.
            TypeError: there is no such setting.
        """
        return dataclasses.replace(self, **options) if options else self

    def with_settings_in_signature(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Lists the settings in the function's signature, so that a spec refuses one that does not exist."""
        keyword = inspect.Parameter.KEYWORD_ONLY
        positional = list(inspect.signature(compute).parameters.values())[:2]
        settings = [inspect.Parameter(name, keyword, default=getattr(self, name)) for name in self._settings()]
        cast("Any", compute).__signature__ = inspect.Signature([*positional, *settings])
        return compute

    def _settings(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self) if field.name != "name"]


def check_choice(term: str, setting: str, value: object, allowed: Sequence[object]) -> None:
    """Raises InvalidSpec unless the value is one of those allowed."""
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
        raise InvalidSpec(f"{term}: {setting} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_number(
    term: str,
    setting: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raises InvalidSpec unless the value is a finite number within the bounds."""
    limits = [(f"> {above}", above), (f">= {at_least}", at_least), (f"<= {at_most}", at_most)]
    wanted = " and ".join(text for text, limit in limits if limit is not None)
    usable = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
    )
    if not usable:
        raise InvalidSpec(f"{term}: {setting} must be a finite number {wanted}".rstrip() + f", got {value!r}")
