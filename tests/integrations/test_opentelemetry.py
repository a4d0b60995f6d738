"""Each step is one trace, and the events become metrics; with the OpenTelemetry SDK, over real HTTP."""

import asyncio
import gc
import importlib
import json
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity
import torch
from opentelemetry import context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.client.data import datum, nll
from tests.client.recorder import KEY, Recorder, answering, http_client, http_recorder, quick_config
from tests.support.scripted_server import ScriptedServer, answer
from tests.transport.keyed import KeyedClient
from tinkex_py import AsyncServiceClient, MissingExtra, Pipeline, RegularizerError, RegularizerSpec, telemetry
from tinkex_py.integrations import opentelemetry
from tinkex_py.integrations.opentelemetry import OpenTelemetry
from tinkex_py.telemetry import handlers
from tinkex_py.transport.messages import Secret, request

SECRET_TEXT = "the text of a prompt"


@dataclass
class Observed:
    """An attached OpenTelemetry with providers of its own."""

    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    reader: InMemoryMetricReader = field(default_factory=InMemoryMetricReader)

    def __post_init__(self) -> None:
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.tracer = self.tracers.get_tracer("the program")
        self.observer = OpenTelemetry(tracer_provider=self.tracers, meter_provider=self.meters)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def the(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def path(self, span: ReadableSpan) -> list[str]:
        """Names from the root of the trace down to the span."""
        by_id = {other.context.span_id: other for other in self.spans}
        path = [span.name]
        while span.parent is not None:
            span = by_id[span.parent.span_id]
            path.insert(0, span.name)
        return path

    def points(self, name: str) -> dict[frozenset[tuple[str, Any]], Any]:
        data = self.reader.get_metrics_data()
        return {
            frozenset(point.attributes.items()): point
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        }

    def point(self, name: str, **attributes: Any) -> Any:
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        (found,) = [point for attrs, point in self.points(name).items() if dict(attrs) == wanted]
        return found


@pytest.fixture
def detached() -> Iterator[Observed]:
    made = Observed()
    yield made
    assert handlers._ATTACHMENTS.current == ()
    assert telemetry.request_headers() == {}
    assert made.observer._open == {}
    made.tracers.shutdown()
    made.meters.shutdown()


@pytest.fixture
def observed(detached: Observed) -> Iterator[Observed]:
    with detached.observer:
        yield detached


@asynccontextmanager
async def trained() -> AsyncIterator[tuple[Any, Recorder]]:
    async with http_client() as (service, recorder):
        yield await service.create_lora_training_client("tiny", rank=2, seed=1), recorder


async def computed(*specs: RegularizerSpec, logprobs: torch.Tensor | None = None) -> Any:
    return await Pipeline(nll, specs).compute([], torch.ones(3) if logprobs is None else logprobs)


@pytest.mark.asyncio
async def test_a_step_is_one_trace(observed: Observed) -> None:
    async def reward(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await training.forward(data, "cross_entropy")
        with observed.tracer.start_as_current_span("reward model"):
            return logprobs.sum()

    def in_a_thread(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread() is not threading.main_thread()
        with observed.tracer.start_as_current_span("inside the thread"):
            return logprobs.pow(2).sum()

    specs = [
        RegularizerSpec(fn=reward, weight=0.5, name="reward"),
        RegularizerSpec(fn=in_a_thread, weight=0.1, name="l2"),
    ]
    async with trained() as (training, recorder):
        observed.exporter.clear()
        with observed.tracer.start_as_current_span("the program's request"):
            output = await training.forward_backward_custom([datum(5)], nll, regularizers=specs, track_grad_norms=True)
            await training.optim_step()
        assert trace.get_current_span() is trace.INVALID_SPAN
        step = ["the program's request", "tinkex.training forward_backward_custom"]
        loss = [*step, "tinkex.custom_loss"]
        paths = [observed.path(span) for span in observed.spans]
        assert len({span.context.trace_id for span in observed.spans}) == 1
        assert loss in paths
        assert [*loss, "tinkex.regularizer.compute reward", "reward model"] in paths
        assert [*loss, "tinkex.regularizer.compute l2", "inside the thread"] in paths
        assert [*step, "POST forward_backward"] in paths
        nested = [*loss, "tinkex.regularizer.compute reward", "tinkex.training forward"]
        assert [*nested, "POST forward_backward"] in paths
        assert any(path[:4] == nested[:4] and path[-1] == "POST retrieve_future" for path in paths)
        assert ["the program's request", "tinkex.training optim_step", "POST optim_step"] in paths

        # Every request has sent its own span to the service.
        http = {f"{span.context.span_id:016x}": span for span in observed.spans if span.name.startswith("POST ")}
        carried = [arrival for arrival in recorder.arrivals if arrival.headers["traceparent"].split("-")[2] in http]
        assert len(carried) == len(http) >= 8
        for arrival in carried:
            _, trace_id, span_id, _ = arrival.headers["traceparent"].split("-")
            assert trace_id == f"{http[span_id].context.trace_id:032x}"
            assert http[span_id].attributes["url.path"] == arrival.path
            assert http[span_id].attributes["http.response.status_code"] == arrival.status

        term = observed.the("tinkex.regularizer.compute reward")
        assert term.attributes["tinkex.term.value"] == output.regularizers["reward"].value
        assert term.attributes["tinkex.term.contribution"] == 0.5 * output.regularizers["reward"].value
        assert term.attributes["tinkex.term.is_async"] is True
        loss_span = observed.the("tinkex.custom_loss")
        assert loss_span.attributes["tinkex.loss.total"] == output.loss_total
        assert loss_span.attributes["tinkex.grad_norm.total"] == output.total_grad_norm

        model = {"tinkex__model_id": training.model_id}
        assert observed.point("tinkex.loss.total", **model).value == output.loss_total
        assert observed.point("tinkex.loss.regularizers", **model).value == output.regularizer_total
        for name, regularizer in output.regularizers.items():
            of_term = {"tinkex__term__name": name}
            for number in ("value", "contribution", "grad_norm"):
                point = observed.point(f"tinkex.term.{number}", **of_term, **model)
                assert point.value == getattr(regularizer, number)
            assert observed.point("tinkex.term.duration", **of_term).count == 1
        assert observed.point("tinkex.custom_loss.duration").count == 1
        operation = "forward_backward_custom"
        assert observed.point("tinkex.training.duration", tinkex__operation=operation).count == 1
        sent = observed.point(
            "tinkex.http.duration",
            http__request__method="POST",
            tinkex__endpoint="forward_backward",
            http__response__status_code=200,
        )
        assert sent.count == len(recorder.of("F", "B")) == 3
        waits = observed.points("tinkex.queue.wait")
        assert sum(point.count for point in waits.values()) == sum(
            point.count for point in observed.points("tinkex.future.duration").values()
        )
        assert all(point.sum == 0 for point in waits.values())


@pytest.mark.asyncio
async def test_overlapping_steps_are_separate_traces(observed: Observed) -> None:
    """Two clients train at the same time on one loop: each span is under its own client's step."""
    meet = asyncio.Barrier(2)

    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await meet.wait()  # both steps are in their terms now
        return logprobs.sum()

    spec = RegularizerSpec(fn=term, weight=0.1, name="term")
    async with http_client() as (service, _):
        first, second = [await service.create_lora_training_client("tiny", rank=2, seed=n) for n in (1, 2)]
        observed.exporter.clear()
        await asyncio.gather(
            *(client.forward_backward_custom([datum(4)], nll, regularizers=[spec]) for client in (first, second))
        )
    steps = observed.named("tinkex.training forward_backward_custom")
    assert {span.attributes["tinkex.model_id"] for span in steps} == {first.model_id, second.model_id}
    assert len({span.context.trace_id for span in steps}) == 2
    for step in steps:
        trace_id = step.context.trace_id
        inside = Counter(span.name for span in observed.spans if span.context.trace_id == trace_id)
        assert inside["tinkex.regularizer.compute term"] == inside["tinkex.custom_loss"] == 1
        assert inside["POST forward_backward"] == 2
    assert {dict(attrs)["tinkex.model_id"] for attrs in observed.points("tinkex.loss.total")} == {
        first.model_id,
        second.model_id,
    }


@pytest.mark.asyncio
async def test_only_the_class_of_an_error_is_exported(observed: Observed) -> None:
    def failing(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise OSError(SECRET_TEXT)

    failures = [OSError(SECRET_TEXT)]

    async def flaky(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return logprobs.sum()

    at_once = tenacity.AsyncRetrying(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_none())
    async with trained() as (training, recorder):
        recorder.faults["F"] = [answering(503, {"detail": SECRET_TEXT})]
        with pytest.raises(RegularizerError):
            await training.forward_backward_custom(
                [datum(4)],
                nll,
                regularizers=[
                    RegularizerSpec(fn=failing, weight=0.1, name="failing"),
                    RegularizerSpec(fn=flaky, weight=0.1, name="flaky", retry=at_once),
                ],
            )
    term = observed.the("tinkex.regularizer.compute failing")
    assert term.attributes["error.type"] == "OSError"
    assert (term.status.status_code, term.status.description) == (trace.StatusCode.ERROR, "OSError")
    assert observed.the("tinkex.training forward_backward_custom").attributes["error.type"] == "OSError"
    refused, repeated = observed.named("POST forward_backward")
    assert (refused.attributes["error.type"], refused.attributes["tinkex.attempt"]) == ("503", 1)
    assert (repeated.status.status_code, repeated.attributes["tinkex.attempt"]) == (trace.StatusCode.UNSET, 2)
    assert observed.point("tinkex.http.retries", tinkex__endpoint="forward_backward").value == 1
    assert observed.point("tinkex.term.retries", tinkex__term__name="flaky").value == 1
    assert observed.point("tinkex.term.duration", tinkex__term__name="failing", error__type="OSError").count == 1
    everything = "".join(span.to_json() for span in observed.spans) + observed.reader.get_metrics_data().to_json()
    assert SECRET_TEXT not in everything
    assert KEY not in everything
    tokens = datum(4).model_input.to_ints()
    assert json.dumps(list(map(int, tokens))) not in everything


@pytest.mark.asyncio
async def test_a_cancelled_step_ends_every_span_once(observed: Observed) -> None:
    started = asyncio.Event()

    async def endless(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        started.set()
        await asyncio.Event().wait()
        raise AssertionError

    spec = RegularizerSpec(fn=endless, weight=0.1, name="endless")
    async with trained() as (training, _):
        step = asyncio.create_task(training.forward_backward_custom([datum(4)], nll, regularizers=[spec]))
        await started.wait()
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
    ends = Counter(span.context.span_id for span in observed.spans)
    assert set(ends.values()) == {1}
    for name in ("tinkex.regularizer.compute endless", "tinkex.custom_loss", "tinkex.training forward_backward_custom"):
        span = observed.the(name)
        assert span.attributes["tinkex.cancelled"] is True
        assert span.status.status_code is trace.StatusCode.UNSET


@pytest.mark.asyncio
async def test_detaching_ends_the_spans_in_progress(detached: Observed) -> None:
    resume = asyncio.Event()

    async def started(name: str) -> asyncio.Task[Any]:
        entered = asyncio.Event()

        async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            entered.set()
            await resume.wait()
            return logprobs.sum()

        step = asyncio.create_task(computed(RegularizerSpec(fn=term, weight=0.1, name=name)))
        await entered.wait()
        return step

    early = await started("early")
    with detached.observer:
        late = await started("late")
    assert {span.name for span in detached.spans} == {"tinkex.custom_loss", "tinkex.regularizer.compute late"}
    assert all(span.attributes["tinkex.detached"] is True for span in detached.spans)
    before = len(detached.spans)
    resume.set()
    await early
    await late
    assert len(detached.spans) == before
    detached.observer.detach()  # does nothing
    with detached.observer:
        await computed()
    assert len(detached.spans) == before + 1


def test_the_choice_of_a_surrogate_is_an_event_of_its_span(observed: Observed) -> None:
    with telemetry.lifecycle("tinkex.custom_loss", {"regularizer_count": 1, "track_grad_norms": False}):
        telemetry.emit("tinkex.custom_loss.surrogate", {}, {"surrogate": "cross_entropy", "explanation": SECRET_TEXT})
    (span,) = observed.spans
    (event,) = span.events
    assert event.attributes["tinkex.surrogate"] == "cross_entropy"
    assert SECRET_TEXT not in span.to_json()


def test_two_loops_in_two_threads_are_separate(observed: Observed) -> None:
    meet = threading.Barrier(2)

    async def steps(name: str) -> None:
        def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
            meet.wait(30)
            return logprobs.sum()

        with observed.tracer.start_as_current_span(name):
            for _ in range(5):
                await computed(RegularizerSpec(fn=term, weight=0.1, name=name))

    threads = [threading.Thread(target=lambda name=name: asyncio.run(steps(name))) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("one", "two"):
        path = [name, "tinkex.custom_loss", f"tinkex.regularizer.compute {name}"]
        assert [observed.path(span) for span in observed.named(path[-1])] == [path] * 5
        assert observed.point("tinkex.term.duration", tinkex__term__name=name).count == 5


@pytest.mark.asyncio
async def test_a_heartbeat_is_not_part_of_the_trace_that_opened_the_session(observed: Observed) -> None:
    async with http_recorder() as (recorder, url):
        service = AsyncServiceClient(quick_config(url, heartbeat_interval=0.01))
        with observed.tracer.start_as_current_span("a request"):
            await service.get_server_capabilities()
            await service.create_lora_training_client("tiny", rank=2)
        await recorder.until(lambda: len(recorder.of("session_heartbeat")) >= 2)
        await service.aclose()
    beats = observed.named("POST session_heartbeat")
    assert beats
    session = observed.the("tinkex.session")
    assert observed.path(session)[0] == "a request"
    for span in beats:
        assert span.parent is None
        assert span.context.trace_id != session.context.trace_id
        assert [link.context.span_id for link in span.links] == [session.context.span_id]
    assert len(observed.named("POST sessions")) == 1  # of /api/v1/sessions/ID/finish, without the id


@pytest.mark.asyncio
async def test_the_queue_wait_is_what_the_service_reports(observed: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 100.0])  # paused, active, done
    monkeypatch.setattr(opentelemetry, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    metadata = {"request_id": "r", "request_type": "optim_step"}

    def report(state: str) -> None:
        telemetry.emit(
            "tinkex.future.queue_state", {}, {**metadata, "queue_state": state, "queue_state_reason": SECRET_TEXT}
        )

    with telemetry.lifecycle("tinkex.future", metadata):
        report("paused_capacity")
        report("active")
    (point,) = observed.points("tinkex.queue.wait").values()
    assert point.sum == 2.5
    (span,) = observed.spans
    assert [event.attributes["tinkex.queue_state"] for event in span.events] == ["paused_capacity", "active"]
    assert SECRET_TEXT not in span.to_json()


@pytest.mark.asyncio
async def test_trace_headers_go_to_the_service_only_and_replace_nothing(observed: Observed) -> None:
    async with ScriptedServer() as home, ScriptedServer() as elsewhere:
        home.script("/thing", answer(json={}))
        elsewhere.script("/file", answer(body=b"x"))
        client = KeyedClient(base_url=home.url, api_key=KEY, headers={"tracestate": "own=1"})
        with observed.tracer.start_as_current_span("outside"):
            await client.exchange("GET", "/thing")
            async with client.http.towards(Secret(f"{elsewhere.url}/file"), key=client.key) as (other, path, key):
                await other.exchange(request("GET", path.reveal()), key=key)
            async with client.stream("/thing") as stream:
                assert stream.status == 200
        await client.aclose()
    sent, streamed = home.requests
    assert sent.headers["traceparent"].split("-")[1] == streamed.headers["traceparent"].split("-")[1]
    assert sent.headers["tracestate"] == "own=1"
    assert sent.headers["x-api-key"] == KEY
    (foreign,) = elsewhere.requests
    assert "traceparent" not in foreign.headers


@pytest.mark.asyncio
async def test_without_propagation_nothing_is_sent(detached: Observed) -> None:
    quiet = OpenTelemetry(tracer_provider=detached.tracers, meter_provider=detached.meters, propagate=False)
    async with ScriptedServer() as server:
        server.script("/thing", answer(json={}))
        client = KeyedClient(base_url=server.url, api_key=KEY)
        with quiet:
            await client.exchange("GET", "/thing")
        with detached.observer:
            await client.exchange("GET", "/thing")
        await client.exchange("GET", "/thing")
        await client.aclose()
    assert ["traceparent" in request.headers for request in server.requests] == [False, True, False]


@pytest.mark.asyncio
async def test_invalid_headers_of_a_handler_detach_it_and_break_nothing(caplog: pytest.LogCaptureFixture) -> None:
    invalid: list[Any] = [{"two words": "x"}, {"name": "Größe"}, {"name": "a\nb"}, {"name": 1}, None, {"a:b": "c"}]
    async with ScriptedServer() as server:
        server.script("/thing", answer(json={}))
        client = KeyedClient(base_url=server.url)
        for headers in invalid:
            caplog.clear()
            telemetry.attach(lambda event: None, handler_id="mine", request_headers=lambda given=headers: given)
            assert (await client.exchange("GET", "/thing")).status == 200
            assert not telemetry.detach("mine")
            assert "handler_id=mine on=request_headers" in caplog.text
        await client.aclose()


@pytest.mark.asyncio
async def test_an_abandoned_stream_ends_its_span_and_leaves_the_context_alone(observed: Observed) -> None:
    """A task of the loop closes its generator, not the one that started it."""
    async with ScriptedServer() as server:
        server.script("/file", answer(body=b"x" * 10))
        client = KeyedClient(base_url=server.url)

        async def begin() -> None:
            manager = client.stream("/file")
            await manager.__aenter__()

        await asyncio.create_task(begin())
        gc.collect()
        await server.until(lambda: server.open_connections == 0)  # which closing the generator does
        await client.aclose()
    assert observed.the("GET file").end_time is not None
    assert context.get_current() == context.Context()


def test_prometheus_exports_the_numbers() -> None:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import REGISTRY, generate_latest

    def l2(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.pow(2).sum()

    reader = PrometheusMetricReader()
    meters = MeterProvider([reader], shutdown_on_exit=False)
    with OpenTelemetry(meter_provider=meters, tracer_provider=TracerProvider(shutdown_on_exit=False)):
        spec = RegularizerSpec(fn=l2, weight=0.5, name="l2")
        output = asyncio.run(computed(spec, logprobs=torch.tensor([1.0, 2.0])))
    lines = generate_latest(REGISTRY).decode().splitlines()
    meters.shutdown()
    assert output.loss_total == -3 + 0.5 * 5  # by hand
    for name, number in (("tinkex_loss_total", "-0.5"), ("tinkex_term_duration_seconds_count", "1.0")):
        assert [line.split()[-1] for line in lines if line.startswith(name + "{")] == [number]
    (value,) = [line for line in lines if line.startswith("tinkex_term_value{")]
    assert 'tinkex_term_name="l2"' in value
    assert value.split()[-1] == "5.0"


def test_the_providers_of_the_process_are_the_default() -> None:
    with OpenTelemetry():
        asyncio.run(computed())
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def test_the_api_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "tinkex_py.integrations.opentelemetry")
    with pytest.raises(MissingExtra, match=r"Run: pip install 'tinkex-py\[opentelemetry\]'"):
        importlib.import_module("tinkex_py.integrations.opentelemetry")
