"""Listings of training runs and sessions."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import answer, page_of, read, with_core
from tinkex_py.local.records import RunInfo
from tinkex_py.local.requests import SearchBody
from tinkex_py.local.routes_checkpoints import checkpoint_entry
from tinkex_py.local.session_search import OWNER, page_of_sessions

UNSUPPORTED = "unsupported_feature"
"""The code of an answer that says that this service does not have something at all."""


async def training_runs(request: Request, core: Core) -> Response:
    """All runs, newest first."""
    page = page_of(request, 20)
    project_id = request.query_params.get("project_id")

    def listed(store: CheckpointStore) -> tuple[list[dict[str, Any]], int]:
        runs, count = store.records.runs(page.limit, page.offset, project_id)
        return [_run_entry(core, store, run) for run in runs], count

    entries, count = await core.stored(listed)
    return answer({"training_runs": entries, "cursor": page.cursor(count)})


async def training_run(request: Request, core: Core) -> Response:
    """One run."""
    run_id = request.path_params["run"]

    def described(store: CheckpointStore) -> dict[str, Any] | None:
        run = store.records.run(run_id)
        return None if run is None else _run_entry(core, store, run)

    entry = await core.stored(described)
    if entry is None:
        raise Refused(404, f"there is no training run {run_id!r}")
    return answer(entry)


async def sessions(request: Request, core: Core) -> Response:
    """Ids of all sessions, newest first."""
    page = page_of(request, 20)
    return answer({"sessions": await core.stored(lambda store: store.records.session_ids(page.limit, page.offset))})


async def session(request: Request, core: Core) -> Response:
    """One session, with its runs and sampling sessions."""
    known = core.session(request.path_params["session_id"])
    prefix = f"{known.session_id}:"
    return answer(
        {
            "training_run_ids": await core.stored(lambda store: store.records.run_ids(known.session_id)),
            "sampler_ids": [sampler for sampler in core.samplers if sampler.startswith(prefix)],
            "user_metadata": known.user_metadata,
            "display_name": known.display_name,
        }
    )


async def search_sessions(request: Request, core: Core) -> Response:
    """Sessions that fit a query, newest first."""
    body = await read(request, SearchBody)
    return answer(await core.stored(lambda store: page_of_sessions(store.records, body)))


async def absent(request: Request) -> Response:
    """What belongs to a service with accounts."""
    raise Refused(
        404,
        f"{request.method} {request.url.path}: the embedded service has no accounts, and so no billing, audit log, "
        "projects or traces",
        UNSUPPORTED,
    )


def _run_entry(core: Core, store: CheckpointStore, run: RunInfo) -> dict[str, Any]:
    saved, _ = store.records.checkpoints(run.run_id)
    moments = [run.created, *(info.time for info in saved)]
    entry: dict[str, Any] = {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": OWNER,
        "is_lora": True,
        "lora_rank": run.rank,
        "last_request_time": max(core.last_requests.get(run.run_id, run.created), *moments).isoformat(),
        "corrupted": False,
    }
    for field, kind in (("last_checkpoint", "weights"), ("last_sampler_checkpoint", "sampler_weights")):
        newest = next((info for info in saved if info.kind == kind), None)
        if newest is not None:
            entry[field] = checkpoint_entry(newest)
    if run.user_metadata is not None:
        entry["user_metadata"] = run.user_metadata
    return entry


routes = [
    Route("/api/v1/training_runs", with_core(training_runs), methods=["GET"]),
    Route("/api/v1/training_runs/{run}", with_core(training_run), methods=["GET"]),
    Route("/api/v1/sessions", with_core(sessions), methods=["GET"]),
    Route("/api/v1/sessions/search", with_core(search_sessions), methods=["POST"]),
    Route("/api/v1/sessions/{session_id}", with_core(session), methods=["GET"]),
    Route("/api/v1/sessions/{session_id}/project", absent, methods=["PUT"]),
    Route("/api/v1/sessions/{session_id}/trace_export", absent, methods=["GET"]),
    Route("/api/v1/audit", absent, methods=["GET"]),
    Route("/api/v1/billing/usage/events", absent, methods=["GET"]),
    Route("/api/v1/billing/usage/checkpoints/current", absent, methods=["GET"]),
]
