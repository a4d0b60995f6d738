"""The files of the demo: its data set, and the folder of a run."""

from datetime import datetime
from pathlib import Path

from tinkex_py.arguments import check_path
from tinkex_py.errors import ConfigError

# In a checkout the data is in examples/, in an installed package beside this file.
_FOLDERS = (Path(__file__).parents[2] / "examples" / "data", Path(__file__).parent / "data")


def default_file(name: str) -> Path:
    """Returns the path of a file of the project's data set.

    Raises:
        ConfigError: it does not exist.
    """
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{name} is not in {' or '.join(map(str, _FOLDERS))}: name a data file with --data")


def new_run_folder(runs_dir: Path) -> Path:
    """Creates a folder named after the time; a second run in the same second gets a number.

    Raises:
        ConfigError: it cannot be created.
    """
    runs_dir = check_path("--runs-dir", runs_dir, error=ConfigError)
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    attempt = 1
    while True:
        folder = runs_dir / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            attempt += 1
        except OSError as error:
            raise ConfigError(
                f"the run's folder {folder} cannot be created: {error.strerror}; choose another --runs-dir"
            ) from error
        else:
            return folder
