"""The route for uploaded losses."""

from typing import Any

from fastapi import Depends, Request

from tinkex_py.local.core import Refused
from tinkex_py.local.http import api_router, arrival_of
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.requests import CustomLossBody
from tinkex_py.local.responses import SubmittedResponse
from tinkex_py.local.results import Answer

router = api_router()


async def _require_uploads(request: Request) -> None:
    options: LocalOptions = request.app.state.service.options
    if not options.custom_losses:
        raise Refused(404, "this service takes no uploaded losses: start it with custom_losses=True or --custom-losses")


@router.post("/create_custom_loss", dependencies=[Depends(_require_uploads)])
async def create_custom_loss(body: CustomLossBody, request: Request) -> SubmittedResponse:
    """Check a traced loss and keep it for its session."""
    arrival = await arrival_of(request)
    core = arrival.core
    core.open_session(body.session_id)
    fields: dict[str, Any] = await request.json()

    def work() -> Answer:
        loss_id = core.engine.custom_losses.add(body.session_id, body.custom_loss_seq_id, fields)
        return Answer(lambda: {"loss_id": loss_id, "type": "create_custom_loss"})

    scope = ("custom_loss_seq_id", body.session_id, body.custom_loss_seq_id)
    return SubmittedResponse(request_id=arrival.numbered(scope, lambda: core.submit(work, arrival.size)))
