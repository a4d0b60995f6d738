"""`tinkex-py version`."""

import platform
from importlib import metadata

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.printing import echo, echo_json
from tinkex_py.version import __version__

# Libraries that affect results; those not installed are omitted.
_LIBRARIES = ("torch", "transformers", "peft", "httpx", "pydantic")


def version(as_json: AsJson = False) -> None:
    """Print the versions of this package and of the libraries that it uses."""
    versions = {"tinkex_py": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if as_json:
        echo_json(versions)
        return
    for name, number in versions.items():
        echo(f"{name} {number}")
