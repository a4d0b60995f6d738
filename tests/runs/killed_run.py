"""A run that kills its own process with SIGKILL: FOLDER STATE_DIR MOMENT, counted in what its progress tells."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from tests.runs.support import run_to
from tinkex_py import AsyncServiceClient
from tinkex_py.runs import RunInfo, StepRecord


class Dying:
    """Dies at a moment."""

    def __init__(self, moment: int) -> None:
        self._left = moment

    def start(self, run: RunInfo, made: int) -> None:
        self._count()

    def doing(self, text: str) -> None:
        self._count()

    def step(self, record: StepRecord) -> None:
        self._count()

    def finish(self, run: RunInfo) -> None:
        self._count()

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


async def main(folder: str, state_dir: str, moment: str) -> None:
    async with AsyncServiceClient.local(model="tiny", state_dir=state_dir) as service:
        await run_to(service, Path(folder), progress=Dying(int(moment)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
