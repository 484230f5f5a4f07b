"""Agents that meet over a real TURN server, with credentials that the gateway made."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from turn_server import SECRET, TurnServer

from aiconexus import Agent, Intent, Peer, Quote, capability, current_call
from aiconexus.protocol.errors import PeerConnectError, PeerRefusedError

if TYPE_CHECKING:
    from conftest import GatewayProcess

SECONDS = 20.0  # for anything that must happen at all
ERROR_SECONDS = 10.0  # for a fault of the servers to be told


class Worker(Agent):
    """Doubles numbers, and offers no address of its own."""

    def __init__(self, gateway: str, **options: Any) -> None:
        super().__init__(gateway, relay_only=True, **options)

    cancelled: asyncio.Event

    @capability(tags=["arithmetic"])
    async def double(self, value: int) -> int:
        return 2 * value

    @capability
    async def blocks(self, count: int) -> AsyncIterator[bytes]:
        for number in range(count):
            yield bytes([number % 256]) * 50_000

    @capability
    async def measure(self, data: AsyncIterator[bytes]) -> int:
        return sum([len(chunk) async for chunk in data])

    @capability
    async def wait(self) -> None:
        current_call().progress("waiting")
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def on_intent(self, intent: Intent) -> Quote:
        return Quote(status="understood", cost="nothing")


async def source(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield bytes(50_000)


async def cancel_what_waits(peer: Peer, there: Worker) -> None:
    """Cancel a call that has begun to run, and see it end over there."""
    there.cancelled = asyncio.Event()
    begun = asyncio.Event()
    call = asyncio.ensure_future(peer.execute("wait", on_progress=lambda _: begun.set()))
    await asyncio.wait_for(begun.wait(), SECONDS)
    call.cancel()
    await asyncio.wait_for(there.cancelled.wait(), SECONDS)


async def test_two_agents_work_together_over_a_relay(
    start_gateway: Callable[..., GatewayProcess], turn_server: TurnServer
) -> None:
    more = "--turn-url", turn_server.tcp_url, "--log-level", "debug"
    gateway = start_gateway(*turn_server.gateway_options, *more)
    async with Worker(gateway.url) as one, Worker(gateway.url) as two:
        (found,) = [found async for found in one.discover(tag="arithmetic", dids=[two.did])]
        async with one.connect(found.did, timeout=SECONDS) as peer:
            assert await peer.intent("Double a number for me") == Quote(status="understood", cost="nothing")
            assert await peer.execute("double", value=21) == 42
            received = b"".join([part async for part in peer.stream("blocks", count=20)])
            assert received == b"".join(bytes([number]) * 50_000 for number in range(20))
            assert await peer.execute("measure", data=source(20)) == 1_000_000
            await cancel_what_waits(peer, two)
            assert await peer.execute("measure", data=bytes(300_000)) == 300_000
            assert peer.path is not None
            assert peer.path.kind == "relay"
            assert two.peers[one.did].path.kind == "relay"
    for agent in (one, two):  # whoever runs the TURN server sees who used it
        assert f":{agent.did}" in turn_server.log
    assert one.did in gateway.log
    assert SECRET not in gateway.log


async def test_wrong_secret_is_a_clear_error_in_time(
    start_gateway: Callable[..., GatewayProcess], turn_server: TurnServer
) -> None:
    gateway = start_gateway("--turn-url", turn_server.url, "--turn-secret", "not that of the server")
    async with Worker(gateway.url) as one, Worker(gateway.url) as two:
        with pytest.raises(PeerConnectError) as caught:
            await asyncio.wait_for(one.connect(two.did), ERROR_SECONDS)
        assert f"{turn_server.url} refused the credentials (401 Unauthorized)" in str(caught.value)
        assert "--turn-secret" in str(caught.value)


async def test_turn_server_that_is_not_there_is_a_clear_error_in_time(
    start_gateway: Callable[..., GatewayProcess],
) -> None:
    nobody = "turn:127.0.0.1:9"
    gateway = start_gateway("--turn-url", nobody, "--turn-secret", SECRET)
    async with Worker(gateway.url) as one, Worker(gateway.url) as two:
        with pytest.raises(
            PeerConnectError, match=f"{nobody} did not answer in 5 s; see that these servers run"
        ):
            await asyncio.wait_for(one.connect(two.did), ERROR_SECONDS)


async def test_without_a_turn_server_relay_only_fails_at_once(
    shared_gateway: GatewayProcess, caplog: pytest.LogCaptureFixture
) -> None:
    async with Worker(shared_gateway.url) as one, Agent(shared_gateway.url) as two:
        with pytest.raises(PeerConnectError, match="relay_only needs a TURN server, and none is known"):
            await asyncio.wait_for(one.connect(two.did), 2)
        two._host_addresses = ("127.0.0.1",)
        caplog.clear()
        with pytest.raises(PeerRefusedError, match="made from there: it has no TURN server or address"):
            await asyncio.wait_for(two.connect(one.did), 2)
        (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert f"an OFFER of {two.did} cannot be answered" in told
        assert "relay_only needs a TURN server, and none is known" in told


async def test_agent_that_stays_gets_new_credentials_before_the_old_ones_expire(
    start_gateway: Callable[..., GatewayProcess], turn_server: TurnServer
) -> None:
    gateway = start_gateway(*turn_server.gateway_options, "--turn-ttl", "4")
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(Worker(gateway.url)) for _ in range(2)]

        async def outlived() -> None:
            """Wait until the first credentials of both could not be used any more."""
            for agent in (one, two):
                assert agent.client.session is not None
                first = _expiry(agent)
                while _expiry(agent) <= first + 4:  # noqa: ASYNC110 -- nobody is told of new ones
                    await asyncio.sleep(0.05)

        watch = one.watch(tag="arithmetic", dids=[two.did])
        assert (await watch.__anext__()).event == "join"
        await asyncio.wait_for(outlived(), SECONDS)
        async with one.connect(two.did, timeout=SECONDS) as peer:
            assert await peer.execute("double", value=4) == 8
        # Nothing that one could see has changed: the first event is of what has.
        await two.client.update([{"name": "halve", "tags": ["arithmetic"]}])
        event = await asyncio.wait_for(watch.__anext__(), SECONDS)
        assert [capability.name for capability in event.agent.capabilities] == ["halve"]
        await watch.aclose()
        assert one.client.stats.reconnects == 0


def _expiry(agent: Agent) -> int:
    session = agent.client.session
    assert session is not None
    return int(session.ice_servers[-1]["username"].partition(":")[0])
