"""What `make audit` makes of pip-audit's report; the audit itself needs the network."""

import re
from pathlib import Path

from tests.security.audit import verdict


def package(name, *problems, **fields):
    vulnerabilities = [{"id": problem, "fix_versions": ["2.0"]} for problem in problems]
    return {"name": name, "version": "1.0", "vulns": vulnerabilities, **fields}


SKIPPED = {"name": "elsewhere", "skip_reason": "Dependency not found"}


def test_what_could_not_be_asked_is_not_well():
    assert verdict({"dependencies": [SKIPPED, SKIPPED]}) == (
        False,
        "none of 2 packages could be looked up: this needs the network",
    )


def test_vulnerabilities_are_named_and_fail():
    is_well, text = verdict({"dependencies": [package("good"), package("bad", "PYSEC-1"), SKIPPED]})
    assert not is_well
    assert text.splitlines() == [
        "bad 1.0: PYSEC-1, mended in 2.0",
        "2 packages looked up, 1 vulnerabilities known",
        "not looked up: elsewhere",
    ]


def test_none_is_well():
    assert verdict({"dependencies": [package("good")]})[0]


def test_github_actions_are_pinned_by_commit():
    """A tag can be moved to other code; its name stays as a comment."""
    workflows = sorted((Path(__file__).parents[2] / ".github" / "workflows").glob("*.yml"))
    used = [line.strip("- \n") for file in workflows for line in file.read_text().splitlines() if "uses:" in line]
    assert used
    assert [line for line in used if not re.fullmatch(r"uses: [\w./-]+@[0-9a-f]{40}  # v\d+(\.\d+)*", line)] == []
