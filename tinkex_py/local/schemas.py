"""Bodies of requests and responses that only the service uses; those of both sides are in `tinkex_py.types`.

Requests are read leniently, as the protocol requires: unknown fields and explicit nulls are ignored.
"""

from collections.abc import Sized
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tinkex_py.local.fields import (
    AtMostStops,
    Label,
    Metadata,
    Moment,
    Number,
    Seconds,
    SignedNumber,
    StopText,
)
from tinkex_py.local.records import EndReason
from tinkex_py.types import GetInfoResponse, WeightsInfo

MAX_ITEMS = 16_384
"""Items of one list or object, and characters of one text. Every invalid item costs a kilobyte to report."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in cast("dict[str, Any]", values).items() if value is not None}
        for key in cls.model_fields.keys() & given.keys():
            value = given[key]
            if isinstance(value, str | list | dict) and len(cast("Sized", value)) > MAX_ITEMS:
                raise ValueError(f"{key} has a length of {len(cast('Sized', value))}; at most {MAX_ITEMS}")
        return given


# Sessions


class AnyBody(_Body):
    """A JSON object whose fields are ignored."""


class SessionBody(_Body):
    """create_session."""

    tags: list[str] = []
    user_metadata: Metadata | None = None
    display_name: Label | None = None
    project_id: Label | None = None


class SessionId(_Body):
    """The body of session_heartbeat and the response of sessions/{id}/finish."""

    session_id: str


class FinishReason(_Body):
    """Why a session is finished."""

    type: EndReason = "success"


class FinishBody(_Body):
    """sessions/{id}/finish."""

    reason: FinishReason = FinishReason()
    detail: Label | None = None


class StatusQuery(_Body):
    """One status to search for."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[EndReason] | None = None


class OwnerQuery(_Body):
    """Whose sessions to search."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[str] = []


class SearchCursor(_Body):
    """The last session of the page before."""

    last_created_at: Moment
    last_session_id: Label


class SearchBody(_Body):
    """sessions/search."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = Field(default=None, min_length=1)
    owner: OwnerQuery = OwnerQuery()
    statuses: list[StatusQuery] | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: SearchCursor | None = None


# Training


class LoraBody(_Body):
    """LoRA settings."""

    rank: Number = Field(default=32, ge=1)
    seed: SignedNumber | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class AdamBody(_Body):
    """AdamW parameters, with the defaults of the protocol."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class CreateModelBody(_Body):
    """create_model."""

    session_id: str
    model_seq_id: Number
    base_model: str
    lora_config: LoraBody = LoraBody()
    optimizer_config: dict[str, Any] = {"type": "adamw"}
    user_metadata: Metadata | None = None


class ModelId(_Body):
    """get_info and unload_model."""

    model_id: str


class NumberedBody(_Body):
    """Requests of a training model, which run in the order of their numbers."""

    model_id: str
    seq_id: SignedNumber = 0


class LoadWeightsBody(_Body):
    """load_weights: session_id and model_seq_id create a model, model_id and seq_id load into one."""

    path: str
    optimizer: bool = False
    session_id: str | None = None
    model_seq_id: Number | None = None
    base_model: str | None = None
    user_metadata: Metadata | None = None
    optimizer_config: dict[str, Any] = {"type": "adamw"}
    model_id: str | None = None
    seq_id: SignedNumber = 0


class PassInput(_Body):
    """The inner object of a pass in JSON, which the engine reads."""

    data: list[dict[str, Any]]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = {}


class ForwardBackwardBody(NumberedBody):
    """forward_backward in JSON; invalid input fails the future, not the submission (protocol, "Chunking")."""

    forward_backward_input: Any = None
    forward_only: bool = False


class ForwardBody(NumberedBody):
    """forward in JSON."""

    forward_input: Any = None


class CustomLossBody(_Body):
    """create_custom_loss; the engine checks the other fields, so that an invalid loss fails its future."""

    session_id: str
    custom_loss_seq_id: Number


class OptimStepBody(NumberedBody):
    """optim_step."""

    adam_params: AdamBody = AdamBody()
    optimizer_params: dict[str, Any] | None = None


class SaveWeightsBody(NumberedBody):
    """save_weights, save_weights_for_sampler (a path or a sampling_session_seq_id), save_weights_external."""

    path: str | None = None
    sampling_session_seq_id: Number | None = None
    kind: str = "snapshot"
    ttl_seconds: Seconds | None = None
    age_encryption_recipients: list[str] = []
    overwrite: bool | None = None
    user_metadata: Metadata | None = None


# Futures


class RequestId(_Body):
    """retrieve_future and cancel_future."""

    request_id: str


class CompletionsTarget(_Body):
    """A sampling session, and which clone of its client."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: Number = 0


