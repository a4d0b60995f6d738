"""The settings of a run as one flat table."""

from collections.abc import Mapping

from pydantic import JsonValue

from tinkex_py.runs.records import RunInfo


def settings_of(info: RunInfo) -> dict[str, JsonValue]:
    """All settings of a run under dotted names, with its seed."""
    return {**flattened(info.config), "seed": info.seed}


def flattened(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Nested settings under dotted names; lists stay whole."""
    flat: dict[str, JsonValue] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= {f"{name}.{inner}": setting for inner, setting in flattened(value).items()}
        else:
            flat[name] = value
    return flat
