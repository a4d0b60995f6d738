"""Base class of the ready-made terms."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Self, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tinkex_py.arguments import check_kind, check_list, shown
from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.spec import TermFunction, TermResult
from tinkex_py.types import Datum
from tinkex_py.values import Number, reason_of

NonEmptyStr = Annotated[str, Field(min_length=1)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class ReadyMadeTerm(ABC):
    """A term whose settings are the fields of a frozen dataclass.

    pydantic validates the settings against their annotations. Fields with `repr=False` hold tensors and functions,
    which `check` validates.

    Args:
        name: default name of the regularizer.

    Raises:
        InvalidSpec: a setting is invalid.
    """

    name: NonEmptyStr

    def __post_init__(self) -> None:
        try:
            checked = _settings_model(type(self)).model_validate(vars(self))
        except ValidationError as error:
            raise self.invalid(_problem(error)) from None
        for setting, value in checked:
            object.__setattr__(self, setting, value)
        self.check()

    def check(self) -> None:  # noqa: B027  # optional
        """Raises InvalidSpec if the settings contradict each other."""

    @abstractmethod
    def loss(self, data: Sequence[Datum], logprobs: torch.Tensor) -> TermResult | Awaitable[TermResult]:
        """Computes the loss and its metrics."""

    @property
    def compute(self) -> TermFunction:
        """`compute(data, logprobs, **settings)`, where settings replace those of the object for this call."""
        return self._compute

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """Returns the term with some settings replaced.

        Raises:
            InvalidSpec: a value is invalid.
            TypeError: the term has no such setting.
        """
        if "name" in options:
            raise TypeError(f"{type(self).__name__}: name is not an option: pass it to the spec")
        return dataclasses.replace(self, **options) if options else self

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises InvalidSpec if the options of a spec are not valid settings."""
        try:
            self.with_options(options)
        except TypeError as error:
            raise self.invalid(str(error)) from error

    def settings(self) -> dict[str, Any]:
        """Returns the keyword arguments that create an equal term."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def invalid(self, problem: str) -> InvalidSpec:
        """Returns the error for an invalid setting."""
        return InvalidSpec(f"{type(self).__name__}: {problem}")

    def _compute(
        self, data: Sequence[Datum], logprobs: torch.Tensor, **settings: Any
    ) -> TermResult | Awaitable[TermResult]:
        check_list("data", data, Datum)
        check_kind("logprobs", logprobs, torch.Tensor)
        return self.with_options(settings).loss(data, logprobs)


@cache
def _settings_model(cls: type[ReadyMadeTerm]) -> type[BaseModel]:
    hints = get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {field.name: (hints[field.name], ...) for field in dataclasses.fields(cls) if field.repr}
    return create_model(cls.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)


def _problem(error: ValidationError) -> str:
    """Describes the first invalid setting. A setting with several types has one message for each of them."""
    found = error.errors(include_url=False)
    setting, value = found[0]["loc"][0], found[0]["input"]
    messages = [
        reason_of(item).removeprefix("must ")
        for item in found
        if item["loc"][0] == setting and item["type"] != "is_instance_of"  # a default that no user passes
    ]
    return f"{setting} must {' or '.join(messages)}, got {shown(value)}"
