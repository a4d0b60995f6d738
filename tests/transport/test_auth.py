"""Sources of the key, and the tokens that a service exchanges keys for."""

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tinkex_py.errors import Authentication, ConfigError, ConnectionFailed, InvalidResponse
from tinkex_py.transport.auth import Auth, expiry_of, key_from_command, key_from_file, rejects_token
from tinkex_py.transport.messages import Response, Secret

PLANTED = "tml-PLANTED-0123456789"


def jwt(**claims: Any) -> str:
    """An unsigned token with these claims."""

    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none'})}.{part(claims)}.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((jwt(sub="x" * padding, exp=1234567890), 1234567890.0) for padding in range(4)),
        *((text, None) for text in ("", "eyJ", "eyJ.a", "eyJ.!!!.c", "eyJ.e30.c", "eyJ.W10.c", "eyJ.éé.c")),
        *((jwt(exp=exp), None) for exp in ("soon", True, -5, 1e300)),
        (f"eyJ.{base64.urlsafe_b64encode(b'[' * 99999).decode()}.c", None),
    ],
)
def test_the_expiry_of_a_token(text, expected):
    assert expiry_of(Secret(text)) == expected


# The credentials file


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
def test_an_invalid_file_is_named_without_its_content(tmp_path, content):
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        key_from_file(path)
    assert str(path) in str(caught.value)
    assert PLANTED not in str(caught.value) + repr(caught.value.__context__)


def test_an_unreadable_file(tmp_path):
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
    ("command", "message"),
    [
        (f"echo {PLANTED}; exit 3", "status 3"),
        ("true", "0 bytes"),
        (f"printf '{PLANTED} \\n {PLANTED}'", "not a key"),
        ("printf '\\377\\377'", "not a key"),
        ("/no/such/program", "status 127"),
    ],
)
async def test_a_command_that_prints_no_key(command, message):
    with pytest.raises(ConfigError, match=message) as caught:
        await key_from_command(Secret(command))
    assert PLANTED not in str(caught.value)
    assert "TINKER_CREDENTIAL_CMD" in str(caught.value)


def is_running(pid: int) -> bool:
    """A killed process without a parent that waits for it still has an entry, as a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


@pytest.mark.asyncio
@pytest.mark.parametrize("ended_by", ["the timeout", "a cancellation", "a cancellation of its start"])
async def test_a_command_is_killed_with_all_its_children(tmp_path, ended_by):
    pid_file = tmp_path / "pid"
    command = Secret(f"sleep 600 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait")
    running = asyncio.create_task(key_from_command(command, timeout=0.3 if ended_by == "the timeout" else 60.0))
    for _ in range(2):
        await asyncio.sleep(0)  # starts the process
    async with asyncio.timeout(5):
        while not pid_file.exists():
            if ended_by == "a cancellation of its start":
                time.sleep(0.01)  # noqa: ASYNC251  # the event loop does not see that the process was started
            else:
                await asyncio.sleep(0.01)
    if ended_by != "the timeout":
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    else:
        with pytest.raises(ConfigError, match=r"within 0\.3 s"):
            await running
    pid = int(pid_file.read_text())
    async with asyncio.timeout(5):
        while is_running(pid):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# Tokens


class Service:
    """Exchanges keys for tokens with these lifetimes in seconds, and repeats the last one."""

    def __init__(self, *lifetimes: float | Exception | None) -> None:
        self.lifetimes = list(lifetimes)
        self.keys: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, key: Secret) -> Response:
        self.keys.append(key.reveal())
        await self.gate.wait()
        lifetime = self.lifetimes.pop(0) if len(self.lifetimes) > 1 else self.lifetimes[0]
        if isinstance(lifetime, Exception):
            raise lifetime
        claims = {} if lifetime is None else {"exp": time.time() + lifetime}
        body = json.dumps({"jwt": jwt(number=len(self.keys), **claims)})
        return Response(200, {}, body.encode(), "POST /api/v1/auth/token")


class Clock:
    """Advances the clock of the loop and the wall clock together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = 0.0
        loop = asyncio.get_running_loop()
        loop_time, wall_time = loop.time, time.time
        monkeypatch.setattr(loop, "time", lambda: loop_time() + self.passed)
        monkeypatch.setattr(time, "time", lambda: wall_time() + self.passed)


def exchanging(service: Any, key: str = PLANTED, command: str = "", source: str = "api_key") -> Auth:
    auth = Auth(Secret(key), Secret(command))
    auth.follow(exchange=service, source=source)
    return auth


@pytest.mark.asyncio
async def test_without_exchange_the_key_is_sent():
    auth = exchanging(None)
    assert (await auth.current()).reveal() == PLANTED
    assert await auth.renewed(await auth.current()) is None
    assert PLANTED not in repr(auth)


@pytest.mark.asyncio
async def test_concurrent_requests_exchange_once():
    service = Service(3600.0)
    service.gate.clear()
    auth = exchanging(service)
    requests = [asyncio.create_task(auth.current()) for _ in range(10)]
    await asyncio.sleep(0)
    service.gate.set()
    tokens = {token.reveal() for token in await asyncio.gather(*requests)}
    assert len(tokens) == 1
    assert tokens.pop().startswith("eyJ")
    assert service.keys == [PLANTED]


