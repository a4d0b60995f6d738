"""Where the service is, the key, timeouts and limits."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tinkex_py.errors import ConfigError
from tinkex_py.transport.answer import Secret
from tinkex_py.transport.retry import RetryPolicy

BASE_URL_VARIABLE = "TINKER_BASE_URL"
KEY_VARIABLE = "TINKER_API_KEY"
HOSTED_SERVICE = "https://tinker.thinkingmachines.dev/services/tinker-prod"


@dataclass(frozen=True, kw_only=True)
class TinkexConfig:
    """Settings of a service client. Arguments win over the environment.

    Args:
        base_url: where the service is; else `TINKER_BASE_URL`, else the hosted service.
        api_key: else `TINKER_API_KEY`. It never shows in a repr, log, error or pickle; an unpickled config reads
            it from the environment again.
        timeout: seconds for one HTTP exchange.
        poll_timeout: seconds for one exchange that waits for a result; services hold it for 20 to 40 s.
        retry: how often and how long requests are repeated.
        max_connections: HTTP connections at once for requests that are answered at once.
        max_polls: HTTP connections at once for waiting for results.
        max_threads: worker threads for sync terms, over all training clients; None is the usable CPU count.
        close_timeout: seconds that closing waits for requests in flight.
        heartbeat_interval: seconds between signs of life of a session.
        tags: labels of the session.
        user_metadata: more labels of the session.
        project_id: project of the session; else `TINKER_PROJECT_ID`.
        wire: "protobuf" keeps numbers packed; "json" is for services that read nothing else.

    Raises:
        ConfigError: no key, or a value out of range.
    """

    base_url: str = None  # type: ignore[assignment]  # None asks the environment; a str afterwards
    api_key: str | Secret | None = field(default=None, repr=False, compare=False)
    timeout: float = 60.0
    poll_timeout: float = 75.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_connections: int = 16
    max_polls: int = 128
    max_threads: int | None = None
    close_timeout: float = 10.0
    heartbeat_interval: float = 10.0
    tags: tuple[str, ...] = ()
    user_metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    project_id: str | None = None
    wire: str = "protobuf"

    def __post_init__(self) -> None:
        given: str | None = self.base_url
        base_url = (given or os.environ.get(BASE_URL_VARIABLE) or HOSTED_SERVICE).rstrip("/")
        object.__setattr__(self, "base_url", base_url)
        object.__setattr__(self, "api_key", _secret(self.api_key))
        object.__setattr__(self, "project_id", self.project_id or os.environ.get("TINKER_PROJECT_ID") or None)
        object.__setattr__(self, "tags", tuple(self.tags))
        for name in ("timeout", "poll_timeout", "heartbeat_interval"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be a positive number of seconds, got {getattr(self, name)!r}")
        if not self.close_timeout >= 0:
            raise ConfigError(f"close_timeout must be >= 0 seconds, got {self.close_timeout!r}")
        for name in ("max_connections", "max_polls", "max_threads"):
            count: int | None = getattr(self, name)
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be at least 1, got {count!r}")
        if self.wire not in ("protobuf", "json"):
            raise ConfigError(f"wire must be 'protobuf' or 'json', got {self.wire!r}")

    @property
    def key(self) -> str:
        """The key itself, for the header it is sent in."""
        assert isinstance(self.api_key, Secret)
        return self.api_key.reveal()

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "api_key"}
        return _restore, (kept,)


def _restore(fields: dict[str, Any]) -> TinkexConfig:
    return TinkexConfig(**fields)


def _secret(api_key: str | Secret | None) -> Secret:
    if isinstance(api_key, Secret):
        return api_key
    key = api_key or os.environ.get(KEY_VARIABLE) or ""
    if not key.strip():
        raise ConfigError(f"no API key: pass api_key=..., or set the environment variable {KEY_VARIABLE}")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ConfigError(
            "the API key has spaces around it or characters that no header can carry; was it copied completely?"
        )
    return Secret(key)
