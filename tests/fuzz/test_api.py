"""The OpenAPI document is accurate, and no request, valid or not, causes an internal error of the service."""

import json
import logging
import random
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from schemathesis import GenerationMode

from tests.support.layers import innermost
from tinkex_py.local import LocalOptions
from tinkex_py.local.results import Failure
from tinkex_py.transport import wire

pytestmark = pytest.mark.asyncio
EXAMPLES = 8
OPTIONS = LocalOptions(hold_seconds=0.02, custom_losses=True)
# These end or remove objects that other requests need.
ENDING = ("/finish", "unload_model", "cancel_future", "DELETE")


async def document_of(client: Any) -> dict[str, Any]:
    answer = await client.http.get("/openapi.json")
    assert answer.status_code == 200
    return answer.json()


async def test_the_document_lists_every_route(client):
    document = await document_of(client)
    routes = [route for route in innermost(client.service.app).routes if route.path != "/openapi.json"]
    expected = {(route.path, method.lower()) for route in routes for method in route.methods - {"HEAD"}}
    described = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert described == expected
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["description"] for operation in operations)
    assert document["components"]["securitySchemes"]["key"]["name"] == "X-API-Key"


def required_fields(document: dict[str, Any], operation: dict[str, Any]) -> set[str]:
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    name = schema.get("$ref", "").rpartition("/")[2]
    return set(document["components"]["schemas"].get(name, schema).get("required", []))


async def test_the_document_lists_the_required_fields(run_service):
    """The response to an empty body names exactly the fields that the document requires."""
    checked = 0
    async with run_service(OPTIONS) as client:
        document = await document_of(client)
        operations = [
            (path, method, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
            if "requestBody" in operation
        ]
        for path, method, operation in operations:
            needed = required_fields(document, operation)
            answer = await client.http.request(method, path, json={})
            if needed:
                assert answer.status_code == 422, path
                named = {problem.partition(":")[0] for problem in answer.json()["detail"].split("; ")}
                assert named == needed, path
                checked += 1
            else:
                assert answer.status_code in (200, 404), path
    assert checked >= 18


async def test_there_are_no_pages_with_external_scripts(client):
    """The default pages of FastAPI load scripts from another host."""
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert (await client.http.get(path)).status_code == 404


class Planted:
    """Puts ids of existing objects into generated requests, so that they do not all end in a 404."""

    def __init__(self, chance: random.Random, things: dict[str, Any]) -> None:
        self._chance = chance
        self._things = things

    def into(self, label: str, fields: dict[str, Any]) -> None:
        if any(word in label for word in ENDING):
            return
        for name, value in self._things.items():
            if name in fields and self._chance.random() < 0.8:
                fields[name] = value


async def planted_in(client: Any, kit: Any) -> dict[str, Any]:
    model_id = await client.model()
    saved = {}
    for number, kind in enumerate(("save_weights", "save_weights_for_sampler", "save_weights_external"), 1):
        saved[kind] = await client.done(kind, {"model_id": model_id, "seq_id": number, "path": "one"})
    sampler = {"session_id": client.session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    done = await client.ask("optim_step", {"model_id": model_id, "seq_id": 4, "adam_params": {}})
    await client.final(done["request_id"])
    passed = kit.message(model_id, 5, [kit.datum(3, 1)])
    await client.pass_result(passed)
    return {
        "session_id": client.session_id,
        "model_id": model_id,
        "base_model": "tiny",
        "path": saved["save_weights"]["path"],
        "tinker_path": saved["save_weights"]["path"],
        "source_path": saved["save_weights"]["path"],
        "model_path": saved["save_weights_for_sampler"]["path"],
        "sampling_session_id": (await client.ask("create_sampling_session", sampler))["sampling_session_id"],
        "sampler_id": f"{client.session_id}:sample:0",
        "request_id": done["request_id"],
        "run": model_id,
        "kind": "weights",
        "name": "one",
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        "seq_id": 0,
    }


def cases_of(operation: Any, planted: Planted) -> list[dict[str, Any]]:
    """Generates requests for one route, valid and invalid."""
    found: list[dict[str, Any]] = []

    @seed(20261124)
    @settings(max_examples=EXAMPLES, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.one_of([operation.as_strategy(mode) for mode in GenerationMode]))
    def collect(case: Any) -> None:
        planted.into(operation.label, case.path_parameters)
        if isinstance(case.body, dict):
            planted.into(operation.label, case.body)
        arguments = case.as_transport_kwargs(base_url="http://local")
        headers = {name: value for name, value in arguments["headers"].items() if name.lower() != "user-agent"}
        request = {"method": arguments["method"], "url": arguments["url"], "params": arguments["params"]}
        content = arguments.get("data")
        if "json" in arguments:
            content = json.dumps(arguments["json"]).encode()
        found.append({**request, "headers": headers, "content": content, "case": case})

    collect()
    return found


async def test_no_request_causes_an_internal_error(run_service, kit, caplog):
    caplog.set_level(logging.ERROR, "tinkex_py.local")
    async with run_service(OPTIONS) as client:
        schema = schemathesis.openapi.from_dict(await document_of(client))
        chance = random.Random(20261124)
        planted = Planted(chance, await planted_in(client, kit))
        statuses: dict[int, int] = {}
        for found in schema.get_all_operations():
            operation = found.ok()
            for request in cases_of(operation, planted):
                case = request.pop("case")
                answer = await client.http.request(**request)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                shown = f"{operation.label} {request['content']!r}: {answer.status_code} {answer.text[:300]}"
                assert answer.status_code < 500, shown
                assert case is not None
                operation.validate_response(answer)
        core = client.service.core
        await client.model(10**6)  # returns after all earlier requests
        failures = [pending.outcome for pending in core.results._results.values()]
        faults = [outcome for outcome in failures if isinstance(outcome, Failure) and outcome.category != "user"]
        assert faults == []
        assert caplog.records == []
        # All kinds of responses occurred: the requests are neither all rejected nor all accepted.
        assert statuses[200] > 60
        assert statuses[422] > 20
        assert statuses[404] > 20
        assert len(failures) > 20


async def test_no_protobuf_causes_an_internal_error(run_service, kit):
    """A valid request with changed, removed and inserted bytes gets a 4xx, or a future without an internal error."""
    async with run_service(OPTIONS) as client:
        model_id = await client.model()
        whole = kit.message(model_id, 0, [kit.datum(5, 1), kit.datum(3, 2, weights=[1.0, 0.5, 0.0])])
        content = whole.SerializeToString()
        bodies: list[bytes] = []

        @seed(20261124)
        @settings(max_examples=60, database=None, phases=[Phase.generate])
        @given(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=1)), max_size=2),
            st.one_of(st.none(), st.none(), st.none(), st.integers(0, len(content))),
        )
        def collect(changes: list[tuple[int, bytes]], end: int | None) -> None:
            body = bytearray(content)
            for place, written in changes:
                body[place : place + len(written)] = written
            bodies.append(bytes(body[:end]))

        collect()
        done = 0
        for body in bodies:
            headers = {"Content-Type": "application/x-protobuf"}
            answer = await client.http.post("/api/v1/forward_backward", content=body, headers=headers)
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                continue
            message = wire.ForwardBackwardRequest.FromString(body)
            if message.seq_id > 0 and message.seq_id != client.service.core.sequencers[model_id].next_number - 1:
                continue  # it waits for earlier numbers
            result = await client.final(answer.json()["request_id"])
            assert result.status_code == 200
            assert result.json().get("category", "user") == "user", result.text
            done += 1
        assert done > 10
