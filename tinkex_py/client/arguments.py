"""Names of checkpoints, and optional fields of requests."""

import re
from typing import Any

from tinkex_py.arguments import shown
from tinkex_py.errors import InvalidData

_CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def check_name(name: str) -> str:
    """Returns a checkpoint name if the service can use it as a path segment; else raises InvalidData."""
    if not isinstance(name, str) or not _CHECKPOINT_NAME.fullmatch(name):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(
            f"the name of a checkpoint consists of 1 to 128 letters, digits, '_', '.' or '-', got {shown(name)}"
        )
    return name


def given(**fields: Any) -> dict[str, Any]:
    """Returns the fields that are not None: services may refuse fields that they do not know."""
    return {name: value for name, value in fields.items() if value is not None}
