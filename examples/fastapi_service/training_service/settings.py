"""Settings of the service, from the environment."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tinkex_py import AsyncServiceClient, ConfigError


@dataclass(frozen=True)
class Settings:
    """Where to train, and how many jobs at a time.

    Attributes:
        make_service: creates the client of the training service.
        base_model: the model that jobs fine-tune.
        folder: of the jobs' runs.
        limit: jobs at a time.
    """

    make_service: Callable[[], AsyncServiceClient]
    base_model: str
    folder: Path
    limit: int = 2

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Reads `TINKER_BASE_URL`, `BASE_MODEL`, `RUNS_FOLDER` and `MAX_JOBS`.

        Without `TINKER_BASE_URL`, jobs train on a service in this process.

        Raises:
            ConfigError: MAX_JOBS is not a positive whole number.
        """
        model = environment.get("BASE_MODEL", "tiny")
        remote = environment.get("TINKER_BASE_URL")
        limit = environment.get("MAX_JOBS", "2")
        if not limit.isdecimal() or int(limit) < 1:
            raise ConfigError(f"MAX_JOBS must be a whole number of at least 1, got {limit!r}")
        return cls(
            make_service=AsyncServiceClient.from_env if remote else partial(AsyncServiceClient.local, model=model),
            base_model=model,
            folder=Path(environment.get("RUNS_FOLDER", "runs")),
            limit=int(limit),
        )
