"""Downloads: signed addresses for a checkpoint's archive and for its single files, and what they lead to."""

from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import FileResponse, RedirectResponse

from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import API, api_router, core_of
from tinkex_py.local.records import CheckpointInfo
from tinkex_py.local.routes_checkpoints import CHECKPOINT, FoundCheckpoint, find_checkpoint
from tinkex_py.types import ExternalWeightsUrls

router = api_router()
DOWNLOADS = f"{API}/downloads/"
ARCHIVE = "archive.tar"
_OCTETS = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.get(
    f"{CHECKPOINT}/archive",
    status_code=302,
    response_class=RedirectResponse,
    response_description="the address is in Location",
)
async def archive(request: Request, info: FoundCheckpoint) -> RedirectResponse:
    """Where a checkpoint can be downloaded as one tar file."""
    core = core_of(request)
    url, expires = _signed_url(request, core, info, ARCHIVE)
    return RedirectResponse(url, status_code=302, headers={"Expires": format_datetime(expires, usegmt=True)})


@router.get(f"{CHECKPOINT}/external_weights_urls")
async def external_weights_urls(request: Request, info: FoundCheckpoint) -> ExternalWeightsUrls:
    """Where each file of external weights can be downloaded."""
    core = core_of(request)
    if info.kind != "external_weights":
        raise Refused(400, f"{info.path!r} holds no external weights: ask for its archive")
    files = await core.stored(lambda store: store.files(info))
    signed = {file.name: _signed_url(request, core, info, file.name) for file in files}
    if not signed:
        raise Refused(404, f"there is no checkpoint {info.path!r} any more")
    expires = min(moment for _, moment in signed.values())
    return ExternalWeightsUrls(urls={name: url for name, (url, _) in signed.items()}, expires=expires)


@router.get(
    "/downloads/{run}/{kind}/{name}/{file}",
    response_class=FileResponse,
    responses={200: _OCTETS, 206: {**_OCTETS, "description": "the range that was asked for"}},
)
async def download(
    run: str, kind: str, name: str, file: str, request: Request, expires: str = "", signature: str = ""
) -> FileResponse:
    """The bytes behind a signed address; ranges are served."""
    core = core_of(request)
    refusal = core.links.refusal(_path(run, kind, name, file), expires, signature)
    if refusal is not None:
        raise Refused(*refusal)
    info = await find_checkpoint(run, kind, name, request)
    found = await core.stored(lambda store: _file(store, info, file))
    if found is None:
        raise Refused(404, f"there is no file {file!r} in checkpoint {info.path!r}")
    return FileResponse(found, media_type="application/octet-stream", filename=f"{info.name}-{file}")


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
