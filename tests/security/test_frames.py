"""Secrets planted in every place a client takes them from; then everything that an error carries is searched.

A traceback keeps the local variables of its frames, and tools print them. The frames of this package and of its
dependencies hold no secret; those of the test do, as those of a user may.
"""

import asyncio
import base64
import logging
import pickle
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import httpx
import pytest
from rich.pretty import pretty_repr

from tests.support.scripted_server import (
    Behaviour,
    Request,
    ScriptedServer,
    answer,
    computed,
    half_a_body,
    raw,
    reset,
    stall,
)
from tests.test_way_of_a_step import Service, data, l1, nll
from tinkex_py import (
    AsyncServiceClient,
    AsyncTrainingClient,
    ConfigError,
    RegularizerSpec,
    RetryPolicy,
    TinkexConfig,
    TinkexError,
)
from tinkex_py.local import LocalOptions
from tinkex_py.transport.auth import key_from_command
from tinkex_py.transport.messages import Secret
from tinkex_py.transport.secrecy import exchanging

KEY, HEADER, PASSWORD, SIGNATURE = "tml-PLANTEDKEY111", "PLANTEDHDR222", "PLANTEDPW444", "PLANTEDSIG555"
PRINTED, TOKEN = "PLANTEDCMD666", "eyJPLANTEDJWT777"
PLANTED = {
    "key": KEY,
    "header": HEADER,
    "access header": "PLANTEDCF3333",
    "password of the proxy": PASSWORD,
    "password in the header of the proxy": base64.b64encode(f"user:{PASSWORD}".encode()).decode(),
    "signature": SIGNATURE,
    "printed key": PRINTED,
    "token": TOKEN,
}
LOGGERS = ("", "httpx", "httpcore", *(f"httpcore.{part}" for part in ("connection", "http11", "proxy")), "uvicorn")


def shown_by(value: object) -> str:
    """The texts of a value; rich's is the one in its tracebacks."""
    try:
        return f"{value!r} {value} {pretty_repr(value)}"
    except Exception as error:  # noqa: BLE001  (an object that is not complete)
        return repr(error)


def frames_of(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def family(error: BaseException) -> list[BaseException]:
    """The error, its causes, contexts and members."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in found:
            found.append(one)
            waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return found


def everything_in(error: BaseException) -> Iterator[tuple[str, str]]:
    """Each place in an error, and its text. The frames of this file are the user's."""
    for one in family(error):
        kind = type(one).__name__
        yield f"{kind}: text, arguments and fields", shown_by(one) + shown_by(one.args) + shown_by(vars(one))
        if isinstance(one, TinkexError):
            yield f"{kind}: pickle", pickle.dumps(one).decode("latin-1")
        for frame in frames_of(one.__traceback__):
            if frame.f_code.co_filename != __file__:
                for name, value in frame.f_locals.items():
                    yield f"{kind}: {frame.f_code.co_qualname}, local {name}", shown_by(value)


def check_clean(places: Iterable[tuple[str, str]]) -> None:
    found = [
        f"{name} in {place}: ...{text[max(0, text.index(secret) - 80) :][:160]}"
        for place, text in places
        for name, secret in PLANTED.items()
        if secret in text
    ]
    assert not found, "\n".join(found)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The lines of all loggers, down to DEBUG."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.name}: {record.getMessage()} {record.__dict__!r}")

    handler, root = Handler(), logging.getLogger()
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    root.addHandler(handler)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield lines
    root.removeHandler(handler)
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", PLANTED["access header"])
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "TINKER_API_KEY", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


def test_the_search_finds_what_is_planted() -> None:
    def fail(_secret: str) -> None:
        raise ValueError("something else")

    hidden = compile("def call(function, secret):\n    function(secret)", "elsewhere.py", "exec")
    scope: dict[str, Any] = {}
    exec(hidden, scope)
    with pytest.raises(ValueError, match="something else") as caught:
        scope["call"](fail, KEY)
    with pytest.raises(AssertionError, match="key in ValueError: call, local secret"):
        check_clean(everything_in(caught.value))


# Requests


def echoing(status: int, **headers: str) -> Behaviour:
    """An answer that quotes the request: its address and headers."""
    return computed(
        lambda request: answer(
            status,
            json={"detail": f"{request.target} {dict(request.headers)}", request.target: dict(request.headers)},
            headers=headers,
        )
    )


def echoing_text(request: Request) -> Behaviour:
    return answer(body=f"{request.target} {dict(request.headers)}".encode())


