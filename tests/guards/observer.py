"""A pytest plugin for runs without a guard: `-p tests.guards.observer`.

It ends the run where another package than the copy would be tested, and writes down what each test came to.
"""

import json
import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

import tinkex_py
from tests.guards.entry import PACKAGE

REPORT = "GUARDS_REPORT"
WATCHED = "GUARDS_TESTS"
NOT_THE_COPY = 97


def belongs_to(node: str, named: str) -> bool:
    """Whether a test is the named one, with any parameters where the name has none."""
    return node == named or node.startswith((f"{named}[", f"{named}::"))


def pytest_configure(config: pytest.Config) -> None:
    expected = config.rootpath / PACKAGE
    if Path(tinkex_py.__file__).parent != expected:
        pytest.exit(f"{tinkex_py.__file__} was imported instead of {expected}", returncode=NOT_THE_COPY)
    # The same examples each time; how small one could be made does not matter here.
    quick = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain, Phase.reuse)]
    settings.register_profile("guards", parent=settings(), derandomize=True, database=None, phases=quick)
    settings.load_profile("guards")
    config.pluginmanager.register(Observer(Path(os.environ[REPORT]), json.loads(os.environ[WATCHED])))


class Observer:
    """Watches the tests of one run.

    Args:
        report: where the outcomes go.
        named: ids of tests; of each, nothing is run any more once one of its parameters has failed.
    """

    def __init__(self, report: Path, named: list[str]) -> None:
        self._report = report
        self._named = named
        self._failed: dict[str, str] = {}
        self._broken: dict[str, str] = {}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if any(belongs_to(item.nodeid, name) and name in self._failed for name in self._named):
            pytest.skip("another parameter has failed already")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = str(getattr(crash, "message", None) or report.longrepr).strip().partition("\n")[0]
        found = self._broken if report.when == "setup" else self._failed
        for name in self._named:
            if belongs_to(report.nodeid, name):
                found.setdefault(name, reason)

    def pytest_sessionfinish(self) -> None:
        self._report.write_text(json.dumps({"failed": self._failed, "broken": self._broken}), encoding="utf-8")
