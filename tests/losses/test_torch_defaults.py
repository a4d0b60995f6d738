"""torch's default dtype and device: a term that changes them is named where that is sure, and they are restored."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.losses.support import LIMIT, async_nll, guide_logprobs, nll, spec
from tinkex_py import InvalidTermResult, Pipeline
from tinkex_py.losses.torch_modes import changes_of_libraries

pytestmark = pytest.mark.asyncio
DTYPE, DEVICE = "the default dtype to torch.float64", "the default device to meta"


@pytest.fixture(autouse=True)
def usual_defaults() -> Iterator[None]:
    assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float32, "cpu")
    yield
    left = torch.get_default_dtype(), torch.get_default_device().type
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    assert left == (torch.float32, "cpu")


def change(what: str) -> None:
    if DTYPE in what:
        torch.set_default_dtype(torch.float64)
    if DEVICE in what:
        torch.set_default_device("meta")


def changing(what: str, kind: str) -> Any:
    def sync(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        loss = logprobs.sum()
        change(what)
        return loss

    async def at_once(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return sync(data, logprobs)

    async def before_it_waits(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        loss = sync(data, logprobs)
        await asyncio.sleep(0)
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float32, "cpu")
        return loss

    def returns_it(data: Any, logprobs: torch.Tensor) -> Any:
        return before_it_waits(data, logprobs)

    return {"sync": sync, "at once": at_once, "before it waits": before_it_waits, "returned": returns_it}[kind]


@pytest.mark.parametrize("what", [DTYPE, DEVICE, f"{DTYPE} and {DEVICE}"])
@pytest.mark.parametrize("kind", ["sync", "at once", "before it waits", "returned"])
async def test_a_term_that_changes_them_is_named(kind: str, what: str):
    pipeline = Pipeline(async_nll, [spec(changing(what, kind), "changes")], max_threads=1)
    with pytest.raises(InvalidTermResult, match=f"term 'changes' changed {what}, which") as caught:
        await pipeline.compute([], guide_logprobs())
    assert caught.value.name == "changes"
    # In the same worker thread, too:
    output = await Pipeline(nll, [spec(on_the_usual, "usual")]).compute([], guide_logprobs())
    assert output.loss_total == pytest.approx(0.98 - 4.9)


def on_the_usual(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    assert torch.empty(0).device.type == "cpu"
    assert torch.empty(0).dtype == torch.float32
    return logprobs.sum()


async def test_a_skipped_term_does_not_change_the_next_one_in_its_thread():
    specs = [spec(changing(f"{DTYPE} and {DEVICE}", "sync"), "changes", on_error="skip"), spec(on_the_usual, "usual")]
    output = await Pipeline(nll, specs, max_threads=1).compute([], guide_logprobs())
    assert (output.skipped, list(output.regularizers)) == ({"changes": "InvalidTermResult"}, ["usual"])


async def test_a_term_that_restores_them_itself_does_nothing_wrong():
    def careful(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        change(DTYPE)
        try:
            with torch.device("meta"):
                assert torch.empty(0).device.type == "meta"
            return logprobs.sum()
        finally:
            torch.set_default_dtype(torch.float32)

    output = await Pipeline(async_nll, [spec(careful, "careful")]).compute([], guide_logprobs())
    assert list(output.regularizers) == ["careful"]


async def test_a_failure_of_the_term_itself_is_raised_and_they_are_restored():
    def fails(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        change(f"{DTYPE} and {DEVICE}")
        raise LookupError("its own")

    with pytest.raises(Exception, match="LookupError: its own"):
        await Pipeline(async_nll, [spec(fails, "fails")], max_threads=1).compute([], guide_logprobs())


async def test_a_device_context_that_is_open_while_the_term_waits():
    async def waits_inside(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        loss = logprobs.sum()
        with torch.device("meta"):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert torch.empty(0).device.type == "cpu"
        await asyncio.sleep(0)
        return loss

    with pytest.raises(InvalidTermResult, match=DEVICE):
        await Pipeline(nll, [spec(waits_inside, "inside")]).compute([], guide_logprobs())


async def test_no_term_is_blamed_while_others_run_and_the_last_one_restores():
    """Two terms run at once: which of them changed the dtype of the process cannot be told."""
    changed, seen = threading.Event(), threading.Event()

    def changes(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        change(DTYPE)
        changed.set()
        assert seen.wait(LIMIT)
        return logprobs.sum()

    def sees(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        assert changed.wait(LIMIT)
        assert torch.get_default_dtype() == torch.float64
        seen.set()
        return logprobs.sum()

    specs = [spec(changes, "changes"), spec(sees, "sees")]
    output = await Pipeline(async_nll, specs, max_threads=2).compute([], guide_logprobs())
    assert list(output.regularizers) == ["changes", "sees"]
    assert torch.get_default_dtype() == torch.float32


async def test_no_term_is_blamed_for_a_model_that_is_loaded():
    def meanwhile(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        change(DTYPE)  # as the loading does in its own thread
        return logprobs.sum()

    with changes_of_libraries():
        output = await Pipeline(nll, [spec(meanwhile, "meanwhile")]).compute([], guide_logprobs())
        assert list(output.regularizers) == ["meanwhile"]
        assert torch.get_default_dtype() == torch.float64  # not restored in the middle of it
        torch.set_default_dtype(torch.float32)


async def test_the_programs_own_defaults_stay():
    torch.set_default_dtype(torch.float64)
    try:
        await Pipeline(nll, [spec(async_nll, "own")]).compute([], guide_logprobs())
        assert torch.get_default_dtype() == torch.float64
        with pytest.raises(InvalidTermResult, match=r"the default dtype to torch\.float16"):
            await Pipeline(
                async_nll,
                [spec(lambda *_: torch.set_default_dtype(torch.float16), "changes")],  #
            ).compute([], guide_logprobs())
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
