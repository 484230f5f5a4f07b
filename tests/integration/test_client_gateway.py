"""GatewayClient against the real gateway: signal, drop, resume, restart, replace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from aiconexus.client import Backoff, ClientState, GatewayClient
from aiconexus.protocol import (
    AnswerPayload,
    DIDKey,
    ErrorPayload,
    IceCandidatePayload,
    Message,
    MessageType,
    OfferPayload,
)
from aiconexus.protocol.errors import (
    GatewayClosedError,
    GatewayIdentityError,
    GatewayUnreachableError,
    NotConnectedError,
    RegistrationError,
    UnknownAgentError,
)
from aiconexus.protocol.limits import MESSAGE_BURST, MESSAGE_RATE

if TYPE_CHECKING:
    from conftest import GatewayProcess

Register = Callable[..., Awaitable[GatewayClient]]


@pytest.fixture
async def register(shared_gateway: GatewayProcess) -> AsyncIterator[Register]:
    """Register agents, at the shared gateway if no other is given; all are closed in the end."""
    async with AsyncExitStack() as stack:

        async def make(key: DIDKey | None = None, at: GatewayProcess = shared_gateway) -> GatewayClient:
            client = GatewayClient(at.url, key or DIDKey.generate(), backoff=Backoff(0.05, 0.5))
            await stack.enter_async_context(client)
            await client.register(["echo"])
            return client

        yield make


def offer(sender: GatewayClient, target: GatewayClient, sdp: str = "v=0") -> Message:
    return Message.create(sender.did, target.did, OfferPayload(sdp=sdp))


def cut(client: GatewayClient) -> None:
    """Break the client's connection, as a change of network does."""
    assert client._connection is not None
    client._connection.abort()


async def test_session_of_a_real_gateway(register: Register) -> None:
    client = await register()
    session = client.session
    assert session is not None
    assert session.resumed is False
    assert "resume" in session.features
    assert session.limits["message_max_bytes"] == 65_536
    assert (session.limits["message_rate"], session.limits["message_burst"]) == (MESSAGE_RATE, MESSAGE_BURST)
    assert session.gateway_did.startswith("did:key:z6Mk")
    assert 0 < await client.ping() < 5


async def test_tls_to_a_plain_port_fails_at_once_and_says_so(shared_gateway: GatewayProcess) -> None:
    begin = asyncio.get_running_loop().time()
    async with GatewayClient(shared_gateway.url.replace("ws:", "wss:"), DIDKey.generate()) as client:
        with pytest.raises(GatewayUnreachableError, match="may not speak TLS"):
            await client.register()
    assert asyncio.get_running_loop().time() - begin < 5  # and not after the 10 s that a request may take


async def test_offer_and_answer_between_two_agents(register: Register) -> None:
    alice, bob = await register(), await register()

    async def answer(message: Message) -> None:
        await bob.send(message.reply(AnswerPayload(sdp="v=1")))
        candidate = IceCandidatePayload(candidate="")
        await bob.send(Message.create(bob.did, message.from_, candidate))

    bob.on(MessageType.OFFER, answer)
    reply = await alice.request(offer(alice, bob))
    assert reply.payload == AnswerPayload(sdp="v=1")
    assert reply.from_ == bob.did
    assert (await alice.receive(timeout=5)).type is MessageType.ICE_CANDIDATE


async def test_agent_that_is_not_there(register: Register) -> None:
    alice, bob = await register(), await register()
    await bob.unregister("gone")
    with pytest.raises(UnknownAgentError, match=rf"is not online \(asked {alice.url}\)"):
        await alice.request(offer(alice, bob))
    sent = await alice.send(offer(alice, bob))
    error = await alice.receive(timeout=5)
    assert isinstance(error.payload, ErrorPayload)
    assert error.correlation_id == sent.id


async def test_pinned_key(shared_gateway: GatewayProcess, register: Register) -> None:
    session = (await register()).session
    assert session is not None
    async with GatewayClient(
        shared_gateway.url, DIDKey.generate(), gateway_did=session.gateway_did
    ) as client:
        await client.register()
    async with GatewayClient(
        shared_gateway.url, DIDKey.generate(), gateway_did=DIDKey.generate().did
    ) as client:
        with pytest.raises(GatewayIdentityError):
            await client.register()


