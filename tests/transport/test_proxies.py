"""The proxy variables: equal to httpx on a table of values, apart from the intended differences."""

import http.server
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tinkex_py import ConfigError
from tinkex_py.transport.proxies import proxy_for

VARIABLES = [f"{kind}_PROXY" for kind in ("HTTP", "HTTPS", "ALL", "NO")]
HOSTS = [
    "http://service.example/v1",
    "http://service.example:8080/v1",
    "http://api.service.example/v1",
    "http://notservice.example/v1",
    "http://sub.localhost:9/v1",
    "http://10.1.2.3/v1",
    "http://10.1.2.3:9000/v1",
    "http://192.168.0.7/v1",
]
EXCLUSIONS = [
    "",
    "*",
    "service.example",
    ".service.example",
    "SERVICE.example",
    "service.example:8080",
    "service.example, 10.1.2.3",
    "other.example,service.example",
    "http://service.example",
    "https://service.example",
    "all://service.example",
    "localhost",
    "10.1.2.3",
    "10.1.2.3:9000",
    "example",
    " , ,",
]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def proxy() -> Iterator[str]:
    """Responds to every request that it should forward."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def nothing_else_is_reachable(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the proxy: every other address fails at once."""
    resolve = socket.getaddrinfo
    own = urlsplit(proxy).port

    def only_the_proxy(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        if port != own:
            raise socket.gaierror(socket.EAI_NONAME, "not reachable in this test")
        return resolve(host, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_the_proxy)


def httpx_uses_the_proxy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 204
    except httpx.ConnectError:
        return False


@pytest.mark.usefixtures("nothing_else_is_reachable")
@pytest.mark.parametrize("excluded", EXCLUSIONS)
def test_the_same_hosts_go_through_the_proxy_as_with_httpx(excluded: str, proxy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", excluded)
    ours = {url: proxy_for(urlsplit(url)) is not None for url in HOSTS}
    with httpx.Client(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)) as client:
        assert ours == {url: httpx_uses_the_proxy(client, url) for url in HOSTS}


@pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1", "127.8.8.8:1", "[::1]:8000"])
@pytest.mark.parametrize("value", ["http://proxy.example:3128", "not://the address of a proxy"])
def test_a_service_on_this_machine_needs_no_proxy(value: str, host: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, value)
    for scheme in ("http", "https"):
        assert proxy_for(urlsplit(f"{scheme}://{host}/v1")) is None


@pytest.mark.parametrize(
    ("excluded", "host"),
    [
        ("10.0.0.0/8", "10.1.2.3"),
        ("192.168.0.0/16,10.0.0.0/8", "10.1.2.3:9000"),
        ("[fd00::7]", "[fd00::7]:8000"),
        ("fd00::7", "[fd00::7]:8000"),
        ("fd00::/8", "[fd00::7]"),
    ],
)
def test_networks_and_addresses_in_brackets_are_excluded(excluded: str, host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", excluded)
    assert proxy_for(urlsplit(f"http://{host}/v1")) is None
    assert proxy_for(urlsplit("http://172.16.0.1/v1")) is not None


def test_the_variable_of_the_scheme_comes_before_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALL_PROXY", "http://everything.example:1")
    monkeypatch.setenv("HTTPS_PROXY", "https://user:p%40ss@secure.example:2")
    plain, secure = proxy_for(urlsplit("http://s.example")), proxy_for(urlsplit("https://s.example"))
    assert plain is not None
    assert secure is not None
    assert (plain.variable, plain.host, plain.port) == ("ALL_PROXY", "everything.example", 1)
    assert (secure.variable, secure.scheme, secure.host, secure.port) == ("HTTPS_PROXY", "https", "secure.example", 2)
    assert secure.credentials == ("user", "p@ss")
    assert "ss" not in repr(secure).partition("credentials")[2]


@pytest.mark.parametrize(
    "value",
    [
        "http://",
        "http://host:notaport",
        "http://host:99999",
        "http://[::1",
        "http://my proxy:3128",
        "http://proxy.example:3128/proxy.pac",
        "http://user:7/pass@proxy.example:3128",
        "ftp://proxy.example",
        "http://prö.example",
        "://x",
    ],
)
def test_an_invalid_proxy_is_an_error_that_names_its_variable(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", value)
    with pytest.raises(ConfigError, match="http_proxy"):
        proxy_for(urlsplit("http://service.example"))
    assert proxy_for(urlsplit("https://service.example")) is None, "it does not concern this service"


def test_a_socks_proxy_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy.example:1080")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(ConfigError, match=r"ALL_PROXY names a SOCKS proxy.*httpx\[socks\]"):
        proxy_for(urlsplit("http://service.example"))
