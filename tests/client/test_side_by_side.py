"""The limit of term threads over several steps of one client."""

import threading
from typing import Any

import pytest
import torch

from tests.client.data import datum, nll
from tinkex_py import RegularizerSpec, RegularizerTimeout

pytestmark = pytest.mark.asyncio


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
