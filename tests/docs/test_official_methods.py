"""Every public method of the official SDK has its row in the guide: ours, or "not yet"."""

import inspect
import re
from pathlib import Path

import pytest
import tinker

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "official_sdk.md"
PREFIXES = {
    "ServiceClient": "service",
    "TrainingClient": "training",
    "SamplingClient": "sampler",
    "RestClient": "rest",
    "AdminClient": "admin",
}


def methods(cls: type) -> set[str]:
    """The public methods, without the deprecated `_async` twins."""
    found = {name for name, member in inspect.getmembers(cls, inspect.isroutine) if not name.startswith("_")}
    return {name for name in found if name.removesuffix("_async") not in found - {name}}


@pytest.mark.parametrize("client", PREFIXES)
def test_every_method_has_a_row(client):
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    written = set(re.findall(rf"\b{PREFIXES[client]}\.(\w+)", " ".join(rows)))
    assert sorted(methods(getattr(tinker, client)) - written) == []
