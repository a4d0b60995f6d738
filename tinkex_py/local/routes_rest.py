"""Listings of training runs and sessions."""

from fastapi import Request, Response

from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import Whole, api_router, core_of
from tinkex_py.local.records import Kind, TrainingRunInfo
from tinkex_py.local.requests import SearchBody
from tinkex_py.local.routes_checkpoints import checkpoint_entry
from tinkex_py.local.session_search import OWNER, page_of_sessions
from tinkex_py.types import Checkpoint, Cursor, Session, SessionSearchPage, SessionsPage, TrainingRun, TrainingRunsPage

router = api_router()
UNSUPPORTED = "unsupported_feature"
"""The code of an answer that says that this service does not have something at all."""


@router.get("/training_runs")
async def training_runs(
    request: Request, limit: Whole = 20, offset: Whole = 0, project_id: str | None = None
) -> TrainingRunsPage:
    """All runs, newest first."""
    core = core_of(request)

    def listed(store: CheckpointStore) -> tuple[tuple[TrainingRun, ...], int]:
        runs, count = store.records.runs(limit, offset, project_id)
        return tuple(_run_entry(core, store, run) for run in runs), count

    entries, count = await core.stored(listed)
    return TrainingRunsPage(training_runs=entries, cursor=Cursor(offset=offset, limit=limit, total_count=count))


@router.get("/training_runs/{run}")
async def training_run(run: str, request: Request) -> TrainingRun:
    """One run."""
    core = core_of(request)

    def described(store: CheckpointStore) -> TrainingRun | None:
        info = store.records.run(run)
        return None if info is None else _run_entry(core, store, info)

    entry = await core.stored(described)
    if entry is None:
        raise Refused(404, f"there is no training run {run!r}")
    return entry


@router.get("/sessions")
async def sessions(request: Request, limit: Whole = 20, offset: Whole = 0) -> SessionsPage:
    """Ids of all sessions, newest first."""
    core = core_of(request)
    return SessionsPage(sessions=tuple(await core.stored(lambda store: store.records.session_ids(limit, offset))))


@router.post("/sessions/search")
async def search_sessions(body: SearchBody, request: Request) -> SessionSearchPage:
    """Sessions that fit a query, newest first."""
    core = core_of(request)
    return await core.stored(lambda store: page_of_sessions(store.records, body))


@router.get("/sessions/{session_id}")
async def session(session_id: str, request: Request) -> Session:
    """One session, with its runs and sampling sessions."""
    core = core_of(request)
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
async def absent(request: Request) -> Response:
    """What belongs to a service with accounts."""
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
