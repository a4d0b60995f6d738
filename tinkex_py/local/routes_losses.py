"""The route for uploaded losses."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinkex_py.local.core import Core, Refused
from tinkex_py.local.http import answer, digest, parse, read_json, size_of, with_core
from tinkex_py.local.requests import CustomLossBody
from tinkex_py.local.results import Answer


async def create_custom_loss(request: Request, core: Core) -> Response:
    """Check a traced loss and keep it for its session."""
    if not core.options.custom_losses:
        raise Refused(404, "this service takes no uploaded losses: start it with custom_losses=True or --custom-losses")
    raw = await read_json(request)
    body = parse(CustomLossBody, raw)
    core.open_session(body.session_id)

    def work() -> Answer:
        loss_id = core.engine.custom_losses.add(body.session_id, body.custom_loss_seq_id, raw)
        return Answer(lambda: {"loss_id": loss_id, "type": "create_custom_loss"})

    scope = ("custom_loss_seq_id", body.session_id, body.custom_loss_seq_id)
    told, size = digest("create_custom_loss", raw), size_of(request)
    return answer({"request_id": core.numbered(scope, told, lambda: core.submit(work, size))})


routes = [Route("/api/v1/create_custom_loss", with_core(create_custom_loss), methods=["POST"])]
