"""Finding agents and watching them with the SDK, on a real gateway that is killed and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from aiconexus import Agent, GatewayClient, PresenceEvent, capability
from aiconexus.client import Backoff, ClientState
from aiconexus.protocol import DIDKey

QUICK = Backoff(base=0.05, maximum=0.2)


class Adder(Agent):
    """Adds."""

    @capability(tags=["math"])
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b


def client(gateway: Any) -> GatewayClient:
    return GatewayClient(gateway.url, DIDKey.generate(), backoff=QUICK)


class Events:
    """The events of a watch, read one by one."""

    def __init__(self, events: AsyncIterator[PresenceEvent]) -> None:
        self._events = events

    async def next(self) -> tuple[str, str]:
        event = await asyncio.wait_for(anext_of(self._events), 20)
        return event.event, event.agent.did


async def anext_of(events: AsyncIterator[Any]) -> Any:
    return await events.__anext__()


async def test_an_agent_finds_others_by_what_they_can_do(gateway):
    async with (
        Adder(gateway.url) as adder,
        Agent(gateway.url) as other,
        Adder(gateway.url, hidden=True) as hidden,
    ):
        found = [each async for each in other.discover(tag="math")]
        assert [each.did for each in found] == [adder.did]
        (add,) = found[0].capabilities
        assert (add.name, add.description) == ("add", "Add two numbers.")
        assert add.input is not None
        assert set(add.input["properties"]) == {"a", "b"}
        assert [each.did async for each in other.discover(dids=[hidden.did])] == [hidden.did]
        assert [each.did async for each in other.discover(text="TWO numbers", limit=1)] == [adder.did]
        assert [each async for each in other.discover(capability="sub")] == []


async def test_three_hundred_agents_come_page_by_page(gateway):
    agents = [client(gateway) for _ in range(300)]
    for agent in agents:
        await agent.register([{"name": "one", "description": "x" * 900}])
    async with client(gateway) as asker:
        await asker.register()
        found = [each.did async for each in asker.discover(capability="one")]
        assert found == sorted(agent.did for agent in agents)
        assert len([each async for each in asker.discover(limit=150)]) == 150
    for agent in agents:
        await agent.close()


async def test_a_search_that_waits_for_the_gateway_finds_it_with_another_key(gateway):
    async with client(gateway) as searcher, client(gateway) as found:
        for agent in (searcher, found):
            await agent.register(["add"])
        assert searcher.session is not None
        before = searcher.session.gateway_did
        gateway.kill()
        await searcher.wait_for(ClientState.RECONNECTING, timeout=20)
        search = asyncio.ensure_future(anext_of(searcher.discover(dids=[searcher.did])))
        gateway.start()
        assert (await asyncio.wait_for(search, 20)).did == searcher.did
        assert searcher.session.gateway_did != before


async def test_a_watch_goes_on_after_the_gateway_was_killed_and_tells_what_has_changed(gateway):
    async with client(gateway) as watcher, client(gateway) as stays, client(gateway) as changes:
        await watcher.register()
        await stays.register(["add"])
        await changes.register(["add"])
        leaves = client(gateway)
        await leaves.register(["add"])
        watch = watcher.watch(capability="add")
        events = Events(watch)
        assert {await events.next() for _ in range(3)} == {
            ("join", agent.did) for agent in (stays, changes, leaves)
        }
        await changes.update(["add", "sub"])
        assert await events.next() == ("update", changes.did)
        await leaves.close()
        assert await events.next() == ("leave", leaves.did)
        async with client(gateway) as fresh:
            await fresh.register(["add"])
            assert await events.next() == ("join", fresh.did)
            gateway.kill()
        gateway.start()
        # Those that are back before the watcher asks were never away for it.
        seen = set()
        while ("leave", fresh.did) not in seen:
            seen.add(await events.next())
        async with client(gateway) as late:
            await late.register(["add"])
            while (event := await events.next()) != ("join", late.did):
                seen.add(event)
        assert {did for _, did in seen} <= {stays.did, changes.did, fresh.did}
        await watch.aclose()


@pytest.mark.parametrize("how", ["left", "closed"])
async def test_a_watch_ends(how: str, gateway, start_gateway: Callable[..., Any]):
    async with client(gateway) as watcher, client(gateway) as agent:
        await watcher.register()
        await agent.register(["add"])
        count = 0
        async for _ in watcher.watch():
            count += 1
            if how == "left":
                break
            if count == 2:
                await watcher.close()
        assert count == (1 if how == "left" else 2)
