"""Candidates of this side: which addresses, and what STUN and TURN servers give or refuse."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection
from turn_server import SECRET, TurnServer

from aiconexus.core.candidates import ice_connection
from aiconexus.core.gathering import Gathering, read_ice_servers
from aiconexus.core.peer_connection import PeerConnection
from aiconexus.protocol.errors import PeerConnectError
from gateway.ice import IceServers

SECONDS = 10.0
DISCARD = "turn:127.0.0.1:9"  # RFC 863: nobody listens there


async def _gathered(*addresses: str) -> str:
    pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    try:
        pc.createDataChannel("ioap")
        connection = ice_connection(pc)
        assert connection is not None
        Gathering([], host_addresses=addresses, relay_only=False).take_over(connection)
        await pc.setLocalDescription(await pc.createOffer())
        return pc.localDescription.sdp
    finally:
        await pc.close()


async def test_no_other_address_than_the_chosen_is_in_the_description() -> None:
    sdp = await _gathered("127.0.0.1")
    addresses = {line.split()[4] for line in sdp.splitlines() if line.startswith("a=candidate:")}
    assert addresses == {"127.0.0.1"}
    # The default address and the origin are addresses too.
    assert [line for line in sdp.splitlines() if line.startswith("c=")] == ["c=IN IP4 127.0.0.1"]
    assert next(line for line in sdp.splitlines() if line.startswith("o=")).endswith(" IN IP4 0.0.0.0")


async def test_two_connections_in_one_process_choose_differently() -> None:
    one, two = await _gathered("127.0.0.1"), await _gathered("127.0.0.2", "127.0.0.3")
    assert "127.0.0.2" not in one
    assert "127.0.0.1" not in two
    assert "127.0.0.2" in two
    assert "127.0.0.3" in two


async def test_address_of_another_machine_is_left_out() -> None:
    sdp = await _gathered("192.0.2.1", "127.0.0.1")  # TEST-NET-1, RFC 5737
    assert "192.0.2.1" not in sdp
    assert "127.0.0.1" in sdp


# --- STUN and TURN -----------------------------------------------------------------------------

Make = Callable[..., PeerConnection]


def minted(*urls: str, secret: str = SECRET, stun: tuple[str, ...] = ()) -> Any:
    """Return ICE servers as a gateway names them."""
    return IceServers(stun, urls, secret, 60).ext("did:key:z6Mk")["ice_servers"]


@pytest.fixture
async def connection() -> AsyncIterator[Make]:
    made: list[PeerConnection] = []

    def make(*urls: str, relay_only: bool = True, **options: Any) -> PeerConnection:
        servers = minted(*urls, **options)
        made.append(PeerConnection(host_addresses=["127.0.0.1"], ice_servers=servers, relay_only=relay_only))
        return made[-1]

    yield make
    await asyncio.gather(*(each.close() for each in made))


async def opened(one: PeerConnection, two: PeerConnection) -> None:
    await one.accept_answer(await two.create_answer(await one.create_offer()))
    await asyncio.wait_for(asyncio.gather(one.opened, two.opened), SECONDS)


def candidates(sdp: str) -> list[str]:
    return [line for line in sdp.splitlines() if line.startswith("a=candidate:")]


@pytest.mark.parametrize("transport", ["udp", "tcp"])
async def test_relay_only_goes_over_the_turn_server_and_shows_nothing_else(
    turn_server: TurnServer, connection: Make, transport: str
) -> None:
    url = turn_server.url if transport == "udp" else turn_server.tcp_url
    one, two = connection(url), connection(url)
    await opened(one, two)
    assert one.path is not None
    assert one.path.kind == "relay"
    assert one.path.local.startswith("127.0.0.2:")
    for sdp in (one._pc.localDescription.sdp, two._pc.localDescription.sdp):
        (candidate,) = candidates(sdp)
        assert candidate.endswith(" typ relay raddr 0.0.0.0 rport 9")
        assert "127.0.0.1" not in sdp


async def test_relay_only_is_reached_by_one_that_shows_its_addresses(
    turn_server: TurnServer, connection: Make
) -> None:
    one, two = connection(turn_server.url), connection(relay_only=False)
    await opened(one, two)
    assert one.path is not None
    assert one.path.kind.startswith("relay/")


async def test_wrong_secret_is_named_with_the_server(turn_server: TurnServer, connection: Make) -> None:
    with pytest.raises(PeerConnectError) as caught:
        await asyncio.wait_for(connection(turn_server.url, secret="another").create_offer(), SECONDS)
    assert f"{turn_server.url} refused the credentials (401 Unauthorized); see that" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (DISCARD, f"{DISCARD} did not answer in "),
        (f"{DISCARD}?transport=tcp", "cannot be reached: Connection refused"),
        ("turns:127.0.0.1:9", "cannot be reached: Connection refused"),
        ("turn:nowhere.invalid", "turn:nowhere.invalid cannot be reached: "),
    ],
)
async def test_turn_server_that_is_not_there_is_named_with_the_reason(
    connection: Make, monkeypatch: pytest.MonkeyPatch, url: str, text: str
) -> None:
    monkeypatch.setattr("aiconexus.core.gathering.GATHER_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(PeerConnectError, match=text):
        await connection(url).create_offer()


async def test_relay_only_without_a_turn_server_fails_at_once(connection: Make) -> None:
    with pytest.raises(
        PeerConnectError, match="relay_only needs a TURN server, and none is known: give ice_ser"
    ):
        await connection().create_offer()
    offer = await connection(relay_only=False).create_offer()
    with pytest.raises(PeerConnectError, match="relay_only needs a TURN server"):
        await connection(stun=("stun:127.0.0.1:9",)).create_answer(offer)


async def test_servers_that_fail_delay_nothing_while_another_works(
    turn_server: TurnServer, connection: Make
) -> None:
    one = connection(
        DISCARD,
        turn_server.url,
        relay_only=False,
        stun=("stun:127.0.0.1:9", f"stun:127.0.0.1:{turn_server.port}"),
    )
    offer = await asyncio.wait_for(one.create_offer(), 2.5)  # half of what one waits for a server
    kinds = {line.split(" typ ")[1].split()[0] for line in candidates(offer)}
    assert kinds == {"host", "srflx", "relay"}
    assert one._gathering.faults == []  # those that had no time to answer are not blamed


async def test_one_relay_is_enough(turn_server: TurnServer, connection: Make) -> None:
    offer = await connection(turn_server.url, turn_server.tcp_url).create_offer()
    assert len(candidates(offer)) == 1


async def test_next_turn_server_is_asked_as_soon_as_one_has_failed(
    turn_server: TurnServer, connection: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiconexus.core.gathering.TURN_DELAY_SECONDS", SECONDS)
    refusing = f"{DISCARD}?transport=tcp"
    one = connection(refusing, turn_server.url)
    assert len(candidates(await asyncio.wait_for(one.create_offer(), 2.5))) == 1
    assert one._gathering.faults == [f"{refusing} cannot be reached: Connection refused"]


async def test_failing_turn_server_is_a_warning_where_there_are_other_paths(
    turn_server: TurnServer, connection: Make, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = connection(turn_server.url, secret="another", relay_only=False), connection(relay_only=False)
    await opened(one, two)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{turn_server.url} refused the credentials (401 Unauthorized)"
    ]
    assert "refused the credentials (401 Unauthorized)" in one.describe()


async def test_relay_is_given_up_in_bounded_time_also_if_its_server_is_gone(
    start_turn_server: Callable[..., TurnServer], connection: Make
) -> None:
    server = start_turn_server()
    one, two = connection(server.url), connection(server.url)
    await opened(one, two)
    server.signal(signal.SIGSTOP)
    try:
        await asyncio.wait_for(asyncio.gather(one.close(), two.close()), 5)
    finally:
        server.signal(signal.SIGCONT)


async def test_turn_server_that_refuses_for_another_reason_is_quoted(
    start_turn_server: Callable[..., TurnServer], connection: Make
) -> None:
    server = start_turn_server("--user-quota=1")
    one, two = connection(server.url), connection(server.url)
    await one.create_offer()
    with pytest.raises(PeerConnectError, match=r"refused \(486 Allocation Quota Reached\)"):
        await two.create_offer()


# --- descriptions of servers -------------------------------------------------------------------


def test_every_url_of_a_server_is_one_to_ask() -> None:
    servers = [
        RTCIceServer("stun:a"),
        {"urls": ["turn:b:1", "turns:[::1]"], "username": "u", "credential": "c"},
        {"urls": ["stuns:a", "turns:b?transport=udp"], "username": "u", "credential": "c"},
    ]
    read = read_ice_servers(servers)
    assert [tuple(server.where) for server in read] == [
        ("stun", "a", 3478, "udp"),
        ("turn", "b", 1, "udp"),
        ("turns", "::1", 5349, "tcp"),
    ]
    assert read[1].credential == "c"
    assert "'c'" not in repr(read)  # a credential is in no log


@pytest.mark.parametrize(
    ("server", "text"),
    [
        ({}, "has `urls`"),
        ({"urls": 7}, "has `urls`"),
        ({"urls": [7]}, "has `urls`"),
        ({"urls": "turn:a"}, "turn:a needs `username` and `credential`"),
        ({"urls": "turn:a", "username": "u", "credential": 7}, "needs `username` and `credential`"),
        ({"urls": "turn://a"}, "there is no // in these URLs"),
    ],
)
def test_what_is_no_ice_server_is_told(server: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_ice_servers([server])
