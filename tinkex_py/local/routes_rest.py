"""Listings of runs, checkpoints and sessions, and what can be done to checkpoints."""

from collections.abc import Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkex_py.errors import InvalidData
from tinkex_py.local.checkpoints import CheckpointInfo, RunInfo
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import answer, read, with_core
from tinkex_py.local.requests import TinkerPathBody, TtlBody

T = TypeVar("T")
_TYPES = {"weights": "training", "sampler_weights": "sampler"}


async def training_runs(request: Request, core: Core) -> Response:
    """All runs, newest first."""
    page, cursor = _page(request, core.store.runs(), 20)
    return answer({"training_runs": [_run(core, run) for run in page], "cursor": cursor})


async def training_run(request: Request, core: Core) -> Response:
    """One run."""
    return answer(_run(core, _find_run(core, request.path_params["run"])))


async def run_checkpoints(request: Request, core: Core) -> Response:
    """Checkpoints of one run, newest first."""
    run = _find_run(core, request.path_params["run"])
    return answer({"checkpoints": [_checkpoint(info) for info in core.store.checkpoints(run.run_id)]})


async def checkpoints(request: Request, core: Core) -> Response:
    """Checkpoints of all runs, newest first."""
    page, cursor = _page(request, core.store.checkpoints(), 100)
    return answer({"checkpoints": [_checkpoint(info) for info in page], "cursor": cursor})


async def delete_checkpoint(request: Request, core: Core) -> Response:
    """Remove a checkpoint."""
    core.store.delete(_find_checkpoint(request, core))
    return answer({})


async def checkpoint_ttl(request: Request, core: Core) -> Response:
    """Change when a checkpoint expires; null is never."""
    body = await read(request, TtlBody)
    core.store.set_ttl(_find_checkpoint(request, core), body.ttl_seconds)
    return answer({})


async def weights_info(request: Request, core: Core) -> Response:
    """What a checkpoint was made with."""
    body = await read(request, TinkerPathBody)
    try:
        run = core.store.find(body.tinker_path).run
    except InvalidData as error:
        raise Refused(404, str(error)) from error
    return answer(
        {
            "base_model": run.base_model,
            "is_lora": True,
            "lora_rank": run.rank,
            "train_unembed": run.train_unembed,
            "train_mlp": run.train_mlp,
            "train_attn": run.train_attn,
            "optimizer_config": {"type": "adamw"},
        }
    )


async def sessions(request: Request, core: Core) -> Response:
    """Sessions of this run of the service, newest first."""
    newest = sorted(core.sessions.values(), key=lambda session: session.created, reverse=True)
    page, _ = _page(request, newest, 20)
    return answer({"sessions": [session.session_id for session in page]})


async def session(request: Request, core: Core) -> Response:
    """One session, with its runs and sampling sessions."""
    known = core.session(request.path_params["session_id"])
    prefix = f"{known.session_id}:"
    return answer(
        {
            "training_run_ids": [run.run_id for run in core.store.runs() if run.run_id.startswith(prefix)],
            "sampler_ids": [sampler for sampler in core.samplers if sampler.startswith(prefix)],
            "user_metadata": known.user_metadata,
            "display_name": known.display_name,
        }
    )


def _page(request: Request, items: Sequence[T], limit: int) -> tuple[Sequence[T], dict[str, int]]:
    try:
        size = int(request.query_params.get("limit", limit))
        offset = int(request.query_params.get("offset", 0))
    except ValueError:
        raise Refused(422, "limit and offset must be whole numbers") from None
    if size < 0 or offset < 0:
        raise Refused(422, f"limit={size} and offset={offset} must not be negative")
    return items[offset : offset + size], {"offset": offset, "limit": size, "total_count": len(items)}


def _find_run(core: Core, run_id: str) -> RunInfo:
    for run in core.store.runs():
        if run.run_id == run_id:
            return run
    raise Refused(404, f"there is no training run {run_id!r}")


def _find_checkpoint(request: Request, core: Core) -> CheckpointInfo:
    run, kind, name = (request.path_params[key] for key in ("run", "kind", "name"))
    info = core.store.get(run, kind, name) if kind in _TYPES else None
    if info is None:
        raise Refused(404, f"there is no checkpoint tinker://{run}/{kind}/{name}")
    return info


def _run(core: Core, run: RunInfo) -> dict[str, Any]:
    saved = core.store.checkpoints(run.run_id)
    entry: dict[str, Any] = {
        "training_run_id": run.run_id,
        "base_model": run.base_model,
        "model_owner": "local",
        "is_lora": True,
        "lora_rank": run.rank,
        "last_request_time": max([run.created, *(info.time for info in saved)]).isoformat(),
        "corrupted": False,
    }
    for field, kind in (("last_checkpoint", "weights"), ("last_sampler_checkpoint", "sampler_weights")):
        newest = next((info for info in saved if info.kind == kind), None)
        if newest is not None:
            entry[field] = _checkpoint(newest)
    if run.user_metadata is not None:
        entry["user_metadata"] = run.user_metadata
    return entry


def _checkpoint(info: CheckpointInfo) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "checkpoint_id": f"{info.kind}/{info.name}",
        "checkpoint_type": _TYPES[info.kind],
        "time": info.time.isoformat(),
        "tinker_path": info.path,
        "size_bytes": info.size_bytes,
        "public": False,
    }
    if info.user_metadata is not None:
        entry["user_metadata"] = info.user_metadata
    if info.expires_at is not None:
        entry["expires_at"] = info.expires_at.isoformat()
    return entry


routes = [
    Route("/api/v1/training_runs", with_core(training_runs), methods=["GET"]),
    Route("/api/v1/training_runs/{run}", with_core(training_run), methods=["GET"]),
    Route("/api/v1/training_runs/{run}/checkpoints", with_core(run_checkpoints), methods=["GET"]),
    Route("/api/v1/checkpoints", with_core(checkpoints), methods=["GET"]),
    Route("/api/v1/training_runs/{run}/checkpoints/{kind}/{name}", with_core(delete_checkpoint), methods=["DELETE"]),
    Route("/api/v1/training_runs/{run}/checkpoints/{kind}/{name}/ttl", with_core(checkpoint_ttl), methods=["PUT"]),
    Route("/api/v1/weights_info", with_core(weights_info), methods=["POST"]),
    Route("/api/v1/sessions", with_core(sessions), methods=["GET"]),
    Route("/api/v1/sessions/{session_id}", with_core(session), methods=["GET"]),
]
