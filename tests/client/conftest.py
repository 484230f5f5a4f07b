"""Fixtures of the client's tests: a scripted gateway, a client of it, another agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from scripted_gateway import ScriptedGateway, Visit

from aiconexus.client import Backoff, GatewayClient
from aiconexus.protocol import DIDKey, Message, OfferPayload


@pytest.fixture
async def gateway() -> AsyncIterator[ScriptedGateway]:
    scripted = ScriptedGateway()
    await scripted.start()
    yield scripted
    await scripted.stop()
    assert not scripted.faults


@pytest.fixture
def key() -> DIDKey:
    """The agent's key."""
    return DIDKey.generate()


@pytest.fixture
def other() -> DIDKey:
    """The key of another agent."""
    return DIDKey.generate()


@pytest.fixture
async def client(gateway: ScriptedGateway, key: DIDKey) -> AsyncIterator[GatewayClient]:
    """A client that comes back at once."""
    async with GatewayClient(gateway.url, key, backoff=Backoff(0.01, 0.01)) as made:
        yield made
    assert not [task for task in asyncio.all_tasks() if "GatewayClient" in task.get_name()]


@pytest.fixture
def registered(gateway: ScriptedGateway, client: GatewayClient) -> Callable[[], Awaitable[Visit]]:
    """Register the client; return the gateway's side of the connection."""

    async def register() -> Visit:
        await client.register(["echo"])
        return await gateway.visit()

    return register


@pytest.fixture
def offer(key: DIDKey, other: DIDKey) -> Callable[..., Message]:
    """Build an OFFER from the other agent to ours."""

    def build(sdp: str = "v=0", **changes: Any) -> Message:
        return Message.create(other.did, key.did, OfferPayload(sdp=sdp)).model_copy(update=changes)

    return build