def write(command: Path, text: str) -> None:
    command.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Trouble:
    """What a service does once the client is connected.

    Attributes:
        every: its answer to every request.
        token: its answer to the exchange of a key for a token; None if it accepts keys.
        command: the script that prints the key, afterwards; None for a configured key.
        leaves: how the caller ends the call: "cancelled" or "timeout".
        proxied: the client reaches it through a proxy.
        gone: nothing listens any more.
        timeout: of the client, in seconds.
        poll: its answer to every poll.
    """

    every: Behaviour | None = None
    poll: Behaviour | None = None
    token: Behaviour | None = None
    command: str | None = None
    leaves: str | None = None
    proxied: bool = False
    gone: bool = False
    timeout: float = 30.0


EXPIRED = {"www-authenticate": 'Bearer error="invalid_token"'}
TROUBLES = {
    "refused": Trouble(echoing(400)),
    "failed": Trouble(echoing(500)),
    "unauthorized": Trouble(echoing(401)),
    "redirected": Trouble(answer(302, headers={"location": f"http://elsewhere/?signature={SIGNATURE}"})),
    "not JSON": Trouble(computed(echoing_text)),
    "not the protocol": Trouble(computed(lambda request: answer(json=[request.target, dict(request.headers)]))),
    "not HTTP": Trouble(raw(b"\x00\x01 no HTTP\r\n\r\n")),
    "reset": Trouble(reset()),
    "half a body": Trouble(half_a_body(b"x" * 1000)),
    "silent": Trouble(stall(), timeout=0.5),
    "closed": Trouble(gone=True),
    "a failed result": Trouble(poll=computed(lambda request: answer(json={"error": str(dict(request.headers))}))),
    "a refused poll": Trouble(poll=echoing(400)),
    "a lost result": Trouble(poll=echoing(410)),
    "an invalid result": Trouble(poll=computed(lambda request: answer(json={"model_id": dict(request.headers)}))),
    "cancelled": Trouble(stall(), leaves="cancelled"),
    "timeout": Trouble(stall(), leaves="timeout"),
    "no token": Trouble(echoing(401, **EXPIRED), token=echoing(200)),
    "a token that cannot be sent": Trouble(echoing(401, **EXPIRED), token=answer(json={"jwt": f"{TOKEN}\n"})),
    "a refused token": Trouble(echoing(401, **EXPIRED), token=echoing(403)),
    "a command that fails": Trouble(echoing(401, **EXPIRED), command=f"echo {PRINTED}; exit 3"),
    "a command that prints more": Trouble(echoing(401, **EXPIRED), command=f"echo {PRINTED}; echo {PRINTED}"),
    "a proxy that refuses": Trouble(echoing(407), proxied=True),
    "a proxy that is gone": Trouble(gone=True, proxied=True),
    "a proxy that resets": Trouble(reset(), proxied=True),
}
CALLS = ("create", "custom step", "run", "download", "delete")
CHECKPOINT = "/api/v1/training_runs/r/checkpoints/weights/n"
PATHS = (
    *("create_model", "forward", "forward_backward", "retrieve_future", "training_runs/r"),
    *("training_runs/r/checkpoints/weights/n", "auth/token"),
)


class Setting:
    """A service and a client of it that work, until they are broken."""

    def __init__(self, server: ScriptedServer, service: AsyncServiceClient, training: AsyncTrainingClient) -> None:
        self.server = server
        self.service = service
        self.training = training

    async def break_it(self, trouble: Trouble, command: Path) -> None:
        if trouble.every is not None:
            for path in PATHS:
                self.server.script(f"/api/v1/{path}", trouble.every)
            self.server.script("/files/n.tar", trouble.every)
        if trouble.poll is not None:
            self.server.script("/api/v1/retrieve_future", trouble.poll)
        if trouble.token is not None:
            self.server.script("/api/v1/auth/token", trouble.token)
        if trouble.command is not None:
            write(command, trouble.command)
        if trouble.gone:
            self.server.stop_listening()
            for writer in list(self.server.writers):
                writer.close()
            await self.server.until(lambda: self.server.open_connections == 0)

    async def call(self, name: str, folder: Path) -> object:
        rest = self.service.create_rest_client()
        match name:
            case "create":
                return await self.service.create_lora_training_client("m")
            case "custom step":
                specs = [RegularizerSpec(fn=l1, weight=0.1, name="l1")]
                return await self.training.forward_backward_custom(data(), nll, regularizers=specs)
            case "run":
                return await rest.get_training_run("r")
            case "delete":
                return await rest.delete_checkpoint("tinker://r/weights/n")
        return await rest.download_checkpoint("tinker://r/weights/n", folder / "files")


