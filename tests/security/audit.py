"""Asks pip-audit for known vulnerabilities of what is installed: `python -m tests.security.audit PIP_AUDIT SITE`.

Without the network pip-audit finds nothing and says that all is well; this says that nothing was asked.
"""

import json
import subprocess
import sys
from typing import Any


def verdict(report: dict[str, Any]) -> tuple[bool, str]:
    """Whether all is well, and what is to be said.

    Args:
        report: what `pip-audit --format json` wrote.
    """
    packages = report["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    found = [
        f"{package['name']} {package['version']}: {problem['id']}, mended in {', '.join(problem['fix_versions'])}"
        for package in asked
        for problem in package["vulns"]
    ]
    if not asked:
        return False, f"none of {len(packages)} packages could be looked up: this needs the network"
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    told = [*found, f"{len(asked)} packages looked up, {len(found)} vulnerabilities known"]
    if skipped:
        told.append(f"not looked up: {', '.join(sorted(skipped))}")
    return not found, "\n".join(told)


def main() -> None:
    command, site = sys.argv[1:]
    arguments = [command, "--path", site, "--skip-editable", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        sys.exit(done.stderr or "pip-audit said nothing")
    is_well, text = verdict(report)
    sys.stdout.write(f"{text}\n")
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
