"""`tinkex-py version`."""

import json
import platform
from importlib import metadata

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.version import __version__

# What decides how a run behaves; those that are not installed are left out.
_LIBRARIES = ("torch", "transformers", "peft", "httpx", "pydantic")


def version(as_json: AsJson = False) -> None:
    """Say which version this is, and what it runs on."""
    versions = {"tinkex_py": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if as_json:
        typer.echo(json.dumps(versions))
        return
    for name, number in versions.items():
        typer.echo(f"{name} {number}")