async def test_wrong_path_is_told(shared_gateway: GatewayProcess) -> None:
    async with GatewayClient(shared_gateway.url + "x", DIDKey.generate()) as client:
        with pytest.raises(GatewayUnreachableError, match="HTTP 404"):
            await client.register()


async def test_capability_that_stands_twice_is_refused_for_good(shared_gateway: GatewayProcess) -> None:
    async with GatewayClient(shared_gateway.url, DIDKey.generate()) as client:
        with pytest.raises(RegistrationError, match="twice"):
            await client.register(["echo", "echo"])
        assert client.state is ClientState.CLOSED


async def test_dropped_agent_resumes_and_misses_nothing(register: Register) -> None:
    alice, bob = await register(), await register()
    cut(bob)
    await bob.wait_for(ClientState.RECONNECTING, timeout=5)
    for number in range(20):
        await alice.send(offer(alice, bob, str(number)))
    await alice.ping()
    got = [await bob.receive(timeout=10) for _ in range(20)]
    assert [message.payload.sdp for message in got] == [str(number) for number in range(20)]  # type: ignore[attr-defined]
    assert bob.session is not None
    assert bob.session.resumed is True
    assert bob.stats.reconnects == 1
    with pytest.raises(TimeoutError):
        await alice.receive(timeout=0)


async def test_request_outlives_the_drop_of_the_asker(register: Register) -> None:
    alice, bob = await register(), await register()
    asking = asyncio.create_task(alice.request(offer(alice, bob)))
    question = await bob.receive(timeout=5)
    cut(alice)
    await alice.wait_for(ClientState.RECONNECTING, timeout=5)
    await bob.send(question.reply(AnswerPayload(sdp="v=1")))
    assert (await asyncio.wait_for(asking, 10)).payload == AnswerPayload(sdp="v=1")


async def test_many_drops(register: Register) -> None:
    alice, bob = await register(), await register()
    for number in range(3):
        cut(bob)
        await bob.wait_for(ClientState.RECONNECTING, timeout=5)
        await bob.wait_for(ClientState.REGISTERED, timeout=5)
        assert bob.session is not None
        assert bob.session.resumed is True
        await alice.send(offer(alice, bob, str(number)))
        assert (await bob.receive(timeout=5)).payload == OfferPayload(sdp=str(number))


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_restart_of_the_gateway(end: str, gateway: GatewayProcess, register: Register) -> None:
    alice, bob = await register(at=gateway), await register(at=gateway)
    waiting = [
        asyncio.create_task(client.wait_for(ClientState.RECONNECTING, timeout=20)) for client in (alice, bob)
    ]
    await asyncio.to_thread(getattr(gateway, end))
    await asyncio.gather(*waiting)
    with pytest.raises(NotConnectedError):
        await alice.ping(timeout=0.1)
    sending = asyncio.create_task(alice.ping(timeout=30))
    await asyncio.to_thread(gateway.start)
    await sending
    await bob.wait_for(ClientState.REGISTERED, timeout=30)
    assert alice.session is not None
    assert alice.session.resumed is False  # the memory of one process is gone with it
    await alice.send(offer(alice, bob))
    assert (await bob.receive(timeout=5)).from_ == alice.did


async def test_newest_session_of_a_key_wins(register: Register) -> None:
    key = DIDKey.generate()
    old = await register(key)
    reading = asyncio.create_task(old.receive())
    new = await register(key)
    with pytest.raises(GatewayClosedError, match="a second client runs with the same key") as caught:
        await asyncio.wait_for(reading, 5)
    assert caught.value.close_code.number == 4504
    assert old.state is ClientState.CLOSED
    await new.ping()


async def test_unregistered_agent_may_come_back(register: Register) -> None:
    client = await register()
    await client.unregister()
    assert client.state is ClientState.DISCONNECTED
    session = await client.register()
    assert session.resumed is False
    await client.ping()


async def test_close_is_seen_as_the_end_not_as_a_drop(gateway: GatewayProcess, register: Register) -> None:
    client = await register(at=gateway)
    await client.close()
    health = await asyncio.to_thread(gateway.health)
    assert (health["sessions"], health["away"]) == (0, 0)
