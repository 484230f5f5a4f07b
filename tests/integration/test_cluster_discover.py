"""Searches and watches of two nodes, while agents come and go."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from async_agent import AsyncAgent
from flock import Flock
from searches import dids, discover
from wire import Agent, assert_exchange

from aiconexus.client import GatewayClient
from aiconexus.protocol import DIDKey
from gateway.redis_line import read_script

LASTING, RESTLESS = 1_600, 400
ROUNDS = 8
SETTLE_SECONDS = 15.0


async def come_and_go(agent: AsyncAgent, ports: list[int], rng: random.Random, *, stays: bool) -> None:
    """Be here and there, leave in every way, and come back; at last stay, or leave for good."""
    for _ in range(4):
        agent.port = rng.choice(ports)
        await agent.connect(resume=True)
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        await agent.leave(rng.choice(["close", "reset", "end"]))
        await asyncio.sleep(rng.uniform(0.0, 0.5))
    agent.port = rng.choice(ports)
    await agent.connect(resume=True)
    if not stays:
        await agent.leave("close")


async def follow(client: GatewayClient, there: dict[str, str]) -> None:
    """Keep the list of who is there by what a watch tells."""
    async for event in client.watch(tag="restless"):
        if event.event == "leave":
            there.pop(event.agent.did, None)
        else:
            there[event.agent.did] = event.agent.status


def test_messages_between_nodes_do_not_wait_for_a_search(redis_server, make_proxy, start_node):
    proxy = make_proxy(redis_server.port)
    first, second = start_node("--workers", "1", url=proxy.url), start_node()
    with Agent(first.port) as one, Agent(second.port) as far:
        assert_exchange(one, far)
        # The search does not get to Redis, and what would leave on its connection does not either.
        proxy.held = read_script("discover").digest.encode()
        discover(one)
        assert proxy.is_holding.wait(10)
        for _ in range(10):
            assert_exchange(one, far)
        with Agent(first.port) as fresh:
            assert_exchange(far, fresh)
            proxy.release()
            assert dids(one.receive()["payload"]["agents"]) == sorted([one.did, far.did, fresh.did])


@pytest.mark.soak
async def test_who_stays_is_found_once_and_a_watch_knows_who_is_there(start_node):
    nodes = [start_node() for _ in range(2)]
    ports = [node.port for node in nodes]
    rng = random.Random(11)
    flock = Flock(ports, LASTING, seed=5, capabilities=[{"name": "last", "tags": ["all", "lasting"]}])
    restless = [
        AsyncAgent(ports[0], DIDKey.generate(), [{"name": "move", "tags": ["all", "restless"]}])
        for _ in range(RESTLESS)
    ]
    await flock.start()
    async with (
        GatewayClient(gateway_url=nodes[0].url, did_key=DIDKey.generate()) as first,
        GatewayClient(gateway_url=nodes[1].url, did_key=DIDKey.generate()) as second,
    ):
        clients = [first, second]
        for client in clients:
            await client.register()
        seen: list[dict[str, str]] = [{}, {}]
        watches = [
            asyncio.create_task(follow(client, there)) for client, there in zip(clients, seen, strict=True)
        ]
        stays = restless[::2]
        moves = [
            asyncio.create_task(come_and_go(agent, ports, rng, stays=number % 2 == 0))
            for number, agent in enumerate(restless)
        ]
        lasting = set(flock.by_did)
        for _ in range(ROUNDS):
            for client in clients:
                flock.roam()
                found = [agent.did async for agent in client.discover(tag="all")]
                assert len(found) == len(set(found))
                assert lasting <= set(found)
        await asyncio.gather(*moves)
        there = {agent.did: "online" for agent in stays}
        deadline = time.monotonic() + SETTLE_SECONDS
        while seen != [there, there]:
            assert time.monotonic() < deadline, [
                (len(there.items() - one.items()), len(one.items() - there.items())) for one in seen
            ]
            assert not any(watch.done() for watch in watches)
            await asyncio.sleep(0.05)
        for client in clients:
            found = [agent.did async for agent in client.discover(tag="all")]
            assert found == sorted(lasting | set(there))
        for watch in watches:
            watch.cancel()
        await asyncio.wait(watches)
    for agent in stays:
        await agent.leave("close")
    await flock.leave()
