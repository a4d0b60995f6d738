"""Routes for sessions and configuration."""

import uuid
from datetime import UTC, datetime

from fastapi import Request

from tinkex_py.local.core import Refused
from tinkex_py.local.http import api_router, core_of
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.records import SessionEnd, SessionInfo
from tinkex_py.local.requests import AnyBody, FinishBody, SessionBody, SessionIdBody
from tinkex_py.local.responses import (
    ClientConfigResponse,
    CreateSessionResponse,
    EmptyResponse,
    FinishSessionResponse,
    HeartbeatResponse,
    TelemetryResponse,
)
from tinkex_py.types import ServerCapabilities, SupportedModel

router = api_router()


@router.post("/client/config")
async def client_config(body: AnyBody, request: Request) -> ClientConfigResponse:
    """How clients should talk to this service."""
    del body
    options: LocalOptions = request.app.state.service.options
    return ClientConfigResponse(custom_loss_server_side=True if options.custom_losses else None)


@router.post("/client/dynamic_config")
async def dynamic_config(body: AnyBody) -> EmptyResponse:
    """Nothing changes while the service runs."""
    del body
    return EmptyResponse()


@router.post("/telemetry", openapi_extra={"requestBody": {"content": {"application/json": {"schema": {}}}}})
async def telemetry() -> TelemetryResponse:
    """Accepted and dropped: it may hold credentials."""
    return TelemetryResponse()


@router.get("/get_server_capabilities")
async def capabilities(request: Request) -> ServerCapabilities:
    """The one model there is."""
    core = core_of(request)
    model = core.engine.model
    return ServerCapabilities(
        supported_models=(
            SupportedModel(
                model_name=model.name, max_context_length=model.context_length, trainable=True, sampleable=True
            ),
        )
    )


@router.post("/create_session")
async def create_session(body: SessionBody, request: Request) -> CreateSessionResponse:
    """A new session."""
    core = core_of(request)
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
async def session_heartbeat(body: SessionIdBody, request: Request) -> HeartbeatResponse:
    """Keeps the session; 410 for a finished or unknown one, whose client stops."""
    core = core_of(request)
    session = core.sessions.get(body.session_id)
    if session is None or session.finished:
        raise Refused(410, f"session {body.session_id!r} is over or unknown here")
    core.mark_active(body.session_id)
    return HeartbeatResponse()


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str, body: FinishBody, request: Request) -> FinishSessionResponse:
    """Free what the session holds; the first reason wins."""
    core = core_of(request)
    session = core.session(session_id)
    if not session.finished:
        await core.finish_session(session, SessionEnd(reason=body.reason.type, detail=body.detail))
    return FinishSessionResponse(session_id=session.session_id)
