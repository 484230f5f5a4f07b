"""A worker of a gateway in the process of the test, which may look into it and break it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from aiconexus.protocol import DIDKey
from gateway import log
from gateway.config import Settings
from gateway.node import Node
from gateway.worker import Gateway


def run(test: Callable[[Gateway, int], Awaitable[None]], **settings: Any) -> None:
    """Run a gateway in this process, and `test` with it and its port beside it."""

    async def main() -> None:
        node = Node.create(1, 100)
        node.ledger.begin(0, 0)
        gateway = Gateway(Settings(**settings), DIDKey.generate(), node)
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        ready = asyncio.Event()
        serving = asyncio.create_task(gateway.serve(listener, ready.set))
        try:
            await ready.wait()
            await test(gateway, port)
        finally:
            serving.cancel()
            await asyncio.wait([serving])

    log.configure("error", "json")
    uvloop.run(main())


def closed(gateway: Gateway) -> object:
    """Return how many connections ended, by close code."""
    return gateway.node.totals()["closed"]
