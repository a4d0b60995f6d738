"""Things of the user's own code that an option or a file names as MODULE:NAME."""

import importlib
import sys
from pathlib import Path

from tinkex_py.errors import ConfigError


def named_object(reference: str, where: str) -> object:
    """What `module:name` names; modules of the working folder are found too.

    Args:
        reference: the name.
        where: the option or setting it was given in, for the error.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise ConfigError(f"{where} must be MODULE:NAME, got {reference!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: {reference!r} cannot be imported: {error}") from error
