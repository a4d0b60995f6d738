"""The options of a custom step."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tinkex_py.errors import InvalidData, PipelineError, TimeoutExceeded, TinkexError
from tinkex_py.types.seconds import is_seconds

if TYPE_CHECKING:
    from tinkex_py.losses.pipeline import Pipeline
    from tinkex_py.losses.spec import RegularizerSpec, Term

_PIPELINE_DEFAULTS: Mapping[str, Any] = {
    "track_grad_norms": False,
    "parallel": True,
    "max_concurrency": 32,
    "max_threads": None,
    "timeout": 30.0,
    "combine": "sum",
}


def check_deadline(deadline: float | None) -> None:
    """Checks that a deadline is None or a number of seconds.

    Raises:
        InvalidData: it is neither.
    """
    if deadline is None:
        return
    if not (is_seconds(deadline) and deadline > 0):
        raise InvalidData(f"deadline must be > 0 seconds or None, got {deadline!r}")


@asynccontextmanager
async def until_handed_over(deadline: float | None) -> AsyncGenerator[Callable[[], None]]:
    """A time limit that ends at the moment the block calls what it yields."""
    scope = asyncio.timeout(None if deadline is None or math.isinf(deadline) else deadline)
    try:
        async with scope:
            yield lambda: scope.reschedule(None)
    except TimeoutError as error:
        if not scope.expired() or isinstance(error, TinkexError):
            raise
        raise TimeoutExceeded(f"the custom step was not handed over within its deadline of {deadline} s") from None


def pipeline_of(
    base_loss: "Term | Pipeline", regularizers: "Sequence[RegularizerSpec]", options: Mapping[str, Any]
) -> "Pipeline":
    """The pipeline of a custom step; a ready one is taken as it is.

    Raises:
        PipelineError: options were given beside a ready one, or cannot be used.
    """
    from tinkex_py.losses.pipeline import Pipeline

    if not isinstance(base_loss, Pipeline):
        return Pipeline(base_loss, regularizers, **options)
    given = [name for name, value in options.items() if value != _PIPELINE_DEFAULTS[name]]
    if regularizers:
        given.insert(0, "regularizers")
    if given:
        raise PipelineError(f"a ready Pipeline has its own options: set {', '.join(given)} on it instead")
    return base_loss
