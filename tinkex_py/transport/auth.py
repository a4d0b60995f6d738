"""Authentication: the sources of the API key, and the tokens that a service exchanges keys for.

The key comes from the configuration, a command, or the credentials file of the official command line (protocol:
"Credentials"). A service may exchange it for tokens that expire (protocol: "JWT exchange").
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
from tinkex_py.transport.secrecy import CutOff

COMMAND_VARIABLE = "TINKER_CREDENTIAL_CMD"
COMMAND_TIMEOUT = 30.0
# Seconds before its expiry at which a token is replaced; half of its lifetime if that is shorter.
_REFRESH_MARGIN = 60.0
# Seconds between attempts to replace a token that is still valid.
_REFRESH_RETRY = 60.0
_JWT_PREFIX = "eyJ"

Exchange = Callable[[Secret], Awaitable[Response]]


class Auth:
    """Returns the key for the next request. There is no background task: a request that needs a new token fetches it.

    Args:
        given: the key of the configuration; empty if the command prints it.
        command: the command that prints a key; empty if there is none.
    """

    def __init__(self, given: Secret, command: Secret) -> None:
        self._given = given
        self._command = command
        self._given_expires = expiry_of(given) if _is_jwt(given) else None  # Unix seconds
        self._uses_command = not given
        self._exchange: Exchange | None = None
        self._token: Secret | None = None
        self._refresh_at = float("inf")  # on the loop's clock
        self._expires_at = float("inf")
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Auth(exchanges={self._exchange is not None})"

    def follow(self, *, exchange: Exchange | None, source: str) -> None:
        """Configures the authentication that the service asks for.

        Args:
            exchange: exchanges a key for a token; None if the service accepts keys.
            source: "credential_cmd" requires the key that the command prints.

        Raises:
            ConfigError: the configured key does not fit.
        """
        if exchange is None:
            if self._uses_command:
                raise ConfigError(
                    f"{COMMAND_VARIABLE} works only with services that exchange keys for tokens, which this one does "
                    "not: set TINKER_API_KEY"
                )
            return
        if source == "credential_cmd":
            if not self._command:
                raise ConfigError(f"this service requires a key that a command prints: set {COMMAND_VARIABLE}")
            self._uses_command = True
        if self._uses_command or not _is_jwt(self._given):
            self._exchange = exchange

    async def current(self) -> Secret:
        """Returns the key for a request that is sent now.

        Raises:
            ConfigError: the key has expired, or the command failed.
            APIStatusError, TransportError: the exchange failed.
        """
        if self._exchange is not None:
            return await self._fresh_token(self._exchange)
        return self._given if self._given_expires is None and not self._uses_command else await self._raw()

    async def renewed(self, rejected: Secret) -> Secret | None:
        """Returns a replacement for a token that the service rejected; None if there is no exchange.

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
                with CutOff():
                    token = _token_of(await exchange(await self._raw()))
            except (APIStatusError, TransportError, ConfigError):
                if self._token is None or now() >= self._expires_at:
                    raise
                self._refresh_at = min(now() + _REFRESH_RETRY, self._expires_at)  # the old one is still valid
                return self._token
            self._token = token
            self._refresh_at = self._expires_at = float("inf")
            expires = expiry_of(token)
            left = None if expires is None else expires - time.time()
            # A new token that seems expired means that the clocks differ: the service will reject it when it expires.
            if left is not None and left > 0:
                self._expires_at = now() + left
                self._refresh_at = self._expires_at - min(_REFRESH_MARGIN, left / 2)
            return token

    async def _raw(self) -> Secret:
        if self._uses_command:
            return await key_from_command(self._command)
        if self._given_expires is not None and self._given_expires <= time.time():
            ago = time.time() - self._given_expires
            raise ConfigError(f"the API key is a token that expired {ago:.0f} s ago: get a new one")
        return self._given


def rejects_token(response: Response) -> bool:
    """Whether a 401 rejects the token itself, and not the permissions of its owner."""
    return 'error="invalid_token"' in response.headers.get("www-authenticate", "")


def credentials_file() -> Path | None:
    """Returns the credentials file of the official command line; None if there is no home directory."""
    try:
        return Path.home() / ".tinker" / "credentials.json"
    except RuntimeError:
        return None


def key_from_file(path: Path | None) -> str | None:
    """Returns the key of the default entry; None if there is no file or no default.

    Raises:
        ConfigError: the file cannot be read, or is not a credentials file.
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
    """Runs a shell command and returns the key that it prints, stripped. Its stderr, which may quote keys, is dropped.

    Args:
        command: a line for the shell.
        timeout: seconds after which the command is killed.

    Raises:
        ConfigError: the command failed, took too long, or printed no key.
    """
    with CutOff():
        return await _printed_key(command, timeout)


async def _printed_key(command: Secret, timeout: float) -> Secret:
    process = await _started(command)
    try:
        async with time_limit(timeout, lambda: ConfigError(f"{COMMAND_VARIABLE} did not exit within {timeout:g} s")):
            printed, _ = await process.communicate()
    finally:
        await _end(process)
    if process.returncode != 0:
        raise ConfigError(f"{COMMAND_VARIABLE} exited with status {process.returncode}; run it in a shell to see why")
    key = printed.decode("utf-8", errors="replace").strip()
    if not _is_sendable(key):
        raise ConfigError(f"{COMMAND_VARIABLE} printed {len(printed)} bytes that are not a key: print the key only")
    return Secret(key)


async def _started(command: Secret) -> asyncio.subprocess.Process:
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_shell(
            command.reveal(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        # asyncio kills the shell of a cancelled start, but not what the shell started.
        await asyncio.wait([starting])
        if starting.exception() is None:
            await _end(starting.result())
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started
        else:
            process.kill()
    # `communicate` also closes the pipe.
    await asyncio.shield(process.communicate())


def expiry_of(token: Secret) -> float | None:
    """Returns the expiry of a JWT in Unix seconds; None if it has none."""
    parts = token.reveal().split(".")
    if len(parts) != 3:
        return None
    try:
        claims = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
    except ValueError:
        return None
    exp = (_mapping(_parsed(claims)) or {}).get("exp")
    return float(exp) if isinstance(exp, int | float) and not isinstance(exp, bool) and 0 < exp < 1e12 else None


def _is_jwt(key: Secret) -> bool:
    return key.reveal().startswith(_JWT_PREFIX)


def _token_of(response: Response) -> Secret:
    token = (_mapping(response.json()) or {}).get("jwt")
    if not isinstance(token, str) or not _is_sendable(token):
        raise InvalidResponse(f"{response.request} returned no token in `jwt`")
    return Secret(token)


def _is_sendable(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable()


def _parsed(content: bytes) -> object:
    """Returns None for invalid JSON: the parser's error, which quotes the content, must not become a context."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _mapping(value: object) -> Mapping[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
