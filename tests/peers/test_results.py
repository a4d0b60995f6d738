"""The table of the conformance runs and its page. `make conformance` does the runs."""

import re
from pathlib import Path

import pytest

from tests.peers import results
from tests.peers.__main__ import PAGE, chosen, main, result_file
from tests.peers.flows import FLOWS
from tests.peers.pairs import COOKBOOK_PAIRS, PAIRS
from tests.peers.recipes import RECIPES

FOLDER = Path(__file__).parent
TABLES = [(results.TABLE, PAIRS, FLOWS), (results.COOKBOOK_TABLE, COOKBOOK_PAIRS, RECIPES)]


def test_an_unreached_flow_is_a_failure():
    output = ['{"flow": "forward", "outcome": "pass", "detail": ""}', "noise of a library", ""]
    cells = results.cells_from(output, FLOWS)
    assert list(cells) == list(FLOWS)
    assert cells.pop("forward") == results.Cell("pass")
    assert {cell.outcome for cell in cells.values()} == {"fail"}


def test_only_the_known_failure_is_a_defect_of_the_server():
    defects = [results.Defect(flow, r"ServerError: POST /a returned 500\..*", "broken") for flow in ("one", "two")]
    known = results.Cell("fail", "ServerError: POST /a returned 500. At line 1\nof it")
    for cell, expected in (
        (results.Cell("pass"), "pass"),
        (known, "silent"),
        (results.Cell("fail", "ServerError: POST /b returned 500. At"), "fail"),
        (results.Cell("fail", "AssertionError: ServerError: POST /a returned 500. At"), "fail"),
        (results.Cell("fail", "the program ended or hung before this was done"), "fail"),
        (results.Cell("unsupported", known.detail), "unsupported"),
    ):
        seen = results.with_defects({"one": cell, "two": results.Cell("pass"), "three": known}, defects)
        assert [item.outcome for item in seen.values()] == [expected, "pass", "fail"]
        assert seen["one"].detail == ("a defect of the server: broken" if expected == "silent" else cell.detail)


def test_defects_name_existing_flows():
    assert {defect.flow for pair in PAIRS for defect in pair.defects} <= set(FLOWS)


def test_a_saved_column_is_loaded_unchanged(tmp_path):
    cells = {flow: results.Cell("pass") for flow in FLOWS} | {"sample": results.Cell("unsupported", "no\n`sampler`")}
    column = results.Column("ours -> other", "a 1", "b 2", "2026-01-02", cells)
    results.save(column, tmp_path / "results" / "one.json")
    assert results.load(tmp_path / "results" / "one.json") == column
    block = results.markdown([column], FLOWS)
    assert "| sample | unsupported |" in block
    assert "| ours -> other | a 1 | b 2 | 2026-01-02 |" in block
    assert "- sample: `no 'sampler'`" in block


def test_only_the_text_between_the_markers_is_replaced():
    begin, end = results.markers("one")
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    once = results.with_block(page, "new\n", "one")
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert results.with_block(once, "new\n", "one") == once
    with pytest.raises(ValueError, match="not found"):
        results.with_block(page, "new", "another")


@pytest.mark.parametrize(("name", "pairs", "expected"), TABLES)
def test_the_page_lists_every_pair_and_row_without_failures(name: str, pairs, expected):
    page = PAGE.read_text()
    begin, end = results.markers(name)
    table = page[page.index(begin) : page.index(end)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    assert rows[0][1:] == [pair.head for pair in pairs]
    assert [row[0] for row in rows[2 : 2 + len(expected)]] == list(expected)
    words = {word for row in rows[2 : 2 + len(expected)] for word in row[1:]}
    assert words <= {"pass", "unsupported", "not by this server", "not in this SDK"}


def test_the_page_is_made_of_the_columns_in_the_repository():
    page = PAGE.read_text()
    for name, pairs, rows in TABLES:
        columns = [results.load(result_file(pair)) for pair in pairs]
        assert results.with_block(page, results.markdown(columns, rows), name) == page


@pytest.mark.parametrize(
    ("program", "rows"),
    [("official_program.py", FLOWS), ("own_program.py", FLOWS), ("cookbook_program.py", RECIPES)],
)
def test_every_row_is_a_method_of_its_programs(program: str, rows):
    methods = set(re.findall(r"^    (?:async )?def (\w+)\(self\)", (FOLDER / program).read_text(), re.MULTILINE))
    assert set(rows.values()) <= methods


def test_the_beginning_of_names_chooses_several_pairs():
    assert chosen(["cookbook"]) == list(COOKBOOK_PAIRS)
    assert [pair.name for pair in chosen(["ours", "tuft"])] == ["ours", "tuft-hf", "tuft-dummy"]


@pytest.mark.parametrize(("argument", "code", "shown"), [("--help", 0, "skyrl-0.4.0"), ("nobody", 2, "unknown pair")])
def test_the_command_line_lists_the_pairs(capsys, argument: str, code: int, shown: str):
    with pytest.raises(SystemExit) as exit_:
        main([argument])
    output = capsys.readouterr()
    assert exit_.value.code == code
    assert shown in output.out + output.err
    assert "skyrl-0.4.0" in output.out + output.err
