"""The folder of a run of the demo."""

from datetime import datetime
from pathlib import Path

from tinkex_py.errors import ConfigError


def new_run_folder(runs_dir: Path) -> Path:
    """A new folder named after the time; a second run in the same second gets a number.

    Raises:
        ConfigError: it cannot be created.
    """
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = runs_dir / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"the run's folder {folder} cannot be created: {error.strerror}") from error
        return folder
    raise ConfigError(f"{runs_dir / stamp} and 998 siblings exist already")
