"""Fifty agents in two processes pair up at random; their gateway is killed while all of them work.

Nothing here waits for time to pass: the gateway is killed when every agent has reported that it is executing
for its partner, and the executions end when they are told to, after the gateway is gone.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import GatewayProcess

AGENTS = 50
SECONDS = 60.0
HOST = Path(__file__).parent.parent / "support" / "agent_host.py"


class AgentHost:
    """One process full of agents."""

    def __init__(self, process: Process) -> None:
        self.process = process

    @classmethod
    async def start(cls) -> AgentHost:
        command = [sys.executable, "-W", "error", str(HOST)]
        return cls(await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE))

    def tell(self, do: str, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}).encode() + b"\n")

    async def hear(self, name: str) -> Any:
        """Return what the next event says; it must be `name`."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), SECONDS)
        event = json.loads(line)
        assert list(event) == [name], event
        return event[name]


@pytest.fixture
async def hosts() -> AsyncIterator[list[AgentHost]]:
    hosts = [await AgentHost.start(), await AgentHost.start()]
    yield hosts
    for host in hosts:
        if host.process.returncode is None:
            host.tell("stop")
    for host in hosts:
        try:
            assert await asyncio.wait_for(host.process.wait(), SECONDS) == 0
        finally:
            if host.process.returncode is None:
                host.process.kill()
                await host.process.wait()


async def test_executions_of_fifty_agents_outlive_their_gateway(
    gateway: GatewayProcess, hosts: list[AgentHost], record_property: Callable[[str, object], None]
) -> None:
    for host in hosts:
        host.tell("start", gateway=gateway.url, count=AGENTS // len(hosts))
    homes = {did: host for host in hosts for did in await host.hear("dids")}

    seed = random.randrange(2**32)
    record_property("seed", seed)
    for generation in range(2):
        pairs = matching(list(homes), seed + generation)
        across = sum(homes[one] is not homes[other] for one, other in pairs)
        assert across, "two processes that never talk prove little"
        for host in hosts:
            host.tell("connect", pairs=pairs)
        assert sum([await host.hear("connected") for host in hosts]) == AGENTS // 2

        # Each executes for its partner, over the one connection that they share.
        both_ways = pairs + [(callee, caller) for caller, callee in pairs]
        for host in hosts:
            host.tell("hold", pairs=both_ways)
        started = {await homes[did].hear("started") for did in homes}
        assert started == set(homes)

        await asyncio.to_thread(gateway.kill)
        for host in hosts:
            host.tell("release")
        results = dict([await homes[did].hear("result") for did in homes])
        assert results == {caller: f"{caller}, held by {callee}" for caller, callee in both_ways}

        # Behind all this they return to the gateway, where new pairs can find each other.
        await asyncio.to_thread(gateway.start)
        for host in hosts:
            host.tell("registered")
        assert sum([await host.hear("registered") for host in hosts]) == AGENTS


def matching(dids: list[str], seed: int) -> list[tuple[str, str]]:
    """Pair everybody with somebody."""
    random.Random(seed).shuffle(dids)
    return list(zip(dids[::2], dids[1::2], strict=True))
