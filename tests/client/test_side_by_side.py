"""Two training clients of one service, and the thread bound over several steps of one client."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch

from tests.client.data import datum, nll
from tinkex_py import AdamParams, PrecedingRequestFailed, RegularizerSpec, RegularizerTimeout

pytestmark = pytest.mark.asyncio
ADAM = AdamParams(learning_rate=1e-2)


def squared(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs**2).sum()


async def trained_alone(bench: Any, data: Any, loss: Any, seed: int) -> np.ndarray:
    training = await bench.train(seed=seed)
    await training.forward_backward_custom(data, loss)
    await training.optim_step(ADAM)
    return (await training.forward(data)).packed["logprobs"].values


async def test_interleaved_clients_get_the_gradients_they_would_get_alone(local_bench):
    data = {"a": [datum(5, 1), datum(3, 2)], "b": [datum(4, 3)]}
    losses = {"a": nll, "b": squared}
    bench = local_bench()
    async with bench.service:
        alone = {name: await trained_alone(bench, data[name], losses[name], index) for index, name in enumerate("ab")}
        clients = {name: await bench.train(seed=index) for index, name in enumerate("ab")}
        seen = {name: asyncio.Event() for name in "ab"}
        b_is_done = asyncio.Event()

        async def loss_a(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            seen["a"].set()
            await b_is_done.wait()  # F_a F_b B_b, and only then B_a
            return losses["a"](data, logprobs)

        async def loss_b(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            seen["b"].set()
            return losses["b"](data, logprobs)

        step_a = asyncio.create_task(clients["a"].forward_backward_custom(data["a"], loss_a))
        await seen["a"].wait()
        await clients["b"].forward_backward_custom(data["b"], loss_b)
        b_is_done.set()
        await step_a
        order = [(arrival.kind, arrival.message.model_id) for arrival in bench.recorder.of("F", "B")[-4:]]
        a, b = clients["a"].model_id, clients["b"].model_id
        assert order == [("F", a), ("F", b), ("B", b), ("B", a)]
        for name in "ab":
            await clients[name].optim_step(ADAM)
            after = (await clients[name].forward(data[name])).packed["logprobs"].values
            np.testing.assert_allclose(after, alone[name], rtol=1e-6)


async def test_f_a_f_b_b_a_b_b(local_bench):
    data = [datum(5, 1), datum(3, 2)]
    bench = local_bench()
    async with bench.service:
        alone = [await trained_alone(bench, data, nll, seed) for seed in (1, 2)]
        clients = [await bench.train(seed=seed) for seed in (1, 2)]
        both_seen = asyncio.Barrier(2)
        a_is_done = asyncio.Event()

        async def loss_a(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            await both_seen.wait()
            return nll(data, logprobs)

        async def loss_b(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            await both_seen.wait()
            await a_is_done.wait()
            return nll(data, logprobs)

        async def first() -> None:
            await clients[0].forward_backward_custom(data, loss_a)
            a_is_done.set()

        await asyncio.gather(first(), clients[1].forward_backward_custom(data, loss_b))
        order = [arrival.message.model_id for arrival in bench.recorder.of("B")[-2:]]
        assert order == [client.model_id for client in clients]
        await asyncio.gather(*(client.optim_step(ADAM) for client in clients))
        for client, expected in zip(clients, alone, strict=True):
            after = (await client.forward(data)).packed["logprobs"].values
            np.testing.assert_allclose(after, expected, rtol=1e-6)


async def test_a_failure_of_one_client_does_not_touch_the_other(bench):
    one, other = await bench.train(), await bench.train()
    data = [datum(3, 1)]

    def broken(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    results = await asyncio.gather(
        one.forward_backward_custom(data, broken),
        other.forward_backward_custom(data, nll),
        one.optim_step(),
        other.optim_step(),
        return_exceptions=True,
    )
    assert isinstance(results[2], PrecedingRequestFailed)
    assert not isinstance(results[1], BaseException)
    assert not isinstance(results[3], BaseException)
    assert bench.kinds(other) == ["F", "B", "optim_step"]


class Stubborn:
    """A sync term that returns only when it is let go; counts how many run at once."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.running = 0
        self.peak = 0
        self._lock = threading.Lock()

    def __call__(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self.running += 1
            self.peak = max(self.peak, self.running)
        self.let_go.wait(60)
        with self._lock:
            self.running -= 1
        return logprobs.sum()


async def test_live_term_threads_never_exceed_the_bound_over_several_steps(local_bench):
    bench = local_bench(max_threads=8)
    stubborn = Stubborn()
    data = [datum(3, 1)]

    async def base(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return -logprobs.sum()

    specs = [
        RegularizerSpec(fn=stubborn, weight=1.0, name=f"stubborn{index}", timeout=0.05, on_error="skip")
        for index in range(6)
    ]
    async with bench.service:
        training = await bench.train()
        try:
            for _ in range(3):
                output = await training.forward_backward_custom(data, base, regularizers=specs, max_concurrency=2)
                assert set(output.skipped) == {spec.name for spec in specs}
                assert output.abandoned_threads == 2
                assert stubborn.running == stubborn.peak == 2
            waiting = RegularizerSpec(fn=stubborn, weight=1.0, name="waiting", timeout=0.05)
            with pytest.raises(RegularizerTimeout) as caught:
                await training.forward_backward_custom(data, base, regularizers=[waiting], max_concurrency=2)
            assert caught.value.name == "waiting"
            assert "stubborn0" in str(caught.value)
            assert stubborn.peak == 2
        finally:
            stubborn.let_go.set()
        # The threads come back: sync terms run again.
        output = await training.forward_backward_custom(data, nll, max_concurrency=2)
        assert bench.kinds(training) == ["F", "B"] * 3 + ["F"] + ["F", "B"]
        assert stubborn.peak == 2
