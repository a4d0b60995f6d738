"""The table that a soak ends with."""

from collections.abc import Iterable, Sequence

from tests.soak.resources import MIB, Look, growth
from tests.soak.run import CLIENT_GROWTH, SERVICE_GROWTH, Settings, Tally

Row = Sequence[object]


def table(settings: Settings, tally: Tally) -> str:
    """All of it, as text."""
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
                    "callers that leave at any moment",
                    tally.leavers,
                    f"{tally.left['CancelledError']} before the answer",
                ),
            ],
        ),
        _faults(tally),
        section("checked", ("what", "times"), list(tally.checked.items())),
        _resources(tally),
    ]
    return "\n\n".join(parts)


def section(title: str, heads: Sequence[str], rows: Iterable[Row]) -> str:
    """One table with a title; the first column is left, all others are right."""
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
    names = ("tasks", "threads", "sockets", "descriptors", "rss")
    of_service = ("service_threads", "service_sockets", "service_descriptors", "service_rss")
    rows: list[Row] = [
        (name.replace("_", " "), *(_told(look, name) for look in looks), _trend(tally, name))
        for name in (*names, *of_service)
    ]
    return section("resources", ("what", "start", "warm", "end", "growth after the warm-up"), rows)


def _told(look: Look | None, name: str) -> str:
    value = None if look is None else getattr(look, name)
    if value is None:
        return "-"
    return f"{value / MIB:.1f} MiB" if name.endswith("rss") else str(value)


def _trend(tally: Tally, name: str) -> str:
    sizes, bound = {
        "rss": (tally.memory.client, CLIENT_GROWTH),
        "service_rss": (tally.memory.service, SERVICE_GROWTH),
    }.get(name, ([], 0))
    if not sizes:
        return ""
    found = growth(name, sizes, bound)
    told = "too few looks" if found.grown is None else f"{found.grown / MIB:.1f} MiB"
    return f"{told}, at most {bound / MIB:.0f} MiB"
