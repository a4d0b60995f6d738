"""Which proxy the environment names for a service: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`.

The rules are those of httpx, with two differences: a network in `NO_PROXY` such as `10.0.0.0/8` covers its addresses,
in brackets too, and a proxy that cannot be used is an error only where the service needs it.
"""

import importlib.util
import ipaddress
import os
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from tinkex_py.errors import ConfigError

DEFAULT_PORTS = {"http": 80, "https": 443}
_SCHEMES = ("http", "https", "socks5", "socks5h")
_WAY_OUT = "give something like http://host:port, or unset it"


@dataclass(frozen=True)
class ProxyAddress:
    """A proxy.

    Attributes:
        variable: the environment variable that names it.
        scheme: "http", "https", "socks5" or "socks5h".
        host: its name or address.
        port: None is the scheme's default.
        credentials: user and password, or None.
    """

    variable: str
    scheme: str
    host: str
    port: int | None
    credentials: tuple[str, str] | None = field(repr=False)


def proxy_for(service: SplitResult) -> ProxyAddress | None:
    """The proxy for a service; None if it is asked directly.

    Args:
        service: the service's address.

    Raises:
        ConfigError: naming the variable whose value cannot be used.
    """
    settings = urllib.request.getproxies()
    kind = next((kind for kind in (service.scheme, "all") if settings.get(kind)), None)
    if kind is None or _is_excluded(service, settings.get("no", "")):
        return None
    return _address(_variable(kind), settings[kind])


def _variable(kind: str) -> str:
    """The name by which a user knows a setting."""
    name = f"{kind}_proxy"
    return name if os.environ.get(name) else name.upper()


def _address(variable: str, value: str) -> ProxyAddress:
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if not host or not value.isascii():
        raise ConfigError(f"the environment variable {variable} is not the address of a proxy; {_WAY_OUT}")
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"the environment variable {variable} names a proxy of the unknown kind {parts.scheme!r}; "
            f"known are {', '.join(_SCHEMES)}"
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
    """Whether an entry of NO_PROXY, `[scheme://]host[:port]`, is about a service; `.host` is only its subdomains."""
    host = service.hostname or ""
    scheme, separator, place = entry.rpartition("://")
    if separator and scheme not in ("all", service.scheme):
        return False
    network = _network(place)
    if network is not None:
        return _is_in(host, network)
    try:
        parts = urlsplit(f"//{place}")
        name, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    if port is not None and port != (service.port or DEFAULT_PORTS[service.scheme]):
        return False
    network = _network(name)
    if network is not None:
        return _is_in(host, network)
    if separator or name == "localhost":
        return host == name
    return host.endswith(name) if name.startswith(".") else host == name or host.endswith(f".{name}")


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _is_in(host: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return ipaddress.ip_address(host) in network
    except ValueError:
        return False
