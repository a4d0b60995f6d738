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
        """Two tables: faults by place, and promises."""
        places = [*dict.fromkeys(sorted(place for _, place in self.injected))]
        faults = sorted({name for name, _ in self.injected})
        head, longest = [*places, "all"], max(map(len, faults), default=0)
        yield "  ".join(["injected".ljust(longest), *head])
        for fault in faults:
            counts = [self.injected[fault, place] for place in places]
            cells = [
                str(count or "").rjust(len(name)) for count, name in zip([*counts, sum(counts)], head, strict=True)
            ]
            yield "  ".join([fault.ljust(longest), *cells])
        yield f"{self.injected.total()} faults of {len(faults)} kinds"
        yield ""
        longest = max(map(len, self.checked), default=0)
        yield "  ".join(["checked".ljust(longest), "times"])
        for promise, count in sorted(self.checked.items()):
            yield f"{promise.ljust(longest)}  {count:5d}"


TALLY = pytest.StashKey[Tally]()


def tally_of(config: pytest.Config) -> Tally:
    """The one of this process."""
    return config.stash.setdefault(TALLY, Tally())
