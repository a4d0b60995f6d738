"""Base class of parsed responses."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tinkex_py.errors import InvalidResponse


class ResponseModel(BaseModel):
    """A parsed response: frozen; unknown fields are ignored."""

    model_config = ConfigDict(
        frozen=True, arbitrary_types_allowed=True, extra="ignore", protected_namespaces=(), ser_json_inf_nan="strings"
    )

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Self:
        """Parses the fields of a response.

        Raises:
            InvalidResponse: fields are missing or invalid; the message names them.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            invalid = {".".join(str(part) for part in item["loc"]) for item in error.errors(include_url=False)}
        # Raised outside of the except block, and without `fields` in this frame, because they contain the response.
        del fields
        names = ", ".join(sorted(filter(None, invalid)))
        raise InvalidResponse(
            f"the service returned an invalid {cls.__name__}" + (f"; missing or invalid: {names}" if names else "")
        )
