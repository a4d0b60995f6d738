"""`tinkex-py runs`."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from tinkex_py.commands.common.options import AsJson, BaseUrl, Limit, service_at
from tinkex_py.commands.common.printing import PAGE_SIZE, show_listing
from tinkex_py.commands.common.running import one_line_errors, run

if TYPE_CHECKING:
    from tinkex_py.types.rest import TrainingRun


def runs(
    run_id: Annotated[
        str | None, typer.Argument(metavar="RUN", help="id of one run, or a path of one of its checkpoints")
    ] = None,
    project: Annotated[str | None, typer.Option(help="only runs of this project", show_default=False)] = None,
    others: Annotated[
        bool, typer.Option("--others", help="include runs of other users that you have access to")
    ] = False,
    limit: Limit = 20,
    base_url: BaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """List the training runs that the service keeps, newest first."""
    with one_line_errors("runs", needs=("rich",)):
        run(_listed(run_id, project, others=others, limit=limit, base_url=base_url, as_json=as_json))


async def _listed(
    run_id: str | None, project: str | None, *, others: bool, limit: int, base_url: str | None, as_json: bool
) -> None:
    scope = "accessible" if others else "owned"
    async with aclosing(service_at(base_url)) as service:
        rest = service.create_rest_client()

        async def one(run_id: str) -> "AsyncGenerator[TrainingRun, None]":
            yield await rest.get_training_run(run_id, access_scope=scope)

        found = rest.training_runs(page_size=PAGE_SIZE, access_scope=scope, project_id=project)
        columns = ("run", "base model", "rank", "last request", "last checkpoint", "state")
        items = found if run_id is None else one(run_id)
        await show_listing(items, columns, _row, limit=limit, as_json=as_json, nothing="no training runs")


def _row(item: "TrainingRun") -> Sequence[object]:
    last = None if item.last_checkpoint is None else item.last_checkpoint.checkpoint_id
    state = "corrupted" if item.corrupted else None
    return item.training_run_id, item.base_model, item.lora_rank, item.last_request_time, last, state
