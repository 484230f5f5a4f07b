"""A relay with `websockets`, uvloop and orjson, as one writes it who knows them: a dict of sockets.

Messages are received and sent as bytes, which spares orjson and `websockets` a str each way.

Usage: `python -m bench.rival_websockets PORT`
"""

from __future__ import annotations

import signal
import sys

import orjson
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

agents: dict[str, ServerConnection] = {}


async def forward(message: bytes) -> bool:
    """Send a message to the agent in its `to`; tell whether that could be."""
    target = agents.get(orjson.loads(message)["to"])
    if target is None:
        return False
    try:
        await target.send(message, text=True)
    except ConnectionClosed:
        return False
    return True


async def serve_agent(connection: ServerConnection) -> None:
    """Register an agent by its first message, then forward its messages."""
    did = orjson.loads(await connection.recv(decode=False))["from"]
    agents[did] = connection
    try:
        await connection.send(b'{"type":"REGISTER"}', text=True)
        while True:
            message = await connection.recv(decode=False)
            if not await forward(message):
                await connection.send(b'{"type":"ERROR","payload":{"code":"UNKNOWN_AGENT"}}', text=True)
    except ConnectionClosed:
        pass
    finally:
        if agents.get(did) is connection:
            del agents[did]


async def main(port: int) -> None:
    """Serve 127.0.0.1:`port` until SIGTERM."""
    async with serve(
        serve_agent, "127.0.0.1", port, subprotocols=[Subprotocol("ioap.v1")], compression=None
    ) as server:
        server.get_loop().add_signal_handler(signal.SIGTERM, server.close)
        await server.wait_closed()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
