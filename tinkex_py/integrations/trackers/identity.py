"""How a tracker knows a run again."""

import hashlib
import re
from typing import TypeVar

from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import RunInfo

Opened = TypeVar("Opened")
_LONGEST_NAME = 50


def run_key(run: RunInfo) -> str:
    """A name that is the same whenever this run goes on, and another for a new run with the same name.

    It holds letters, digits, `.`, `_` and `-` only.
    """
    digest = hashlib.sha256(f"{run.name}\0{run.started_at!r}".encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name).strip("-.")[:_LONGEST_NAME]
    return f"{readable or 'run'}-{digest[:8]}"


def started(opened: Opened | None, sink: object) -> Opened:
    """What a sink opened when its run started.

    Raises:
        ConfigError: the sink was not started, or is finished.
    """
    if opened is None:
        raise ConfigError(f"{type(sink).__name__} has no run: call start(run) before log and finish")
    return opened
