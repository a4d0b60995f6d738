"""Where the service is, the key, timeouts and limits."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from tinkex_py.errors import ConfigError
from tinkex_py.transport.answer import Secret
from tinkex_py.transport.request import checked_base_url
from tinkex_py.transport.retry import RetryPolicy
from tinkex_py.types.seconds import is_seconds

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
    user_metadata: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    project_id: str | None = None
    wire: str = "protobuf"

    def __post_init__(self) -> None:
        base_url = _checked_text("base_url", self.base_url) or os.environ.get(BASE_URL_VARIABLE) or HOSTED_SERVICE
        checked_base_url(base_url)
        object.__setattr__(self, "base_url", base_url.rstrip("/"))
        object.__setattr__(self, "api_key", _secret(self.api_key))
        project = _checked_text("project_id", self.project_id) or os.environ.get("TINKER_PROJECT_ID") or None
        object.__setattr__(self, "project_id", project)
        tags = cast("object", self.tags)
        is_sequence = isinstance(tags, Iterable) and not isinstance(tags, str)
        if not is_sequence or not all(isinstance(tag, str) for tag in cast("Iterable[object]", tags)):
            raise ConfigError(f"tags must be a sequence of texts, got {tags!r}")
        if not isinstance(self.user_metadata, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"user_metadata must be a mapping, got {self.user_metadata!r}")
        object.__setattr__(self, "tags", tuple(self.tags))
        for name in ("timeout", "poll_timeout", "heartbeat_interval"):
            _check_seconds(name, getattr(self, name), least_excluded=0)
        _check_seconds("close_timeout", self.close_timeout, least_excluded=None)
        for name in ("max_connections", "max_polls", "max_threads"):
            count: object = getattr(self, name)
            optional = name == "max_threads" and count is None
            if not optional and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ConfigError(f"{name} must be an int >= 1, got {count!r}")
        if not isinstance(self.retry, RetryPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"retry must be a RetryPolicy, got {self.retry!r}")
        if self.wire not in ("protobuf", "json"):
            raise ConfigError(f"wire must be 'protobuf' or 'json', got {self.wire!r}")

    @property
    def key(self) -> str:
        """The key itself, for the header it is sent in."""
        assert isinstance(self.api_key, Secret)
        return self.api_key.reveal()

    def __copy__(self) -> "TinkexConfig":
        return self

    def __deepcopy__(self, _memo: object) -> "TinkexConfig":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "api_key"}
        return _restore, (kept,)


def _restore(fields: dict[str, Any]) -> TinkexConfig:
    return TinkexConfig(**fields)


def _checked_text(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} must be a text, got {value!r}")
    return value


def _check_seconds(name: str, value: object, *, least_excluded: int | None) -> None:
    if not (is_seconds(value) and value >= 0 and value != least_excluded):
        least = "> 0" if least_excluded == 0 else ">= 0"
        raise ConfigError(f"{name} must be a number of seconds {least}, got {value!r}")


def _secret(api_key: str | Secret | None) -> Secret:
    if isinstance(api_key, Secret):
        return api_key
    if api_key is not None and not isinstance(api_key, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"api_key must be a text, got a {type(api_key).__name__}")
    key = api_key or os.environ.get(KEY_VARIABLE) or ""
    if not key.strip():
        raise ConfigError(f"no API key: pass api_key=..., or set the environment variable {KEY_VARIABLE}")
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ConfigError(
            "the API key has spaces around it or characters that no header can carry; was it copied completely?"
        )
    return Secret(key)
