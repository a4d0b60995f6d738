"""The names that `__init__.py` loads on first use."""

from .folder import (
    RunFolder as RunFolder,
    read_run as read_run,
    read_steps as read_steps,
)
from .loop import (
    TrainedRun as TrainedRun,
    train as train,
)
from .progress import (
    ProgressView as ProgressView,
)
from .records import (
    RunInfo as RunInfo,
    StepRecord as StepRecord,
    scalars as scalars,
)
from .rollouts import (
    Rollout as Rollout,
)
from .settings import (
    EarlyStop as EarlyStop,
    TrainSettings as TrainSettings,
)
from .sinks import (
    MetricSink as MetricSink,
)
