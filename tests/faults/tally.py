"""What was injected and what was checked, over all tests of this folder."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.faults.proxy import FaultProxy

Told = dict[str, list[list[object]]]
"""Counts as processes can tell each other."""


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

    def tell(self) -> Told:
        """All counts."""
        return {
            "injected": [[*key, count] for key, count in self.injected.items()],
            "checked": [[name, count] for name, count in self.checked.items()],
        }

    def hear(self, told: Told) -> None:
        """Adds the counts of another process."""
        for name, place, count in told["injected"]:
            self.injected[str(name), str(place)] += int(str(count))
        for name, count in told["checked"]:
            self.checked[str(name)] += int(str(count))

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
    """The one of this process."""
    return config.stash.setdefault(TALLY, Tally())
