"""Runs benchmarks, prints their table, and writes JSON and a plot into benchmarks/results/.

python -m benchmarks [NAME ...] [--rounds N] [--quick] [--out FOLDER]

The exit status is 1 when a target is missed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import (
    against_official,
    embedded,
    growth,
    imports,
    many_clients,
    overlap,
    pipeline_alone,
    terms_at_once,
    with_regularizers,
)
from benchmarks.benchmark import Benchmark, Settings
from benchmarks.plot import draw
from benchmarks.results import FOLDER, LATEST, Report, Result, report, this_machine
from benchmarks.table import show

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
)


def run(benchmarks: Sequence[Benchmark], settings: Settings, console: Console) -> Report:
    """Runs them one after another."""
    machine = this_machine()
    results: list[Result] = []
    for benchmark in benchmarks:
        started = time.perf_counter()
        console.print(f"({benchmark.name}) {benchmark.title} ...", end=" ", highlight=False)
        results += benchmark.run(settings)
        console.print(f"{time.perf_counter() - started:.0f} s", highlight=False)
    return report(results, machine, rounds=settings.rounds, quick=settings.quick)


def write(made: Report, folder: Path) -> list[Path]:
    """Writes JSON and plot; a quick run does not replace the numbers of a real one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("quick.json" if made.quick else LATEST.name)
    path.write_text(made.model_dump_json(indent=1) + "\n")
    draw(made, path.with_suffix(".png"))
    return [path, path.with_suffix(".png")]


def main(arguments: Sequence[str], benchmarks: Sequence[Benchmark] = BENCHMARKS) -> int:
    """Does what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    names = [benchmark.name for benchmark in benchmarks]
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=None, help="runs of every subject that count")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; judges nothing")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where JSON and plot go")
    given = parser.parse_args(arguments)
    settings = Settings(rounds=given.rounds or (2 if given.quick else Settings.rounds), quick=given.quick)
    chosen = [benchmark for benchmark in benchmarks if not given.names or benchmark.name in given.names]
    console = Console(width=None if sys.stdout.isatty() else 140)
    made = run(chosen, settings, console)
    show(made, console)
    for path in write(made, given.out):
        console.print(str(path), highlight=False)
    return 1 if made.missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
