"""The other side of `bench.connect`: an agent, and aiortc by itself, in one process. Talks in JSON lines.

The first line it writes is the agent's DID; then for each `{"offer": sdp}` the SDP of an answer, and for each
`{"close": true}`, when that connection is closed, null.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiconexus import Agent
from bench import bare


async def _serve(gateway: str) -> None:
    reader = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    connection = None
    async with Agent(gateway, host_addresses=["127.0.0.1"]) as agent:
        _say(agent.did)
        while line := await reader.readline():
            order = json.loads(line)
            if "offer" in order:
                connection, sdp = await bare.answer(order["offer"])
                _say(sdp)
            elif connection is not None:
                await connection.close()
                _say(None)


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
