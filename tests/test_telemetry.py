"""Rows 88-105 and 160 of the guide: events, handlers, log lines."""

import asyncio
import functools
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given, strategies as st

from tinkex_py import telemetry
from tinkex_py.errors import NonFiniteLoss, RegularizerError
from tinkex_py.telemetry import Event, handlers, logs


@pytest.fixture(autouse=True)
def nothing_attached() -> Iterator[None]:
    assert handlers._ATTACHMENTS.current == ()
    yield
    for attachment in handlers._ATTACHMENTS.current:
        telemetry.detach(attachment.handler_id)
    structlog.reset_defaults()


def run_alone(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_the_events_of_the_table():
    lifecycles = ["custom_loss", "regularizer.compute", "http.request", "future", "session", "training", "run.step"]
    expected = {f"tinkex.{name}.{phase}" for name in lifecycles for phase in ("start", "stop", "exception")}
    expected |= {"tinkex.regularizer.not_differentiable", "tinkex.regularizer.abandoned", "tinkex.future.queue_state"}
    expected |= {"tinkex.session.heartbeat_failed", "tinkex.session.heartbeat_recovered"}
    expected |= {"tinkex.regularizer.retry", "tinkex.regularizer.controller_failed"}
    expected |= {"tinkex.custom_loss.not_on_service", "tinkex.custom_loss.surrogate"}
    expected |= {"tinkex.session.over", "tinkex.billing.paused", "tinkex.sampling.turned_away"}
    expected |= {f"tinkex.run.{name}" for name in ("resent", "restarted", "sink_failed", "checkpoint_not_deleted")}
    expected |= {"tinkex.run.status_not_written"}
    assert set(telemetry.events()) == expected
    assert len(telemetry.events()) == len(expected)


def test_a_handler_receives_one_frozen_event():
    seen: list[Event] = []
    telemetry.attach(seen.append)
    measurements = {"system_time": 1.5}
    telemetry.emit("tinkex.custom_loss.start", measurements, {"regularizer_count": 2})
    measurements["system_time"] = 2.5
    (event,) = seen
    assert event.name == "tinkex.custom_loss.start"
    assert event.measurements == {"system_time": 1.5}
    assert event.metadata == {"regularizer_count": 2}
    assert event.exception is None
    with pytest.raises(AttributeError):
        event.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        event.measurements["system_time"] = 3.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("tinkex.custom_loss.stop", {"tinkex.custom_loss.stop"}),
        (
            ["tinkex.custom_loss.stop", "tinkex.custom_loss.start"],
            {"tinkex.custom_loss.stop", "tinkex.custom_loss.start"},
        ),
        ("tinkex.regularizer.*", {name for name in telemetry.events() if name.startswith("tinkex.regularizer.")}),
        ("*.exception", {name for name in telemetry.events() if name.endswith(".exception")}),
        (None, set(telemetry.events())),
    ],
)
def test_a_handler_hears_what_it_chose(chosen: object, expected: set[str]):
    seen: list[Event] = []
    telemetry.attach(seen.append, events=chosen)  # type: ignore[arg-type]
    for name in telemetry.events():
        telemetry.emit(name, {}, {})
    assert {event.name for event in seen} == expected
    assert len(seen) == len(expected)


