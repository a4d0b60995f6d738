"""Where the key comes from (protocol: "Credentials"): the environment, a command, or a file."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tinkex_py.errors import ConfigError
from tinkex_py.transport.answer import Secret

COMMAND_VARIABLE = "TINKER_CREDENTIAL_CMD"
COMMAND_TIMEOUT = 30.0
_JWT_PREFIX = "eyJ"


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
    unusable = ConfigError(f"{path} is no credentials file: make it anew, or set TINKER_API_KEY")
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


def _parsed(content: bytes) -> object:
    """None for what is no JSON. The parser's own error quotes what it read, so it must not be anybody's context."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


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
        async with asyncio.timeout(timeout):
            printed, _ = await process.communicate()
    except TimeoutError:
        raise ConfigError(f"{COMMAND_VARIABLE} did not end within {timeout:g} s") from None
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


def is_jwt(key: Secret) -> bool:
    """Whether the key is a token that tells about itself."""
    return key.reveal().startswith(_JWT_PREFIX)


def expiry_of(token: Secret) -> float | None:
    """When a JWT ends, in Unix seconds; None if it does not tell."""
    parts = token.reveal().split(".")
    if len(parts) != 3:
        return None
    try:
        claims = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
    except ValueError:
        return None
    told = (_mapping(_parsed(claims)) or {}).get("exp")
    return float(told) if isinstance(told, int | float) and not isinstance(told, bool) and 0 < told < 1e12 else None


def check_not_expired(key: Secret) -> None:
    """Checks a key that is a JWT against its own end.

    Raises:
        ConfigError: it has ended, so no service will take it.
    """
    ends = expiry_of(key) if is_jwt(key) else None
    if ends is not None and ends <= time.time():
        ago = time.time() - ends
        raise ConfigError(f"the API key is a token that ended {ago:.0f} s ago: get a new one")


def _mapping(value: object) -> Mapping[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
