"""Saves a checkpoint over an older one again and again, in a process that is killed meanwhile; prints what was left.

The first argument is a folder. Without more, a save is killed before every single line of Python that writes it, one
after another, until one save ends by itself. With `SEED COUNT`, it is killed at that many random moments instead.
Every line of the output is JSON: what a service that is started after the kill finds.
"""

import json
import os
import random
import signal
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import load_file

from tinkex_py.local import checkpoints, database
from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.records import CheckpointInfo, TrainingRunInfo

WATCHED = {checkpoints.__file__, database.__file__}
FILES = ("adapter_model.safetensors", "optimizer.safetensors")


def described(generation: int) -> CheckpointInfo:
    kinds = {"train_unembed": True, "train_mlp": True, "train_attn": True}
    run = TrainingRunInfo(run_id="run", base_model="tiny", rank=4, created=datetime.now(UTC), **kinds)
    told = {"generation": generation}
    return CheckpointInfo(run=run, kind="weights", name="x", folder="", time=run.created, user_metadata=told)


def save(store: CheckpointStore, generation: int) -> None:
    values = {f"layer{index}": torch.full((64,), float(generation)) for index in range(4)}
    texts = {"adapter_config.json": json.dumps({"generation": generation})}
    store.write(described(generation), dict.fromkeys(FILES, values), texts, overwrite=True)


def found(root: Path) -> dict[str, object]:
    """What is there after a restart: the generation, and whether every file is whole and of that generation."""
    with closing(CheckpointStore(root)) as store:
        info = store.get("run", "weights", "x")
        if info is None:
            return {"generation": None}
        assert info.user_metadata is not None
        generation = info.user_metadata["generation"]
        tensors = [tensor for name in FILES for tensor in load_file(store.file(info, name)).values()]
        config = json.loads(store.file(info, "adapter_config.json").read_text())
        sizes = sum(file.stat().st_size for file in store.files(info))
        return {
            "generation": generation,
            "whole": len(tensors) == 8
            and all(bool((tensor == float(generation)).all()) for tensor in tensors)
            and config == {"generation": generation}
            and sizes == info.size_bytes,
            "folders": len(list((root / "runs").glob("*/*/*"))),
        }


class KillAt:
    """Kills this process before the given line of Python, counted from 1; counts in `lines`."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.lines = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> object:
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.line:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def in_child(work: object) -> int:
    """The status of a forked process that does the work; this one has a single thread."""
    child = os.fork()
    if child == 0:
        try:
            work()  # type: ignore[operator]
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitpid(child, 0)[1]


def killed_before_line(root: Path, line: int, generation: int) -> bool:
    def work() -> None:
        with closing(CheckpointStore(root)) as store:
            sys.settrace(KillAt(line))  # type: ignore[arg-type]
            save(store, generation)
            sys.settrace(None)

    return os.WIFSIGNALED(in_child(work))


def kill_everywhere(root: Path) -> None:
    generation, line, killed = 1, 0, True
    in_child(lambda: first_save(root))
    while killed:
        line += 1
        killed = killed_before_line(root, line, generation + 1)
        result = found(root)
        tell({"line": line, "killed": killed, "before": generation, **result})
        generation = generation + 1 if result["generation"] == generation + 1 else generation


def tell(outcome: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(outcome) + "\n")


def first_save(root: Path) -> None:
    with closing(CheckpointStore(root)) as store:
        save(store, 1)


def kill_at_random(root: Path, seed: int, count: int) -> None:
    chance = random.Random(seed)
    in_child(lambda: first_save(root))
    before = 1
    for _ in range(count):
        delay = chance.uniform(0.005, 0.08)

        def work(delay: float = delay, generation: int = before) -> None:
            with closing(CheckpointStore(root)) as store:
                signal.setitimer(signal.ITIMER_REAL, delay)  # its signal ends the process as it stands
                while True:
                    generation += 1
                    save(store, generation)

        killed = os.WIFSIGNALED(in_child(work))
        result = found(root)
        tell({"killed": killed, "before": before, **result})
        before = int(str(result["generation"]))


if __name__ == "__main__":
    place, *rest = sys.argv[1:]
    if rest:
        kill_at_random(Path(place), int(rest[0]), int(rest[1]))
    else:
        kill_everywhere(Path(place))
