"""Where the key comes from, and tokens that are exchanged for it."""

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tinkex_py.errors import Authentication, ConfigError, ConnectionFailed, InvalidResponse
from tinkex_py.transport import auth as auth_module
from tinkex_py.transport.auth import (
    Auth,
    check_not_expired,
    expiry_of,
    key_from_command,
    key_from_file,
    rejects_token,
)
from tinkex_py.transport.messages import Response, Secret

PLANTED = "tml-PLANTED-0123456789"


def jwt(**claims: Any) -> str:
    """An unsigned token with these claims."""

    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none'})}.{part(claims)}.c2lnbmF0dXJl"


# Tokens that tell about themselves


@pytest.mark.parametrize("padding", range(4))
def test_the_end_of_a_token(padding):
    assert expiry_of(Secret(jwt(sub="x" * padding, exp=1234567890))) == 1234567890.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "eyJ",
        "eyJ.a",
        "eyJ.!!!.c",
        "eyJ.e30.c",
        "eyJ.W10.c",
        jwt(exp="soon"),
        jwt(exp=True),
        jwt(exp=-5),
        jwt(exp=1e300),
        f"eyJ.{base64.urlsafe_b64encode(b'[' * 99999).decode()}.c",
        "eyJ.éé.c",
    ],
)
def test_tokens_that_do_not_tell_it(text):
    assert expiry_of(Secret(text)) is None


def test_a_token_that_has_ended_is_not_sent():
    ended = Secret(jwt(exp=time.time() - 100))
    assert ended.reveal().startswith("eyJ")
    with pytest.raises(ConfigError, match="ended 100 s ago") as caught:
        check_not_expired(expiry_of(ended))
    assert ended.reveal() not in str(caught.value)
    check_not_expired(time.time() + 100)
    check_not_expired(expiry_of(Secret(jwt())))


# The file of the official command line


def written(folder: Path, content: object) -> Path:
    path = folder / "credentials.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_default_entry(tmp_path):
    entry = {"type": "manual", "key": PLANTED, "name": "mine", "note": None}
    content = {"version": 1, "default": "k1", "keys": {"k1": entry, "k2": {"key": "tml-other"}}}
    assert key_from_file(written(tmp_path, content)) == PLANTED
    assert key_from_file(written(tmp_path, {**content, "default": None})) is None
    assert key_from_file(tmp_path / "missing" / "credentials.json") is None
    assert key_from_file(None) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        PLANTED,
        [PLANTED],
        {"default": "k1"},
        {"default": "k1", "keys": [PLANTED]},
        {"default": "k1", "keys": {"k1": PLANTED}},
        {"default": "k1", "keys": {"k1": {"key": 7}}},
        {"default": "gone", "keys": {"k1": {"key": PLANTED}}},
        {"default": [1], "keys": {"k1": {"key": PLANTED}}},
    ],
)
def test_a_file_of_another_kind_is_named_without_its_content(tmp_path, content):
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        key_from_file(path)
    assert str(path) in str(caught.value)
    assert PLANTED not in str(caught.value) + repr(caught.value.__context__)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="IsADirectoryError"):
        key_from_file(tmp_path)
    path = tmp_path / "credentials.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a valid credentials file"):
        key_from_file(path)


# The command


@pytest.mark.asyncio
async def test_a_command_prints_the_key():
    key = await key_from_command(Secret(f"printf '  {PLANTED}\\n'"))
    assert key.reveal() == PLANTED
    assert PLANTED not in repr(key)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"echo {PLANTED}; exit 3", "status 3"),
        ("true", "0 bytes"),
        (f"printf '{PLANTED} \\n {PLANTED}'", "no key"),
        ("printf '\\377\\377'", "no key"),
        ("/no/such/program", "status 127"),
    ],
)
async def test_a_command_that_gives_no_key(command, words):
    with pytest.raises(ConfigError, match=words) as caught:
        await key_from_command(Secret(command))
    assert PLANTED not in str(caught.value)
    assert "TINKER_CREDENTIAL_CMD" in str(caught.value)


