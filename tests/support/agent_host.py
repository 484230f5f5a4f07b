"""A process full of agents, told what to do in JSON lines on stdin: see `test_fifty_agents.py`.

    {"do": "start", "gateway": url, "count": 25}   -> {"dids": [...]}
    {"do": "connect", "pairs": [[caller, callee], ...]} -> {"connected": n}
    {"do": "hold", "pairs": [...]}                 -> {"started": callee} for each that runs here
    {"do": "release"}                              -> {"result": [caller, text]} for each held call
    {"do": "registered"}                           -> {"registered": n}, once all are (again)
    {"do": "stop"}                                 -> the process ends

Only what concerns an agent of this process is done here; the rest is for the other process.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import Any

from aiconexus import Agent, capability
from aiconexus.client import ClientState

SECONDS = 60.0


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)  # noqa: T201 -- this is the protocol


class Holder(Agent):
    """Holds what it is given until it is told to give it back."""

    released: asyncio.Event

    @capability
    async def hold(self, text: str) -> str:
        say(started=self.did)
        await self.released.wait()
        return f"{text}, held by {self.did}"


class Host:
    def __init__(self) -> None:
        self.agents: dict[str, Holder] = {}
        self.calls: set[asyncio.Task[None]] = set()

    def mine(self, pairs: list[tuple[str, str]]) -> list[tuple[Holder, str]]:
        return [(self.agents[caller], callee) for caller, callee in pairs if caller in self.agents]

    async def call(self, agent: Holder, callee: str) -> None:
        result = await agent.peers[callee].execute("hold", text=agent.did, timeout=SECONDS)
        say(result=[agent.did, result])

    async def do(self, stack: AsyncExitStack, order: dict[str, Any]) -> None:
        pairs = order.get("pairs", [])
        match order["do"]:
            case "start":
                for _ in range(order["count"]):
                    agent = Holder(order["gateway"], host_addresses=["127.0.0.1"])
                    agent.released = asyncio.Event()
                    self.agents[agent.did] = await stack.enter_async_context(agent)
                say(dids=list(self.agents))
            case "connect":
                for agent in self.agents.values():
                    agent.released.clear()
                mine = self.mine(pairs)
                await asyncio.gather(*(agent.connect(callee, timeout=SECONDS) for agent, callee in mine))
                say(connected=len(mine))
            case "hold":
                for agent, callee in self.mine(pairs):
                    self.calls.add(asyncio.ensure_future(self.call(agent, callee)))
            case "release":
                for agent in self.agents.values():
                    agent.released.set()
                await asyncio.gather(*self.calls)
                self.calls.clear()
            case "registered":
                for agent in self.agents.values():
                    await agent.client.wait_for(ClientState.REGISTERED, timeout=SECONDS)
                say(registered=len(self.agents))


async def main() -> None:
    host = Host()
    async with AsyncExitStack() as stack:
        while True:
            order = json.loads(await asyncio.to_thread(sys.stdin.readline))
            if order["do"] == "stop":
                return
            await host.do(stack, order)


if __name__ == "__main__":
    asyncio.run(main())
