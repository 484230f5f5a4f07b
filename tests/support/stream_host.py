"""An agent in a process of its own that streams, or reads a stream, and tells how much memory that took.

stream_host.py serve GATEWAY            -> {"did": ...}, and serves until stdin ends
stream_host.py read GATEWAY DID BYTES   -> {"received": n, "own_mb": n, "peer_mb": n}
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from aiconexus import Agent, capability

BLOCK_BYTES = 262_144


def peak_mb() -> float:
    """Return the most memory that this process has had, in MB; `getrusage` would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


class Source(Agent):
    @capability
    async def blocks(self, size: int) -> AsyncIterator[bytes]:
        for start in range(0, size, BLOCK_BYTES):
            yield bytes([start // BLOCK_BYTES % 256]) * min(BLOCK_BYTES, size - start)

    @capability
    async def peak(self) -> float:
        return peak_mb()


async def serve(gateway: str) -> None:
    async with Source(gateway, host_addresses=["127.0.0.1"]) as agent:
        print(json.dumps({"did": agent.did}), flush=True)  # noqa: T201 -- this is the protocol
        await asyncio.to_thread(sys.stdin.read)


async def read(gateway: str, did: str, size: str) -> None:
    async with Agent(gateway, host_addresses=["127.0.0.1"]) as me, me.connect(did) as peer:
        received = 0
        async for part in peer.stream("blocks", size=int(size)):
            assert part == bytes([received // BLOCK_BYTES % 256]) * len(part)
            received += len(part)
        figures = {"received": received, "own_mb": peak_mb(), "peer_mb": await peer.execute("peak")}
        print(json.dumps(figures), flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run({"serve": serve, "read": read}[sys.argv[1]](*sys.argv[2:]))
