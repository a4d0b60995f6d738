"""Says at the end of the tests how many entries were compared with numbers from elsewhere.

A test that compares an entry calls `record_property(source, entry)`; the source is one of `SOURCES`.
"""

import re
from collections import defaultdict
from typing import Any

import pytest

SOURCES = {"sheet": "the sheet's numbers", "trl": "TRL", "verl": "verl"}


def _in_order(entry: str) -> tuple[str, int, str]:
    letter, number, rest = re.fullmatch(r"([A-Z]*)(\d*)(.*)", entry).groups()  # type: ignore[union-attr]
    return letter, int(number or 0), rest


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for report in terminalreporter.stats.get("passed", []):
        for source, entry in getattr(report, "user_properties", []):
            if source in SOURCES and isinstance(report, pytest.TestReport):
                counts[source][entry] += 1
    for source, entries in counts.items():
        names = " ".join(sorted(entries, key=_in_order))
        terminalreporter.write_line(
            f"objectives: {len(entries)} entries ({sum(entries.values())} comparisons) compared with "
            f"{SOURCES[source]}: {names}"
        )
