"""Base class of the ready-made terms."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Self, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tinkex_py.arguments import check_kind, shown
from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.known_gradient import Scored
from tinkex_py.losses.logprobs import checked_data
from tinkex_py.losses.spec import TermFunction, TermResult
from tinkex_py.types import Datum
from tinkex_py.values import Number, reason_of

NonEmptyStr = Annotated[str, Field(min_length=1)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]

ADDED = MappingProxyType({"added": True})
"""Metadata of a setting that earlier versions did not have.

While it has its default, it is left out of records and fingerprints, so that older runs can be resumed.
"""


@dataclass(frozen=True, kw_only=True)
class CheckedSettings:
    """Settings that are the fields of a frozen dataclass.

    pydantic validates them against their annotations. Fields with `repr=False` hold tensors and functions, which
    `check` validates.

    Raises:
        InvalidSpec: a setting is invalid.
    """

    def __post_init__(self) -> None:
        try:
            checked = _settings_model(type(self)).model_validate(vars(self))
        except ValidationError as error:
            raise self.invalid(_problem(error)) from None
        for setting, value in checked:
            object.__setattr__(self, setting, value)
        self.check()

    def check(self) -> None:
        """Raises InvalidSpec if the settings contradict each other."""

    def settings(self) -> dict[str, Any]:
        """Returns the keyword arguments that create an equal object."""
        given = {one: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {one.name: value for one, value in given.items() if "added" not in one.metadata or value != one.default}

    def invalid(self, problem: str) -> InvalidSpec:
        """Returns the error for an invalid setting."""
        return InvalidSpec(f"{type(self).__name__}: {problem}")


@dataclass(frozen=True, kw_only=True)
class ReadyMadeTerm(CheckedSettings, ABC):
    """A term whose settings are the fields of a frozen dataclass.

    Args:
        name: default name of the regularizer.

    Raises:
        InvalidSpec: a setting is invalid.
    """

    name: NonEmptyStr

    @property
    def coupling(self) -> str | None:
        """Why the loss of some datums is not a part of the loss of more datums; None if it is.

        A term that couples datums cannot be split into the micro-batches of one optimizer step.
        """
        return None

    @property
    def surrogate(self) -> str | None:
        """Why the gradient is not the derivative of the value; None if it is."""
        return None

    def total_of(self, data: Sequence[Datum]) -> float | None:
        """Returns what a mean over all of these datums divides by, for the setting `total`; None for a sum.

        Raises:
            InvalidData: `data` is not a list of datums, or a datum lacks what the mask needs.
        """
        return self._total_of(checked_data(data))

    def _total_of(self, data: Sequence[Datum]) -> float | None:
        del data
        return None

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

    def _compute(
        self, data: Sequence[Datum], logprobs: torch.Tensor, **settings: Any
    ) -> TermResult | Awaitable[TermResult]:
        data = checked_data(data)
        check_kind("logprobs", logprobs, torch.Tensor)
        return self.with_options(settings).loss(data, logprobs)


@cache
def _settings_model(cls: type[CheckedSettings]) -> type[BaseModel]:
    # A field may be a function of terms, whose type names `Scored` without importing torch.
    hints = get_type_hints(cls, localns={"Scored": Scored}, include_extras=True)
    fields: dict[str, Any] = {one.name: (hints[one.name], ...) for one in dataclasses.fields(cls) if one.repr}
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
