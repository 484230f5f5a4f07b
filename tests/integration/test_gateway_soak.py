"""Two thousand agents that come, go, come back and take over at random, with traffic all the while."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from async_agent import AsyncAgent
from wire import Agent, RawClient, close_frame, wait_until

from aiconexus.protocol import DIDKey

pytestmark = pytest.mark.soak

AGENTS = int(os.environ.get("AICONEXUS_SOAK_AGENTS", "2000"))
STEPS = int(os.environ.get("AICONEXUS_SOAK_STEPS", "6000"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("workers", "seed"), [(1, 1), (3, 2)])
async def test_every_message_is_delivered_or_comes_back(start_gateway, workers, seed):
    gateway = start_gateway("--workers", str(workers), "--message-rate", "0")
    rng = random.Random(seed)
    slots = asyncio.Semaphore(100)
    peers = [AsyncAgent(gateway.port, DIDKey.from_seed(rng.randbytes(32))) for _ in range(AGENTS)]

    async def connect(peer: AsyncAgent) -> None:
        async with slots:
            await peer.connect(resume=False)

    await asyncio.gather(*map(connect, peers))
    assert gateway.health()["sessions"] == AGENTS
    # Where an agent drops, what its own kernel had not read is lost to it, and nobody can know.
    lossy: set[str] = set()
    target_of: dict[str, str] = {}
    number = 0
    for step in range(STEPS):
        peer = rng.choice(peers)
        action = rng.random()
        if not peer.is_connected:
            await peer.connect(resume=rng.random() < 0.8)
        elif action < 0.05:
            lossy.add(peer.did)
            await peer.leave(rng.choice(["drop", "reset", "close"]))
        elif action < 0.08:
            await peer.connect(resume=rng.random() < 0.8)
        else:
            for _ in range(rng.choice([1, 1, 1, 5])):
                number += 1
                target = rng.choice(peers).did
                target_of[peer.send(target, number)] = target
        if step % 50 == 0:
            await asyncio.sleep(0)
    for peer in peers:
        if not peer.is_connected:
            await peer.connect(resume=True)
    for _ in range(2):  # the second time for what the first made others return
        await asyncio.gather(*(peer.sync() for peer in peers))

    sender_of = {name: peer for peer in peers for name in peer.sent}
    delivered = Counter(name for peer in peers for _, name in peer.got)
    errors: Counter[str] = sum((peer.errors for peer in peers), Counter())
    assert not [name for name, count in (delivered + errors).items() if count > 1], (
        "delivered or returned twice"
    )
    for peer in peers:
        assert set(peer.errors) <= set(peer.sent), "an ERROR for somebody else"
        last: dict[str, str] = {}
        for sender, name in peer.got:
            assert sender_of[name].did == sender
            assert last.get(sender, "") < name, "the order changed"
            last[sender] = name
    state = gateway.health()
    assert (state["sessions"], state["connections"], state["away"]) == (AGENTS, AGENTS, 0)
    missing = set(sender_of) - set(delivered) - set(errors)
    # Only what the kernel had for an agent that dropped: a message to it, or an ERROR for it.
    assert all(target_of[name] in lossy or sender_of[name].did in lossy for name in missing)
    assert len(missing) <= 0.002 * number
    for peer in peers:
        assert peer.writer is not None
        assert peer.reading is not None
        peer.writer.close()
        await peer.reading
    assert sum(peer.resumed for peer in peers) > 10


def usage(pid: int) -> tuple[int, int]:
    """Return bytes and open descriptors of a process; without shared memory, as the routing table is."""
    _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (resident - shared) * 4096, len(os.listdir(f"/proc/{pid}/fd"))


def test_connections_that_end_leave_nothing_behind(start_gateway):
    """Every kind of end, again and again: memory and descriptors stay where they were."""
    gateway = start_gateway("--workers", "1", "--away", "0", "--log-level", "error")
    (worker,) = gateway.worker_pids
    port = gateway.port
    key = DIDKey.generate()

    def cycle(number: int) -> None:
        kind = number % 8
        if kind == 0:
            Agent(port).close()
        elif kind == 1:
            Agent(port).drop()
        elif kind == 2:
            Agent(port).reset()
        elif kind == 3:
            Agent(port, register=False).drop()
        elif kind == 4:
            with RawClient(port) as client:
                client.write(b"nonsense\r\n\r\n")
                client.read_to_end()
        elif kind == 5:
            with Agent(port) as agent:
                agent.write(b"\x83\x80mask")
                agent.read_to_end()
        elif kind == 6:
            with Agent(port, key), Agent(port, key) as new:
                new.send(new.offer(new.did, 60_000), b"no JSON")
                new.read_text()
        else:
            with Agent(port, register=False) as agent:
                agent.send(b"no JSON")
                agent.write(close_frame(agent.read_close().close_code))
                agent.assert_ended()

    cycles = int(os.environ.get("AICONEXUS_SOAK_CYCLES", "1200"))
    for number in range(400):
        cycle(number)
    wait_until(lambda: gateway.health()["connections"] == 0)
    before = usage(worker)
    for number in range(cycles):
        cycle(number)
    wait_until(lambda: gateway.health()["connections"] == 0)
    gc.collect()
    wait_until(lambda: usage(worker)[1] <= before[1])
    after = usage(worker)
    # 1 KB per cycle would be a leaked connection.
    assert after[0] - before[0] < 500_000 + 400 * cycles
