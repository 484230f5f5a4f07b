"""Redis that is lost for long, or slow, while nodes have much to tell it."""

from __future__ import annotations

import asyncio
import signal
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Any

import pytest
from flock import Flock
from network import (
    LOST,
    RECOVERY_SECONDS,
    STALE_SECONDS,
    assert_unreachable,
    entries,
    exchange_soon,
    wait_until_confirmed,
)
from searches import dids, found
from wire import Agent, assert_exchange, wait_until

# Longer than leases, deadlines and the 30 s for which an agent is away are together.
OUTAGE_SECONDS = 30.0
# 1,250 agents of each of four workers, 200 in a round trip of 0.4 s, and as much again for a busy machine.
ANNOUNCE_SECONDS = 30.0


def ready(node) -> int:
    """Return the status of GET /ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{node.port}/ready", timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def events(node, name: str) -> list[dict[str, Any]]:
    return [line for line in node.log_lines() if line["event"] == name]


def count_found(port: int, tag: str) -> int:
    with Agent(port) as agent:
        return len(found(agent, tag=tag, limit=200))


@pytest.mark.soak
@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_redis_that_is_lost_for_half_a_minute_parts_the_nodes_and_no_more(fault, own_redis, start_node):
    nodes = [start_node("--redis-required", url=own_redis.url) for _ in range(2)]
    first, second = nodes
    for node in nodes:
        node.forgive(*LOST)
    with ExitStack() as stack:
        here = [stack.enter_context(Agent(first.port)) for _ in range(2)]
        there = [stack.enter_context(Agent(second.port)) for _ in range(2)]
        roams, leaves = (stack.enter_context(Agent(node.port)) for node in (second, first))
        assert_exchange(here[0], there[0])
        assert_exchange(leaves, roams)
        wait_until_confirmed(*nodes)
        assert [ready(node) for node in nodes] == [200, 200]
        if fault == "killed":
            own_redis.kill()
        else:
            own_redis.signal(signal.SIGSTOP)
        lost_at = time.monotonic()
        is_known, slowest, turns, in_a_row = False, 0.0, 0, 0
        while time.monotonic() - lost_at < OUTAGE_SECONDS:
            turns += 1
            began = time.monotonic()
            assert_exchange(*here)
            assert_exchange(*there)
            assert_exchange(roams, there[0])
            slowest = max(slowest, time.monotonic() - began)
            states = [ready(node) for node in nodes]
            in_a_row = in_a_row + 1 if states == [503, 503] else 0
            if in_a_row >= 20 and not is_known:  # any worker answers, and each notices by itself
                is_known = True
                # Meanwhile one goes to the other node, and another goes for good.
                moved = stack.enter_context(Agent(first.port, roams.key))
                leaves.close()
            elif is_known:
                assert states == [503, 503]
                assert_exchange(moved, here[0])
                for sender, receiver in ((here[0], there[0]), (there[1], here[1])):
                    assert_unreachable(sender, receiver.did, "unreachable")
            time.sleep(0.02)
        assert is_known
        assert turns > 100
        assert slowest < 2.5, "messages of one node waited for Redis"  # which is given 3 s to answer
        if fault == "killed":
            own_redis.start()
        else:
            own_redis.signal(signal.SIGCONT)
        back_at = time.monotonic()

        def left() -> float:
            return RECOVERY_SECONDS - (time.monotonic() - back_at)

        for one, other in zip(here, there, strict=True):
            exchange_soon(one, other, left())
        # Until it is closed, what comes from its node goes to the old session.
        assert roams.read_close().close_code == 4504
        exchange_soon(there[0], moved, left())
        present = sorted(agent.did for agent in (*here, *there, moved))
        wait_until(lambda: dids(found(here[0])) == dids(found(there[0])) == present, left())
        wait_until(lambda: [ready(node) for node in nodes] == [200, 200], left())
        wait_until(lambda: entries(own_redis) == len(present), left())
        wait_until(lambda: sum(node.health()["sessions"] for node in nodes) == len(present), left())


@pytest.mark.soak
@pytest.mark.timeout(300)
async def test_a_slow_redis_that_comes_back_empty_is_filled_while_the_leases_hold(
    own_redis, make_proxy, start_node
):
    """5,000 agents at two nodes of two workers; a round trip to Redis takes 0.4 s."""
    proxy = make_proxy(own_redis.port)
    nodes = [start_node(url=proxy.url) for _ in range(2)]
    for node in nodes:
        node.forgive(*LOST)
    capabilities: list[dict[str, object]] = [{"name": "wait", "description": "Waits. " * 20, "tags": ["all"]}]
    flock = Flock([node.port for node in nodes], 5_000, seed=3, capabilities=capabilities)
    await flock.start()
    assert entries(own_redis) == 5_000
    met = [len(events(node, "node met")) for node in nodes]
    proxy.delay = 0.2
    await asyncio.to_thread(own_redis.kill)
    await asyncio.to_thread(own_redis.start)
    deadline = time.monotonic() + ANNOUNCE_SECONDS
    before = 0
    while (now := entries(own_redis)) != 5_000:
        assert now >= before, "what was announced was removed again"
        assert time.monotonic() < deadline, now
        before = now
        await asyncio.sleep(0.1)
    # Longer than a lease: whoever takes another for dead, or its agents for its own, does so now.
    until = time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        assert entries(own_redis) == 5_000
        await asyncio.sleep(0.1)
    for node, before in zip(nodes, met, strict=True):
        assert len(events(node, "joined")) == 4, "a lease has ended"  # of two workers, twice
        assert events(node, "node gone") == []
        assert len(events(node, "node met")) == 2 * before
    proxy.delay = 0
    sent = [message for _ in range(500) if (message := flock.send()) is not None]
    assert await flock.settle(sent, 30) == {"delivered": 500}
    for port in flock.ports:
        counted = await asyncio.to_thread(count_found, port, "all")
        assert counted == 5_000
    await flock.leave()