class FuturesBody(_Body):
    """retrieve_futures; completions up to `prev_cursor` are acknowledged, `timeout` is in seconds."""

    target: CompletionsTarget
    prev_cursor: Number = 0
    timeout: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    retrieved_request_ids: list[str] = []


# Sampling


class SamplingSessionBody(_Body):
    """create_sampling_session."""

    session_id: str
    sampling_session_seq_id: Number
    base_model: str | None = None
    model_path: str | None = None


class SamplerId(_Body):
    """join_sampling_session."""

    sampling_session_id: str


class SamplingParamsBody(_Body):
    """Sampling parameters. Without `stop`, sampling stops at the end of text; with `[]`, nowhere."""

    max_tokens: Number | None = None
    seed: SignedNumber | None = None
    stop: StopText | Annotated[list[int], AtMostStops] | Annotated[list[StopText], AtMostStops] | None = None
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_k: SignedNumber = -1
    top_p: float = Field(default=1.0, gt=0, le=1)


class SampleBody(_Body):
    """asample."""

    prompt: dict[str, Any]
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    num_samples: int = Field(default=1, ge=1, le=1024)
    sampling_session_id: str | None = None
    seq_id: SignedNumber | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool = False
    topk_prompt_logprobs: Number = 0
    topk_sample_logprobs: Number = 0
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    prompt_alt_tokens_k: Number = 0
    target_prompt_logprobs: dict[str, Any] | None = None


# Checkpoints


class TinkerPath(_Body):
    """weights_info."""

    tinker_path: str


class TtlBody(_Body):
    """The new time to live of a checkpoint, in seconds."""

    ttl_seconds: Seconds | None = None


class CopyBody(_Body):
    """copy_weights."""

    source_path: str
    session_id: str | None = None
    model_seq_id: Number | None = None
    destination_project_id: str | None = None
    ttl_seconds: Seconds | None = None


# Responses


class ErrorResponse(BaseModel):
    """Why a request is refused; `code` is for programs, where the status is not enough."""

    detail: str
    code: str | None = None


class EmptyResponse(BaseModel):
    """Success without a result."""


class HealthResponse(BaseModel):
    """healthz."""

    status: Literal["ok"] = "ok"


class ClientConfigResponse(BaseModel):
    """client/config."""

    parallel_fwdbwd_chunks: bool = False
    use_pyqwest_transport: bool = False
    proto_write_fwdbwd: bool = True
    fwd_via_fwdbwd: bool = True
    gradient_products: bool = True
    sample_use_retrieve_futures: bool = True
    custom_loss_server_side: bool | None = None


class TelemetryResponse(BaseModel):
    """telemetry."""

    status: Literal["accepted"] = "accepted"


class CreateSessionResponse(BaseModel):
    """create_session."""

    session_id: str
    type: Literal["create_session"] = "create_session"


class HeartbeatResponse(BaseModel):
    """session_heartbeat."""

    type: Literal["session_heartbeat"] = "session_heartbeat"


class SubmittedResponse(BaseModel):
    """The future of an accepted request."""

    request_id: str
    model_id: str | None = None


class SampleSubmittedResponse(BaseModel):
    """The future of a sampling request, and an id for each of its sequences."""

    request_id: str
    sample_sequence_ids: list[str]


class TryAgainResponse(BaseModel):
    """The result is not ready."""

    type: Literal["try_again"] = "try_again"
    queue_state: Literal["active", "paused_capacity"]
    queue_state_reason: str | None = None


class Completion(BaseModel):
    """One completed request, with the size of its result in bytes."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None


class CompletionsResponse(BaseModel):
    """retrieve_futures."""

    completions: list[Completion]
    cursor: int


class AdamW(BaseModel):
    """The only optimizer."""

    type: Literal["adamw"] = "adamw"


class ModelInfoResponse(GetInfoResponse):
    """get_info."""

    type: Literal["get_info"] = "get_info"
    optimizer_config: AdamW = AdamW()


class WeightsInfoResponse(WeightsInfo):
    """weights_info."""

    optimizer_config: AdamW = AdamW()


class SamplingSessionResponse(BaseModel):
    """create_sampling_session."""

    sampling_session_id: str
    type: Literal["create_sampling_session"] = "create_sampling_session"


class JoinResponse(BaseModel):
    """join_sampling_session."""

    client_counter: int
    type: Literal["join_sampling_session"] = "join_sampling_session"
