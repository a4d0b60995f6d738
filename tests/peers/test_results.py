"""The table of the conformance runs and its page. `make conformance` does the runs."""

import re
from pathlib import Path

import pytest

from tests.peers import results
from tests.peers.__main__ import PAGE, main, result_file
from tests.peers.flows import FLOWS
from tests.peers.pairs import PAIRS

FOLDER = Path(__file__).parent


def test_an_unreached_flow_is_a_failure():
    output = ['{"flow": "forward", "outcome": "pass", "detail": ""}', "noise of a library", ""]
    cells = results.cells_from(output)
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
    block = results.markdown([column])
    assert "| sample | unsupported |" in block
    assert "| ours -> other | a 1 | b 2 | 2026-01-02 |" in block
    assert "- sample: `no 'sampler'`" in block


def test_only_the_text_between_the_markers_is_replaced():
    page = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"
    once = results.with_block(page, "new\n")
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert results.with_block(once, "new\n") == once
    with pytest.raises(ValueError, match="not found"):
        results.with_block("no markers", "new")


def test_the_page_lists_every_pair_and_flow_without_failures():
    page = PAGE.read_text()
    table = page[page.index(results.BEGIN) : page.index(results.END)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    assert rows[0][1:] == [pair.head for pair in PAIRS]
    assert [row[0] for row in rows[2 : 2 + len(FLOWS)]] == list(FLOWS)
    words = {word for row in rows[2 : 2 + len(FLOWS)] for word in row[1:]}
    assert words == {"pass", "unsupported", "not by this server", "not in this SDK"}


def test_the_page_is_made_of_the_columns_in_the_repository():
    columns = [results.load(result_file(pair)) for pair in PAIRS]
    page = PAGE.read_text()
    assert results.with_block(page, results.markdown(columns)) == page


def test_every_flow_is_a_method_of_both_programs():
    for program in ("official_program.py", "own_program.py"):
        methods = set(re.findall(r"^    (?:async )?def (\w+)\(self\)", (FOLDER / program).read_text(), re.MULTILINE))
        assert set(FLOWS.values()) <= methods, program


@pytest.mark.parametrize(("argument", "code", "shown"), [("--help", 0, "skyrl-0.4.0"), ("nobody", 2, "unknown pair")])
def test_the_command_line_lists_the_pairs(capsys, argument: str, code: int, shown: str):
    with pytest.raises(SystemExit) as exit_:
        main([argument])
    output = capsys.readouterr()
    assert exit_.value.code == code
    assert shown in output.out + output.err
    assert "skyrl-0.4.0" in output.out + output.err
