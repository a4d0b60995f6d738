"""What all ready-made terms share: they are frozen settings with a formula."""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch

from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.checks import checked_number
from tinkex_py.losses.spec import TermFunction, TermResult
from tinkex_py.types import Datum


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
        self._check_text("name")
        self.check()

    def check(self) -> None:  # noqa: B027  # most terms have something to check, none must
        """Raises InvalidSpec if a setting cannot be used."""

    @abstractmethod
    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult | Awaitable[TermResult]:
        """The formula."""

    @property
    def compute(self) -> TermFunction:
        """`compute(data, logprobs, **settings)`: the formula; settings given here override those of the object."""

        def compute(
            data: Sequence[Datum], logprobs: torch.Tensor, **settings: Any
        ) -> TermResult | Awaitable[TermResult]:
            return self.with_options(settings).loss(data, logprobs)

        return self._with_settings_in_signature(compute)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same term with some settings replaced.

        Raises:
            InvalidSpec: a value cannot be used.
            TypeError: there is no such setting.
        """
        if "name" in options:
            raise TypeError(f"{type(self).__name__}: the name is not an option; give it to the spec")
        return dataclasses.replace(self, **options) if options else self

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises InvalidSpec if a spec's options cannot replace settings."""
        self.with_options(options)

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that make an equal term."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _with_settings_in_signature(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Lists the settings in the function's signature, so that a spec refuses one that does not exist."""
        keyword = inspect.Parameter.KEYWORD_ONLY
        positional = list(inspect.signature(compute).parameters.values())[:2]
        names = [field.name for field in dataclasses.fields(self) if field.name != "name"]
        settings = [inspect.Parameter(name, keyword, default=getattr(self, name)) for name in names]
        cast("Any", compute).__signature__ = inspect.Signature([*positional, *settings])
        return compute

    def _refuse(self, setting: str, wanted: str) -> InvalidSpec:
        return InvalidSpec(f"{type(self).__name__}: {setting} must be {wanted}, got {getattr(self, setting)!r}")

    def _check_choice(self, setting: str, allowed: Sequence[object]) -> None:
        value = getattr(self, setting)
        if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in allowed):
            raise self._refuse(setting, f"one of {', '.join(map(repr, allowed))}")

    def _check_flag(self, setting: str) -> None:
        self._check_choice(setting, (True, False))

    def _check_text(self, setting: str, *, optional: bool = False) -> None:
        value = getattr(self, setting)
        if not (isinstance(value, str) and value) and not (optional and value is None):
            raise self._refuse(setting, "a non-empty str" + (" or None" if optional else ""))

    def _check_int(self, setting: str, *, optional: bool = False) -> None:
        value = getattr(self, setting)
        if (isinstance(value, bool) or not isinstance(value, int)) and not (optional and value is None):
            raise self._refuse(setting, "an int" + (" or None" if optional else ""))

    def _check_number(
        self, setting: str, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        value = getattr(self, setting)
        checked_number(type(self).__name__, setting, value, above=above, at_least=at_least, at_most=at_most)
