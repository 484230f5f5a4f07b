"""What is told of a connection that did not open."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from turn_server import TurnServer

from aiconexus.core.peer_connection import PeerConnection
from gateway.ice import IceServers

NAME = "3b0f3e4c-5b0a-4d59-9b6f-0f2a7f1e7c11.local"

Make = Callable[..., PeerConnection]


@pytest.fixture
async def connection() -> AsyncIterator[Make]:
    made: list[PeerConnection] = []

    def make(**options: Any) -> PeerConnection:
        made.append(PeerConnection(host_addresses=["127.0.0.1"], **options))
        return made[-1]

    yield make
    await asyncio.gather(*(each.close() for each in made))


@pytest.fixture
def deaf() -> Any:
    """The port of a socket that answers nothing."""
    with socket.socket(type=socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def elsewhere(sdp: str, *hosts: str) -> str:
    """Return a description whose candidates are others, all `host port`."""
    head = re.sub("a=candidate:.*\r\n|a=end-of-candidates\r\n", "", sdp)
    lines = [f"a=candidate:{i} 1 udp 2130706431 {host} typ host\r\n" for i, host in enumerate(hosts)]
    return "".join([head, *lines])


async def tried(one: PeerConnection, two: PeerConnection, *hosts: str) -> str:
    """Let `one` try to reach `two` at other addresses, and say how it went when it began."""
    offer = elsewhere(await one.create_offer())
    answer = await two.create_answer(offer)
    await one.accept_answer(elsewhere(answer, *hosts))
    while one._pc.iceConnectionState == "new":  # noqa: ASYNC110 -- loop passes until it begins
        await asyncio.sleep(0)
    return one.describe()


async def test_pairs_are_listed_with_their_state_and_the_missing_turn_server(
    connection: Make, deaf: int
) -> None:
    one = connection()
    text = await tried(one, connection(), f"127.0.0.1 {deaf}")
    pair = rf"127\.0\.0\.1:\d+ → 127\.0\.0\.1:{deaf} (not tried|no answer yet)"
    assert re.search(
        rf"ICE checking, .*; local candidates: \S+ host; remote candidates: \S+ host; pairs tried: {pair}; "
        "no TURN server is configured: behind two NATs, .* give ice_servers, or the gateway --turn-url$",
        text,
    )


async def test_many_pairs_are_counted(connection: Make, deaf: int) -> None:
    hosts = [f"127.0.0.{number} {deaf}" for number in range(1, 21)]
    text = await tried(connection(), connection(), *hosts)
    assert text.count("→") == 6
    assert text.count(", 14 more;") == 2


async def test_names_that_are_not_looked_up_are_no_candidates(connection: Make) -> None:
    text = await tried(connection(), connection(), f"{NAME} 50000")
    assert "remote candidates: none" in text
    assert "the other side names only mDNS addresses, as browsers do" in text


async def test_other_side_without_a_network(connection: Make) -> None:
    assert "has named no candidate: has it a network?" in await tried(connection(), connection())


async def test_relay_that_reaches_nobody(connection: Make, turn_server: TurnServer, deaf: int) -> None:
    servers: Any = IceServers((), (turn_server.url,), "the secret of the tests", 60).ext("x")["ice_servers"]
    text = await tried(connection(ice_servers=servers), connection(), f"127.0.0.1 {deaf}")
    assert "not even a relay reaches the other side" in text


async def test_turn_server_that_failed_is_the_reason(
    connection: Make, turn_server: TurnServer, deaf: int
) -> None:
    servers: Any = IceServers((), (turn_server.url,), "another", 60).ext("x")["ice_servers"]
    text = await tried(connection(ice_servers=servers), connection(), f"127.0.0.1 {deaf}")
    assert f"; {turn_server.url} refused the credentials (401 Unauthorized); see that these servers" in text


async def test_before_the_other_side_has_answered_nothing_is_advised(connection: Make) -> None:
    one = connection()
    assert one.describe() == "ICE new, connection new"
    await one.create_offer()
    assert one.describe().endswith("remote candidates: none")
