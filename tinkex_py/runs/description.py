"""Says in plain JSON what a run trains with, so that a resumed run can be compared with what it was."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, cast

from pydantic import JsonValue

from tinkex_py.errors import ConfigError
from tinkex_py.types import AdamParams, OptimizerParams
from tinkex_py.version import __version__

if TYPE_CHECKING:
    from tinkex_py.losses.pipeline import Pipeline

Optimizer = AdamParams | OptimizerParams | Callable[[int], AdamParams | OptimizerParams]


def pipeline_description(pipeline: "Pipeline") -> dict[str, JsonValue]:
    """The terms of a pipeline, their settings and weights, and its options."""
    from tinkex_py.losses.recording import term_fields

    regularizers: dict[str, JsonValue] = {
        spec.name: {
            **term_fields(spec.fn),
            "weight": _described_weight(spec.weight),
            "options": {name: _described(value) for name, value in spec.options.items()},
            "enabled": spec.enabled,
        }
        for spec in pipeline.regularizers
    }
    return {"base_loss": term_fields(pipeline.base_loss), "regularizers": regularizers, "options": pipeline.options}


def optimizer_description(optimizer: Optimizer) -> JsonValue:
    """The optimizer's settings; of a schedule, what it is."""
    return _described_code(optimizer) if callable(optimizer) else optimizer.on_the_wire()


def versions() -> dict[str, str]:
    """Of Python, this package and torch."""
    return {
        "python": platform.python_version(),
        "tinkex_py": __version__,
        "torch": importlib.metadata.version("torch"),
    }


def check_same(before: Mapping[str, JsonValue], now: Mapping[str, JsonValue], folder: object) -> None:
    """Refuses to resume a run with settings that would give other numbers.

    Raises:
        ConfigError: naming each setting with both values.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    differences = [
        f"{name} was {_shown(old, name)} and is {_shown(new, name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, _ABSENT) != new.get(name, _ABSENT)
    ]
    if differences:
        raise ConfigError(
            f"the run in {folder} was started with other settings: {'; '.join(differences)}. Resume it with the same "
            "settings, or give another folder"
        )


_ABSENT = object()


def _described_weight(weight: object) -> JsonValue:
    from tinkex_py.losses.weights import WeightController

    if isinstance(weight, WeightController):
        settings = {name: _described(value) for name, value in vars(weight).items() if not name.startswith("_")}
        return {"controller": _described_code(type(weight)), **settings}
    return _described(weight)


def _described(value: object) -> JsonValue:
    """The value where it is JSON, else what it is, without what differs from process to process."""
    from tinkex_py.losses.recording import is_plain

    if is_plain(value):
        return cast("JsonValue", value)
    return repr(value) if isinstance(value, float) else _described_code(value)


def _described_code(code: object) -> str:
    if is_dataclass(code) and not isinstance(code, type):
        return repr(code)
    named: Any = code if hasattr(code, "__qualname__") else cast("object", type(code))
    return f"{named.__module__}:{named.__qualname__}"


def _flat(values: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(cast("Mapping[str, JsonValue]", value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(values: Mapping[str, JsonValue], name: str) -> str:
    return repr(values[name]) if name in values else "not there"
