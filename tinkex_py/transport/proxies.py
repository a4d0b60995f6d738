"""The proxy variables of the environment: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`.

The rules are those of httpx, with three differences: `NO_PROXY` may contain networks such as `10.0.0.0/8` and addresses
in brackets, an unusable proxy is an error only if the service needs it, and services on this machine need none.
"""

import base64
import importlib.util
import ipaddress
import os
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from tinkex_py.errors import ConfigError
from tinkex_py.serving import is_loopback

DEFAULT_PORTS = {"http": 80, "https": 443}
_SCHEMES = ("http", "https", "socks5", "socks5h")
_WAY_OUT = "set it to an address such as http://host:port, or unset it"


@dataclass(frozen=True)
class ProxyAddress:
    """A proxy.

    Attributes:
        variable: the environment variable that names it.
        scheme: "http", "https", "socks5" or "socks5h".
        host: name or address.
        port: None is the default of the scheme.
        credentials: user and password, or None.
    """

    variable: str
    scheme: str
    host: str
    port: int | None
    credentials: tuple[str, str] | None = field(repr=False)

    @property
    def secrets(self) -> list[str]:
        """The password, and the value of the header that sends it; empty without a password."""
        if self.credentials is None or not self.credentials[1]:
            return []
        return [self.credentials[1], base64.b64encode(":".join(self.credentials).encode()).decode()]

    def __str__(self) -> str:
        return f"the proxy {self.host!r}, which the environment variable {self.variable} names"


def proxy_for(service: SplitResult) -> ProxyAddress | None:
    """Returns the proxy for the address of a service; None for a direct connection.

    Raises:
        ConfigError: the value of a variable is unusable; the message names the variable.
    """
    if is_loopback(service.hostname or ""):
        return None
    settings = urllib.request.getproxies()
    kind = next((kind for kind in (service.scheme, "all") if settings.get(kind)), None)
    if kind is None or _is_excluded(service, settings.get("no", "")):
        return None
    variable = f"{kind}_proxy"
    return _address(variable if os.environ.get(variable) else variable.upper(), settings[kind])


def _address(variable: str, value: str) -> ProxyAddress:
    value = value.strip()
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    # A password with an unescaped "/" looks like a path.
    is_complete = parts.path in ("", "/") and not parts.query and not parts.fragment
    if not host or not is_complete or not value.isascii() or any(letter.isspace() for letter in value):
        raise ConfigError(f"the environment variable {variable} is not the address of a proxy; {_WAY_OUT}")
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"the environment variable {variable} names a proxy with the unknown scheme {parts.scheme!r}: use one of "
            f"{', '.join(_SCHEMES)}"
        )
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ConfigError(
            f"the environment variable {variable} names a SOCKS proxy, which needs the package socksio: "
            "pip install 'httpx[socks]', or unset it"
        )
    user = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    return ProxyAddress(variable, parts.scheme, host, port, user)


def _is_excluded(service: SplitResult, no_proxy: str) -> bool:
    entries = [entry.strip().lower() for entry in no_proxy.split(",")]
    return "*" in entries or any(_covers(entry, service) for entry in entries if entry)


def _covers(entry: str, service: SplitResult) -> bool:
    """Whether an entry of NO_PROXY, `[scheme://]host[:port]`, covers a service; `.host` covers only subdomains."""
    host = service.hostname or ""
    scheme, separator, address = entry.rpartition("://")
    if separator and scheme not in ("all", service.scheme):
        return False
    name, port = address, None
    if _network(address) is None:
        try:
            parts = urlsplit(f"//{address}")
            name, port = parts.hostname or "", parts.port
        except ValueError:
            return False
    if port is not None and port != (service.port or DEFAULT_PORTS[service.scheme]):
        return False
    network = _network(name)
    if network is not None:
        try:
            return ipaddress.ip_address(host) in network
        except ValueError:
            return False
    if separator or name == "localhost":
        return host == name
    return host.endswith(name) if name.startswith(".") else host == name or host.endswith(f".{name}")


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
