"""Runs benchmarks, prints their table, and writes JSON and a plot into benchmarks/results/.

python -m benchmarks [NAME ...] [--rounds N] [--quick] [--out FOLDER]

The exit status is 1 if a target is missed. A run of all benchmarks at full size writes `latest.json`, `latest.png` and
the table of docs/performance.md. Other runs write `part.json` or `quick.json`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import (
    against_official,
    dashboard_page,
    embedded,
    growth,
    imports,
    many_clients,
    overlap,
    pipeline_alone,
    processes,
    ray_terms,
    sampling_at_scale,
    terms_at_once,
    with_regularizers,
)
from benchmarks.benchmark import Benchmark, Settings
from benchmarks.plot import draw
from benchmarks.results import FOLDER, Report, Result, report, this_machine
from benchmarks.subjects import ROOT
from benchmarks.table import show, write_page

PAGE = ROOT / "docs" / "performance.md"
QUICK_ROUNDS = 2
WIDTH = 150  # if the output is not a terminal

BENCHMARKS: tuple[Benchmark, ...] = (
    against_official.BENCHMARK,
    with_regularizers.BENCHMARK,
    pipeline_alone.BENCHMARK,
    terms_at_once.BENCHMARK,
    growth.BENCHMARK,
    imports.BENCHMARK,
    many_clients.BENCHMARK,
    overlap.BENCHMARK,
    embedded.BENCHMARK,
    sampling_at_scale.BENCHMARK,
    dashboard_page.BENCHMARK,
    processes.BENCHMARK,
    ray_terms.BENCHMARK,
)


def run(benchmarks: Sequence[Benchmark], settings: Settings, console: Console) -> Report:
    """Runs benchmarks one after another."""
    machine = this_machine()
    results: list[Result] = []
    for benchmark in benchmarks:
        started = time.perf_counter()
        console.print(f"({benchmark.name}) {benchmark.title} ...", end=" ", highlight=False)
        results += benchmark.run(settings)
        console.print(f"{time.perf_counter() - started:.0f} s", highlight=False)
    return report(results, machine, rounds=settings.rounds, quick=settings.quick)


def write(made: Report, folder: Path, *, complete: bool) -> list[Path]:
    """Writes JSON and plot; only a complete run at full size replaces the latest results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("quick.json" if made.quick else "latest.json" if complete else "part.json")
    path.write_text(made.model_dump_json(indent=1) + "\n")
    draw(made, path.with_suffix(".png"))
    return [path, path.with_suffix(".png")]


def parsed(arguments: Sequence[str], names: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; default: all")
    parser.add_argument("--rounds", type=int, default=None, help="measured runs of every subject")
    parser.add_argument("--quick", action="store_true", help="small sizes, without verdicts")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for JSON and plot")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(names))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(names)}")
    if given.rounds is not None and given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    return given


def main(arguments: Sequence[str], benchmarks: Sequence[Benchmark] = BENCHMARKS) -> int:
    """Runs the command; returns the exit status."""
    given = parsed(arguments, [benchmark.name for benchmark in benchmarks])
    settings = Settings(given.rounds or (QUICK_ROUNDS if given.quick else Settings.rounds), quick=given.quick)
    chosen = [benchmark for benchmark in benchmarks if not given.names or benchmark.name in given.names]
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    made = run(chosen, settings, console)
    show(made, console)
    for path in write(made, given.out, complete=not given.names):
        console.print(str(path), highlight=False)
    if not given.names and not given.quick and given.out == FOLDER:
        write_page(made, PAGE)
    return 1 if made.missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
