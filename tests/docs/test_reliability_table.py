"""The tables of promises name existing tests; the page for users names none."""

import re

from tests.docs.named_tests import problem_of
from tests.docs.test_docs_run import ROOT
from tinkex_py import RetryPolicy, TinkexConfig
from tinkex_py.local import LocalOptions
from tinkex_py.transport.http import LONGEST_RESPONSE

TABLES = ROOT / "docs" / "contributing" / "promises.md"
PAGE = ROOT / "docs" / "reliability.md"


def rows() -> list[tuple[str, list[str]]]:
    """Returns the promise and the tests of every row below the first heading."""
    _, tables = TABLES.read_text(encoding="utf-8").split("\n## ", 1)
    lines = [line for line in tables.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row for row in cells if len(row) != 3] == []
    promises = [row for row in cells if row[0] not in ("promise", "---")]
    return [(promise, re.findall(r"`([^`]+)`", tests)) for promise, _, tests in promises]


def test_every_promise_has_tests_and_they_exist():
    found = rows()
    assert len(found) > 90
    assert [promise for promise, tests in found if not tests] == []
    assert [f"{name} {problem}" for _, tests in found for name in tests if (problem := problem_of(name))] == []


def test_promises_are_unique():
    promises = [promise for promise, _ in rows()]
    assert sorted(set(promises)) == sorted(promises)


def test_the_page_for_users_names_no_tests():
    assert re.findall(r"\btest_\w+", PAGE.read_text(encoding="utf-8")) == []


def test_the_page_for_users_states_the_defaults():
    config, retry, local = TinkexConfig(api_key="tml-key"), RetryPolicy(), LocalOptions()
    bounds = [
        f"for up to {retry.deadline:g} s (`RetryPolicy.deadline`)",
        f"doubles from {retry.initial_wait:g} s to {retry.max_wait:g} s",
        f"One exchange takes at most {config.timeout:g} s",
        f"A poll for a result takes at most {config.poll_timeout:g} s",
        f"for up to {config.close_timeout:g} s (`close_timeout`)",
        f"A heartbeat is sent every {config.heartbeat_interval:g} s",
        f"at most {config.max_connections} connections for requests",
        f"{config.max_polls} for polls",
        f"at most {config.max_response_bytes >> 30} GiB after decompression (`max_response_bytes`)",
        f"at most {LONGEST_RESPONSE >> 20} MiB",
        f"{local.max_waiting_requests} requests, {local.max_waiting_bytes >> 30} GiB of bodies",
        f"{local.max_waiting_samples} samples, {local.max_models} training models",
        f"A body has at most {local.max_body_bytes >> 30} GiB",
    ]
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert [bound for bound in bounds if bound not in text] == []
