"""Options that several commands take."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from tinkex_py.commands.common.printing import echo, echo_json

if TYPE_CHECKING:
    from tinkex_py.client.service import AsyncServiceClient

BaseUrl = Annotated[
    str | None,
    typer.Option(help="URL of the service; default TINKER_BASE_URL, else the hosted service", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, one object per line")]
Limit = Annotated[int, typer.Option(min=0, help="maximum number of items; 0 lists all")]
Host = Annotated[str, typer.Option(help="address to listen on")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 selects a free one")]


def service_at(base_url: str | None) -> "AsyncServiceClient":
    """Creates a client of a service; the key comes from the environment or the credentials file.

    Raises:
        ConfigError: there is no key, or the URL is invalid.
    """
    from tinkex_py.client.service import AsyncServiceClient
    from tinkex_py.config import TinkexConfig

    # A command reports a missing payment at once instead of waiting for it.
    return AsyncServiceClient(TinkexConfig(base_url=base_url or "", billing_pause=0.0))


def announcement(words: str, *, as_json: bool) -> Callable[[str], None]:
    """Returns a function that prints the address on which a command listens, after `words` or as JSON."""
    return lambda address: echo_json({"address": address}) if as_json else echo(f"{words} {address}")
