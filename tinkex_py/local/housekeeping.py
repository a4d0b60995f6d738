"""Background tasks of the service: they delete expired checkpoints, and end inactive sessions."""

import asyncio
import sqlite3
from collections import Counter
from datetime import UTC, datetime

from tinkex_py.local.core import Core, logger
from tinkex_py.local.records import SessionEnd

# Seconds. Bounds the wait in case the clock is changed.
_LONGEST_WAIT = 600.0
_LOOKS = 10


async def delete_expired(core: Core) -> None:
    """Deletes checkpoints as they expire, until cancelled."""
    while True:
        core.expiry_changed.clear()
        wait = _LONGEST_WAIT
        try:
            next_expiry = await core.stored(lambda store: store.delete_expired())
        except (OSError, sqlite3.Error) as error:
            logger.error("cannot delete expired checkpoints; the next attempt is in %g s", wait, exc_info=error)
        else:
            if next_expiry is not None:
                wait = min(max((next_expiry - datetime.now(UTC)).total_seconds(), 0.0), wait)
        try:
            async with asyncio.timeout(wait):
                await core.expiry_changed.wait()
        except TimeoutError:
            continue


async def end_inactive_sessions(core: Core, timeout: float) -> None:
    """Ends sessions without a request or heartbeat for `timeout` seconds, until cancelled.

    Counts looks instead of seconds: while the event loop is blocked, no request can arrive.
    """
    idle_looks: Counter[str] = Counter()
    while True:
        await asyncio.sleep(timeout / _LOOKS)
        active = core.take_active_sessions()
        for session in [session for session in core.sessions.values() if not session.finished]:
            if session.session_id in active:
                del idle_looks[session.session_id]
                continue
            idle_looks[session.session_id] += 1
            if idle_looks[session.session_id] <= _LOOKS:
                continue
            end = SessionEnd(reason="interrupted", detail=f"no request and no heartbeat for {timeout:g} s")
            try:
                await core.finish_session(session, end)
            except (OSError, sqlite3.Error) as error:
                logger.error("cannot store the end of session %s", session.session_id, exc_info=error)
            del idle_looks[session.session_id]
