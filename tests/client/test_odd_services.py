"""Services that answer oddly, the JSON wire, and a process that asked for no output."""

import asyncio
import gc
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.client.data import datum, nll
from tests.client.recorder import after, answering, sent_weights
from tinkex_py import InvalidResponse, NonFiniteLoss, PrecedingRequestFailed, RetryPolicy
from tinkex_py.base_losses import NLL
from tinkex_py.transport import wire

pytestmark = pytest.mark.asyncio
DATA = [datum(3, 1), datum(2, 2)]


def result_of(*arrays: np.ndarray, name: str = "logprobs", dtype: int = wire.DTYPE_FLOAT32) -> Any:
    """A future that is done with these arrays."""
    offsets = np.concatenate([[0], np.cumsum([array.nbytes for array in arrays])]).astype("<i8")
    field = wire.BatchedTensor(
        data=b"".join(array.astype("<f4").tobytes() for array in arrays), offsets=offsets.tobytes(), dtype=dtype
    )
    record = wire.ArrayRecord(num_datums=len(arrays), fields={name: field})
    body = wire.ForwardBackwardOutput(loss_fn_outputs=[record]).SerializeToString()

    async def fault(arrival: Any, serve: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/x-protobuf"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return fault


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


ODD_FORWARDS = {
    "one datum too few": result_of(floats(-1, -1, -1)),
    "one datum too many": result_of(floats(-1, -1, -1), floats(-1, -1), floats(-1)),
    "another length": result_of(floats(-1, -1), floats(-1, -1)),
    "boundaries moved": result_of(floats(-1, -1), floats(-1, -1, -1)),
    "no logprobs": result_of(floats(-1, -1, -1), floats(-1, -1), name="losses"),
    "no record": result_of(),
    "whole numbers": result_of(floats(-1, -1, -1), floats(-1, -1), dtype=wire.DTYPE_INT32),
}


async def test_a_forward_that_does_not_fit_sends_nothing(local_bench):
    bench = local_bench(retry=RetryPolicy(deadline=1.0, max_attempts=2, initial_wait=0.0, max_wait=0.01))
    async with bench.service:
        for name, odd in ODD_FORWARDS.items():
            training = await bench.train()
            bench.recorder.faults["retrieve_future"] = [odd, odd]
            step, update = await asyncio.gather(
                training.forward_backward_custom(DATA, nll), training.optim_step(), return_exceptions=True
            )
            bench.recorder.faults.clear()
            assert isinstance(step, InvalidResponse), (name, step)
            assert isinstance(update, PrecedingRequestFailed), name
            await training.forward_backward_custom(DATA, nll)
            assert bench.kinds(training) == ["F", "F", "B"], name


async def test_a_result_of_other_datums_is_refused(bench):
    training = await bench.train()
    for method in (training.forward, training.forward_backward):
        for name in ("one datum too few", "one datum too many"):
            bench.recorder.faults["retrieve_future"] = [ODD_FORWARDS[name]]
            with pytest.raises(InvalidResponse, match="datums, but 2 were sent"):
                await method(DATA)
        assert (await method(DATA)).num_datums == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 1), (1, 0), (1, 1)])
async def test_values_that_are_no_logprobs_are_the_fault_of_the_service(bench, place, value):
    rows = [floats(-1, -1, -1), floats(-1, -1)]
    rows[place[0]][place[1]] = value
    training = await bench.train()
    bench.recorder.faults["retrieve_future"] = [result_of(*rows)]
    evaluated = []
    message = f"the service at embedded returned 1 logprobs .* in datum {place[0]}"
    with pytest.raises(InvalidResponse, match=message):
        await training.forward_backward_custom(DATA, lambda data, logprobs: evaluated.append(1) or nll(data, logprobs))
    assert evaluated == []
    await training.forward_backward_custom(DATA, nll)
    assert bench.kinds(training) == ["F", "F", "B"]


async def test_a_term_may_mask_a_token_of_probability_0(bench):
    training = await bench.train()
    masked = [datum(3, 1, weights=[1.0, 0.0, 1.0]), datum(2, 2, weights=[1.0, 1.0])]
    rows = [floats(-1, -math.inf, -1), floats(-1, -2)]
    bench.recorder.faults["retrieve_future"] = [result_of(*rows), result_of(*rows)]
    output = await training.forward_backward_custom(masked, NLL(), surrogate="cross_entropy")
    assert output.loss_total == 5.0
    bench.recorder.faults["retrieve_future"] = [result_of(*rows)]
    with pytest.raises(NonFiniteLoss):
        await training.forward_backward_custom(
            masked, lambda data, logprobs: -logprobs.sum(), surrogate="cross_entropy"
        )


async def test_only_the_forward_of_a_custom_step_asks_to_keep_the_graph(bench):
    training = await bench.train()
    await training.forward_backward_custom(DATA, nll)
    await training.forward(DATA)
    await training.forward_backward(DATA)
    kept = [(arrival.kind, "x-tinkex-keep-graph" in arrival.headers) for arrival in bench.recorder.of("F", "B")]
    assert kept == [("F", True), ("B", False), ("F", False), ("B", False)]
    assert np.all(sent_weights([bench.recorder.of("B")[0].message]) == 1.0)


async def test_a_submission_of_a_forgotten_client_does_not_outlive_the_service_client(local_bench):
    bench = local_bench(retry=RetryPolicy(deadline=60.0, initial_wait=5.0, max_wait=5.0), close_timeout=0.1)
    async with bench.service:
        training = await bench.train()
        bench.recorder.always["B"] = answering(503, retry_after="30")
        step = asyncio.create_task(training.forward_backward(DATA))
        await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 1)
        step.cancel()
        await asyncio.wait([step])
        del training, step
        gc.collect()
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert left == []


async def test_abandoned_polls_do_not_outlive_the_service_client(local_bench):
    bench = local_bench()
    gate = asyncio.Event()
    async with bench.service:
        training = await bench.train()
        bench.recorder.always["retrieve_future"] = after(gate)
        tasks = [asyncio.create_task(training.forward(DATA)) for _ in range(3)]
        await bench.recorder.until(lambda: len(bench.recorder.of("retrieve_future")) >= 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


SILENT = """
import asyncio, tinkex_py as t
data = [t.Datum(model_input=t.ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [2, 3]})]
def broken(data, logprobs):
    raise ValueError("term")
async def main():
    async with t.AsyncServiceClient.local(model="tiny") as service:
        training = await service.create_lora_training_client("tiny", rank=4)
        await training.forward_backward_custom(data, lambda data, logprobs: -logprobs.sum())
        for request in (
            training.forward_backward_custom(data, broken),
            training.forward_backward_custom(data, lambda data, logprobs: logprobs.detach().sum()),
            training.forward_backward([]),
        ):
            try:
                await request
            except t.TinkexError:
                pass
        await training.optim_step()
asyncio.run(main())
"""


async def test_an_unconfigured_process_prints_nothing():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", SILENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert (process.returncode, out.decode(), err.decode()) == (0, "", "")
