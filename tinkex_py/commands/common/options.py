"""Options that several commands have."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tinkex_py.client.service import AsyncServiceClient

BaseUrl = Annotated[
    str | None,
    typer.Option(help="where the service is; else TINKER_BASE_URL, else the hosted service", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, one object a line")]
Limit = Annotated[int, typer.Option(min=0, help="at most so many; 0 for all")]
Host = Annotated[str, typer.Option(help="address to listen on")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one")]


def service_at(base_url: str | None) -> "AsyncServiceClient":
    """A client of a service; the key comes from the environment or the credentials file.

    Raises:
        ConfigError: there is no key, or the address cannot be used.
    """
    from tinkex_py.client.service import AsyncServiceClient
    from tinkex_py.config import TinkexConfig

    # A command is not to wait for an hour until somebody has paid.
    return AsyncServiceClient(TinkexConfig(base_url=base_url or "", billing_pause=0.0))
