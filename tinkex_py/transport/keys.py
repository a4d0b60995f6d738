"""The key of a connection: as it was given, or a token that the service gives for it (protocol: "JWT exchange")."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from tinkex_py.errors import APIStatusError, ConfigError, InvalidResponse, TransportError
from tinkex_py.transport.answer import HttpAnswer, Secret
from tinkex_py.transport.credentials import (
    COMMAND_VARIABLE,
    check_not_expired,
    expiry_of,
    is_jwt,
    key_from_command,
)

# Seconds before its end at which a token is replaced; half of its life if that is shorter.
REFRESH_MARGIN = 60.0
# Seconds between attempts to replace a token that is still good.
REFRESH_RETRY = 60.0

Exchange = Callable[[Secret], Awaitable[HttpAnswer]]


class Keys:
    """Gives the key for the next request. Nothing runs in between: a token is replaced by the request that needs it.

    Args:
        given: the key of the configuration; empty if it comes from the command.
        command: the command that prints a key; empty if there is none.
    """

    def __init__(self, given: Secret, command: Secret) -> None:
        self._given = given
        self._command = command
        self._exchange: Exchange | None = None
        self._uses_command = not given
        self._token: Secret | None = None
        self._refresh_at = float("inf")  # on the loop's clock
        self._ends_at = float("inf")
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Keys(exchanges={self._exchange is not None})"

    def follow(self, *, exchange: Exchange | None, source: str) -> None:
        """Does what the service asked for.

        Args:
            exchange: trades a key for a token; None if the service takes keys as they are.
            source: "credential_cmd" asks for the command's key.

        Raises:
            ConfigError: that does not fit the configured key.
        """
        if exchange is None:
            if self._uses_command:
                raise ConfigError(
                    f"{COMMAND_VARIABLE} works only with services that exchange keys for tokens, and this one does "
                    "not: set TINKER_API_KEY"
                )
            return
        if source == "credential_cmd":
            if not self._command:
                raise ConfigError(f"this service wants the key from a command: set {COMMAND_VARIABLE}")
            self._uses_command = True
        if self._uses_command or not is_jwt(self._given):
            self._exchange = exchange

    async def current(self) -> Secret:
        """The key for a request that is sent now.

        Raises:
            ConfigError: the key has ended, or the command gave none.
            APIStatusError, TransportError: the exchange failed.
        """
        if self._exchange is None:
            return await self._raw()
        if self._is_fresh():
            assert self._token is not None
            return self._token
        async with self._lock:
            if not self._is_fresh():
                await self._refresh(self._exchange)
            assert self._token is not None
            return self._token

    async def renewed(self, rejected: Secret) -> Secret | None:
        """Another token in place of one that the service rejected; None if there is no exchange.

        Raises:
            ConfigError, APIStatusError, TransportError: as `current`.
        """
        if self._exchange is None:
            return None
        async with self._lock:
            if self._token is rejected or self._token is None:
                self._token = None
                await self._refresh(self._exchange)
            assert self._token is not None
            return self._token

    def _is_fresh(self) -> bool:
        return self._token is not None and asyncio.get_running_loop().time() < self._refresh_at

    async def _refresh(self, exchange: Exchange) -> None:
        now = asyncio.get_running_loop().time
        try:
            token = _token_of(await exchange(await self._raw()))
        except (APIStatusError, TransportError, ConfigError):
            if self._token is None or now() >= self._ends_at:
                raise
            self._refresh_at = min(now() + REFRESH_RETRY, self._ends_at)  # the old one is still good
            return
        self._token = token
        self._refresh_at = self._ends_at = float("inf")
        ends = expiry_of(token)
        left = None if ends is None else ends - time.time()
        # A token that is over on arrival tells of clocks that differ; then the service will say when it is over.
        if left is not None and left > 0:
            self._ends_at = now() + left
            self._refresh_at = self._ends_at - min(REFRESH_MARGIN, left / 2)

    async def _raw(self) -> Secret:
        if self._uses_command:
            return await key_from_command(self._command)
        check_not_expired(self._given)
        return self._given


def rejects_token(answer: HttpAnswer) -> bool:
    """Whether an answer says that the token, and not the right to do this, is the trouble."""
    return answer.status == 401 and 'error="invalid_token"' in answer.headers.get("www-authenticate", "")


def _token_of(answer: HttpAnswer) -> Secret:
    fields: object = answer.json()
    token = cast("dict[str, Any]", fields).get("jwt") if isinstance(fields, dict) else None
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise InvalidResponse(f"{answer.request} was answered without a token in `jwt`")
    return Secret(token)
