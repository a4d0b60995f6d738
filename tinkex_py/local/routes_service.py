"""Routes of sessions and configuration."""

import uuid
from datetime import UTC, datetime

from fastapi import Request

from tinkex_py.local.core import Refused
from tinkex_py.local.http import Running, api_router
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.records import SessionEnd, SessionInfo
from tinkex_py.local.schemas import (
    AnyBody,
    ClientConfigResponse,
    CreateSessionResponse,
    EmptyResponse,
    FinishBody,
    HeartbeatResponse,
    SessionBody,
    SessionId,
    TelemetryResponse,
)
from tinkex_py.types import ServerCapabilities, SupportedModel
from tinkex_py.version import __version__

router = api_router()


@router.post("/client/config")
async def client_config(body: AnyBody, request: Request) -> ClientConfigResponse:
    """Returns which features of the protocol clients should use."""
    del body
    options: LocalOptions = request.app.state.service.options
    return ClientConfigResponse(custom_loss_server_side=True if options.custom_losses else None)


@router.post("/client/dynamic_config")
async def dynamic_config(body: AnyBody) -> EmptyResponse:
    """Returns no changes: the configuration is constant while the service runs."""
    del body
    return EmptyResponse()


@router.post("/telemetry", openapi_extra={"requestBody": {"content": {"application/json": {"schema": {}}}}})
async def telemetry() -> TelemetryResponse:
    """Accepts telemetry and drops it, because it may contain credentials."""
    return TelemetryResponse()


@router.get("/get_server_capabilities")
async def capabilities(core: Running) -> ServerCapabilities:
    """Returns the served model."""
    model = core.engine.model
    served = SupportedModel(
        model_name=model.name, max_context_length=model.context_length, trainable=True, sampleable=True
    )
    return ServerCapabilities(supported_models=(served,), version=f"tinkex_py {__version__}")


@router.post("/create_session")
async def create_session(body: SessionBody, core: Running) -> CreateSessionResponse:
    """Creates a session."""
    session = SessionInfo(
        session_id=f"s{uuid.uuid4().hex[:16]}",
        created=datetime.now(UTC),
        user_metadata=body.user_metadata,
        display_name=body.display_name,
        project_id=body.project_id,
    )
    await core.remember(session)
    return CreateSessionResponse(session_id=session.session_id)


@router.post("/session_heartbeat")
async def session_heartbeat(body: SessionId, core: Running) -> HeartbeatResponse:
    """Keeps a session; 410 tells the client of a finished or unknown one to stop."""
    session = core.sessions.get(body.session_id)
    if session is None or session.finished:
        raise Refused(410, f"session {body.session_id!r} is over or unknown: create a new one")
    core.mark_active(body.session_id)
    return HeartbeatResponse()


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str, body: FinishBody, core: Running) -> SessionId:
    """Finishes a session and frees its models; the first reason stays."""
    session = core.session(session_id)
    if not session.finished:
        await core.finish_session(session, SessionEnd(reason=body.reason.type, detail=body.detail))
    return SessionId(session_id=session.session_id)
