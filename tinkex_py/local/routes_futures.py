"""Routes that clients poll: health, and results of accepted requests."""

from typing import Any

from fastapi import Request, Response

from tinkex_py.local.bodies import SMALL_BODY
from tinkex_py.local.core import Refused
from tinkex_py.local.http import (
    PROTOBUF,
    Running,
    UnicodeJSONResponse,
    api_router,
    body_schema,
    core_of,
    json_in_pieces,
    read_json,
)
from tinkex_py.local.results import Failure, PendingResult
from tinkex_py.local.schemas import (
    Completion,
    CompletionsResponse,
    EmptyResponse,
    FuturesBody,
    HealthResponse,
    RequestId,
    TryAgainResponse,
)

MAX_JSON_RESULT = 16 * 1024**2
"""Bytes of a result in protobuf beyond which it has no JSON form, which is about seven times as large."""
_TOO_LARGE = (
    f"the result has {{}} bytes, and JSON results at most {MAX_JSON_RESULT}: retrieve it with "
    f"`Accept: {PROTOBUF}`, or send smaller requests"
)
router = api_router()
_RESULT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the result, or the failure with `error` and `category`",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            PROTOBUF: {"schema": {"type": "string", "format": "binary"}},
        },
    },
    408: {"model": TryAgainResponse, "description": "the result is not ready"},
}


@router.get("/healthz", response_model=HealthResponse)
async def healthz(request: Request) -> Response:
    """Returns ok; needs neither key nor model."""
    del request
    return UnicodeJSONResponse(HealthResponse().model_dump())


@router.post("/retrieve_future", responses=_RESULT, openapi_extra=body_schema(RequestId))
async def retrieve_future(request: Request) -> Response:
    """Waits for a result; returns 408 if there is none within the hold time."""
    core = await core_of(request)
    body = read_json(request, RequestId)
    pending = core.results.find(body.request_id)
    if pending is None:
        known = core.results.was_given(body.request_id)
        reason = "its result is no longer kept" if known else "unknown request; ids end with the service"
        raise Refused(410 if known else 404, f"there is no result for request {body.request_id!r}: {reason}")
    if not await core.results.wait(pending, core.options.hold_seconds):
        if core.results.closing:
            raise Refused(503, "the service is stopping")
        reason = pending.note() if pending.note is not None else None
        state = "active" if reason is None else "paused_capacity"
        try_again = TryAgainResponse(queue_state=state, queue_state_reason=reason)
        return UnicodeJSONResponse(try_again.model_dump(exclude_none=True), status_code=408)
    outcome = core.results.fetch(pending)
    if outcome is None:
        raise Refused(500, f"request {body.request_id!r} is done but has no result")
    if isinstance(outcome, Failure):
        return UnicodeJSONResponse({"error": outcome.message, "category": outcome.category})
    if outcome.protobuf is not None and PROTOBUF in request.headers.get("accept", ""):
        return Response(outcome.protobuf, media_type=PROTOBUF)
    if pending.size <= SMALL_BODY:
        return UnicodeJSONResponse({key: value for key, value in outcome.json().items() if value is not None})
    if pending.size > MAX_JSON_RESULT:
        return UnicodeJSONResponse({"error": _TOO_LARGE.format(pending.size), "category": "user"})
    return Response(await core.aside(lambda: json_in_pieces(outcome.json())), media_type="application/json")


@router.post("/retrieve_futures")
async def retrieve_futures(body: FuturesBody, core: Running) -> CompletionsResponse:
    """Waits for completed sampling requests of one client, which then retrieves each result."""
    key = core.sampling_session(body.target.sampling_session_id).sampler_id, body.target.cloned_sampler_id
    for request_id in body.retrieved_request_ids:
        core.results.release(request_id, key)
    longest = core.options.hold_seconds
    seconds = longest if body.timeout is None else min(body.timeout, longest)
    cursors = await core.results.completions.after(key, body.prev_cursor, seconds)
    if core.results.closing and not cursors:
        raise Refused(503, "the service is stopping")
    completions = [_completion(request_id, core.results.find(request_id)) for request_id in cursors]
    return CompletionsResponse(completions=completions, cursor=max(cursors.values(), default=body.prev_cursor))


def _completion(request_id: str, pending: PendingResult | None) -> Completion:
    """A forgotten result counts as finished: its client gets 410 when it retrieves it."""
    if pending is not None and isinstance(pending.outcome, Failure):
        return Completion(state="failed", request_id=request_id)
    size = None if pending is None else pending.size
    return Completion(state="finished", request_id=request_id, response_payload_uncompressed_size=size)


@router.post("/cancel_future")
async def cancel_future(body: RequestId, core: Running) -> EmptyResponse:
    """Cancels work that has not started, and drops its result."""
    pending = core.results.find(body.request_id)
    if pending is not None and pending.outcome is None and pending.cancel is not None:
        pending.cancel()
    if pending is not None and pending.outcome is not None:
        core.results.forget(body.request_id)
    return EmptyResponse()
