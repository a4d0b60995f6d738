"""The table of the conformance runs, and the page that holds it. The runs themselves are `make conformance`."""

import pytest

from tests.peers import results
from tests.peers.flows import FLOWS
from tests.peers.installs import ROOT
from tests.peers.pairs import PAIRS

PAGE = ROOT / "docs" / "compatibility.md"


def test_what_a_program_did_not_reach_is_a_failure():
    told = ['{"flow": "forward", "outcome": "pass", "detail": ""}', "noise of a library", ""]
    cells = results.cells_from(told)
    assert list(cells) == list(FLOWS)
    assert cells.pop("forward") == results.Cell("pass")
    assert {cell.outcome for cell in cells.values()} == {"fail"}


def test_only_the_very_failure_that_is_known_is_a_defect_of_the_server():
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


def test_the_defects_are_of_flows_that_there_are():
    assert {defect.flow for pair in PAIRS for defect in pair.defects} <= set(FLOWS)


def test_a_column_survives_being_kept(tmp_path):
    cells = {flow: results.Cell("pass") for flow in FLOWS} | {"sample": results.Cell("unsupported", "no\n`sampler`")}
    column = results.Column("ours -> it", "a 1", "b 2", "2026-01-02", cells)
    results.save(column, tmp_path / "kept" / "one.json")
    assert results.load(tmp_path / "kept" / "one.json") == column
    block = results.markdown([column])
    assert "| sample | unsupported |" in block
    assert "| ours -> it | a 1 | b 2 | 2026-01-02 |" in block
    assert "- sample: `no 'sampler'`" in block


def test_only_what_is_between_the_markers_is_replaced():
    page = f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n"
    once = results.with_block(page, "new\n")
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert results.with_block(once, "new\n") == once
    with pytest.raises(ValueError, match="not found"):
        results.with_block("no markers", "new")


def test_the_page_has_every_pair_and_flow_and_no_failure():
    page = PAGE.read_text()
    table = page[page.index(results.BEGIN) : page.index(results.END)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    assert rows[0][1:] == [pair.head for pair in PAIRS]
    assert [row[0] for row in rows[2 : 2 + len(FLOWS)]] == list(FLOWS)
    words = {word for row in rows[2 : 2 + len(FLOWS)] for word in row[1:]}
    assert words == {"pass", "unsupported", "not by this server", "not in this SDK"}
