"""A run, and the numbers that every tracker receives."""

import math
from collections.abc import Callable

from tinkex_py.runs.records import RunInfo
from tinkex_py.runs.sinks import MetricSink

RUN = RunInfo(
    name="sft kl/1",
    started_at=1_795_000_000.25,
    updated_at=1_795_000_000.25,
    model="tiny",
    config={"learning_rate": 1e-4, "terms": ["l1", "kl"], "note": "plain"},
    seed=7,
)
FIRST = {1: {"loss/total": 0.1, "term/l1/value": 4.9}, 2: {"loss/total": math.nan, "term/l1/value": math.inf}}
# The run failed after step 2 and resumes from the checkpoint of step 1.
AGAIN = {2: {"loss/total": 0.3, "term/l1/value": -math.inf}, 3: {"loss/total": -1e-12, "term/l1/value": 7.0}}


def log_twice(make: Callable[[], MetricSink]) -> None:
    """Logs like a run that fails after step 2 and then resumes."""
    for rows, status in ((FIRST, "failed"), (AGAIN, "finished")):
        sink = make()
        sink.start(RUN)
        for step, metrics in rows.items():
            sink.log(step, metrics)
        sink.finish(status)
