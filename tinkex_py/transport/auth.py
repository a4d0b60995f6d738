"""The key of a service: where it comes from, and the token that a service gives for it.

Sources: the environment, a command, or the credentials file of the official command line (protocol: "Credentials");
a service may exchange keys for tokens that end (protocol: "JWT exchange").
"""

import asyncio
import base64
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, cast

from tinkex_py.errors import APIStatusError, ConfigError, InvalidResponse, TransportError
from tinkex_py.limits import time_limit
from tinkex_py.transport.messages import Response, Secret

COMMAND_VARIABLE = "TINKER_CREDENTIAL_CMD"
COMMAND_TIMEOUT = 30.0
# Seconds before its end at which a token is replaced; half of its life if that is shorter.
REFRESH_MARGIN = 60.0
# Seconds between attempts to replace a token that is still good.
REFRESH_RETRY = 60.0
_JWT_PREFIX = "eyJ"

Exchange = Callable[[Secret], Awaitable[Response]]


class Auth:
    """Gives the key for the next request. Nothing runs in between: a token is replaced by the request that needs it.

    Args:
        given: the key of the configuration; empty if it comes from the command.
        command: the command that prints a key; empty if there is none.
    """

    def __init__(self, given: Secret, command: Secret) -> None:
        self._given = given
        self._command = command
        self._given_ends = expiry_of(given) if _is_jwt(given) else None  # Unix seconds
        self._uses_command = not given
        self._exchange: Exchange | None = None
        self._token: Secret | None = None
        self._refresh_at = float("inf")  # on the loop's clock
        self._ends_at = float("inf")
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Auth(exchanges={self._exchange is not None})"

    def follow(self, *, exchange: Exchange | None, source: str) -> None:
        """Does what the service asks for.

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
        if self._uses_command or not _is_jwt(self._given):
            self._exchange = exchange

    async def current(self) -> Secret:
        """The key for a request that is sent now.

        Raises:
            ConfigError: the key has ended, or the command gave none.
            APIStatusError, TransportError: the exchange failed.
        """
        if self._exchange is not None:
            return await self._fresh_token(self._exchange)
        return self._given if self._given_ends is None and not self._uses_command else await self._raw()

    async def renewed(self, rejected: Secret) -> Secret | None:
        """Another token in place of one that the service rejected; None if there is no exchange.

        Raises:
            ConfigError, APIStatusError, TransportError: as `current`.
        """
        if self._exchange is None:
            return None
        if self._token is rejected:
            self._token = None
        return await self._fresh_token(self._exchange)

    async def _fresh_token(self, exchange: Exchange) -> Secret:
        now = asyncio.get_running_loop().time
        if self._token is not None and now() < self._refresh_at:
            return self._token
        async with self._lock:
            if self._token is not None and now() < self._refresh_at:
                return self._token
            try:
                token = _token_of(await exchange(await self._raw()))
            except (APIStatusError, TransportError, ConfigError):
                if self._token is None or now() >= self._ends_at:
                    raise
                self._refresh_at = min(now() + REFRESH_RETRY, self._ends_at)  # the old one is still good
                return self._token
            self._token = token
            self._refresh_at = self._ends_at = float("inf")
            ends = expiry_of(token)
            left = None if ends is None else ends - time.time()
            # A token that is over on arrival shows clocks that differ; then the service will say when it is over.
            if left is not None and left > 0:
                self._ends_at = now() + left
                self._refresh_at = self._ends_at - min(REFRESH_MARGIN, left / 2)
            return token

    async def _raw(self) -> Secret:
        if self._uses_command:
            return await key_from_command(self._command)
        check_not_expired(self._given_ends)
        return self._given


def rejects_token(response: Response) -> bool:
    """Whether a 401 says that the token, and not the right to do this, is the trouble."""
    return 'error="invalid_token"' in response.headers.get("www-authenticate", "")


def credentials_file() -> Path | None:
    """Where the official command line keeps keys; None if there is no home."""
    try:
        return Path.home() / ".tinker" / "credentials.json"
    except RuntimeError:
        return None


def key_from_file(path: Path | None) -> str | None:
    """The key of the default entry; None if there is no file or no default.

    Raises:
        ConfigError: the file cannot be read, or is no credentials file.
    """
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}); set TINKER_API_KEY instead") from None
    unusable = ConfigError(f"{path} is not a valid credentials file; recreate it, or set TINKER_API_KEY")
    fields = _mapping(_parsed(content))
    if fields is None:
        raise unusable
    default = fields.get("default")
    if default is None:
        return None
    entry = _mapping((_mapping(fields.get("keys")) or {}).get(str(default)))
    key = None if entry is None else entry.get("key")
    if not isinstance(key, str) or not key:
        raise unusable
    return key


async def key_from_command(command: Secret, *, timeout: float = COMMAND_TIMEOUT) -> Secret:
    """What a shell command prints, without the space around it.

    Its error output is dropped: it may quote what it was given.

    Args:
        command: a line for the shell.
        timeout: seconds after which it is ended.

    Raises:
        ConfigError: it failed, took too long, or printed no key.
    """
    process = await asyncio.create_subprocess_shell(
        command.reveal(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        async with time_limit(timeout, lambda: ConfigError(f"{COMMAND_VARIABLE} did not end within {timeout:g} s")):
            printed, _ = await process.communicate()
    finally:
        await _end(process)
    if process.returncode != 0:
        raise ConfigError(f"{COMMAND_VARIABLE} ended with status {process.returncode}")
    key = printed.decode("utf-8", errors="replace").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"{COMMAND_VARIABLE} printed {len(printed)} bytes, which are no key")
    return Secret(key)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started
        else:
            process.kill()
    # Communicating to the end also closes the pipe.
    await asyncio.shield(process.communicate())


def expiry_of(token: Secret) -> float | None:
    """When a JWT ends, in Unix seconds; None if it does not say."""
    parts = token.reveal().split(".")
    if len(parts) != 3:
        return None
    try:
        claims = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
    except ValueError:
        return None
    ends = (_mapping(_parsed(claims)) or {}).get("exp")
    return float(ends) if isinstance(ends, int | float) and not isinstance(ends, bool) and 0 < ends < 1e12 else None


def check_not_expired(ends: float | None) -> None:
    """Checks the end of a key that says when it ends.

    Args:
        ends: Unix seconds; None if it does not end.

    Raises:
        ConfigError: it has ended, so no service will take it.
    """
    if ends is not None and ends <= time.time():
        raise ConfigError(f"the API key is a token that ended {time.time() - ends:.0f} s ago: get a new one")


def _is_jwt(key: Secret) -> bool:
    return key.reveal().startswith(_JWT_PREFIX)


def _token_of(response: Response) -> Secret:
    token = (_mapping(response.json()) or {}).get("jwt")
    if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
        raise InvalidResponse(f"{response.request} returned no token in `jwt`")
    return Secret(token)


def _parsed(content: bytes) -> object:
    """None for what is no JSON. The parser's own error quotes what it read, so it must not be the context of any."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _mapping(value: object) -> Mapping[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
