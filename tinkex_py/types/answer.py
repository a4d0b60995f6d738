"""What all answers have in common: frozen, and deaf to fields they do not know."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tinkex_py.errors import InvalidResponse


class Answer(BaseModel):
    """A parsed answer: frozen, and deaf to fields it does not know."""

    model_config = ConfigDict(
        frozen=True, arbitrary_types_allowed=True, extra="ignore", protected_namespaces=(), ser_json_inf_nan="strings"
    )

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        """Reads what a service answered.

        Raises:
            InvalidResponse: naming the fields that do not fit.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            places = {".".join(str(part) for part in item["loc"]) for item in error.errors(include_url=False)}
        # Raised out here, because pydantic's own error holds the answer.
        where = ", ".join(sorted(filter(None, places)))
        raise InvalidResponse(f"the service's answer is no {cls.__name__}" + (f": see {where}" if where else ""))
