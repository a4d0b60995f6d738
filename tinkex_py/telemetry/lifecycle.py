"""Start, then stop or exception: exactly one end for every start."""

import itertools
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from tinkex_py.errors import RegularizerError
from tinkex_py.telemetry.events import Measurements
from tinkex_py.telemetry.handlers import emit

# Metadata that an end does not repeat from its start, as the table of events has it.
_LEFT_OUT_AT_STOP: Mapping[str, frozenset[str]] = {"tinkex.custom_loss": frozenset({"track_grad_norms"})}
_LEFT_OUT_AT_EXCEPTION: Mapping[str, frozenset[str]] = {
    "tinkex.custom_loss": frozenset({"regularizer_count", "track_grad_norms"}),
    "tinkex.regularizer.compute": frozenset({"is_async"}),
}
_UNITS = itertools.count(1)


def failure_reason(error: BaseException) -> str:
    """The class name that tells why something failed; for a failed term, the class of its own exception."""
    if type(error) is RegularizerError and error.__cause__ is not None:
        return type(error.__cause__).__name__
    return type(error).__name__


@contextmanager
def lifecycle(prefix: str, metadata: Mapping[str, Any]) -> Generator[Measurements, None, None]:
    """Emit `<prefix>.start` now, and `<prefix>.stop` or `<prefix>.exception` at the end of the block.

    A plain `with`, also around awaits. A cancellation is an exception event with the reason "CancelledError".

    Args:
        prefix: the event's name without its last part, e.g. "tinkex.http.request".
        metadata: what the work is about.

    Yields:
        The measurements of the stop event, to be filled by the block; `duration` (seconds) is added.

    Raises:
        ValueError: no event has this prefix.
    """
    measurements: Measurements = {}
    unit = next(_UNITS)
    emit(f"{prefix}.start", {"system_time": time.time()}, metadata, unit=unit)
    started = time.monotonic()
    try:
        yield measurements
    except BaseException as error:
        duration = time.monotonic() - started
        kept = _without(metadata, _LEFT_OUT_AT_EXCEPTION.get(prefix))
        failed = {**kept, "reason": failure_reason(error)}
        emit(f"{prefix}.exception", {"duration": duration}, failed, error, unit=unit)
        raise
    duration = time.monotonic() - started
    kept = _without(metadata, _LEFT_OUT_AT_STOP.get(prefix))
    emit(f"{prefix}.stop", {"duration": duration, **measurements}, kept, unit=unit)


def _without(metadata: Mapping[str, Any], left_out: frozenset[str] | None) -> Mapping[str, Any]:
    return {key: value for key, value in metadata.items() if key not in left_out} if left_out else metadata
