"""What several nodes do when something fails while messages flow between them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from typing import Any

import pytest
from flock import Flock
from network import (
    LOST,
    STALE_SECONDS,
    entries,
)
from redis_server import RedisServer
from tcp_proxy import TcpProxy


class Outage:
    """A fault that begins and ends while two nodes are under load.

    Args:
        fault: Which one.
        redis: Which they share.
        replica: That takes over from it, if it is to fail over.
        proxies: Between each node and Redis, if the way is what fails.
        nodes: The nodes.
    """

    def __init__(
        self,
        fault: str,
        redis: RedisServer,
        replica: RedisServer | None,
        proxies: list[TcpProxy],
        nodes: list[Any],
    ) -> None:
        self.fault = fault
        self.redis = redis
        self.replica = replica
        self.proxies = proxies
        self.nodes = nodes

    @property
    def lets_nodes_hear(self) -> bool:
        """Whether nodes hear of each other meanwhile."""
        return self.fault in ("none", "redis slow", "node killed")

    def begin(self) -> None:
        if self.fault == "redis killed":
            self.redis.kill()
        elif self.fault == "redis stopped":
            self.redis.signal(signal.SIGSTOP)
        elif self.fault == "redis slow":
            for proxy in self.proxies:
                proxy.delay = 0.1  # each way
        elif self.fault == "redis fails over":
            assert self.replica is not None
            self.redis.kill()
            self.replica.command("REPLICAOF NO ONE")
            for proxy in self.proxies:
                proxy.redirect(self.replica.port)
        elif self.fault == "node cut off":
            self.proxies[1].cut()
        elif self.fault == "node killed":
            self.nodes[1].kill()

    def end(self) -> None:
        if self.fault == "redis killed":
            self.redis.start()
        elif self.fault == "redis stopped":
            self.redis.signal(signal.SIGCONT)
        elif self.fault == "redis slow":
            for proxy in self.proxies:
                proxy.delay = 0
        elif self.fault == "node cut off":
            self.proxies[1].mend()


@pytest.fixture
def make_outage(own_redis, make_proxy, start_node, tmp_path):
    """Start two nodes for a fault that is to come."""
    replicas: list[RedisServer] = []

    def make(fault: str) -> Outage:
        if fault == "redis fails over":
            (tmp_path / "replica").mkdir()
            primary = ("--replicaof", "127.0.0.1", str(own_redis.port))
            replicas.append(RedisServer(tmp_path / "replica", *primary))
        way_fails = fault in ("redis slow", "redis fails over", "node cut off")
        proxies = [make_proxy(own_redis.port) for _ in range(2 * way_fails)]
        nodes = [start_node(url=each.url) for each in proxies or (own_redis, own_redis)]
        for node in nodes:
            node.forgive(*LOST)
        return Outage(fault, own_redis, replicas[-1] if replicas else None, proxies, nodes)

    yield make
    for replica in replicas:
        replica.kill()


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "fault",
    [
        "none",
        "redis killed",
        "redis stopped",
        "redis slow",
        "redis fails over",
        "node cut off",
        "node killed",
    ],
)
async def test_nodes_under_load_lose_no_message_in_silence(fault, make_outage):
    """2,000 agents at two nodes of two workers, some of them away; each may come back to the other node."""
    outage = await asyncio.to_thread(make_outage, fault)
    nodes = outage.nodes
    alive = list(nodes)
    flock = Flock([node.port for node in nodes], 2_000, seed=7)
    await flock.start()
    total: Counter[str] = Counter()
    waited = 0
    for turn in range(6):
        is_faulty = turn in (2, 3)
        sent = []
        for step in range(4_000):
            if step == 2_000:
                waited += sum(node.health()["waiting_elsewhere"] for node in alive)
            if step == 2_000 and turn == 2:
                await asyncio.to_thread(outage.begin)
                if fault == "node killed":
                    flock.ports.remove(nodes[1].port)
                    alive.remove(nodes[1])
            if step % 100 == 50 and (not is_faulty or fault == "redis slow"):
                flock.roam()
            # Nobody hears what becomes of what waits elsewhere while Redis is lost.
            if step % 20 == 0 and (not is_faulty or outage.lets_nodes_hear):
                flock.rest(2.0)
            message = flock.send()
            if message is not None:
                sent.append(message)
            if step % 100 == 99:
                await asyncio.sleep(0.01)
        total.update(await flock.settle(sent, 30))
        if turn == 3:
            await asyncio.to_thread(outage.end)
    assert total["delivered"] > 10_000
    assert waited > 0
    redis = outage.replica or outage.redis
    deadline = time.monotonic() + STALE_SECONDS
    while entries(redis) != 2_000 or sum(node.health()["sessions"] for node in alive) != 2_000:
        assert time.monotonic() < deadline, (entries(redis), [node.health() for node in alive])
        await asyncio.sleep(0.1)
    await flock.leave()