@pytest.mark.parametrize("chosen", ["tinkex.custom_loss.stopp", ["tinkex.custom_loss.stop", "nope.*"], [], "Tinkex.*"])
def test_unknown_events_are_refused(chosen: object):
    with pytest.raises(ValueError, match="event"):
        telemetry.attach(print, events=chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("chosen", [5, [5], ["tinkex.custom_loss.stop", None]])
def test_events_that_are_not_strings_are_refused(chosen: object):
    with pytest.raises(TypeError, match="event names"):
        telemetry.attach(print, events=chosen)  # type: ignore[arg-type]


def test_emitting_an_unknown_event_is_refused():
    with pytest.raises(ValueError, match=r"'tinkex\.nothing'"):
        telemetry.emit("tinkex.nothing", {}, {})


def test_ids():
    assert telemetry.attach(print, handler_id="mine", events="tinkex.session.stop") == "mine"
    with pytest.raises(ValueError, match="'mine' is in use"):
        telemetry.attach(print, handler_id="mine")
    with pytest.raises(ValueError, match="'mine' is in use"):
        telemetry.attach_logger(handler_id="mine")
    made = {telemetry.attach(print, events="tinkex.session.stop") for _ in range(3)}
    assert len(made) == 3
    assert telemetry.detach("mine") is True
    assert telemetry.detach("mine") is False
    assert telemetry.detach("never there") is False
    for handler_id in made:
        assert telemetry.detach(handler_id)


def test_a_made_id_never_takes_a_chosen_one():
    first = telemetry.attach(print, events="tinkex.session.stop")
    number = int(first.rsplit("-", 1)[1])
    telemetry.attach(print, events="tinkex.session.stop", handler_id=f"handler-{number + 1}")
    assert telemetry.attach(print, events="tinkex.session.stop") == f"handler-{number + 2}"


class AsyncCallable:
    async def __call__(self, event: Event) -> None: ...


async def coroutine_handler(event: Event) -> None: ...


async def generator_handler(event: Event):
    yield event


@pytest.mark.parametrize(
    "handler",
    [
        coroutine_handler,
        functools.partial(coroutine_handler),
        AsyncCallable(),
        AsyncCallable().__call__,
        generator_handler,
        "not callable",
    ],
)
def test_async_and_uncallable_handlers_are_refused(handler: object):
    with pytest.raises(TypeError, match="telemetry handler"):
        telemetry.attach(handler)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ZeroDivisionError("secret text"), asyncio.CancelledError()])
def test_a_failing_handler_is_detached_and_its_siblings_still_hear(
    error: BaseException, caplog: pytest.LogCaptureFixture
):
    calls: list[str] = []

    def failing(event: Event) -> None:
        calls.append("failing")
        raise error

    telemetry.attach(lambda event: calls.append("before"))
    failing_id = telemetry.attach(failing)
    telemetry.attach(lambda event: calls.append("after"))
    telemetry.emit("tinkex.session.start", {}, {})
    telemetry.emit("tinkex.session.stop", {}, {})
    assert calls == ["before", "failing", "after", "before", "after"]
    assert telemetry.detach(failing_id) is False
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert failing_id in record.getMessage()
    assert type(error).__name__ in record.getMessage()
    assert "test_telemetry.py:" in record.getMessage()
    assert "secret text" not in caplog.text


def test_a_handler_that_returns_a_coroutine_is_detached():
    def returns_a_coroutine(event: Event) -> object:
        return coroutine_handler(event)

    handler_id = telemetry.attach(returns_a_coroutine)
    telemetry.emit("tinkex.session.start", {}, {})
    assert telemetry.detach(handler_id) is False


def test_a_new_handler_under_the_id_of_a_failing_one_stays():
    def swap_then_fail(event: Event) -> None:
        telemetry.detach("id")
        telemetry.attach(seen.append, handler_id="id")
        raise ZeroDivisionError

    seen: list[Event] = []
    telemetry.attach(swap_then_fail, handler_id="id")
    telemetry.emit("tinkex.session.start", {}, {})
    telemetry.emit("tinkex.session.stop", {}, {})
    assert [event.name for event in seen] == ["tinkex.session.stop"]


def test_attach_and_detach_from_many_threads_lose_nothing():
    barrier = threading.Barrier(8)
    ids: list[str] = []

    def work() -> None:
        barrier.wait()
        for _ in range(50):
            ids.append(telemetry.attach(print, events="tinkex.session.stop"))
            kept = telemetry.attach(print, events="tinkex.session.stop")
            assert telemetry.detach(kept)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 400
    assert {attachment.handler_id for attachment in handlers._ATTACHMENTS.current} == set(ids)


# Lifecycle


def ends(seen: list[Event]) -> list[str]:
    return [event.name.rsplit(".", 1)[1] for event in seen]


