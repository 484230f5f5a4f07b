"""A hostile gateway: a WebSocket relay before the real one, which may change whatever passes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from aiconexus.protocol.limits import SUBPROTOCOL


class Relay:
    """Every agent dials it; it dials the real gateway for each.

    Attributes:
        tamper: Is given every message that goes to an agent; returns what this agent gets instead.
        seen: All messages that went to agents, as they were before.
    """

    def __init__(self) -> None:
        self.upstream = ""
        self.url = ""
        self.tamper: Callable[[dict[str, Any]], list[dict[str, Any]]] = lambda message: [message]
        self.seen: list[dict[str, Any]] = []
        self._server: Server | None = None

    async def __aenter__(self) -> Relay:
        protocol = [Subprotocol(SUBPROTOCOL)]
        self._server = await serve(self._serve, "127.0.0.1", 0, subprotocols=protocol)
        self.url = f"ws://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/ws"
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, agent: ServerConnection) -> None:
        async with connect(self.upstream, subprotocols=[Subprotocol(SUBPROTOCOL)], proxy=None) as gateway:
            up = asyncio.ensure_future(self._up(agent, gateway))
            try:
                async for text in gateway:
                    for message in self._taken(text):
                        await agent.send(message)
            except ConnectionClosed:
                pass
            finally:
                up.cancel()
                await asyncio.wait({up})

    def _taken(self, text: str | bytes) -> list[str]:
        message = json.loads(text)
        self.seen.append(message)
        changed = self.tamper(message)
        # Untouched means untouched: a message that is written anew is not the same bytes.
        return [text if new is message else json.dumps(new) for new in changed]  # type: ignore[misc]

    @staticmethod
    async def _up(agent: ServerConnection, gateway: Any) -> None:
        try:
            async for text in agent:
                await gateway.send(text)
        except ConnectionClosed:
            pass
        await gateway.close()
