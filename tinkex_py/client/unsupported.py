"""Recognizes refusals that report a missing feature of the service rather than an invalid request."""

import re
from collections.abc import Generator
from contextlib import contextmanager

from tinkex_py.errors import APIStatusError, MissingEndpoint, RequestFailed, UnsupportedFeature

_NO_SUCH_METHOD = (405, 501)
_NOT_SUPPORTED = re.compile(
    r"\b(not (yet )?(supported|implemented)|unsupported|(does not|doesn't) support|capability disabled)\b",
    re.IGNORECASE,
)
_NOT_COUNTED = re.compile(r"\bcapability disabled\b", re.IGNORECASE)


def was_not_counted(error: RequestFailed) -> bool:
    """Returns whether the service did not count the refused number: TuFT checks capabilities before numbers."""
    return _NOT_COUNTED.search(str(error)) is not None


@contextmanager
def reported_as_unsupported(host: str, feature: str) -> Generator[None]:
    """Raises UnsupportedFeature instead of a refusal whose words or status report a missing feature."""
    try:
        yield
    except (RequestFailed, APIStatusError) as error:
        if not (_has_no_endpoint(error) or _NOT_SUPPORTED.search(str(error))):
            raise
        raise UnsupportedFeature(f"{host} does not support {feature}. {error}") from error


def means_no_endpoint(error: APIStatusError, *, names_nothing: bool) -> bool:
    """Returns whether a refusal reports a missing endpoint.

    Args:
        error: the refusal.
        names_nothing: the path names no run, checkpoint or session, so that 404 can only mean the endpoint.
    """
    return (error.status == 404 and names_nothing) or _has_no_endpoint(error)


def _has_no_endpoint(error: RequestFailed | APIStatusError) -> bool:
    return isinstance(error, APIStatusError) and (
        isinstance(error, MissingEndpoint) or error.status in _NO_SUCH_METHOD or error.code == "unsupported_feature"
    )
