"""Parts of a custom step that have nothing to do with the order of requests."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tinkex_py.errors import InvalidData, InvalidResponse, PipelineError, TimeoutExceeded, TinkexError
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor

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
    if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not deadline > 0:  # pyright: ignore[reportUnnecessaryIsInstance]
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


def logprobs_of(forward: ForwardBackwardOutput, data: Sequence[Datum]) -> PackedTensor:
    """The logprobs of a forward pass, shaped like the targets.

    Raises:
        InvalidResponse: they are missing, or shaped otherwise.
    """
    packed = forward.packed.get("logprobs")
    if packed is None or len(packed) != len(data):
        raise InvalidResponse(f"the forward pass gave no logprobs for each of {len(data)} datums")
    if packed.values.dtype.kind != "f":
        raise InvalidResponse(f"the forward pass gave logprobs of dtype {packed.values.dtype}, not float32")
    for index, datum in enumerate(data):
        expected = datum.loss_fn_inputs["target_tokens"].shape
        if packed.shape(index) != expected:
            raise InvalidResponse(
                f"logprobs of datum {index} have shape {packed.shape(index)}, its target_tokens {expected}"
            )
    return packed
