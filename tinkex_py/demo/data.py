"""The data set of the project."""

from pathlib import Path

from tinkex_py.errors import ConfigError

# In a checkout the data is in examples/, in an installed package beside this file.
_FOLDERS = (Path(__file__).parents[2] / "examples" / "data", Path(__file__).parent / "data")


def default_file(name: str) -> Path:
    """A file of the data set of the project.

    Raises:
        ConfigError: it does not exist.
    """
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{name} is not in {' or '.join(str(folder) for folder in _FOLDERS)}; pass --data FILE")
