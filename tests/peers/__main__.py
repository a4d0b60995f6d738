"""Runs the flows of all pairs or of some, prints the table, and writes it into docs/compatibility.md.

The columns of the other pairs are those of their last run, which are in `columns/`.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.peers import results
from tests.peers.flows import FLOWS
from tests.peers.installs import ROOT, peers_folder
from tests.peers.pairs import PAIRS, Pair, program_output
from tests.peers.process import PeerError

PAGE = ROOT / "docs" / "compatibility.md"
STYLES = {"pass": "green", "unsupported": "yellow", "silent": "yellow", "absent": "dim", "fail": "bold red"}
PROGRAM_SECONDS = 900.0


def run(pair: Pair) -> results.Column:
    with tempfile.TemporaryDirectory(prefix="tinkex-peer-") as name, pair.serve(Path(name)) as peer:
        errors = peers_folder() / "results" / f"{pair.name}.stderr"
        errors.parent.mkdir(parents=True, exist_ok=True)
        cells = results.cells_from(program_output(pair, peer, errors, PROGRAM_SECONDS).splitlines())
    cells = results.with_defects(cells, pair.defects)
    return results.Column(pair.head, pair.client, peer.version, f"{datetime.now(UTC):%Y-%m-%d}", cells)


def result_file(pair: Pair) -> Path:
    return Path(__file__).with_name("columns") / f"{pair.name}.json"


def print_table(columns: Sequence[results.Column], console: Console) -> None:
    table = Table("flow", *(column.head for column in columns))
    for flow in FLOWS:
        outcomes = [column.cells[flow].outcome for column in columns]
        table.add_row(flow, *(f"[{STYLES[outcome]}]{results.WORDS[outcome]}" for outcome in outcomes))
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    names = [pair.name for pair in PAIRS]
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=f"{', '.join(names)}; default: all")
    wanted = parser.parse_args(arguments).pairs
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"unknown pair {', '.join(unknown)}; choose from {', '.join(names)}")
    console = Console(width=260)
    broken = False
    for pair in PAIRS:
        if wanted and pair.name not in wanted:
            continue
        console.print(f"{pair.head} ...")
        try:
            column = run(pair)
        except PeerError as error:
            console.print(f"{pair.head}: {error}", markup=False)
            broken = True
            continue
        results.save(column, result_file(pair))
        for flow, cell in column.cells.items():
            if cell.outcome == "fail":
                console.print(f"  {flow}: {cell.detail}", markup=False)
    columns = [results.load(result_file(pair)) for pair in PAIRS if result_file(pair).exists()]
    print_table(columns, console)
    PAGE.write_text(results.with_block(PAGE.read_text(), results.markdown(columns)))
    return int(broken or any(column.has_failed for column in columns))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
