"""A resumed run is compared with what it was: terms, optimizer and data."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs.support import batch, batches, learning_rate, losses, run_to
from tinkex_py import AdamParams, AsyncServiceClient, ConfigError, InvalidData, Pipeline, RegularizerSpec
from tinkex_py.base_losses import NLL
from tinkex_py.runs import read_run, read_steps
from tinkex_py.runs.folder import RUN_FILE, STEPS_FILE

pytestmark = pytest.mark.asyncio


def scaled(factor: Any) -> Pipeline:
    def own(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return factor * logprobs.square().sum()

    return Pipeline(NLL(), [RegularizerSpec(fn=own, weight=0.1)])


def negated() -> Pipeline:
    def own(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return -1.0 * logprobs.square().sum()

    return Pipeline(NLL(), [RegularizerSpec(fn=own, weight=0.1)])


def with_option(value: float) -> Pipeline:
    def own(data: Any, logprobs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (scale * logprobs).sum()

    return Pipeline(NLL(), [RegularizerSpec(fn=own, weight=0.1, options={"scale": torch.tensor(value)})])


def weighted(weight: Callable[[int], float]) -> Pipeline:
    return Pipeline(NLL(), [RegularizerSpec(fn=NLL(), weight=weight, name="own")])


def other_rate(step: int) -> AdamParams:
    return AdamParams(learning_rate=1e-3)


def without_second(start: int) -> Iterator[Any]:
    return map(batch, [number for number in range(start, 20) if number != 2])


CHANGES = {
    "code": ({"pipeline": scaled(1.0)}, {"pipeline": negated()}, "captured values of regularizer 'own' changed"),
    "captured": ({"pipeline": scaled(1.0)}, {"pipeline": scaled(2.0)}, "regularizer 'own' changed"),
    "captured tensor": (
        {"pipeline": scaled(torch.ones(1))},
        {"pipeline": scaled(torch.zeros(1))},
        "regularizer 'own' changed",
    ),
    "option": ({"pipeline": with_option(1.0)}, {"pipeline": with_option(2.0)}, "regularizer 'own' changed"),
    "schedule": (
        {"pipeline": weighted(lambda step: 0.1)},
        {"pipeline": weighted(lambda step: 0.2)},
        "the weight of 'own' changed",
    ),
    "optimizer": ({"optimizer": learning_rate}, {"optimizer": other_rate}, "optimizer was"),
    "data": (
        {"batches": [batch(n) for n in range(5)]},
        {"batches": [batch(7 - n) for n in range(5)]},
        "batch 0 is not",
    ),
    "data behind the checkpoint": ({"batches": batches}, {"batches": without_second}, "batch 2 is not"),
}


async def interrupted(service: AsyncServiceClient, folder: Path, **options: Any) -> bytes:
    """A run of three steps that was killed after step 3; its last checkpoint is that of step 2."""
    await run_to(service, folder, 3, **options)
    state = json.loads((folder / "state.json").read_text())
    state["checkpoints"] = [saved for saved in state["checkpoints"] if saved["step"] == 2]
    (folder / "state.json").write_text(json.dumps({**state, "batches": 2, "client_step": 2}))
    return (folder / STEPS_FILE).read_bytes()


@pytest.mark.parametrize("kind", CHANGES)
async def test_a_change_is_refused_and_recorded_where_it_is_allowed(kind: str, tmp_path: Path) -> None:
    before, after, message = CHANGES[kind]
    recorded = "batches .* are not what they were" if kind.startswith("data") else message
    async with AsyncServiceClient.local(model="tiny") as service:
        steps = await interrupted(service, tmp_path, **before)
        with pytest.raises(ConfigError, match=message):
            await run_to(service, tmp_path, 4, **after)
        assert (tmp_path / STEPS_FILE).read_bytes().startswith(b"".join(steps.splitlines(keepends=True)[:2]))
        resumed = await run_to(service, tmp_path, 4, allow_changes=True, **after)
        assert resumed.info.status == "finished"
        changes = read_run(tmp_path).changes
        assert {change.step for change in changes} == {3}
        assert any(re.search(recorded, change.what) for change in changes)
        # What was allowed is what the next resume is compared with.
        await run_to(service, tmp_path, 5, **after)
        assert read_run(tmp_path).changes == changes


async def test_the_same_run_resumes_and_has_fingerprints(tmp_path: Path) -> None:
    async with AsyncServiceClient.local(model="tiny") as service:
        await run_to(service, tmp_path / "whole", 4, pipeline=scaled(1.0))
        await interrupted(service, tmp_path / "cut", pipeline=scaled(1.0))
        await run_to(service, tmp_path / "cut", 4, pipeline=scaled(1.0))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    info = read_run(tmp_path / "cut")
    assert set(info.fingerprints) == {"the base loss", "regularizer 'own'", "the optimizer"}
    assert None not in info.fingerprints.values()
    assert info.objective is None  # one of its terms is a function
    assert info.changes == ()
    assert len({step.batches for step in read_steps(tmp_path / "cut")}) == 4


async def test_a_run_of_an_older_version_resumes_with_one_warning(tmp_path: Path) -> None:
    async with AsyncServiceClient.local(model="tiny") as service:
        await interrupted(service, tmp_path)
        run = json.loads((tmp_path / RUN_FILE).read_text())
        del run["fingerprints"]
        (tmp_path / RUN_FILE).write_text(json.dumps(run))
        steps = [json.loads(line) for line in (tmp_path / STEPS_FILE).read_text().splitlines()]
        older = [{name: value for name, value in step.items() if name != "batches"} for step in steps]
        (tmp_path / STEPS_FILE).write_text("".join(json.dumps(step) + "\n" for step in older))
        with pytest.warns(UserWarning, match="without fingerprints") as caught:
            await run_to(service, tmp_path, 4)
    assert len(caught) == 1


async def test_an_accumulated_run_of_a_version_with_other_means_is_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {"pipeline": Pipeline(NLL(reduction="token-mean")), "accumulate": 2}
    async with AsyncServiceClient.local(model="tiny") as service:
        await run_to(service, tmp_path / "run", steps=2, **given)
        path = tmp_path / "run" / RUN_FILE
        content = json.loads(path.read_text())
        assert content["config"].pop("means") == "of the whole step"
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="means was not set and is 'of the whole step'"):
            await run_to(service, tmp_path / "run", steps=3, **given)


async def test_code_that_has_no_fingerprint_warns_and_resumes(tmp_path: Path) -> None:
    class Opaque:
        __slots__ = ()

        def __call__(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            return logprobs.sum()

    opaque = Pipeline(NLL(), [RegularizerSpec(fn=Opaque(), weight=0.1, name="opaque")])
    async with AsyncServiceClient.local(model="tiny") as service:
        await interrupted(service, tmp_path, pipeline=opaque)
        assert read_run(tmp_path).fingerprints["regularizer 'opaque'"] is None
        with pytest.warns(UserWarning, match="the code of regularizer 'opaque' cannot be compared"):
            await run_to(service, tmp_path, 4, pipeline=opaque)


@pytest.mark.parametrize("bad", [["text"], "text", 5, [{"tokens": [1]}]])
async def test_what_is_no_batch_is_refused(tmp_path: Path, bad: Any) -> None:
    async with AsyncServiceClient.local(model="tiny") as service:
        with pytest.raises(InvalidData, match="batch 1 must be a sequence of Datum"):
            await run_to(service, tmp_path, batches=iter([batch(0), bad]))
    assert read_run(tmp_path).status == "failed"
