"""Checks of what a pipeline, an executor or a step is given: a bad argument raises a typed error that names it."""

from collections.abc import Iterable, Sequence
from typing import cast

from tinkex_py.errors import DuplicateRegularizerNames, InvalidData, InvalidSpec, PipelineError
from tinkex_py.limits import is_seconds
from tinkex_py.losses.spec import RegularizerSpec
from tinkex_py.types import Datum


def checked_data(data: Sequence[Datum]) -> Sequence[Datum]:
    """The datums, if they are a list; it may be empty."""
    if isinstance(data, Datum | str) or not isinstance(data, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"data must be a list of Datum, got a {type(data).__name__}")
    return data


def checked_specs(regularizers: Sequence[RegularizerSpec]) -> tuple[RegularizerSpec, ...]:
    """The specs, if they are specs and have unique names."""
    given = cast("object", regularizers)
    if isinstance(given, RegularizerSpec) or not isinstance(given, Iterable):
        raise InvalidSpec(f"regularizers must be a list of RegularizerSpec, got a {type(given).__name__}")
    specs = tuple(regularizers)
    for index, spec in enumerate(specs):
        if not isinstance(spec, RegularizerSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidSpec(f"regularizers[{index}] must be a RegularizerSpec, got a {type(spec).__name__}")
    names = [spec.name for spec in specs]
    duplicates = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if duplicates:
        raise DuplicateRegularizerNames(duplicates)
    return specs


def checked_timeout(timeout: float | None) -> float | None:
    """Seconds > 0, or None."""
    if timeout is None:
        return None
    if not (is_seconds(timeout) and timeout > 0):
        raise PipelineError(f"timeout must be > 0 seconds or None, got {timeout!r}")
    return timeout


def checked_flag(name: str, flag: bool) -> bool:
    """True or False, not something that merely counts as it."""
    if not isinstance(flag, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(f"{name} must be True or False, got {flag!r}")
    return flag


def checked_count(name: str, count: int) -> int:
    """An int >= 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(f"{name} must be an int >= 1, got {count!r}")
    return count


def checked_step(step: int) -> int:
    """An int >= 0."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(f"step must be an int >= 0, got {step!r}")
    return step
