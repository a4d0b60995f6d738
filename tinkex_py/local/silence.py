"""Sessions end when nothing was heard of their client for too long: one that was killed does not say so."""

import asyncio
import sqlite3
from collections import Counter

from tinkex_py.local.core import Core, logger
from tinkex_py.local.records import SessionEnd

_LOOKS = 10


async def end_silent_sessions(core: Core, timeout: float) -> None:
    """End every session that was silent for `timeout` seconds, until cancelled.

    Looks are counted, not seconds: while the event loop itself stood still, nobody could be heard.
    """
    silent_looks: Counter[str] = Counter()
    while True:
        await asyncio.sleep(timeout / _LOOKS)
        heard = core.sessions_heard()
        for session in [session for session in core.sessions.values() if not session.finished]:
            if session.session_id in heard:
                del silent_looks[session.session_id]
                continue
            silent_looks[session.session_id] += 1
            if silent_looks[session.session_id] <= _LOOKS:
                continue
            end = SessionEnd(reason="interrupted", detail=f"nothing was heard of its client for {timeout:g} s")
            try:
                await core.finish_session(session, end)
            except (OSError, sqlite3.Error) as error:
                logger.error("the end of session %s cannot be kept", session.session_id, exc_info=error)
            del silent_looks[session.session_id]
