"""The session of one service client: opened once, kept alive by a heartbeat, finished at the end."""

import asyncio
import contextlib
import weakref
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from tinkex_py import telemetry
from tinkex_py.config import TinkexConfig
from tinkex_py.errors import APIStatusError, ConfigError, TransportError, status_error_class
from tinkex_py.transport.answer import HttpAnswer
from tinkex_py.version import __version__

# A session that is over answers 410 to its heartbeat.
SESSION_OVER = 410
_LONGEST_GOODBYE = 5.0

Exchange = Callable[..., Awaitable[HttpAnswer]]


def session_request(config: TinkexConfig) -> dict[str, Any]:
    """The body of create_session."""
    body: dict[str, Any] = {
        "tags": list(config.tags),
        "user_metadata": dict(config.user_metadata),
        "sdk_version": __version__,
        "type": "create_session",
    }
    if config.project_id:
        body["project_id"] = config.project_id
    return body


class Session:
    """An open session.

    Args:
        session_id: the service's id of it.
        exchange: sends one request.
        config: how often its heart beats.
        owner: the client the session belongs to; heartbeats stop when it is gone.

    Attributes:
        heartbeat: the task that sends signs of life; None when the session is closed.
    """

    def __init__(self, session_id: str, exchange: Exchange, config: TinkexConfig, owner: object) -> None:
        self.session_id = session_id
        self._exchange = exchange
        self._longest_goodbye = min(_LONGEST_GOODBYE, config.timeout)
        self.heartbeat: asyncio.Task[None] | None = asyncio.create_task(
            send_heartbeats(exchange, session_id, config.heartbeat_interval, weakref.ref(owner)),
            name="tinkex.heartbeat",
        )

    async def close(self) -> None:
        """Ends the heartbeat and tells the service that the session is over, if it listens."""
        if self.heartbeat is not None:
            self.heartbeat.cancel()
            await asyncio.wait([self.heartbeat])
            self.heartbeat = None
        # Courtesy only: a service that does not know the call, or is gone, will expire the session by itself.
        with contextlib.suppress(APIStatusError, TransportError, ConfigError, TimeoutError):
            async with asyncio.timeout(self._longest_goodbye):
                await self._exchange(
                    "POST",
                    f"/api/v1/sessions/{quote(self.session_id, safe=':')}/finish",
                    json={"reason": {"type": "success"}, "detail": None},
                )


async def send_heartbeats(exchange: Exchange, session_id: str, interval: float, owner: "weakref.ref[Any]") -> None:
    """Tells the service every `interval` seconds that the session lives, as long as its owner does.

    A failed heartbeat is reported as an event and tried again at the next beat; the first that is heard again is
    reported too. The service ends the session itself by answering 410, which is an event too.
    """
    loop = asyncio.get_running_loop()
    failures, last_success = 0, loop.time()

    def tell_failure(reason: type[Exception], error: Exception | None = None) -> None:
        telemetry.emit(
            "tinkex.session.heartbeat_failed",
            {"failures": failures, "silence": loop.time() - last_success},
            {"session_id": session_id, "reason": reason.__name__},
            error,
        )

    while True:
        await asyncio.sleep(interval)
        if owner() is None:
            return
        try:
            answer = await exchange(
                "POST",
                "/api/v1/session_heartbeat",
                json={"session_id": session_id, "type": "session_heartbeat"},
                timeout=10.0,
            )
            if answer.is_success and answer.body.strip():
                answer.json()  # a login page, say, was not written by the service
        except (TransportError, APIStatusError, ConfigError) as error:
            failures += 1
            tell_failure(type(error), error)
            continue
        if answer.status == SESSION_OVER:
            telemetry.emit("tinkex.session.over", {}, {"session_id": session_id})
            return
        if answer.is_success:
            if failures:
                telemetry.emit(
                    "tinkex.session.heartbeat_recovered",
                    {"failures": failures, "silence": loop.time() - last_success},
                    {"session_id": session_id},
                )
            failures, last_success = 0, loop.time()
        else:
            failures += 1
            tell_failure(status_error_class(answer.status))
