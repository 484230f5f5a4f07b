"""An agent in a process of its own, to be killed: prints its DID once others can find it."""

from __future__ import annotations

import asyncio
import os
import sys

from aiconexus import Agent, capability


class Victim(Agent):
    """Tells in which process it runs, or hangs."""

    @capability
    async def pid(self) -> int:
        return os.getpid()

    @capability
    async def hang(self) -> None:
        await asyncio.Event().wait()


async def main(gateway: str, identity: str, caller: str | None = None) -> None:
    """Serve; first call `caller`, if there is one."""
    async with Victim(gateway, identity, host_addresses=["127.0.0.1"]) as victim:
        print(victim.did, flush=True)  # noqa: T201
        if caller is not None:
            async with victim.connect(caller) as peer:
                print(await peer.execute("greet", name="anew"), flush=True)  # noqa: T201
        await victim.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
