"""Routes for sessions, configuration and futures."""

import uuid
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import PROTOBUF, answer, read, read_json, with_core
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.records import SessionEnd, SessionInfo
from tinkex_py.local.requests import FinishBody, FutureBody, SessionBody, SessionIdBody
from tinkex_py.local.results import Failure


async def healthz(request: Request) -> Response:
    """Alive; needs no key and no model."""
    del request
    return answer({"status": "ok"})


async def client_config(request: Request) -> Response:
    """How clients should talk to this service."""
    await read_json(request)
    options: LocalOptions = request.app.state.service.options
    flags = {
        "parallel_fwdbwd_chunks": False,
        "use_pyqwest_transport": False,
        "proto_write_fwdbwd": True,
        "fwd_via_fwdbwd": True,
    }
    if options.custom_losses:
        flags["custom_loss_server_side"] = True
    return answer(flags)


async def dynamic_config(request: Request) -> Response:
    """Nothing changes while the service runs."""
    await read_json(request)
    return answer({})


async def telemetry(request: Request) -> Response:
    """Accepted and dropped: it may hold credentials."""
    del request
    return answer({"status": "accepted"})


async def capabilities(request: Request, core: Core) -> Response:
    """The one model there is."""
    del request
    model = core.engine.model
    entry = {
        "model_name": model.name,
        "max_context_length": model.context_length,
        "trainable": True,
        "sampleable": True,
    }
    return answer({"supported_models": [entry]})


async def create_session(request: Request, core: Core) -> Response:
    """A new session."""
    body = await read(request, SessionBody)
    session = SessionInfo(
        session_id=f"s{uuid.uuid4().hex[:16]}",
        created=datetime.now(UTC),
        user_metadata=body.user_metadata,
        display_name=body.display_name,
        project_id=body.project_id,
    )
    await core.remember(session)
    return answer({"session_id": session.session_id, "type": "create_session"})


async def session_heartbeat(request: Request, core: Core) -> Response:
    """Keeps the session; a finished or unknown one tells its client to stop."""
    body = await read(request, SessionIdBody)
    session = core.sessions.get(body.session_id)
    if session is None or session.finished:
        raise Refused(410, f"session {body.session_id!r} is over or unknown here")
    core.hear(body.session_id)
    return answer({"type": "session_heartbeat"})


async def finish_session(request: Request, core: Core) -> Response:
    """Free what the session holds; the first reason wins."""
    body = await read(request, FinishBody)
    session = core.session(request.path_params["session_id"])
    if not session.finished:
        await core.finish_session(session, SessionEnd(reason=body.reason.type, detail=body.detail))
    return answer({"session_id": session.session_id})


async def retrieve_future(request: Request, core: Core) -> Response:
    """Wait for a result; 408 when there is none within the hold time."""
    body = await read(request, FutureBody)
    pending = core.results.find(body.request_id)
    if pending is None:
        given = core.results.was_given(body.request_id)
        raise Refused(410 if given else 404, f"there is no result for request {body.request_id!r}")
    if not await core.results.wait(pending, core.options.hold_seconds):
        if core.results.closing.is_set():
            raise Refused(503, "the service is stopping")
        reason = pending.note() if pending.note is not None else None
        state = "active" if reason is None else "paused_capacity"
        return answer({"type": "try_again", "queue_state": state, "queue_state_reason": reason}, status=408)
    outcome = pending.outcome
    pending.fetched = True
    if outcome is None:
        raise Refused(500, f"request {body.request_id!r} is done but has no result")
    if isinstance(outcome, Failure):
        return answer({"error": outcome.message, "category": outcome.category})
    if outcome.protobuf is not None and PROTOBUF in request.headers.get("accept", ""):
        return Response(outcome.protobuf, media_type=PROTOBUF)
    return answer(outcome.json())


async def cancel_future(request: Request, core: Core) -> Response:
    """Nobody will ask for this result again."""
    body = await read(request, FutureBody)
    pending = core.results.find(body.request_id)
    if pending is not None and pending.outcome is None and pending.cancel is not None:
        pending.cancel()
    if pending is not None and pending.outcome is not None:
        core.results.forget(body.request_id)
    return answer({})


routes = [
    Route("/api/v1/healthz", healthz, methods=["GET"]),
    Route("/api/v1/client/config", client_config, methods=["POST"]),
    Route("/api/v1/client/dynamic_config", dynamic_config, methods=["POST"]),
    Route("/api/v1/telemetry", telemetry, methods=["POST"]),
    Route("/api/v1/get_server_capabilities", with_core(capabilities), methods=["GET"]),
    Route("/api/v1/create_session", with_core(create_session), methods=["POST"]),
    Route("/api/v1/session_heartbeat", with_core(session_heartbeat), methods=["POST"]),
    Route("/api/v1/sessions/{session_id}/finish", with_core(finish_session), methods=["POST"]),
    Route("/api/v1/retrieve_future", with_core(retrieve_future), methods=["POST"]),
    Route("/api/v1/cancel_future", with_core(cancel_future), methods=["POST"]),
]