def test_a_lifecycle_that_ends_well():
    seen: list[Event] = []
    telemetry.attach(seen.append)
    with telemetry.lifecycle("tinkex.custom_loss", {"regularizer_count": 3, "track_grad_norms": True}) as measured:
        measured["loss_total"] = 1.25
        measured["regularizer_total"] = 0.5
    start, stop = seen
    assert start.name == "tinkex.custom_loss.start"
    assert set(start.measurements) == {"system_time"}
    assert isinstance(start.measurements["system_time"], float)
    assert start.metadata == {"regularizer_count": 3, "track_grad_norms": True}
    assert stop.name == "tinkex.custom_loss.stop"
    assert set(stop.measurements) == {"duration", "loss_total", "regularizer_total"}
    assert stop.measurements["duration"] >= 0.0
    assert stop.measurements["loss_total"] == 1.25
    assert stop.metadata == {"regularizer_count": 3}
    assert stop.exception is None


def test_a_lifecycle_that_fails():
    seen: list[Event] = []
    telemetry.attach(seen.append)
    error = ZeroDivisionError("do not log me")
    metadata = {"regularizer_name": "l1", "weight": 0.5, "is_async": False}

    def fail() -> None:
        with telemetry.lifecycle("tinkex.regularizer.compute", metadata) as measured:
            measured["value"] = 1.0
            raise error

    with pytest.raises(ZeroDivisionError):
        fail()
    start, end = seen
    assert start.metadata == metadata
    assert end.name == "tinkex.regularizer.compute.exception"
    assert set(end.measurements) == {"duration"}
    assert end.metadata == {"regularizer_name": "l1", "weight": 0.5, "reason": "ZeroDivisionError"}
    assert end.exception is error


@pytest.mark.asyncio
async def test_a_cancellation_is_an_exception_event():
    seen: list[Event] = []
    telemetry.attach(seen.append)
    started = asyncio.Event()

    async def work() -> None:
        with telemetry.lifecycle("tinkex.training", {"operation": "optim_step"}):
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ends(seen) == ["start", "exception"]
    assert seen[1].metadata == {"operation": "optim_step", "reason": "CancelledError"}
    assert isinstance(seen[1].exception, asyncio.CancelledError)


def test_the_reason_of_a_failed_term_is_its_own_error():
    error = RegularizerError("term failed", name="l1")
    error.__cause__ = KeyError("x")
    assert telemetry.failure_reason(error) == "KeyError"
    assert telemetry.failure_reason(RegularizerError("term failed", name="l1")) == "RegularizerError"
    assert telemetry.failure_reason(NonFiniteLoss("nan", name="l1")) == "NonFiniteLoss"


class Stop(BaseException):
    pass


@given(
    st.recursive(
        st.sampled_from([None, ValueError, asyncio.CancelledError, KeyboardInterrupt, Stop, StopIteration]),
        lambda children: st.lists(children, max_size=4),
        max_leaves=12,
    )
)
def test_every_start_has_exactly_one_end(plan: object):
    def run(node: object) -> int:
        """Do a unit of work per node; a list is a unit with units inside. Returns the units started."""
        count = 1
        try:
            with telemetry.lifecycle("tinkex.training", {}):
                if isinstance(node, list):
                    count += sum(run(child) for child in node)
                elif node is not None:
                    raise node
        except (ValueError, asyncio.CancelledError, KeyboardInterrupt, Stop, StopIteration, RuntimeError):
            pass
        return count

    seen: list[Event] = []
    handler_id = telemetry.attach(seen.append)
    try:
        units = run(plan)
    finally:
        telemetry.detach(handler_id)
    depth = 0
    for phase in ends(seen):
        depth += 1 if phase == "start" else -1
        assert depth >= 0
    assert depth == 0
    assert ends(seen).count("start") == units
    assert len(seen) == 2 * units


# Log lines


def configure_structlog(**options: object) -> None:
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()], **options)  # type: ignore[arg-type]


