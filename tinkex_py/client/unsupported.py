"""Refusals by which a service says that it does not have what was asked for, and not that the request was wrong."""

import re
from collections.abc import Generator
from contextlib import contextmanager

from tinkex_py.errors import APIStatusError, RequestFailed, UnsupportedFeature

_NO_SUCH_METHOD = frozenset({405, 501})
_LACKS_IT = re.compile(
    r"\b(not (yet )?(supported|implemented)|unsupported|(does not|doesn't) support|capability disabled)\b",
    re.IGNORECASE,
)
_NOT_COUNTED = re.compile(r"\bcapability disabled\b", re.IGNORECASE)


def was_not_counted(error: RequestFailed) -> bool:
    """Whether the service did not count the refused number. TuFT looks at capabilities before it looks at numbers."""
    return _NOT_COUNTED.search(str(error)) is not None


@contextmanager
def reported_as_unsupported(host: str, feature: str) -> Generator[None]:
    """Turns such a refusal into the error that names service and feature.

    Args:
        host: the service, as messages name it.
        feature: the name of what is requested.

    Raises:
        UnsupportedFeature: instead of a refusal whose words or status say that the service lacks it.
    """
    try:
        yield
    except (RequestFailed, APIStatusError) as error:
        if not _says_that_it_lacks_it(error):
            raise
        raise UnsupportedFeature(f"{host} does not support {feature}. {error}") from error


def _says_that_it_lacks_it(error: RequestFailed | APIStatusError) -> bool:
    if isinstance(error, APIStatusError) and (error.status in _NO_SUCH_METHOD or error.code == "unsupported_feature"):
        return True
    return _LACKS_IT.search(str(error)) is not None