@pytest.mark.asyncio
async def test_a_cancelled_request_leaves_the_exchange_to_the_next():
    service = Service(3600.0)
    service.gate.clear()
    auth = exchanging(service)
    first, second = (asyncio.create_task(auth.current()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    service.gate.set()
    assert (await second).reveal().startswith("eyJ")
    await asyncio.wait([first])
    assert len(service.keys) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize(("lifetime", "kept", "replaced"), [(3600.0, 3538.0, 3541.0), (30.0, 14.0, 16.0)])
async def test_a_token_is_replaced_a_minute_before_its_expiry_or_halfway(monkeypatch, lifetime, kept, replaced):
    clock, service = Clock(monkeypatch), Service(lifetime)
    auth = exchanging(service)
    first = await auth.current()
    clock.passed = kept
    assert await auth.current() is first
    clock.passed = replaced
    assert (await auth.current()).reveal() != first.reveal()
    await auth.current()
    assert len(service.keys) == 2


@pytest.mark.asyncio
@pytest.mark.parametrize("lifetime", [None, -100.0])
async def test_a_token_without_a_credible_expiry_is_kept_until_it_is_rejected(lifetime):
    """A token that seems to be expired when it arrives means that the clocks differ."""
    auth = exchanging(Service(lifetime))
    token = await auth.current()
    assert await auth.current() is token
    renewed = await auth.renewed(token)
    assert renewed is not None
    assert renewed.reveal() != token.reveal()
    assert await auth.current() is renewed


@pytest.mark.asyncio
async def test_a_rejected_token_is_renewed_once_for_all_requests():
    service = Service(3600.0)
    auth = exchanging(service)
    token = await auth.current()
    renewed = await asyncio.gather(*(auth.renewed(token) for _ in range(8)))
    assert len({one.reveal() for one in renewed if one}) == 1
    assert len(service.keys) == 2


@pytest.mark.asyncio
async def test_a_failed_replacement_keeps_a_valid_token(monkeypatch):
    clock = Clock(monkeypatch)
    service = Service(3600.0, ConnectionFailed("down"), ConnectionFailed("down"), 3600.0)
    auth = exchanging(service)
    first = await auth.current()
    clock.passed = 3550.0
    for _ in range(5):
        assert await auth.current() is first
    assert len(service.keys) == 2, "not every request tries again"
    clock.passed = 3601.0  # expired: now it must be replaced
    with pytest.raises(ConnectionFailed):
        await auth.current()
    assert (await auth.current()).reveal().startswith("eyJ")


@pytest.mark.asyncio
async def test_an_exchange_that_fails():
    with pytest.raises(Authentication):
        await exchanging(Service(Authentication("no", status=401))).current()
    for body in (b"", b"[]", b"{}", b'{"jwt": 3}', b'{"jwt": ""}', b'{"jwt": "a\\nb"}', b"\xff"):

        async def exchange(key: Secret, body: bytes = body) -> Response:
            return Response(200, {}, body, "POST /api/v1/auth/token")

        with pytest.raises(InvalidResponse):
            await exchanging(exchange).current()


@pytest.mark.asyncio
async def test_a_key_that_is_a_token_is_not_exchanged():
    service = Service(3600.0)
    token = jwt(exp=time.time() + 1000)
    auth = exchanging(service, token)
    assert (await auth.current()).reveal() == token
    assert await auth.renewed(Secret(token)) is None
    assert service.keys == []
    expired = jwt(exp=time.time() - 100)
    with pytest.raises(ConfigError, match="expired 100 s ago") as caught:
        await exchanging(service, expired).current()
    assert expired not in str(caught.value)


@pytest.mark.asyncio
async def test_the_command_runs_once_per_exchange(tmp_path):
    count = tmp_path / "count"
    service = Service(None)
    auth = exchanging(service, "", f"echo x >> {count}; echo tml-run-$(wc -l < {count})")
    token = await auth.current()
    await auth.current()
    await auth.renewed(token)
    assert service.keys == ["tml-run-1", "tml-run-2"]


@pytest.mark.asyncio
async def test_a_service_can_require_the_command():
    service = Service(None)
    await exchanging(service, command="echo tml-from-command", source="credential_cmd").current()
    assert service.keys == ["tml-from-command"]
    with pytest.raises(ConfigError, match="TINKER_CREDENTIAL_CMD"):
        exchanging(service, source="credential_cmd")
    with pytest.raises(ConfigError, match="exchange"):
        exchanging(None, "", "echo tml-x")


@pytest.mark.parametrize(
    ("header", "expected"),
    [('Bearer error="invalid_token", error_description="over"', True), ('Bearer realm="x"', False), ("", False)],
)
def test_which_responses_reject_the_token(header, expected):
    assert rejects_token(Response(401, {"www-authenticate": header} if header else {}, b"")) is expected
