"""Many terms in worker processes, some of which are killed, time out or are cancelled. `make storm` runs 1,000."""

import asyncio
import contextlib
import gc
import os
import random
import sys
from collections import Counter

import psutil
import pytest

from tests.losses.support import GUIDE_VALUES, guide_logprobs, nll, until
from tests.processes import terms
from tests.processes.support import DATA, process_spec, step_files, workers
from tinkex_py import Pipeline, RegularizerError, RegularizerSpec, RegularizerTimeout
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.worker_pool import WorkerPool

COUNT = int(os.environ.get("TINKEX_TEST_PROCESS_TERMS", "18"))
AT_ONCE = 3
NAPS = (0.0, 0.0, 0.01, 0.02, 600.0)
ENDS = (RegularizerError, RegularizerTimeout, asyncio.CancelledError)


@pytest.mark.asyncio
@pytest.mark.timeout(120 + 2 * COUNT)
async def test_random_kills_timeouts_and_cancellations():
    """After all of them every permit is back, and no process, zombie or file is left."""
    specs = [process_spec(terms.naps, options={"seconds": seconds}, timeout=0.2) for seconds in NAPS]
    pool, logprobs = WorkerPool(max_processes=2), guide_logprobs()
    files = step_files()

    async def evaluate(spec: RegularizerSpec) -> float:
        own = Logprobs.from_tensors(logprobs)
        return (await Pipeline(nll, [spec]).evaluate(DATA, own, workers=pool)).output.regularizers["own"].value

    async def one(spec: RegularizerSpec, act: str, chance: random.Random) -> str:
        term = asyncio.ensure_future(evaluate(spec))
        await asyncio.sleep(chance.random() * 0.04)
        if act == "kill" and (alive := workers()):
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(alive).kill()
        elif act == "cancel":
            term.cancel()
        (end,) = await asyncio.gather(term, return_exceptions=True)
        assert type(end) in ENDS or end == pytest.approx(sum(value**2 for value in GUIDE_VALUES)), end
        return type(end).__name__

    async def several(seed: int) -> Counter[str]:
        chance = random.Random(seed)
        acts = ["kill", "cancel", *["nothing"] * 6]
        return Counter([await one(chance.choice(specs), chance.choice(acts), chance) for _ in range(COUNT // AT_ONCE)])

    ends: Counter[str] = Counter()
    for some in await asyncio.gather(*map(several, range(AT_ONCE))):
        ends += some
    sys.stdout.write(f"{dict(ends)}\n")
    assert {"float", "RegularizerTimeout"} <= ends.keys()
    assert pool.process_limiter.holders() == []
    assert await evaluate(specs[0]) > 0
    await until(lambda: len(workers()) <= pool.process_limiter.limit)
    pool.close()
    gc.collect()
    assert workers() == []
    assert step_files() == files