def is_running(pid: int) -> bool:
    """A killed process that nobody has reaped yet still has an entry, as a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


@pytest.mark.asyncio
async def test_a_command_that_does_not_end_is_ended_with_all_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(ConfigError, match=r"within 0\.3 s"):
        await key_from_command(Secret(f"sleep 600 & echo $! > {pid_file}; wait"), timeout=0.3)
    pid = int(pid_file.read_text())
    async with asyncio.timeout(5):
        while is_running(pid):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_caller_that_is_cancelled_leaves_no_process(tmp_path):
    started = tmp_path / "started"
    asking = asyncio.create_task(key_from_command(Secret(f"touch {started}; sleep 600")))
    async with asyncio.timeout(5):
        while not started.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()


# Tokens


class Service:
    """Gives tokens that live so many seconds."""

    def __init__(self, *lifetimes: float | Exception | None) -> None:
        self.lifetimes = list(lifetimes)
        self.keys: list[str] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, key: Secret) -> Response:
        self.keys.append(key.reveal())
        if self.gate is not None:
            await self.gate.wait()
        lifetime = self.lifetimes.pop(0) if len(self.lifetimes) > 1 else self.lifetimes[0]
        if isinstance(lifetime, Exception):
            raise lifetime
        claims = {} if lifetime is None else {"exp": time.time() + lifetime}
        body = json.dumps({"jwt": jwt(number=len(self.keys), **claims)})
        return Response(200, {}, body.encode(), "POST /api/v1/auth/token")


class Clock:
    """The time of token lives, moved by hand: the loop's clock and the wall clock together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = 0.0
        loop, wall = asyncio.get_running_loop(), time.time

        class Loop:
            def time(inner) -> float:  # noqa: N805
                return loop.time() + self.passed

        class Asyncio:
            def __getattr__(inner, name: str) -> Any:  # noqa: N805
                return getattr(asyncio, name)

            def get_running_loop(inner) -> Loop:  # noqa: N805
                return Loop()

        monkeypatch.setattr(auth_module, "asyncio", Asyncio())
        monkeypatch.setattr(time, "time", lambda: wall() + self.passed)


def exchanging(service: Service, key: str = PLANTED) -> Auth:
    keys = Auth(Secret(key), Secret(""))
    keys.follow(exchange=service, source="api_key")
    return keys


@pytest.mark.asyncio
async def test_without_exchange_the_key_is_used_as_it_is():
    keys = Auth(Secret(PLANTED), Secret(""))
    keys.follow(exchange=None, source="api_key")
    assert (await keys.current()).reveal() == PLANTED
    assert await keys.renewed(await keys.current()) is None
    assert PLANTED not in repr(keys)


@pytest.mark.asyncio
async def test_concurrent_requests_exchange_once():
    service = Service(3600.0)
    service.gate = asyncio.Event()
    keys = exchanging(service)
    asking = [asyncio.create_task(keys.current()) for _ in range(10)]
    await asyncio.sleep(0)
    service.gate.set()
    tokens = {token.reveal() for token in await asyncio.gather(*asking)}
    assert len(tokens) == 1
    assert tokens.pop().startswith("eyJ")
    assert service.keys == [PLANTED]


