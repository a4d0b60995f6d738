"""Runs one recipe of the cookbook for `cookbook_program.py`, whose arguments it reads, and checks what it left."""

import asyncio
import inspect
import json
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from tinker_cookbook import weights

from tinkex_py import RegularizerSpec
from tinkex_py.integrations.tinker import regularize_recipe
from tinkex_py.regularizers import L2
from tinkex_py.runs import read_run, read_steps, scalars

BASE_URL, API_KEY, MODEL, _, *OPTIONS = sys.argv[1:]
REGULARIZED = "--regularized" in OPTIONS
STEPS = 3
WEIGHT = 1e-4

Rows = list[dict[str, Any]]


def check(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def l2() -> list[RegularizerSpec]:
    return [RegularizerSpec(fn=L2(mask=None), weight=WEIGHT, name="l2")]


def logs(name: str) -> str:
    return str(Path("runs") / name)


def run(name: str, main: Callable[..., Any], config: Any, *, steps: tuple[int, ...] | None = (STEPS,)) -> Rows:
    """Runs a recipe, and returns its metrics.

    Args:
        name: of its folder of logs, and of that of the record.
        main: its main function.
        config: its argument.
        steps: the optimizer steps of each training client, as the record must say. None: one for each row of metrics.
    """
    record = Path("records") / name
    with regularize_recipe(l2(), record=record) if REGULARIZED else nullcontext():
        result = main(config)
        if inspect.iscoroutine(result):
            asyncio.run(result)
    file = Path(logs(name)) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    broken = [
        key for row in rows for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    check(not broken, f"metrics that are not finite: {broken}")
    for number, count in enumerate((len(rows),) if steps is None else steps, start=1):
        if REGULARIZED:
            check_record(record if number == 1 else record.with_name(f"{name}-{number}"), count)
    return rows


def check_record(folder: Path, count: int) -> None:
    info, steps = read_run(folder), [scalars(step) for step in read_steps(folder)]
    check(info.outcome == "finished", f"{folder.name}: the outcome is {info.outcome}")
    check(info.model == MODEL, f"{folder.name}: the model is {info.model}")
    check(len(steps) == count, f"{folder.name}: {len(steps)} steps were recorded instead of {count}")
    for step in steps:
        check(step["term/l2/weight"] == WEIGHT, f"{folder.name}: the weight is {step['term/l2/weight']}")
        total = step["loss/base"] + step["term/l2/contribution"]
        check(math.isclose(step["loss/total"], total, rel_tol=1e-6, abs_tol=1e-6), f"{folder.name}: {step}")


def check_falls(rows: Rows, name: str) -> None:
    values = [row[name] for row in rows if name in row]
    check(values[-1] < values[0], f"{name} does not fall: {values}")


def adapter(path: str) -> dict[str, np.ndarray]:
    """Downloads the weights of a checkpoint with the cookbook."""
    folder = Path("downloads") / path.removeprefix("tinker://").replace(":", "~").replace("/", "~")
    weights.download(tinker_path=path, output_dir=str(folder))
    return load_file(folder / "adapter_model.safetensors")


def largest_difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    check(first.keys() == second.keys(), f"other tensors: {first.keys() ^ second.keys()}")
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def check_equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray], tolerance: float) -> None:
    far = largest_difference(first, second)
    print(f"largest difference of the weights: {far}")
    check(far <= tolerance, f"the weights differ by {far}")


def check_on_policy(rows: Rows) -> None:
    """The sampler and the trainer have the same logprobs, before the first update of a batch."""
    check_rewarded(rows)
    values = [abs(row["optim/kl_sample_train_v2"]) for row in rows]
    check(max(values) < 1e-6, f"sampler and trainer differ: {values}")


def check_rewarded(rows: Rows) -> None:
    """Some answers were right and some wrong, so the gradient is not zero."""
    correct = [row["env/all/correct"] for row in rows]
    check(any(0 < share < 1 for share in correct), f"the shares of correct answers are {correct}")
