"""Bodies of answers that only this side writes; those that the client reads too are in `tinkex_py.types`."""

from typing import Literal

from pydantic import BaseModel

from tinkex_py.types import GetInfoResponse, WeightsInfo


class ErrorResponse(BaseModel):
    """Why a request is refused; `code` is for programs, where the status is not enough."""

    detail: str
    code: str | None = None


class EmptyResponse(BaseModel):
    """Done, and nothing more to say."""


class HealthResponse(BaseModel):
    """healthz."""

    status: Literal["ok"] = "ok"


class ClientConfigResponse(BaseModel):
    """client/config: how clients should talk to this service."""

    parallel_fwdbwd_chunks: bool = False
    use_pyqwest_transport: bool = False
    proto_write_fwdbwd: bool = True
    fwd_via_fwdbwd: bool = True
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


class FinishSessionResponse(BaseModel):
    """sessions/{id}/finish."""

    session_id: str


class SubmittedResponse(BaseModel):
    """The future of a request that was accepted."""

    request_id: str
    model_id: str | None = None


class SampleSubmittedResponse(BaseModel):
    """The future of a sampling request, and an id for each of its sequences."""

    request_id: str
    sample_sequence_ids: list[str]


class TryAgainResponse(BaseModel):
    """There is no result yet."""

    type: Literal["try_again"] = "try_again"
    queue_state: Literal["active", "paused_capacity"]
    queue_state_reason: str | None = None


class Completion(BaseModel):
    """One completed request; the size of its result is in bytes."""

    state: Literal["finished", "failed"]
    request_id: str
    response_payload_uncompressed_size: int | None = None


class CompletionsResponse(BaseModel):
    """retrieve_futures."""

    completions: list[Completion]
    cursor: int


class AdamW(BaseModel):
    """The one optimizer there is."""

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
