"""Two PeerConnections in one process, over real UDP, DTLS and SCTP on 127.0.0.1."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable

import pytest

from aiconexus.core.candidates import ice_connection
from aiconexus.core.channel import Channel
from aiconexus.core.peer_connection import PeerConnection
from aiconexus.protocol import IceCandidatePayload
from aiconexus.protocol.errors import MalformedMessageError, PeerConnectError, PeerIdentityError
from aiconexus.protocol.limits import DATA_MESSAGE_MAX_BYTES

MDNS = "a=candidate:9 1 udp 2130706431 3b0f3e4c-5b0a-4d59-9b6f-0f2a7f1e7c11.local 50000 typ host"


@pytest.fixture
async def connection() -> AsyncIterator[Callable[[], PeerConnection]]:
    made: list[PeerConnection] = []

    def make() -> PeerConnection:
        made.append(PeerConnection(host_addresses=["127.0.0.1"]))
        return made[-1]

    yield make
    await asyncio.gather(*(connection.close() for connection in made))


async def opened(one: PeerConnection, two: PeerConnection) -> tuple[Channel, Channel]:
    answer = await two.create_answer(await one.create_offer())
    await one.accept_answer(answer)
    channels = await asyncio.wait_for(asyncio.gather(one.opened, two.opened), 10)
    return channels[0], channels[1]


async def test_channel_opens_and_knows_its_path(connection: Callable[[], PeerConnection]) -> None:
    one, two = connection(), connection()
    assert one.path is None
    await opened(one, two)
    assert one.path is not None
    assert two.path is not None
    assert (one.path.local, one.path.remote) == (two.path.remote, two.path.local)
    assert re.fullmatch(r"127\.0\.0\.1:\d+ ⇄ 127\.0\.0\.1:\d+ udp host", str(one.path))


async def test_side_without_candidates_is_found_by_its_checks(
    connection: Callable[[], PeerConnection],
) -> None:
    one, two = connection(), connection()
    offer = re.sub(r"(?m)^a=(candidate:.*|end-of-candidates)\r\n", "", await one.create_offer())
    answer = await two.create_answer(offer)
    two.add_ice_candidate(IceCandidatePayload(candidate="", sdp_mid="0", sdp_mline_index=0))
    failed, _ = await asyncio.wait({two.opened}, timeout=0.2)
    assert not failed  # it waits, though there is nothing that it could try
    await one.accept_answer(answer)
    await asyncio.wait_for(asyncio.gather(one.opened, two.opened), 10)
    assert two.path is not None
    assert two.path.kind == "host/prflx"


async def test_messages_before_there_is_a_receiver_wait_for_it(
    connection: Callable[[], PeerConnection],
) -> None:
    here, there = await opened(connection(), connection())
    for number in range(3):
        here.send(f"early {number}")
    here.close()
    await there.closed
    received: list[str | bytes] = []
    there.receive(received.append)
    assert received == ["early 0", "early 1", "early 2"]


async def test_channel_says_when_it_can_take_more(connection: Callable[[], PeerConnection]) -> None:
    here, there = await opened(connection(), connection())
    text = "x" * DATA_MESSAGE_MAX_BYTES
    received: asyncio.Queue[str | bytes] = asyncio.Queue()
    there.receive(received.put_nowait)
    writable = asyncio.Event()
    here.on_writable(writable.set)
    for _ in range(3):
        while not here.is_congested:
            here.send(text)
        writable.clear()
        await asyncio.wait_for(writable.wait(), 30)
        assert not here.is_congested
    for _ in range(3):
        assert await asyncio.wait_for(received.get(), 30) == text


async def test_closed_channel_takes_nothing(connection: Callable[[], PeerConnection]) -> None:
    one = connection()
    here, _ = await opened(one, connection())
    await one.close()
    with pytest.raises(ConnectionError, match="the DataChannel is closed"):
        here.send("one more")


async def test_close_before_it_opened_ends_the_waiting(connection: Callable[[], PeerConnection]) -> None:
    one = connection()
    await one.create_offer()
    await one.close()
    with pytest.raises(PeerConnectError, match="closed before it opened"):
        await one.opened


async def test_close_during_gathering_leaves_no_socket(connection: Callable[[], PeerConnection]) -> None:
    one = connection()
    offering = asyncio.ensure_future(one.create_offer())
    while not one._tasks:  # noqa: ASYNC110 -- loop passes until it gathers
        await asyncio.sleep(0)
    offering.cancel()
    await one.close()
    assert one._pc.iceGatheringState == "complete"
    connection = ice_connection(one._pc)
    assert connection is not None
    assert connection.local_candidates == []


# --- candidates --------------------------------------------------------------------------------


def take_out_candidates(sdp: str) -> tuple[str, list[str]]:
    lines = sdp.splitlines()
    candidates = [line[2:] for line in lines if line.startswith("a=candidate:")]
    kept = [line for line in lines if not line.startswith(("a=candidate:", "a=end-of-candidates"))]
    return "\r\n".join(kept) + "\r\n", candidates


async def test_trickled_candidates_are_used_also_those_that_came_too_early(
    connection: Callable[[], PeerConnection],
) -> None:
    one, two = connection(), connection()
    offer, candidates = take_out_candidates(await one.create_offer())
    for candidate in candidates:
        two.add_ice_candidate(IceCandidatePayload(candidate=candidate, sdp_mid="0", sdp_mline_index=0))
    answer, candidates = take_out_candidates(await two.create_answer(offer))
    await one.accept_answer(answer)
    for candidate in candidates:
        one.add_ice_candidate(IceCandidatePayload(candidate=candidate))
    one.add_ice_candidate(IceCandidatePayload(candidate=""))
    await asyncio.wait_for(asyncio.gather(one.opened, two.opened), 10)


async def test_mdns_names_of_a_browser_break_nothing(connection: Callable[[], PeerConnection]) -> None:
    # As from a browser that hides its addresses: nothing but names, and the end.
    one, two = connection(), connection()
    offer, _ = take_out_candidates(await one.create_offer())
    answer = await two.create_answer(f"{offer}{MDNS}\r\na=end-of-candidates\r\n")
    await one.accept_answer(answer)
    await asyncio.wait_for(asyncio.gather(one.opened, two.opened), 10)
    assert two.path is not None
    assert two.path.remote.startswith("127.0.0.1:")


async def test_early_end_of_candidates_does_not_cut_off_what_follows(
    connection: Callable[[], PeerConnection],
) -> None:
    one, two = connection(), connection()
    offer, candidates = take_out_candidates(await one.create_offer())
    two.add_ice_candidate(IceCandidatePayload(candidate=""))
    answer = await two.create_answer(offer)
    for candidate in candidates:
        two.add_ice_candidate(IceCandidatePayload(candidate=candidate))
    await one.accept_answer(answer)
    await asyncio.wait_for(asyncio.gather(one.opened, two.opened), 10)


async def test_too_many_candidates_are_refused(connection: Callable[[], PeerConnection]) -> None:
    one, two = connection(), connection()
    payload = IceCandidatePayload(candidate=MDNS[2:])
    for _ in range(100):
        one.add_ice_candidate(payload)
    with pytest.raises(MalformedMessageError, match="more than 100 candidates"):
        one.add_ice_candidate(payload)
    offer = await two.create_offer()
    with pytest.raises(MalformedMessageError, match="more than 100 candidates"):
        await connection().create_answer(offer + f"{MDNS}\r\n" * 100)


async def test_address_that_this_machine_does_not_have_is_named() -> None:
    elsewhere = PeerConnection(host_addresses=["192.0.2.1"])  # TEST-NET-1, RFC 5737
    try:
        with pytest.raises(PeerConnectError, match=r"no host address can be used: \['192.0.2.1'\]"):
            await elsewhere.create_offer()
    finally:
        await elsewhere.close()


# --- descriptions that must be refused -----------------------------------------------------------


@pytest.mark.parametrize(
    ("alter", "text"),
    [
        (lambda sdp: "", "exactly one m=application"),
        (lambda sdp: sdp + "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n", "exactly one m=application"),
        (lambda sdp: sdp.replace("m=application", "m=video"), "exactly one m=application"),
        (lambda sdp: re.sub(r"a=fingerprint:.*\r\n", "", sdp), "no DTLS fingerprint"),
        (lambda sdp: re.sub(r"a=ice-pwd:.*\r\n", "", sdp), "no usable SDP offer"),
        (lambda sdp: re.sub("m=application .*", "m=application nine", sdp), "exactly one m=application"),
        (lambda sdp: sdp.replace("a=sctp-port:5000", "a=sctp-port:x"), "no usable SDP offer"),
        (lambda sdp: sdp.replace("a=candidate:", "a=candidate:x "), "not an ICE candidate"),
        (lambda sdp: re.sub("(a=max-message-size:).*", r"\g<1>100", sdp), "must be 0 or at least 65536"),
        (lambda sdp: re.sub("(a=max-message-size:).*", r"\g<1>-1", sdp), "must be 0 or at least 65536"),
        (lambda sdp: sdp + "a=max-message-size:65535\r\n", "must be 0 or at least 65536"),
        (lambda sdp: "m=application 9 UDP/DTLS/SCTP x\r\na=fingerprint:\r\n", "no usable SDP offer"),
    ],
)
async def test_description_that_cannot_be_used_is_malformed(
    connection: Callable[[], PeerConnection], alter: Callable[[str], str], text: str
) -> None:
    offer = await connection().create_offer()
    with pytest.raises(MalformedMessageError, match=text) as caught:
        await connection().create_answer(alter(offer))
    assert (caught.value.field or "").startswith("payload.")


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("a=max-message-size:0\r\n", DATA_MESSAGE_MAX_BYTES),
        ("a=max-message-size:65536\r\n", 65_536),
        ("a=max-message-size:1073741823\r\n", DATA_MESSAGE_MAX_BYTES),
        ("", 65_536),  # RFC 8841 section 6.1
    ],
)
async def test_size_that_the_other_end_takes_is_known(
    connection: Callable[[], PeerConnection], line: str, size: int
) -> None:
    one, two = connection(), connection()
    offer = re.sub("a=max-message-size:.*\r\n", line, await one.create_offer())
    await two.create_answer(offer)
    assert two.message_max_bytes == size


async def test_description_names_the_size_that_this_end_takes(
    connection: Callable[[], PeerConnection],
) -> None:
    one, two = connection(), connection()
    await opened(one, two)
    assert one.message_max_bytes == two.message_max_bytes == DATA_MESSAGE_MAX_BYTES


async def test_machine_without_a_network_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: [])
    alone = PeerConnection()
    try:
        with pytest.raises(PeerConnectError, match=r'host_addresses=\["127\.0\.0\.1"\]'):
            await alone.create_offer()
    finally:
        await alone.close()


async def test_other_certificate_than_the_signed_one_is_an_identity_error(
    connection: Callable[[], PeerConnection],
) -> None:
    one, two, third = connection(), connection(), connection()
    answer = await two.create_answer(await one.create_offer())
    other = re.findall(r"a=fingerprint:.*\r\n", await third.create_offer())
    answer = re.sub(r"(a=fingerprint:.*\r\n)+", "".join(other).replace("\\", r"\\"), answer)
    await one.accept_answer(answer)
    with pytest.raises(PeerIdentityError, match="another certificate"):
        await asyncio.wait_for(one.opened, 10)


async def test_other_channels_than_ours_are_closed(connection: Callable[[], PeerConnection]) -> None:
    one, two = connection(), connection()
    stranger = one._pc.createDataChannel("chat")
    closed = asyncio.get_running_loop().create_future()
    stranger.on("close", lambda: closed.set_result(None))
    await opened(one, two)
    await asyncio.wait_for(closed, 10)
    assert (await two.opened).is_open
