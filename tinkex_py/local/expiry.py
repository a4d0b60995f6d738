"""Checkpoints disappear when their time is over."""

import asyncio
import sqlite3
from datetime import UTC, datetime

from tinkex_py.local.core import Core, logger

# Also looked at without a reason, in case the clock was changed.
_LONGEST_WAIT = 600.0


async def delete_expired(core: Core) -> None:
    """Delete checkpoints as they expire, until cancelled."""
    while True:
        core.expiry_changed.clear()
        wait = _LONGEST_WAIT
        try:
            next_expiry = await core.stored(lambda store: store.delete_expired())
        except (OSError, sqlite3.Error) as error:
            logger.error("expired checkpoints cannot be deleted now", exc_info=error)
        else:
            if next_expiry is not None:
                wait = min(max((next_expiry - datetime.now(UTC)).total_seconds(), 0.0), wait)
        try:
            async with asyncio.timeout(wait):
                await core.expiry_changed.wait()
        except TimeoutError:
            continue
