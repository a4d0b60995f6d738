"""Base classes of values: pydantic's validation errors are raised as InvalidData."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tinkex_py.errors import InvalidData
from tinkex_py.values import problems_of


class WireModel(BaseModel):
    """A frozen value whose fields have the names of the wire format.

    Raises:
        InvalidData: a field is invalid; the message names it and, if it is plain, its value.
    """

    shows_texts: ClassVar[bool] = False
    """Whether errors contain texts; False where they may be a user's."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
            return
        except ValidationError as error:
            problems = problems_of(error, type(self), shows_texts=self.shows_texts)
        except TypeError as error:  # a mapping that is given for a nested value lacks a field, or has an unknown one
            problems = f"{', '.join(fields)}: {error}"
        # Raised outside of the except block, because pydantic's error contains the input, which may be a prompt.
        raise InvalidData(f"{type(self).__name__}: {problems}")
