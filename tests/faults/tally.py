"""Counts injected faults and checked promises, over all tests of this folder and all worker processes."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest

Counts = tuple[Mapping[tuple[str, str], int], Mapping[str, int]]
"""What a worker of pytest-xdist sends: plain dicts, which it can serialize."""


@dataclass
class Tally:
    """Counts.

    Attributes:
        injected: faults by name and place.
        checked: promises by name.
    """

    injected: Counter[tuple[str, str]] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)

    def counts(self) -> Counts:
        return dict(self.injected), dict(self.checked)

    def add(self, counts: Counts) -> None:
        """Adds the counts of another process."""
        self.injected.update(counts[0])
        self.checked.update(counts[1])

    def lines(self) -> Iterator[str]:
        """Two tables: faults with their places, and promises."""
        faults = sorted({name for name, _ in self.injected})
        longest = max(map(len, [*faults, "injected"]))
        yield f"{'injected'.ljust(longest)}  times  where"
        for fault in faults:
            places = {place: count for (name, place), count in sorted(self.injected.items()) if name == fault}
            where = ", ".join(f"{place} {count}" for place, count in places.items())
            yield f"{fault.ljust(longest)}  {sum(places.values()):5d}  {where}"
        yield f"{self.injected.total()} faults of {len(faults)} kinds"
        yield ""
        longest = max(map(len, [*self.checked, "checked"]))
        yield "  ".join(["checked".ljust(longest), "times"])
        for promise, count in sorted(self.checked.items()):
            yield f"{promise.ljust(longest)}  {count:5d}"


TALLY = pytest.StashKey[Tally]()


def tally_of(config: pytest.Config) -> Tally:
    """Returns the tally of this process."""
    return config.stash.setdefault(TALLY, Tally())
