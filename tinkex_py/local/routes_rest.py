"""Listings of training runs, and listings and search of sessions."""

from itertools import islice

from fastapi import Request, Response

from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.database import Database
from tinkex_py.local.http import Running, Whole, api_router
from tinkex_py.local.records import Kind, SessionInfo, TrainingRunInfo
from tinkex_py.local.routes_checkpoints import checkpoint_entry
from tinkex_py.local.schemas import SearchBody, StatusQuery
from tinkex_py.types import (
    Checkpoint,
    Cursor,
    Session,
    SessionSearchCursor,
    SessionSearchPage,
    SessionsPage,
    SessionStatus,
    SessionSummary,
    TrainingRun,
    TrainingRunsPage,
)

router = api_router()
OWNER = "local"
"""The only owner, and the project of sessions without one."""
UNSUPPORTED = "unsupported_feature"
"""The code of errors about features that this service does not have."""


@router.get("/training_runs")
async def training_runs(
    core: Running, limit: Whole = 20, offset: Whole = 0, project_id: str | None = None
) -> TrainingRunsPage:
    """Lists training runs, newest first."""

    def listed(store: CheckpointStore) -> tuple[tuple[TrainingRun, ...], int]:
        runs, count = store.records.runs(limit, offset, project_id)
        return tuple(_run_entry(core, store, run) for run in runs), count

    entries, count = await core.stored(listed)
    return TrainingRunsPage(training_runs=entries, cursor=Cursor(offset=offset, limit=limit, total_count=count))


@router.get("/training_runs/{run}")
async def training_run(run: str, core: Running) -> TrainingRun:
    """Returns a training run."""

    def described(store: CheckpointStore) -> TrainingRun | None:
        info = store.records.run(run)
        return None if info is None else _run_entry(core, store, info)

    entry = await core.stored(described)
    if entry is None:
        raise Refused(404, f"there is no training run {run!r}")
    return entry


@router.get("/sessions")
async def sessions(core: Running, limit: Whole = 20, offset: Whole = 0) -> SessionsPage:
    """Lists the ids of sessions, newest first."""
    return SessionsPage(sessions=tuple(await core.stored(lambda store: store.records.session_ids(limit, offset))))


@router.post("/sessions/search")
async def search_sessions(body: SearchBody, core: Running) -> SessionSearchPage:
    """Lists the sessions that match a query, newest first."""
    return await core.stored(lambda store: _page_of_sessions(store.records, body))


@router.get("/sessions/{session_id}")
async def session(session_id: str, core: Running) -> Session:
    """Returns a session with its runs and sampling sessions."""
    known = core.session(session_id)
    run_ids = await core.stored(lambda store: store.records.run_ids(session_id))
    return Session(
        training_run_ids=tuple(run_ids),
        sampler_ids=tuple(sampler for sampler in core.samplers if sampler.startswith(f"{session_id}:")),
        user_metadata=known.user_metadata,
        display_name=known.display_name,
    )


@router.put("/sessions/{session_id}/project")
@router.get("/sessions/{session_id}/trace_export")
@router.get("/audit")
@router.get("/billing/usage/events")
@router.get("/billing/usage/checkpoints/current")
async def unsupported(request: Request) -> Response:
    """Refuses what needs accounts."""
    raise Refused(
        404,
        f"{request.method} {request.url.path}: the embedded service has no accounts, and so no billing, audit log, "
        "projects or traces",
        UNSUPPORTED,
    )


def _run_entry(core: Core, store: CheckpointStore, run: TrainingRunInfo) -> TrainingRun:
    saved, _ = store.records.checkpoints(run.run_id)
    moments = [run.created, *(info.time for info in saved)]

    def last(kind: Kind) -> Checkpoint | None:
        newest = next((info for info in saved if info.kind == kind), None)
        return None if newest is None else checkpoint_entry(newest)

    return TrainingRun(
        training_run_id=run.run_id,
        base_model=run.base_model,
        model_owner=OWNER,
        is_lora=True,
        lora_rank=run.rank,
        last_request_time=max(core.last_requests.get(run.run_id, run.created), *moments),
        corrupted=False,
        last_checkpoint=last("weights"),
        last_sampler_checkpoint=last("sampler_weights"),
        user_metadata=run.user_metadata,
    )


def _page_of_sessions(records: Database, query: SearchBody) -> SessionSearchPage:
    cursor = query.cursor
    after = None if cursor is None else (cursor.last_created_at, cursor.last_session_id)
    matching = (session for session in records.sessions(after) if matches(session, query))
    found = list(islice(matching, query.limit + 1))
    page = found[: query.limit]
    following = None
    if len(found) > query.limit:
        following = SessionSearchCursor(last_created_at=page[-1].created, last_session_id=page[-1].session_id)
    return SessionSearchPage(sessions=tuple(_summary(records, session) for session in page), next_cursor=following)


def matches(session: SessionInfo, query: SearchBody) -> bool:
    """Whether a session matches every condition of a query."""
    metadata = session.user_metadata or {}
    return (
        _has_name(session, query)
        and all(metadata.get(key) == value for key, value in query.user_metadata.items())
        and (query.project_ids is None or (session.project_id or OWNER) in query.project_ids)
        and (query.statuses is None or any(_has_status(session, status) for status in query.statuses))
        and (query.owner.type != "user" or OWNER in query.owner.owner_urns)
    )


def _has_name(session: SessionInfo, query: SearchBody) -> bool:
    """Whether the id or the display name matches, if the query has either."""
    if query.session_id is None and query.display_name is None:
        return True
    if session.session_id == query.session_id:
        return True
    if query.display_name is None:
        return False
    name = (session.display_name or "").casefold()
    return all(word in name for word in query.display_name.casefold().split())


def _has_status(session: SessionInfo, status: StatusQuery) -> bool:
    if session.end is None:
        return status.type == "active"
    return status.type == "client_finished" and (status.reasons is None or session.end.reason in status.reasons)


def _summary(records: Database, session: SessionInfo) -> SessionSummary:
    count, size = records.session_usage(session.session_id)
    status = SessionStatus(type="active")
    if session.end is not None:
        reason = {"type": session.end.reason}
        status = SessionStatus(type="client_finished", reason=reason, detail=session.end.detail)
    return SessionSummary(
        session_id=session.session_id,
        created_at=session.created,
        owner=OWNER,
        project_id=session.project_id or OWNER,
        status=status,
        checkpoints_count=count,
        checkpoint_storage_bytes=size,
        display_name=session.display_name,
        user_metadata=session.user_metadata,
    )