@asynccontextmanager
async def working(
    trouble: Trouble, environment: pytest.MonkeyPatch, command: Path, **options: Any
) -> AsyncIterator[Setting]:
    retry = RetryPolicy(deadline=5.0, max_attempts=2, initial_wait=0.0, max_wait=0.01)
    async with ScriptedServer() as server:
        Service(server)
        config: dict[str, Any] = {"proto_write_fwdbwd": True}
        if trouble.token is not None or trouble.command is not None:
            config |= {"pjwt_auth_enabled": True}
            server.script("/api/v1/auth/token", answer(json={"jwt": TOKEN}))
        server.script("/api/v1/client/config", answer(json=config))
        address = server.url
        if trouble.proxied:
            environment.setenv("HTTP_PROXY", server.url.replace("//", f"//user:{PASSWORD}@"))
            address = "http://service.invalid"
        signed = answer(302, headers={"location": f"{address}/files/n.tar?signature={SIGNATURE}&expires=9"})
        server.script(f"{CHECKPOINT}/archive", signed)
        key: dict[str, str] = {"api_key": KEY}
        if trouble.command is not None:
            write(command, f"echo {PRINTED}")
            environment.setenv("TINKER_CREDENTIAL_CMD", f"sh {command}")
            key = {}
        settings = TinkexConfig(
            base_url=address,
            default_headers={"x-mine": HEADER},
            timeout=trouble.timeout,
            retry=retry,
            close_timeout=0.1,
            **key,
        )
        service = AsyncServiceClient(settings, **options)
        try:
            yield Setting(server, service, await service.create_lora_training_client("m"))
        finally:
            await service.aclose()


async def failure_of(setting: Setting, trouble: Trouble, call: str, folder: Path) -> BaseException:
    seen = len(setting.server.started)
    running = asyncio.create_task(setting.call(call, folder))
    if trouble.leaves is None:
        expected: type[BaseException] = TinkexError
    else:
        await setting.server.until(lambda: len(setting.server.started) > seen)
        expected = asyncio.CancelledError
    if trouble.leaves == "cancelled":
        running.cancel()
    elif trouble.leaves == "timeout":
        expected = TimeoutError
    with pytest.raises(expected) as caught:
        async with asyncio.timeout(0.05 if trouble.leaves == "timeout" else None):
            await running
    return caught.value


ATTEMPTS = [(name, call) for name in TROUBLES for call in (CALLS if TROUBLES[name].poll is None else CALLS[:2])]


@pytest.mark.asyncio
@pytest.mark.parametrize(("name", "call"), ATTEMPTS, ids=[f"{name}-{call}" for name, call in ATTEMPTS])
async def test_no_error_of_a_request_carries_a_secret(name, call, logged, environment, tmp_path):
    trouble, command = TROUBLES[name], tmp_path / "command.sh"
    async with working(trouble, environment, command) as setting:
        await setting.break_it(trouble, command)
        error = await failure_of(setting, trouble, call, tmp_path)
        assert HEADER in repr(setting.server.requests), "it was planted"
        check_clean(everything_in(error))
        check_clean([("a log line", line) for line in logged])
        assert any("receive_response_headers.complete return_value=[hidden]" in line for line in logged)


@pytest.mark.asyncio
async def test_a_users_own_client_keeps_its_errors_and_logs_no_signature(logged, environment, tmp_path):
    class Broken(httpx.AsyncHTTPTransport):
        fails = False

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if self.fails:
                raise LookupError("an error of the user's transport")
            return await super().handle_async_request(request)

    transport = Broken()
    async with (
        httpx.AsyncClient(transport=transport) as own,
        working(Trouble(echoing(403)), environment, tmp_path / "command.sh", http_client=own) as setting,
    ):
        setting.server.script("/files/n.tar", echoing(403))
        with pytest.raises(TinkexError) as refused:
            await setting.call("download", tmp_path)
        transport.fails = True
        with pytest.raises(LookupError, match="of the user's transport") as failed:
            await setting.call("run", tmp_path)
        transport.fails = False
    assert any(__file__ in note for note in failed.value.__notes__), "where it was raised"
    for caught in (refused, failed):
        check_clean(everything_in(caught.value))
    check_clean([("a log line", line) for line in logged])
    assert any("GET" in line and "/files/n.tar?[hidden]" in line for line in logged)


