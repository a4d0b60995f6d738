"""Where the tokens of a datum come from: runs of prompts and of sampled sequences."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from tinkex_py.arguments import check_list
from tinkex_py.errors import InvalidData
from tinkex_py.types.base import WireModel
from tinkex_py.values import Integer

_Count = Annotated[Integer, Field(ge=0)]


class _Span(WireModel):
    sequence_id: str = Field(min_length=1)
    offset: _Count = 0
    length: _Count


class PromptProvenanceSpan(_Span):
    """A run of tokens that a service was given as part of a prompt.

    Args:
        sequence_id: `SampledSequence.sequence_id` of a sequence that was sampled from this prompt.
        offset: position of the run within the prompt.
        length: number of tokens.
    """


class SampledProvenanceSpan(_Span):
    """A run of tokens that a service sampled.

    Args:
        sequence_id: `SampledSequence.sequence_id` of their sequence.
        offset: position of the run within the sampled tokens.
        length: number of tokens.
    """


Span = PromptProvenanceSpan | SampledProvenanceSpan


def check_tiling(name: str, spans: Sequence[Span], length: int) -> None:
    """Raises InvalidData unless the spans have as many positions as the field that they describe."""
    covered = sum(span.length for span in spans)
    if covered != length:
        raise InvalidData(f"the spans of {name} have {covered} positions, but it has {length}: they must cover it")


def own_spans(name: str, spans: Sequence[object]) -> tuple[Span, ...]:
    """Returns spans of this package or of the official SDK as those of this package.

    Raises:
        InvalidData: it is not a list of spans.
    """
    return tuple(_own_span(name, span) for span in check_list(name, spans, object))


def _own_span(name: str, span: object) -> Span:
    if isinstance(span, Span):
        return span
    kinds = {kind.__name__: kind for kind in (PromptProvenanceSpan, SampledProvenanceSpan)}
    kind = kinds.get(type(span).__name__)
    if kind is None:
        raise InvalidData(f"{name} must be a list of {' and '.join(kinds)}, got a {type(span).__name__} in it")
    fields: dict[str, Any] = {name: getattr(span, name) for name in ("sequence_id", "offset", "length")}
    return kind(**fields)
