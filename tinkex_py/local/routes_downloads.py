"""Downloads: signed addresses for a checkpoint's archive and for its single files, and what they lead to."""

from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Route

from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import answer, with_core
from tinkex_py.local.records import CheckpointInfo
from tinkex_py.local.routes_checkpoints import find_checkpoint

DOWNLOADS = "/api/v1/downloads/"
ARCHIVE = "archive.tar"


async def archive(request: Request, core: Core) -> Response:
    """Where a checkpoint can be downloaded as one tar file."""
    info = await find_checkpoint(request, core)
    url, expires = _signed_url(request, core, info, ARCHIVE)
    return RedirectResponse(url, status_code=302, headers={"Expires": format_datetime(expires, usegmt=True)})


async def external_weights_urls(request: Request, core: Core) -> Response:
    """Where each file of external weights can be downloaded."""
    info = await find_checkpoint(request, core)
    if info.kind != "external_weights":
        raise Refused(400, f"{info.path!r} holds no external weights: ask for its archive")
    files = await core.stored(lambda store: store.files(info))
    signed = {file.name: _signed_url(request, core, info, file.name) for file in files}
    if not signed:
        raise Refused(404, f"there is no checkpoint {info.path!r} any more")
    expires = min(moment for _, moment in signed.values())
    return answer({"urls": {name: url for name, (url, _) in signed.items()}, "expires": expires.isoformat()})


async def download(request: Request, core: Core) -> Response:
    """The bytes behind a signed address; ranges are served."""
    query = request.query_params
    path = _path(*(request.path_params[part] for part in ("run", "kind", "name", "file")))
    refusal = core.links.refusal(path, query.get("expires", ""), query.get("signature", ""))
    if refusal is not None:
        raise Refused(*refusal)
    info = await find_checkpoint(request, core)
    name = request.path_params["file"]
    found = await core.stored(lambda store: _file(store, info, name))
    if found is None:
        raise Refused(404, f"there is no file {name!r} in checkpoint {info.path!r}")
    return FileResponse(found, media_type="application/octet-stream", filename=f"{info.name}-{name}")


def _file(store: CheckpointStore, info: CheckpointInfo, name: str) -> Path | None:
    if name == ARCHIVE:
        return store.archive(info)
    return next((file for file in store.files(info) if file.name == name), None)


def _path(run_id: str, kind: str, name: str, file: str) -> str:
    return f"{DOWNLOADS}{run_id}/{kind}/{name}/{file}"


def _signed_url(request: Request, core: Core, info: CheckpointInfo, file: str) -> tuple[str, datetime]:
    path = _path(info.run.run_id, info.kind, info.name, file)
    query, expires = core.links.sign(path)
    return f"{str(request.base_url).rstrip('/')}{quote(path, safe='/:')}?{query}", datetime.fromtimestamp(expires, UTC)


_CHECKPOINT = "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"
routes = [
    Route(f"{_CHECKPOINT}/archive", with_core(archive), methods=["GET"]),
    Route(f"{_CHECKPOINT}/external_weights_urls", with_core(external_weights_urls), methods=["GET"]),
    Route(f"{DOWNLOADS}{{run}}/{{kind}}/{{name}}/{{file}}", with_core(download), methods=["GET"]),
]