def test_log_lines_of_others_are_untouched(logged) -> None:
    logger = logging.getLogger("httpcore.socks")
    logger.setLevel(logging.DEBUG)
    line = f"setup_socks5_connection.started host='h' auth=(b'user', b'{PASSWORD}')"
    logger.debug(line)
    exchanging.set(True)
    try:
        logger.debug(line)
    finally:
        exchanging.set(False)
        logger.setLevel(logging.NOTSET)
    assert PASSWORD in logged[0]
    assert "setup_socks5_connection.started host='h' auth=[hidden]" in logged[1]
    check_clean([("the line of this package", logged[1])])


# Settings


def unpickled() -> object:
    return pickle.loads(pickle.dumps(TinkexConfig(api_key=KEY, default_headers={"x-team": "blue"})))


def config(**settings: Any) -> TinkexConfig:
    return TinkexConfig(**{"api_key": KEY, "default_headers": {"x-mine": HEADER}, **settings})


INVALID_SETTINGS: dict[str, Callable[[], object]] = {
    "a timeout": lambda: config(timeout=-1),
    "a key with spaces": lambda: config(api_key=f"{KEY} "),
    "a key that is no text": lambda: config(api_key=[KEY]),
    "a header": lambda: config(default_headers={"x-mine": HEADER, "x-other": f"{HEADER}\n"}),
    "an unknown setting": lambda: config(no_such_setting=KEY),
    "an address with a password": lambda: config(base_url=f"http://user:{PASSWORD}@host"),
    "an address with a key": lambda: config(base_url=f"http://host/?key={KEY}"),
    "an address without a scheme": lambda: config(base_url=f"user:{PASSWORD}@host"),
    "settings beside the environment": lambda: AsyncServiceClient.from_env(api_key=KEY, timeout=-1),
    "options of the embedded service": lambda: LocalOptions(api_key=KEY, seed="x"),
    "a key of the embedded service": lambda: LocalOptions(api_key=f"{KEY}é"),
    "an embedded service": lambda: AsyncServiceClient.local(api_key=KEY, seed="x"),
    "a pickle with headers": lambda: pickle.dumps(config()),
    "a pickle without a key": unpickled,
}


@pytest.mark.parametrize("name", INVALID_SETTINGS)
def test_no_error_of_a_setting_carries_a_secret(name, environment, tmp_path):
    environment.setenv("HOME", str(tmp_path))
    with pytest.raises((ConfigError, TypeError)) as caught:
        INVALID_SETTINGS[name]()
    check_clean(everything_in(caught.value))


@pytest.mark.parametrize("address", [f"http://user:{PASSWORD}/x@proxy", f"ftp://user:{PASSWORD}@proxy"])
def test_no_error_of_a_proxy_setting_carries_its_password(address, environment):
    environment.setenv("HTTP_PROXY", address)
    with pytest.raises(ConfigError, match="HTTP_PROXY") as caught:
        AsyncServiceClient(config(base_url="http://service.invalid"))
    check_clean(everything_in(caught.value))


@pytest.mark.parametrize("content", ['{"default": "a", "keys": {"a": "%s"}}', '{"default": "a", "keys": %s', "[%s]"])
def test_no_error_of_the_credentials_file_carries_its_keys(content, environment, tmp_path):
    environment.setenv("HOME", str(tmp_path))
    (tmp_path / ".tinker").mkdir()
    (tmp_path / ".tinker" / "credentials.json").write_text(content % KEY, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"credentials\.json") as caught:
        TinkexConfig()
    check_clean(everything_in(caught.value))


@pytest.mark.asyncio
@pytest.mark.parametrize("ending", ["exit 3", f"echo {PRINTED}", "printf '\\0'", "exec sleep 60"])
async def test_no_error_of_the_command_carries_what_it_printed(ending, logged):
    with pytest.raises(ConfigError, match="TINKER_CREDENTIAL_CMD") as caught:
        await key_from_command(Secret(f"echo {PRINTED}; {ending}"), timeout=0.3 if "sleep" in ending else 30.0)
    check_clean([*everything_in(caught.value), *(("a log line", line) for line in logged)])


def test_a_pickle_of_an_ordinary_config_keeps_its_headers(environment):
    environment.setenv("TINKER_API_KEY", KEY)
    assert dict(unpickled().default_headers) == {"x-team": "blue"}
