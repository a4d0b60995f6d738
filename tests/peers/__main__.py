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
from tests.peers.installs import ROOT, peers_folder
from tests.peers.pairs import COOKBOOK_PAIRS, PAIRS, Pair, program_output
from tests.peers.process import PeerError

PAGE = ROOT / "docs" / "compatibility.md"
STYLES = {"pass": "green", "unsupported": "yellow", "silent": "yellow", "absent": "dim", "fail": "bold red"}
PROGRAM_SECONDS = 900.0


def run(pair: Pair) -> results.Column:
    with tempfile.TemporaryDirectory(prefix="tinkex-peer-") as name, pair.serve(Path(name)) as peer:
        errors = peers_folder() / "results" / f"{pair.name}.stderr"
        errors.parent.mkdir(parents=True, exist_ok=True)
        output = program_output(pair, peer, errors, PROGRAM_SECONDS)
        cells = results.cells_from(output.splitlines(), pair.rows)
    cells = results.with_defects(cells, pair.defects)
    return results.Column(pair.head, pair.client, peer.version, f"{datetime.now(UTC):%Y-%m-%d}", cells)


def result_file(pair: Pair) -> Path:
    return Path(__file__).with_name("columns") / f"{pair.name}.json"


def print_table(columns: Sequence[results.Column], console: Console) -> None:
    table = Table("", *(column.head for column in columns))
    for row in columns[0].cells:
        outcomes = [column.cells[row].outcome for column in columns]
        table.add_row(row, *(f"[{STYLES[outcome]}]{results.WORDS[outcome]}" for outcome in outcomes))
    console.print(table)


def chosen(words: Sequence[str]) -> list[Pair]:
    """Returns the pairs whose names are, or begin with, one of the words; without words all.

    Raises:
        ValueError: the words that no name begins with.
    """
    pairs = [*PAIRS, *COOKBOOK_PAIRS]
    unknown = [word for word in words if not any(_is_named(pair, word) for pair in pairs)]
    if unknown:
        raise ValueError(", ".join(unknown))
    return [pair for pair in pairs if not words or any(_is_named(pair, word) for word in words)]


def _is_named(pair: Pair, word: str) -> bool:
    return pair.name == word or pair.name.startswith(f"{word}-")


def write_tables(console: Console) -> bool:
    """Writes the tables into the page; returns whether a cell is a failure."""
    page, has_failed = PAGE.read_text(), False
    for table, pairs in ((results.TABLE, PAIRS), (results.COOKBOOK_TABLE, COOKBOOK_PAIRS)):
        columns = [results.load(result_file(pair)) for pair in pairs if result_file(pair).exists()]
        if columns:
            print_table(columns, console)
            page = results.with_block(page, results.markdown(columns, pairs[0].rows), table)
        has_failed |= any(column.has_failed for column in columns)
    PAGE.write_text(page)
    return has_failed


def main(arguments: Sequence[str]) -> int:
    names = ", ".join(pair.name for pair in (*PAIRS, *COOKBOOK_PAIRS))
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument(
        "pairs", nargs="*", metavar="PAIR", help=f"{names}, or the beginning of some, such as cookbook; default: all"
    )
    wanted = parser.parse_args(arguments).pairs
    try:
        pairs = chosen(wanted)
    except ValueError as error:
        parser.error(f"unknown pair {error}; choose from {names}")
    console = Console(width=260)
    broken = False
    for pair in pairs:
        console.print(f"{pair.head} ...")
        try:
            column = run(pair)
        except PeerError as error:
            console.print(f"{pair.head}: {error}", markup=False)
            broken = True
            continue
        results.save(column, result_file(pair))
        for row, cell in column.cells.items():
            if cell.outcome == "fail":
                console.print(f"  {row}: {cell.detail}", markup=False)
    return int(write_tables(console) or broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
