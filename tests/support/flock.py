"""Many agents at one or several gateways, and the account of everything they say to each other."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from async_agent import AsyncAgent

from aiconexus.protocol import DIDKey


class Flock:
    """Many agents that come back when their connection breaks; every message is accounted for.

    Each time they come to one of `ports` at random.
    """

    def __init__(
        self,
        ports: Sequence[int],
        count: int,
        seed: int,
        capabilities: list[dict[str, object]] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.ports = list(ports)
        self.agents = [
            AsyncAgent(ports[0], DIDKey.from_seed(self.rng.randbytes(32)), capabilities) for _ in range(count)
        ]
        self.by_did = {agent.did: agent for agent in self.agents}
        self.slots = asyncio.Semaphore(64)
        self.tasks: list[asyncio.Task[None]] = []
        self.number = 0
        self.is_leaving = False
        self.roaming: dict[AsyncAgent, asyncio.Task[None]] = {}
        self.resting: dict[AsyncAgent, float] = {}

    async def start(self) -> None:
        await asyncio.gather(*(self._connect(agent) for agent in self.agents))
        self.tasks = [asyncio.create_task(self._keep(agent)) for agent in self.agents]

    async def _connect(self, agent: AsyncAgent) -> None:
        while True:
            async with self.slots:
                try:
                    agent.port = self.rng.choice(self.ports)
                    await agent.connect(resume=True)
                    return
                except (OSError, asyncio.IncompleteReadError, AssertionError, ValueError):
                    if agent.writer is not None:
                        agent.writer.close()
                        agent.writer = None
            await asyncio.sleep(self.rng.uniform(0.05, 0.2))

    async def _keep(self, agent: AsyncAgent) -> None:
        while True:
            reading = agent.reading
            assert reading is not None
            await asyncio.wait([reading])
            if self.is_leaving:
                return
            if agent in self.roaming:
                await asyncio.wait([self.roaming[agent]])
            if agent.reading is not reading:
                continue  # it has roamed
            if agent.writer is not None:
                agent.writer.close()
            agent.writer = agent.reading = None
            await asyncio.sleep(self.resting.get(agent, 0))
            self.resting.pop(agent, None)
            await self._connect(agent)

    def roam(self) -> None:
        """Let a random agent register anew, perhaps elsewhere, while its connection is still there.

        One that is dropped instead loses what its kernel has taken.
        """
        agent = self.rng.choice(self.agents)
        if not self._is_settled(agent):
            return
        agent.port = self.rng.choice(self.ports)
        task = self.roaming[agent] = asyncio.create_task(agent.connect(resume=True))
        task.add_done_callback(lambda _: self.roaming.pop(agent))

    def rest(self, seconds: float) -> None:
        """Let a random agent be away for a time; messages wait for it.

        It reads up to the end of its connection: what was written to that has not been lost.
        """
        agent = self.rng.choice(self.agents)
        if self._is_settled(agent) and agent.writer is not None and not agent.is_reset():
            self.resting[agent] = seconds
            agent.writer.write_eof()

    def _is_settled(self, agent: AsyncAgent) -> bool:
        """Tell whether an agent is neither coming nor going."""
        return (
            agent.reading is not None
            and not agent.reading.done()
            and agent not in self.roaming
            and agent not in self.resting
        )

    @property
    def present(self) -> list[AsyncAgent]:
        return [agent for agent in self.agents if agent.reading is not None and not agent.reading.done()]

    def send(self) -> tuple[str, AsyncAgent, int] | None:
        """Send a message from one random agent to another; return its id, its sender and the connection."""
        sender, target = self.rng.choice(self.agents), self.rng.choice(self.agents)
        if not self._is_settled(sender):
            return None
        self.number += 1
        return sender.send(target.did, self.number), sender, sender.generation

    async def settle(self, sent: list[tuple[str, AsyncAgent, int]], seconds: float) -> dict[str, int]:
        """Wait until every message is delivered, or answered, or its sender's connection broke."""
        await asyncio.gather(*self.roaming.values())
        deadline = time.monotonic() + seconds
        while True:
            delivered = Counter(name for agent in self.agents for _, name in agent.got)
            lost = []
            outcome: Counter[str] = Counter()
            for name, sender, generation in sent:
                if name in delivered:
                    outcome["delivered"] += 1
                elif name in sender.errors:
                    outcome["answered"] += 1
                elif sender.generation != generation or sender.reading is None or sender.reading.done():
                    outcome["sender broke"] += 1
                else:
                    lost.append(name)
            if not lost and len(self.present) == len(self.agents):
                break
            assert time.monotonic() < deadline, (
                f"{len(lost)} of {len(sent)} lost, {len(self.present)} agents back, {outcome}"
            )
            await asyncio.sleep(0.05)
        assert set(delivered.values()) <= {1}, "delivered twice"
        assert all(set(agent.errors.values()) <= {1} for agent in self.agents), "answered twice"
        for agent in self.agents:
            last: dict[str, str] = {}
            for sender_did, name in agent.got:
                assert last.get(sender_did, "") < name, "the order changed"
                last[sender_did] = name
            agent.got.clear()
            agent.errors.clear()
        return outcome

    async def leave(self) -> None:
        self.is_leaving = True
        for agent in self.agents:
            if agent.writer is not None:
                agent.writer.close()
        await asyncio.wait(self.tasks)
        for agent in self.agents:
            if agent.writer is not None:
                with suppress(OSError):
                    await agent.writer.wait_closed()