@pytest.mark.asyncio
async def test_the_first_that_is_cancelled_leaves_the_exchange_to_the_next():
    service = Service(3600.0)
    service.gate = asyncio.Event()
    keys = exchanging(service)
    first, second = (asyncio.create_task(keys.current()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    service.gate.set()
    assert (await second).reveal().startswith("eyJ")
    await asyncio.wait([first])
    assert len(service.keys) == 2


@pytest.mark.asyncio
async def test_a_token_is_replaced_a_minute_before_its_end(monkeypatch):
    clock, service = Clock(monkeypatch), Service(3600.0)
    keys = exchanging(service)
    first = await keys.current()
    clock.passed = 3600.0 - 62.0
    assert await keys.current() is first
    clock.passed = 3600.0 - 59.0
    assert (await keys.current()).reveal() != first.reveal()
    assert len(service.keys) == 2


@pytest.mark.asyncio
async def test_a_short_token_is_replaced_in_its_middle_and_not_at_every_request(monkeypatch):
    clock, service = Clock(monkeypatch), Service(30.0)
    keys = exchanging(service)
    for _ in range(5):
        await keys.current()
    assert len(service.keys) == 1
    clock.passed = 16.0
    for _ in range(5):
        await keys.current()
    assert len(service.keys) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("lifetime", [None, -100.0])
async def test_a_token_that_does_not_tell_its_end_is_kept_until_it_is_rejected(lifetime):
    """Also one that seems to be over when it arrives: then the clocks differ."""
    service = Service(lifetime)
    keys = exchanging(service)
    token = await keys.current()
    assert await keys.current() is token
    renewed = await keys.renewed(token)
    assert renewed is not None
    assert renewed.reveal() != token.reveal()
    assert await keys.current() is renewed


@pytest.mark.asyncio
async def test_a_rejected_token_is_renewed_once_for_all_who_held_it():
    service = Service(3600.0)
    keys = exchanging(service)
    token = await keys.current()
    renewed = await asyncio.gather(*(keys.renewed(token) for _ in range(8)))
    assert len({one.reveal() for one in renewed if one}) == 1
    assert len(service.keys) == 2


@pytest.mark.asyncio
async def test_a_failed_replacement_leaves_a_good_token_in_use(monkeypatch):
    clock = Clock(monkeypatch)
    service = Service(3600.0, ConnectionFailed("down"), ConnectionFailed("down"), 3600.0)
    keys = exchanging(service)
    first = await keys.current()
    clock.passed = 3550.0
    for _ in range(5):
        assert await keys.current() is first
    assert len(service.keys) == 2, "not asked again at every request"
    clock.passed = 3601.0  # over: now it must be replaced
    with pytest.raises(ConnectionFailed):
        await keys.current()
    assert (await keys.current()).reveal().startswith("eyJ")


@pytest.mark.asyncio
async def test_an_exchange_that_is_refused_is_final():
    service = Service(Authentication("no", status=401))
    with pytest.raises(Authentication):
        await exchanging(service).current()


@pytest.mark.asyncio
@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"jwt": 3}', b'{"jwt": ""}', b'{"jwt": "a\\nb"}', b"\xff"])
async def test_an_answer_without_a_token(body):
    async def exchange(key: Secret) -> Response:
        return Response(200, {}, body, "POST /api/v1/auth/token")

    keys = Auth(Secret(PLANTED), Secret(""))
    keys.follow(exchange=exchange, source="api_key")
    with pytest.raises(InvalidResponse):
        await keys.current()


@pytest.mark.asyncio
async def test_a_key_that_is_a_token_is_not_exchanged():
    service = Service(3600.0)
    token = jwt(exp=time.time() + 1000)
    keys = exchanging(service, token)
    assert (await keys.current()).reveal() == token
    assert await keys.renewed(Secret(token)) is None
    assert service.keys == []
    with pytest.raises(ConfigError, match="ended"):
        await exchanging(service, jwt(exp=time.time() - 1)).current()


@pytest.mark.asyncio
async def test_the_command_is_run_anew_for_every_exchange(tmp_path):
    count = tmp_path / "count"
    service = Service(None)
    keys = Auth(Secret(""), Secret(f"echo x >> {count}; echo tml-run-$(wc -l < {count})"))
    keys.follow(exchange=service, source="api_key")
    token = await keys.current()
    await keys.current()
    await keys.renewed(token)
    assert service.keys == ["tml-run-1", "tml-run-2"]


def test_what_does_not_fit_together():
    with pytest.raises(ConfigError, match="exchange"):
        Auth(Secret(""), Secret("echo tml-x")).follow(exchange=None, source="api_key")
    with pytest.raises(ConfigError, match="TINKER_CREDENTIAL_CMD"):
        Auth(Secret(PLANTED), Secret("")).follow(exchange=Service(None), source="credential_cmd")


@pytest.mark.asyncio
async def test_the_service_may_force_the_command():
    service = Service(None)
    keys = Auth(Secret(PLANTED), Secret("echo tml-from-command"))
    keys.follow(exchange=service, source="credential_cmd")
    await keys.current()
    assert service.keys == ["tml-from-command"]


@pytest.mark.parametrize(
    ("status", "told", "expected"),
    [
        (401, 'Bearer error="invalid_token", error_description="over"', True),
        (401, 'Bearer realm="x"', False),
        (401, "", False),
    ],
)
def test_which_answers_reject_the_token(status, told, expected):
    assert rejects_token(Response(status, {"www-authenticate": told} if told else {}, b"")) is expected
