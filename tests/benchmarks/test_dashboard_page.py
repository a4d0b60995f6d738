"""The benchmark of the dashboard measures what it says, or nothing without a browser."""

import pytest

from benchmarks import dashboard_page
from benchmarks.benchmark import Settings


@pytest.mark.skipif(dashboard_page.CHROMIUM is None, reason="no chromium on this machine")
def test_opening_and_zooming_are_measured():
    results = dashboard_page.run(Settings(1, quick=True))
    assert [result.bound for result in results] == [2000.0, 100.0, None, None]
    assert all(result.unit == "ms" and result.measured > 0 for result in results)
    unread, complete = results[2:]
    assert unread.measured <= complete.measured


def test_without_a_browser_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(dashboard_page, "CHROMIUM", None)
    assert dashboard_page.run(Settings(1, quick=True)) == []
    assert "no chromium" in capsys.readouterr().out
