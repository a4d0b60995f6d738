"""Logs to one tracker without a network, and prints what the tracker's reader returns as JSON.

    python -m tests.integrations.tracker_program TRACKER FOLDER

A separate process, because these libraries keep threads, processes and settings until the process ends.
"""

import json
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinkex_py.integrations.trackers import MlflowSink, TrackioSink, WandbSink, run_key
from tinkex_py.runs.records import RunInfo
from tinkex_py.runs.sinks import MetricSink

Points = list[tuple[int, float]]

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


def refuse_the_network() -> None:
    """A connection to anything but this machine ends the program."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            sys.exit(f"a tracker connects to {address}")
        connect(self, address)

    socket.socket.connect = checked  # type: ignore[method-assign]


def wandb(folder: Path) -> dict[str, Any]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_machine_info=True)
    around = wandb.init(project="mine", mode="offline", dir=folder, settings=settings)
    log_twice(lambda: WandbSink("guide", mode="offline", dir=folder, settings=settings))
    still_open = wandb.run is around
    around.finish()
    wandb.teardown()
    points: dict[str, Points] = {}
    ids, names, config = set(), set(), {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for content in leveldb_records(file.read_bytes()):
            record = Record.FromString(content)
            if record.WhichOneof("record_type") == "run" and record.run.project == "guide":
                ids.add(record.run.run_id)
                names.add(record.run.display_name)
                config |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for name, value in row.items():
                    if name != "step" and not name.startswith("_"):
                        points.setdefault(name, []).append((row["step"], float(value)))
    return {"points": points, "ids": sorted(ids), "names": sorted(names), "config": config, "still_open": still_open}


def leveldb_records(content: bytes) -> list[bytes]:
    """The records of a `.wandb` file: LevelDB's log format after a header of 7 bytes."""
    records, record, start = [], b"", 7
    while start + 7 <= len(content):
        left_in_block = 32768 - start % 32768
        if left_in_block < 7:
            start += left_in_block
            continue
        length, kind = int.from_bytes(content[start + 4 : start + 6], "little"), content[start + 6]
        record += content[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(record)
            record = b""
    return records


def mlflow(folder: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder}/mlflow.db"
    log_twice(lambda: MlflowSink("guide", tracking_uri=uri))
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("guide").experiment_id])
    (run,) = runs
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {
        "points": {name: [(metric.step, metric.value) for metric in metrics] for name, metrics in history.items()},
        "names": [run.info.run_name],
        "status": run.info.status,
        "config": run.data.params,
    }


def trackio(folder: Path) -> dict[str, Any]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    around = trackio.init(project="mine", embed=False, auto_log_cpu=False, auto_log_gpu=False)
    log_twice(lambda: TrackioSink("guide"))
    still_open = trackio.context_vars.current_run.get() is around
    trackio.finish()
    (run,) = trackio.Api().runs("guide")
    points: dict[str, Points] = {}
    for row in SQLiteStorage.get_logs("guide", run.name, run_id=run.id):
        for name, value in row.items():
            if "/" in name:
                points.setdefault(name, []).append((row["step"], value))
    assert list(folder.glob("guide*.db"))
    return {"points": points, "names": [run.name], "config": run.config, "still_open": still_open}


if __name__ == "__main__":
    refuse_the_network()
    tracker = {"wandb": wandb, "mlflow": mlflow, "trackio": trackio}[sys.argv[1]]
    found = tracker(Path(sys.argv[2]))
    sys.stdout.write(json.dumps({**found, "key": run_key(RUN)}) + "\n")
