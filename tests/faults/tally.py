"""What was injected and what was checked, over all tests of this folder."""

from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.faults.proxy import FaultProxy


@dataclass
class Tally:
    """Counts.

    Attributes:
        injected: faults by name and place.
        checked: promises by name.
    """

    injected: Counter[tuple[str, str]] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)

    def add(self, proxy: FaultProxy) -> None:
        """Counts what a proxy did."""
        self.injected.update(proxy.injected)


TALLY = pytest.StashKey[Tally]()
