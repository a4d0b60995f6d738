"""Configuration of a service client: address, key, timeouts and limits."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import platformdirs

from tinkex_py.arguments import (
    as_number,
    check_choice,
    check_count,
    check_function,
    check_kind,
    check_path,
    plain,
    shown,
)
from tinkex_py.errors import ConfigError, InvalidData
from tinkex_py.limits import RetryPolicy, is_seconds
from tinkex_py.transport.auth import COMMAND_VARIABLE, credentials_file, key_from_file
from tinkex_py.transport.messages import Secret, checked_base_url, may_be_key, merged_headers
from tinkex_py.transport.secrecy import hides_arguments
from tinkex_py.types import QueueState

BASE_URL_VARIABLE = "TINKER_BASE_URL"
KEY_VARIABLE = "TINKER_API_KEY"
PROJECT_VARIABLE = "TINKER_PROJECT_ID"
TAGS_VARIABLE = "TINKER_TAGS"
ACCESS_VARIABLES: Mapping[str, str] = {
    "cf-access-client-id": "CLOUDFLARE_ACCESS_CLIENT_ID",
    "cf-access-client-secret": "CLOUDFLARE_ACCESS_CLIENT_SECRET",
}
HOSTED_SERVICE = "https://tinker.thinkingmachines.dev/services/tinker-prod"
_LEAST_RESPONSE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TinkexConfig:
    """Settings of a service client. Arguments take precedence over the environment.

    Args:
        base_url: address of the service; else `TINKER_BASE_URL`, else the hosted service.
        api_key: else `TINKER_API_KEY`, else the output of the command in `TINKER_CREDENTIAL_CMD`, else the default
            entry of `~/.tinker/credentials.json`. No repr, log, error or pickle shows it; an unpickled config looks
            it up again.
        timeout: seconds for one HTTP exchange.
        poll_timeout: seconds for one poll of a result; services hold polls for 20 to 40 s. After this time the result
            is polled again, as long as the service responds to other requests.
        retry: how long and how often requests are repeated.
        max_connections: maximum concurrent HTTP connections for requests other than polls.
        max_polls: maximum concurrent HTTP connections for polls.
        max_threads: worker threads for sync terms, shared by all training clients; None is the usable CPU count.
        max_processes: worker processes for terms with `runs_in="process"`, shared like the threads; None is the usable
            CPU count.
        max_response_bytes: maximum bytes of the result of a pass or sample, after decompression; at least 64 KiB. Other
            responses have at most 16 MiB of it. A JSON result may have an eighth of it, and one value per 256 bytes.
        close_timeout: seconds that closing waits for requests in flight.
        heartbeat_interval: seconds between the heartbeats of a session.
        tags: labels of the session; else `TINKER_TAGS`, split at commas.
        user_metadata: further labels of the session.
        project_id: project of the session; else `TINKER_PROJECT_ID`.
        default_headers: sent with every request, for example for a proxy in front of the service. No repr or error
            shows them, and a config with values of 8 characters or more, which may be keys, cannot be pickled.
        wire: encoding of passes: "auto" detects it; "protobuf" keeps numbers packed; "json" is for services without
            protobuf.
        billing_pause: seconds that requests wait while the service asks for payment (402); None is the service's own
            limit, at most an hour; 0 raises BillingRequired at once.
        sampling_patience: seconds without progress after which samples that the service refuses (429) fail.
        on_queue_state: called with each new QueueState, on the event loop; it should be quick. If it raises, it is not
            called again.
        certificates: folder of the certificates that `certify_gradients` writes and `surrogate="auto"` reads; None is
            the user's data folder.
        mean_logprob_difference: a custom step warns if its backward and its forward pass differ by more in the mean.
        largest_logprob_difference: the same for a single logprob.

    Raises:
        ConfigError: there is no key, or a value is invalid.
    """

    base_url: str = None  # type: ignore[assignment]  # None reads the environment; a str afterwards
    api_key: str | Secret | None = field(default=None, repr=False, compare=False)
    timeout: float = 60.0
    poll_timeout: float = 45.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_connections: int = 16
    max_polls: int = 128
    max_threads: int | None = None
    max_processes: int | None = None
    max_response_bytes: int = 1 << 30
    close_timeout: float = 10.0
    heartbeat_interval: float = 10.0
    tags: tuple[str, ...] = ()
    user_metadata: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    project_id: str | None = None
    default_headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False, hash=False)
    wire: str = "auto"
    billing_pause: float | None = None
    sampling_patience: float = 7200.0
    on_queue_state: Callable[[QueueState], object] | None = None
    certificates: Path = None  # type: ignore[assignment]  # None is the user's data folder; a Path afterwards
    mean_logprob_difference: float = 1e-3
    largest_logprob_difference: float = 0.1
    credential_command: Secret = field(default=Secret(""), init=False, repr=False, compare=False)
    access_headers: Mapping[str, str] = field(default_factory=dict[str, str], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        base_url = _checked_text("base_url", self.base_url) or os.environ.get(BASE_URL_VARIABLE) or HOSTED_SERVICE
        checked_base_url(base_url)
        object.__setattr__(self, "base_url", base_url.rstrip("/"))
        object.__setattr__(self, "credential_command", Secret(os.environ.get(COMMAND_VARIABLE, "").strip()))
        object.__setattr__(self, "api_key", _secret(self.api_key, self.credential_command))
        project = _checked_text("project_id", self.project_id) or os.environ.get(PROJECT_VARIABLE) or None
        object.__setattr__(self, "project_id", project)
        object.__setattr__(self, "default_headers", _checked_headers("default_headers", self.default_headers))
        access = {name: os.environ.get(variable, "") for name, variable in ACCESS_VARIABLES.items()}
        present = {name: value for name, value in access.items() if value}
        object.__setattr__(self, "access_headers", _checked_headers("CLOUDFLARE_ACCESS_CLIENT_*", present))
        tags = cast("object", () if self.tags is None else self.tags)  # pyright: ignore[reportUnnecessaryComparison]
        is_sequence = isinstance(tags, Iterable) and not isinstance(tags, str)
        if not is_sequence or not all(isinstance(tag, str) for tag in cast("Iterable[object]", tags)):
            raise ConfigError(f"tags must be a sequence of strings, got {shown(self.tags)}")
        if not isinstance(self.user_metadata, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"user_metadata must be a mapping, got {shown(self.user_metadata)}")
        object.__setattr__(self, "tags", tuple(cast("Iterable[str]", tags)) or _tags_of_environment())
        for name in ("timeout", "poll_timeout", "heartbeat_interval", "sampling_patience"):
            self._check_seconds(name, positive=True)
        self._check_seconds("close_timeout", positive=False)
        if self.billing_pause is not None:
            self._check_seconds("billing_pause", positive=False)
        if self.on_queue_state is not None:
            check_function("on_queue_state", self.on_queue_state, error=ConfigError)
        for name in ("max_connections", "max_polls", "max_threads", "max_processes"):
            count: object = getattr(self, name)
            if name not in ("max_threads", "max_processes") or count is not None:
                object.__setattr__(self, name, check_count(name, count, least=1, error=ConfigError))
        longest = check_count("max_response_bytes", self.max_response_bytes, least=_LEAST_RESPONSE, error=ConfigError)
        object.__setattr__(self, "max_response_bytes", longest)
        folder = platformdirs.user_data_path("tinkex-py", appauthor=False) / "certificates"
        given = cast("object", self.certificates)
        chosen = folder if given is None else check_path("certificates", given, error=ConfigError)
        object.__setattr__(self, "certificates", chosen)
        for name in ("mean_logprob_difference", "largest_logprob_difference"):
            limit = as_number(getattr(self, name))
            if limit is None or not limit >= 0:
                raise ConfigError(f"{name} must be a number >= 0, got {shown(getattr(self, name))}")
            object.__setattr__(self, name, limit)
        check_kind("retry", self.retry, RetryPolicy, error=ConfigError)
        check_choice("wire", self.wire, ("auto", "protobuf", "json"), error=ConfigError)

    @property
    def key(self) -> str:
        """The key itself, for the header that sends it; empty if a command prints it."""
        return self.secret_key.reveal()

    @property
    def secret_key(self) -> Secret:
        """The key, wrapped so that nothing shows it."""
        assert isinstance(self.api_key, Secret)
        return self.api_key

    def _check_seconds(self, name: str, *, positive: bool) -> None:
        value: object = getattr(self, name)
        if not (is_seconds(value) and (value > 0 if positive else value >= 0)):
            raise ConfigError(f"{name} must be a number of seconds {'> 0' if positive else '>= 0'}, got {shown(value)}")
        object.__setattr__(self, name, plain(value))

    def __copy__(self) -> "TinkexConfig":
        return self

    def __deepcopy__(self, _memo: object) -> "TinkexConfig":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        secret = [name for name, value in self.default_headers.items() if may_be_key(value)]
        if secret:
            raise ConfigError(
                f"a pickle would contain default_headers, whose {', '.join(map(repr, secret))} may be secret: pickle "
                "dataclasses.replace(config, default_headers={}), and add them where it is used"
            )
        given = [field.name for field in fields(self) if field.init and field.name != "api_key"]
        kept = {name: getattr(self, name) for name in given}
        return _restore, (kept,)


def checked_config(config: TinkexConfig | None) -> TinkexConfig | None:
    """Returns a config or None; raises ConfigError for anything else."""
    if config is None:
        return None
    return check_kind("config", config, TinkexConfig, "pass TinkexConfig(base_url=...)", error=ConfigError)


def names_service(settings: Mapping[str, Any]) -> bool:
    """Returns whether the environment or settings have the address of a service, or a key."""
    variables = (BASE_URL_VARIABLE, KEY_VARIABLE, COMMAND_VARIABLE)
    return any(map(os.environ.get, variables)) or any(settings.get(name) for name in ("base_url", "api_key"))


TinkexConfig.__init__ = hides_arguments(TinkexConfig.__init__)


@hides_arguments
def _restore(settings: dict[str, Any]) -> TinkexConfig:
    return TinkexConfig(**settings)


def _checked_text(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {shown(value)}")
    return value


def _tags_of_environment() -> tuple[str, ...]:
    return tuple(tag.strip() for tag in os.environ.get(TAGS_VARIABLE, "").split(",") if tag.strip())


def _checked_headers(name: str, headers: object) -> Mapping[str, str]:
    if not isinstance(headers, Mapping):
        raise ConfigError(f"{name} must map names to strings, got a {type(headers).__name__}")
    given = cast("Mapping[object, object]", headers)
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in given.items()):
        raise ConfigError(f"{name} must map names to strings: convert its names and values to str")
    try:
        return merged_headers(cast("Mapping[str, str]", headers))
    except InvalidData as error:
        raise ConfigError(f"{name}: {error}") from None


def _secret(api_key: str | Secret | None, command: Secret) -> Secret:
    if isinstance(api_key, Secret) and api_key:
        return api_key
    if api_key is not None and not isinstance(api_key, str | Secret):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"api_key must be a string, got a {type(api_key).__name__}")
    given = api_key if isinstance(api_key, str) else ""
    key = given or os.environ.get(KEY_VARIABLE) or ""
    if not key and command:
        return Secret("")
    key = key or key_from_file(credentials_file()) or ""
    if not key.strip():
        raise ConfigError(
            f"no API key: pass api_key=..., set the environment variable {KEY_VARIABLE} or {COMMAND_VARIABLE}, "
            "or log in with the official command line"
        )
    if not (key.isascii() and key.isprintable()) or key != key.strip():
        raise ConfigError(
            "the API key has spaces around it, or characters that no HTTP header can contain: copy it again"
        )
    return Secret(key)
