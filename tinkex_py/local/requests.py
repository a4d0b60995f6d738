"""Bodies of JSON requests, read leniently: unknown fields and explicit nulls are ignored."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from tinkex_py.local.records import EndReason

# A hundred years in seconds; calendars end not much later.
_LONGEST_TTL = 36_525 * 86_400


def _storable(value: Any) -> Any:
    """What goes to disk and into answers. JSON can escape half a character, which has no UTF-8 form.

    Python's decoder takes NaN and infinities, for which JSON has no form.
    """
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    except ValueError:
        raise ValueError("holds a number that JSON has no form for (NaN or an infinity)") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    return value


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("lies outside the calendar") from None


Label = Annotated[str, AfterValidator(_storable)]
Metadata = Annotated[dict[str, Any], AfterValidator(_storable)]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if value is not None}  # pyright: ignore[reportUnknownVariableType]
        return values


class AnyBody(_Lenient):
    """An object of which nothing is read."""


class LoraBody(_Lenient):
    """LoRA settings as clients send them."""

    rank: int = Field(default=32, ge=1)
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class AdamBody(_Lenient):
    """AdamW parameters; what is missing has the protocol's defaults."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class SessionBody(_Lenient):
    """create_session."""

    tags: list[str] = []
    user_metadata: Metadata | None = None
    display_name: Label | None = None
    project_id: Label | None = None


class SessionIdBody(_Lenient):
    """session_heartbeat."""

    session_id: str


class CreateModelBody(_Lenient):
    """create_model."""

    session_id: str
    model_seq_id: int = Field(ge=0)
    base_model: str
    lora_config: LoraBody = LoraBody()
    optimizer_config: dict[str, Any] = {"type": "adamw"}
    user_metadata: Metadata | None = None


class ModelBody(_Lenient):
    """get_info, unload_model."""

    model_id: str


class NumberedBody(_Lenient):
    """What all requests of a training model have, which are done in the order of their numbers."""

    model_id: str
    seq_id: int = 0


class LoadWeightsBody(_Lenient):
    """load_weights: session_id and model_seq_id make a new model, model_id and seq_id load into one."""

    path: str
    optimizer: bool = False
    session_id: str | None = None
    model_seq_id: int | None = Field(default=None, ge=0)
    base_model: str | None = None
    user_metadata: Metadata | None = None
    optimizer_config: dict[str, Any] = {"type": "adamw"}
    model_id: str | None = None
    seq_id: int = 0


class PassInput(_Lenient):
    """The inner object of the JSON form of forward and forward_backward: read when its turn has come."""

    data: list[dict[str, Any]]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = {}


class ForwardBackwardBody(NumberedBody):
    """forward_backward in JSON; a bad input must fail the future, never the submission (protocol, "Chunking")."""

    forward_backward_input: Any = None
    forward_only: bool = False


class ForwardBody(NumberedBody):
    """forward in JSON."""

    forward_input: Any = None


class CustomLossBody(_Lenient):
    """create_custom_loss; what it holds is checked by the engine, so that a bad loss fails its future."""

    session_id: str
    custom_loss_seq_id: int = Field(ge=0)


class OptimStepBody(NumberedBody):
    """optim_step."""

    adam_params: AdamBody = AdamBody()
    optimizer_params: dict[str, Any] | None = None


class SaveWeightsBody(NumberedBody):
    """save_weights and save_weights_for_sampler; the latter has a path or a sampling_session_seq_id."""

    path: str | None = None
    sampling_session_seq_id: int | None = Field(default=None, ge=0)
    kind: str = "snapshot"
    ttl_seconds: int | None = Field(default=None, gt=0, le=_LONGEST_TTL)
    age_encryption_recipients: list[str] = []
    overwrite: bool | None = None
    user_metadata: Metadata | None = None


class FutureBody(_Lenient):
    """retrieve_future, cancel_future."""

    request_id: str


class CompletionsTarget(_Lenient):
    """Whose completions a poll waits for: those of one copy of a sampling session's client."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: int = Field(default=0, ge=0)


class FuturesBody(_Lenient):
    """retrieve_futures; what was completed up to `prev_cursor` is acknowledged, `timeout` is in seconds."""

    target: CompletionsTarget
    prev_cursor: int = Field(default=0, ge=0)
    timeout: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    retrieved_request_ids: list[str] = []


class SamplingSessionBody(_Lenient):
    """create_sampling_session."""

    session_id: str
    sampling_session_seq_id: int = Field(ge=0)
    base_model: str | None = None
    model_path: str | None = None


class SamplerIdBody(_Lenient):
    """join_sampling_session."""

    sampling_session_id: str


class SamplingParamsBody(_Lenient):
    """How to draw; absent `stop` stops at the end of text, `[]` at nothing."""

    max_tokens: int | None = Field(default=None, ge=0)
    seed: int | None = None
    stop: str | list[int] | list[str] | None = None
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: int = -1
    top_p: float = Field(default=1.0, gt=0, le=1)


class SampleBody(_Lenient):
    """asample."""

    prompt: dict[str, Any]
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    num_samples: int = Field(default=1, ge=1, le=1024)
    sampling_session_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = Field(default=0, ge=0)
    topk_sample_logprobs: int = Field(default=0, ge=0)
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    prompt_alt_tokens_k: int = Field(default=0, ge=0)
    target_prompt_logprobs: dict[str, Any] | None = None


class TinkerPathBody(_Lenient):
    """weights_info."""

    tinker_path: str


class TtlBody(_Lenient):
    """Change of a checkpoint's time to live, in seconds."""

    ttl_seconds: int | None = Field(default=None, gt=0, le=_LONGEST_TTL)


class CopyBody(_Lenient):
    """copy_weights."""

    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = Field(default=None, ge=0)
    destination_project_id: str | None = None
    ttl_seconds: int | None = Field(default=None, gt=0, le=_LONGEST_TTL)


class FinishReason(_Lenient):
    """Why a session is over."""

    type: EndReason = "success"


class FinishBody(_Lenient):
    """sessions/{id}/finish."""

    reason: FinishReason = FinishReason()
    detail: Label | None = None


class StatusQuery(_Lenient):
    """One status that sessions may have."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[EndReason] | None = None


class OwnerQuery(_Lenient):
    """Whose sessions to search."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = []


class SearchCursor(_Lenient):
    """Behind which session the page begins."""

    last_created_at: Annotated[AwareDatetime, AfterValidator(_in_utc)]
    last_session_id: Label


class SearchBody(_Lenient):
    """sessions/search."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = Field(default=None, min_length=1)
    owner: OwnerQuery = OwnerQuery()
    statuses: list[StatusQuery] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SearchCursor | None = None
