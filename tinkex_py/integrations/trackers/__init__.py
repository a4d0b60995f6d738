"""Metric sinks: the numbers of a run go to files and experiment trackers while it trains.

Each is a `tinkex_py.runs.MetricSink`. Importing this loads none of the trackers; making a sink does.
"""

from tinkex_py.integrations.trackers.jsonl import JsonlSink
from tinkex_py.integrations.trackers.mlflow import MlflowSink
from tinkex_py.integrations.trackers.tensorboard import TensorBoardSink
from tinkex_py.integrations.trackers.trackio import TrackioSink
from tinkex_py.integrations.trackers.wandb import WandbSink

__all__ = ["JsonlSink", "MlflowSink", "TensorBoardSink", "TrackioSink", "WandbSink"]