def test_capture_logs_sees_flat_dicts_at_their_levels():
    with structlog.testing.capture_logs() as lines:
        telemetry.emit("tinkex.custom_loss.stop", {"duration": 0.5, "loss_total": 2.0}, {"regularizer_count": 1})
        telemetry.emit("tinkex.custom_loss.exception", {"duration": 0.5}, {"reason": "ValueError"}, ValueError("text"))
        telemetry.emit("tinkex.regularizer.not_differentiable", {}, {"regularizer_name": "l1"})
        telemetry.emit("tinkex.regularizer.abandoned", {}, {"regularizer_name": "l1"})
        telemetry.emit("tinkex.future.queue_state", {}, {"queue_state": "paused_capacity"})
    assert lines == [
        {
            "event": "tinkex.custom_loss.stop",
            "log_level": "debug",
            "duration": 0.5,
            "loss_total": 2.0,
            "regularizer_count": 1,
        },
        {"event": "tinkex.custom_loss.exception", "log_level": "warning", "duration": 0.5, "reason": "ValueError"},
        {"event": "tinkex.regularizer.not_differentiable", "log_level": "warning", "regularizer_name": "l1"},
        {"event": "tinkex.regularizer.abandoned", "log_level": "warning", "regularizer_name": "l1"},
        {"event": "tinkex.future.queue_state", "log_level": "info", "queue_state": "paused_capacity"},
    ]


def test_after_capture_logs_structlog_counts_as_unconfigured(capsys: pytest.CaptureFixture[str]):
    with structlog.testing.capture_logs():
        assert logs.structlog_is_configured()
    assert structlog.is_configured()
    assert not logs.structlog_is_configured()
    telemetry.emit("tinkex.custom_loss.start", {"system_time": 1.0}, {})
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "options",
    [
        {"processors": [structlog.processors.JSONRenderer()]},
        {"wrapper_class": structlog.make_filtering_bound_logger(logging.INFO)},
        {"logger_factory": structlog.PrintLoggerFactory()},
    ],
)
def test_any_difference_from_the_defaults_is_a_configuration(options: dict[str, object]):
    assert not logs.structlog_is_configured()
    structlog.configure(**options)  # type: ignore[arg-type]
    assert logs.structlog_is_configured()


@pytest.mark.parametrize(
    ("configure", "configured"),
    [
        ("with structlog.testing.capture_logs(): pass", False),
        ("structlog.configure()", False),
        ("structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(20))", True),
        ("structlog.configure(logger_factory=structlog.stdlib.LoggerFactory())", True),
    ],
)
def test_a_configuration_before_the_import_is_distinguished_from_the_defaults(configure: str, configured: bool):
    program = f"import structlog\n{configure}\nfrom tinkex_py.telemetry import logs\n"
    assert run_alone(program + "print(logs.structlog_is_configured())").stdout == f"{configured}\n"


def test_without_handlers_lines_go_to_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(logs.LOGGER, "propagate", False)
    assert not logs.logging_is_configured()
    telemetry.emit("tinkex.session.exception", {}, {"reason": "ValueError"})
    assert capsys.readouterr() == ("", "")
    telemetry.attach_logger(level="warning")
    telemetry.emit("tinkex.session.stop", {"duration": 0.5}, {})
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith(" WARNING tinkex_py tinkex.session.stop duration=0.5\n")
    monkeypatch.setattr("sys.stderr", None)
    telemetry.emit("tinkex.session.stop", {"duration": 0.5}, {})


def test_structlog_lines_go_through_the_hosts_processors(capsys: pytest.CaptureFixture[str]):
    configure_structlog()
    telemetry.emit("tinkex.session.stop", {"duration": 0.25}, {"session_id": "s"})
    assert capsys.readouterr().out == "duration=0.25 session_id='s' event='tinkex.session.stop'\n"


def test_no_second_line_while_a_logger_is_attached():
    with structlog.testing.capture_logs() as lines:
        handler_id = telemetry.attach_logger(level="error")
        telemetry.emit("tinkex.session.stop", {"duration": 0.25}, {})
        telemetry.detach(handler_id)
        telemetry.emit("tinkex.session.stop", {"duration": 0.5}, {})
    assert [(line["log_level"], line["duration"]) for line in lines] == [("error", 0.25), ("debug", 0.5)]


