"""`python -m training_service [--host HOST] [--port PORT]`"""

import argparse
import gc
import socket

import uvicorn
from fastapi import FastAPI

from training_service.app import create_app


class Server(uvicorn.Server):
    """Ends the jobs before it waits for open connections, because followers stay connected until their job ends."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        assert isinstance(self.config.app, FastAPI)
        await self.config.app.state.jobs.close()
        await super().shutdown(sockets)


def main() -> None:
    parser = argparse.ArgumentParser(prog="training_service")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    # A full garbage collection blocks the event loop. Without the objects of the imported libraries, mostly torch's,
    # which are never garbage, it takes 0.1 s less.
    gc.freeze()
    Server(uvicorn.Config(create_app(), host=arguments.host, port=arguments.port)).run()


if __name__ == "__main__":
    main()
