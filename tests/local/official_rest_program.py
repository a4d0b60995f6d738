"""The official SDK's REST client, as a part of `official_programs.py`."""

import urllib.request
import warnings
from collections.abc import Callable
from typing import Any

import tinker
from tinker import types


def refusal(call: Callable[[], Any]) -> int:
    """The status with which a call is refused."""
    try:
        call()
    except tinker.APIStatusError as error:
        return error.status_code
    return 200


def main(address: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    seen: dict[str, Any] = {}
    rest = tinker.RestClient(base_url=address, api_key="tml-local")
    seen["nothing_yet"] = [
        len(rest.list_training_runs().result().training_runs),
        len(rest.list_sessions().result().sessions),
        len(rest.list_user_checkpoints().result().checkpoints),
    ]
    service = tinker.ServiceClient(
        base_url=address, api_key="tml-local", user_metadata={"who": "official"}, project_id="p1"
    )
    trainings = [
        service.create_lora_training_client(base_model="tiny", rank=4, user_metadata={"n": str(n)}).result()
        for n in range(3)
    ]
    run_ids = [training.get_info().model_id for training in trainings]
    first = trainings[0]
    paths = [first.save_state(f"s{n}", ttl_seconds=7200 if n else None).result().path for n in range(3)]
    sampler_path = first.save_weights_for_sampler("final").result().path

    pages = [rest.list_training_runs(limit=2, offset=offset).result() for offset in (0, 2)]
    seen["runs_in_pages"] = [run.training_run_id for page in pages for run in page.training_runs] == run_ids[::-1]
    seen["cursor"] = [pages[1].cursor.offset, pages[1].cursor.limit, pages[1].cursor.total_count]
    run = rest.get_training_run(run_ids[0]).result()
    seen["run"] = [run.base_model, run.lora_rank, run.is_lora, run.user_metadata]
    seen["last"] = [
        run.last_checkpoint.tinker_path == paths[2],
        run.last_sampler_checkpoint.tinker_path == sampler_path,
    ]
    seen["run_by_path"] = rest.get_training_run_by_tinker_path(paths[0]).result() == run
    listed = rest.list_checkpoints(run_ids[0]).result().checkpoints
    seen["checkpoints"] = [[item.checkpoint_id, item.checkpoint_type] for item in listed]
    seen["expires"] = [item.expires_at is not None for item in listed]
    user = [rest.list_user_checkpoints(limit=3, offset=offset).result() for offset in (0, 3)]
    seen["of_user"] = [item for page in user for item in page.checkpoints] == listed
    info = rest.get_weights_info_by_tinker_path(paths[0]).result()
    seen["info"] = [info.base_model, info.lora_rank, info.train_mlp, info.train_attn, info.train_unembed]

    def of(path: str) -> types.Checkpoint:
        (found,) = [c for c in rest.list_checkpoints(run_ids[0]).result().checkpoints if c.tinker_path == path]
        return found

    rest.set_checkpoint_ttl_from_tinker_path(paths[0], 3600).result()
    seen["ttl_set"] = of(paths[0]).expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(paths[0], None).result()
    seen["ttl_cleared"] = of(paths[0]).expires_at is None
    for _ in range(2):
        rest.publish_checkpoint_from_tinker_path(paths[0]).result()
    seen["public"] = of(paths[0]).public
    for _ in range(2):
        rest.unpublish_checkpoint_from_tinker_path(paths[0]).result()
    seen["private"] = not of(paths[0]).public
    rest.delete_checkpoint(run_ids[0], "weights/s1").result()
    rest.delete_checkpoint_from_tinker_path(paths[2]).result()
    left = rest.list_checkpoints(run_ids[0]).result().checkpoints
    seen["left"] = sorted(item.checkpoint_id for item in left)
    seen["refused"] = [
        refusal(lambda: rest.delete_checkpoint_from_tinker_path(paths[2]).result()),
        refusal(lambda: rest.publish_checkpoint_from_tinker_path(paths[2]).result()),
        refusal(lambda: rest.get_training_run("nowhere").result()),
        refusal(lambda: rest.get_session("nowhere").result()),
        refusal(lambda: rest.get_sampler("nowhere").result()),
        refusal(lambda: rest.get_weights_info_by_tinker_path("tinker://nowhere/weights/x").result()),
        refusal(lambda: rest.assign_session_project(run_ids[0].partition(":")[0], "p").result()),
        refusal(lambda: rest.get_audit_log("all").result()),
        refusal(lambda: rest.get_billing_usage("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z").result()),
        refusal(lambda: rest.get_current_checkpoint_storage_usage().result()),
        refusal(lambda: rest.export_session_trace(run_ids[0].partition(":")[0]).result()),
        refusal(lambda: rest.copy_weights(paths[0], "p1").result()),
    ]

    external = first.save_weights_external("out").result()
    urls = rest.get_external_weights_urls(external.path).result().urls
    contents = [urllib.request.urlopen(url).read() for url in urls.values()]
    seen["external"] = [sorted(urls), sum(map(len, contents)) == of(external.path).size_bytes]

    sampler = service.create_sampling_client(model_path=sampler_path).result()
    (session_id,) = rest.list_sessions().result().sessions
    session = rest.get_session(session_id).result()
    seen["session"] = [sorted(session.training_run_ids) == sorted(run_ids), session.user_metadata]
    found = rest.get_sampler(session.sampler_ids[0]).result()
    seen["sampler"] = [found.base_model, found.model_path == sampler_path, sampler.get_base_model() == "tiny"]

    def searched(**query: Any) -> list[types.SessionSummary]:
        return rest.search_sessions(types.SessionSearchRequest(**query)).result().sessions

    (summary,) = searched(user_metadata={"who": "official"}, statuses=[{"type": "active"}])
    seen["summary"] = [summary.session_id == session_id, summary.checkpoints_count, summary.project_id]
    service.close("errored", "on purpose").result()
    (over,) = searched(session_id=session_id)
    seen["over"] = [over.status.type, over.status.reason.type, over.status.detail]
    seen["none_active"] = searched(statuses=[{"type": "active"}]) == []
    return seen
