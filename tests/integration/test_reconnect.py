"""A peer that is gone, by its process or by the path to it, and comes back."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from turn_server import TurnServer

from aiconexus import Agent, Peer, capability
from aiconexus.core.keepalive import KeepAlive
from aiconexus.protocol.errors import PeerLostError

if TYPE_CHECKING:
    from conftest import GatewayProcess

SECONDS = 20.0
VICTIM = Path(__file__).parent.parent / "support" / "agent_process.py"
AT_ONCE = 5.0  # far from the 15 s after which the other side would notice


class Host(Agent):
    @capability
    async def greet(self, name: str) -> str:
        return f"Hello, {name}"


def notice_soon(peer: Peer) -> None:
    """Let this side take a silent peer for dead after half a second."""
    peer._timer.cancel()
    peer._keepalive = KeepAlive(asyncio.get_running_loop().time(), interval=0.1, timeout=0.5)
    peer._check()


class Victims:
    """Starts agents that have one key."""

    def __init__(self, gateway: str, key: Path) -> None:
        self._arguments = [gateway, str(key)]
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, *arguments: str) -> str:
        """Start one; return its DID."""
        command = [sys.executable, str(VICTIM), *self._arguments, *arguments]
        self.process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        return await self.line()

    async def line(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), SECONDS)).decode().strip()

    async def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            await self.process.wait()


@pytest.fixture
async def victims(gateway: GatewayProcess, tmp_path: Path) -> AsyncIterator[Victims]:
    made = Victims(gateway.url, tmp_path / "victim.key")
    yield made
    await made.kill()


async def test_killed_agent_that_is_started_anew_is_reached_at_once(
    gateway: GatewayProcess, victims: Victims
) -> None:
    async with Host(gateway.url, host_addresses=["127.0.0.1"]) as one:
        did = await victims.start()
        old = await one.connect(did)
        assert victims.process is not None
        assert await old.execute("pid") == victims.process.pid
        hanging = asyncio.ensure_future(old.execute("hang"))
        await victims.kill()
        notice_soon(old)
        with pytest.raises(PeerLostError, match="it was silent for"):
            await asyncio.wait_for(hanging, SECONDS)
        assert await victims.start() == did
        new = await asyncio.wait_for(one.connect(did), AT_ONCE)
        assert await new.execute("pid") == victims.process.pid
        assert list(one.peers.values()) == [new]


async def test_agent_that_is_started_anew_reaches_one_that_has_not_noticed(
    gateway: GatewayProcess, victims: Victims
) -> None:
    async with Host(gateway.url, host_addresses=["127.0.0.1"]) as one:
        did = await victims.start()
        old = await one.connect(did)
        hanging = asyncio.ensure_future(old.execute("hang"))
        await old.ping()
        await victims.kill()
        begin = time.monotonic()
        await victims.start(one.did)
        assert await victims.line() == "Hello, anew"
        assert time.monotonic() - begin < SECONDS / 2  # it did not wait for the old one to be noticed
        with pytest.raises(PeerLostError, match="a newer connection takes its place"):
            await asyncio.wait_for(hanging, AT_ONCE)
        assert victims.process is not None
        assert await (await one.connect(did)).execute("pid") == victims.process.pid


async def test_cut_path_that_comes_back(
    start_gateway: Callable[..., GatewayProcess], start_turn_server: Callable[..., TurnServer]
) -> None:
    path = start_turn_server()
    gateway = start_gateway(*path.gateway_options)
    async with Host(gateway.url, relay_only=True) as one, Host(gateway.url, relay_only=True) as two:
        old = await one.connect(two.did)
        there = two.peers[one.did]
        assert await old.execute("greet", name="you") == "Hello, you"
        path.signal(signal.SIGSTOP)
        notice_soon(old)
        with pytest.raises(PeerLostError, match="it was silent for"):
            await asyncio.wait_for(old.execute("greet", name="nobody"), AT_ONCE)
        path.signal(signal.SIGCONT)
        assert two.peers[one.did] is there  # it has not noticed
        new = await asyncio.wait_for(one.connect(two.did), AT_ONCE)
        assert await new.execute("greet", name="again") == "Hello, again"
        assert two.peers[one.did] is not there
        back = await two.connect(one.did)
        assert await back.execute("greet", name="too") == "Hello, too"
