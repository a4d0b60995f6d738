"""The summary at the end of a soak."""

from collections.abc import Iterable, Sequence
from dataclasses import fields

from tests.soak.resources import MIB, Look, growth
from tests.soak.run import GROWTH_BOUNDS, Settings, Tally

Row = Sequence[object]


def table(settings: Settings, tally: Tally) -> str:
    """Returns the summary as text."""
    clock = tally.watch.clock
    summary = (
        f"seed {settings.seed}: {tally.seconds:.0f} s, {tally.segments} segments, {sum(clock.calls.values())} calls "
        f"(run and twin), {sum(tally.requests.values())} requests, {sum(tally.injected.values())} faults, "
        f"{tally.watch.ledger.units} units of telemetry"
    )
    parts = [
        summary,
        section(
            "calls (run and twin)",
            ("kind", "calls", "slowest, s"),
            [(kind, count, f"{clock.slowest[kind]:.2f}") for kind, count in clock.calls.most_common()],
        ),
        section(
            "failures in the plan",
            ("what", "planned", "seen"),
            [
                *((name, tally.planned[name], tally.seen[name]) for name in sorted(tally.planned | tally.seen)),
                (
                    "callers cancelled at any moment",
                    tally.leavers,
                    f"{tally.left['CancelledError']} before the result",
                ),
            ],
        ),
        _faults(tally),
        section("checked", ("what", "times"), list(tally.checked.items())),
        _resources(tally),
    ]
    return "\n\n".join(parts)


def section(title: str, heads: Sequence[str], rows: Iterable[Row]) -> str:
    """Formats a table with a title; the first column is left-aligned, the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(row))
        for row in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join([title.upper(), *(f"  {line.rstrip()}" for line in lines)])


def _faults(tally: Tally) -> str:
    places = sorted({place for _, place in tally.injected})
    names = sorted({name for name, _ in tally.injected})
    rows: list[Row] = [
        (name, *(tally.injected[name, place] or "" for place in places), sum(tally.injected[name, p] for p in places))
        for name in names
    ]
    totals = [sum(tally.injected[name, place] for name in names) for place in places]
    return section("faults injected", ("kind", *places, "all"), [*rows, ("all", *totals, sum(totals))])


def _resources(tally: Tally) -> str:
    looks = [tally.looks.get(moment) for moment in ("start", "warm", "end")]
    rows: list[Row] = [
        (field.name.replace("_", " "), *(_shown(look, field.name) for look in looks), _trend(tally, field.name))
        for field in fields(Look)
    ]
    return section("resources", ("what", "start", "warm", "end", "growth after the warm-up"), rows)


def _shown(look: Look | None, name: str) -> str:
    if look is None:
        return "-"
    value = getattr(look, name)
    return f"{value / MIB:.1f} MiB" if name.endswith("rss") else str(value)


def _trend(tally: Tally, name: str) -> str:
    if name not in GROWTH_BOUNDS:
        return ""
    grown = growth(tally.sizes[name])
    shown = "too few looks" if grown is None else f"{grown / MIB:.1f} MiB"
    return f"{shown}, at most {GROWTH_BOUNDS[name] / MIB:.0f} MiB"