def test_a_broken_structlog_configuration_does_not_break_training(caplog: pytest.LogCaptureFixture):
    def broken(logger: object, method: str, fields: dict[str, object]) -> dict[str, object]:
        raise ZeroDivisionError("secret text")

    structlog.configure(processors=[broken])  # type: ignore[list-item]
    seen: list[Event] = []
    telemetry.attach(seen.append)
    telemetry.emit("tinkex.session.start", {}, {})
    assert len(seen) == 1
    assert "ZeroDivisionError" in caplog.text
    assert "secret text" not in caplog.text


def test_stdlib_logging_is_used_where_structlog_is_not_configured(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, logger="tinkex_py"):
        telemetry.emit("tinkex.session.stop", {"duration": 0.25}, {"session_id": "s"})
        telemetry.emit("tinkex.session.exception", {"duration": 0.5}, {"reason": "ValueError"})
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("tinkex_py", "DEBUG", "tinkex.session.stop duration=0.25 session_id=s"),
        ("tinkex_py", "WARNING", "tinkex.session.exception duration=0.5 reason=ValueError"),
    ]


def test_attach_logger_writes_every_event_at_its_level(caplog: pytest.LogCaptureFixture):
    telemetry.attach_logger(level="INFO")
    for name in telemetry.events():
        telemetry.emit(name, {}, {})
    assert [record.getMessage() for record in caplog.records] == list(telemetry.events())
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_attach_logger_respects_an_explicit_level_of_its_logger(caplog: pytest.LogCaptureFixture):
    telemetry.attach_logger(level="info")
    with caplog.at_level(logging.ERROR, logger="tinkex_py"):
        telemetry.emit("tinkex.session.stop", {}, {})
    logging.disable(logging.INFO)
    try:
        telemetry.emit("tinkex.session.stop", {}, {})
    finally:
        logging.disable(logging.NOTSET)
    assert caplog.records == []


def test_attach_logger_refuses_an_unknown_level():
    for level in ("loud", 20, None):
        with pytest.raises(ValueError, match=repr(level)):
            telemetry.attach_logger(level=level)  # type: ignore[arg-type]


EVERY_EVENT = """
from tinkex_py import telemetry
for name in telemetry.events():
    telemetry.emit(name, {"duration": 0.5}, {"reason": "ValueError"})
"""


def test_a_process_that_configured_nothing_prints_nothing():
    done = run_alone(EVERY_EVENT)
    assert (done.stdout, done.stderr) == ("", "")


def test_an_asked_for_logger_is_heard_on_stderr_and_silent_again_when_detached():
    done = run_alone(
        "from tinkex_py import telemetry\n"
        "handler_id = telemetry.attach_logger()" + EVERY_EVENT + "telemetry.detach(handler_id)" + EVERY_EVENT
    )
    lines = done.stderr.splitlines()
    assert done.stdout == ""
    assert len(lines) == len(telemetry.events())
    assert all("INFO tinkex_py tinkex." in line and "duration=0.5 reason=ValueError" in line for line in lines)


def test_once_the_host_configures_logging_the_lines_go_there_only():
    done = run_alone(
        """
        import logging, sys
        from tinkex_py import telemetry
        telemetry.attach_logger()
        logging.basicConfig(stream=sys.stdout, format="host: %(message)s")
        telemetry.emit("tinkex.session.stop", {}, {})
        """
    )
    assert (done.stdout, done.stderr) == ("host: tinkex.session.stop\n", "")


def test_a_detached_handler_is_reported_where_nothing_is_configured():
    done = run_alone(
        """
        from tinkex_py import telemetry
        telemetry.attach(lambda event: 1 / 0, handler_id="mine")
        telemetry.emit("tinkex.session.stop", {}, {})
        """
    )
    assert done.stdout == ""
    assert "WARNING tinkex_py telemetry handler failed and was detached handler_id=mine" in done.stderr
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("before", [True, False])
def test_a_host_that_configured_structlog_before_or_after_the_import(before: bool):
    configure = "import structlog; structlog.configure(processors=[structlog.processors.JSONRenderer()])\n"
    code = configure + EVERY_EVENT if before else "import tinkex_py.telemetry\n" + configure + EVERY_EVENT
    done = run_alone(code)
    assert len(done.stdout.splitlines()) == len(telemetry.events())
    assert done.stderr == ""
