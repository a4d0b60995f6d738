"""Says where a command listens."""

import json

import typer


def announce_address(words: str, address: str, *, as_json: bool) -> None:
    """Prints an address, once connections are accepted.

    Args:
        words: what stands before it for people.
        address: a URL.
        as_json: whether JSON is wanted.
    """
    typer.echo(json.dumps({"address": address}) if as_json else f"{words} {address}")
