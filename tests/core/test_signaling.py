"""Connecting, without a gateway: what the two sides make of messages in any order, lost, late or forged."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest
from switchboard import Switchboard, Workshop

from aiconexus.core import signaling
from aiconexus.core.peer import Peer, PeerState
from aiconexus.core.peer_connection import PeerConnection
from aiconexus.protocol import (
    AnswerPayload,
    DIDKey,
    ErrorPayload,
    IceCandidatePayload,
    Message,
    MessageType,
    OfferPayload,
    sign_message,
)
from aiconexus.protocol.errors import (
    ErrorCode,
    GatewayUnreachableError,
    PeerConnectError,
    PeerIdentityError,
    PeerLostError,
    PeerRefusedError,
    RemoteError,
    UnknownAgentError,
)

Pair = tuple[Workshop, Workshop]


def types(switchboard: Switchboard) -> list[str]:
    return [message.type.value for message in switchboard.sent]


async def test_one_offer_and_one_answer_connect(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    peer = await one.connect(two.did)
    assert peer.did == two.did
    assert types(switchboard) == ["OFFER", "ANSWER"]
    assert switchboard.sent[1].correlation_id == switchboard.sent[0].id
    assert await peer.execute("add", a=1, b=2) == 3
    assert await two.peers[one.did].execute("add", a=3, b=4) == 7


async def test_all_who_connect_get_the_same_peer(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    peers = await asyncio.gather(*(one.connect(two.did) for _ in range(5)))
    assert set(peers) == {await one.connect(two.did)}
    assert types(switchboard) == ["OFFER", "ANSWER"]


async def test_description_names_only_the_chosen_address(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    await one.connect(two.did)
    for message in switchboard.sent:
        assert isinstance(message.payload, OfferPayload | AnswerPayload)
        found = set(re.findall(r"\d+\.\d+\.\d+\.\d+", message.payload.sdp))
        assert found == {"127.0.0.1", "0.0.0.0"}


def record_candidates(agent: Workshop) -> list[IceCandidatePayload]:
    """Return a list of the candidates that the next connection of `agent` is given."""
    found: list[IceCandidatePayload] = []
    make = agent._signaling._new_connection

    def new_connection() -> PeerConnection:
        connection = make()
        add = connection.add_ice_candidate

        def record(payload: IceCandidatePayload) -> None:
            found.append(payload)
            add(payload)

        connection.add_ice_candidate = record  # type: ignore[method-assign]
        return connection

    agent._signaling._new_connection = new_connection
    return found


# --- glare -------------------------------------------------------------------------------------


async def assert_one_connection(one: Workshop, two: Workshop) -> None:
    here, there = one.peers[two.did], two.peers[one.did]
    assert here.path is not None
    assert there.path is not None
    assert (here.path.local, here.path.remote) == (there.path.remote, there.path.local)
    assert await here.execute("add", a=1) == 2
    assert await there.execute("add", a=2) == 3


@pytest.mark.parametrize("first", [0, 1])
async def test_offer_of_the_lower_did_wins(switchboard: Switchboard, pair: Pair, first: int) -> None:
    low, high = pair
    switchboard.held = []
    connecting = asyncio.gather(low.connect(high.did), high.connect(low.did))
    await switchboard.sent_count(2)
    assert types(switchboard) == ["OFFER", "OFFER"]
    switchboard.release(pair[first].did)
    switchboard.release(pair[1 - first].did)
    switchboard.held = None
    # The winner's OFFER is answered; nothing else was sent in the meantime.
    await switchboard.sent_count(3)
    assert types(switchboard)[2] == "ANSWER"
    assert switchboard.sent[2].from_ == high.did
    await connecting
    await assert_one_connection(low, high)


async def test_glare_ends_in_one_connection_every_time(switchboard: Switchboard, pair: Pair) -> None:
    low, high = pair
    for _ in range(20):
        async with low.connect(high.did), high.connect(low.did):
            pass
        mine, theirs = await asyncio.gather(low.connect(high.did), high.connect(low.did))
        assert mine.state is theirs.state is PeerState.OPEN
        await assert_one_connection(low, high)
        await asyncio.gather(mine.release(), theirs.release())
        assert not low.peers
        assert not high.peers


async def test_winner_offers_again_where_its_offer_was_lost(switchboard: Switchboard, pair: Pair) -> None:
    # Its first OFFER came when the other was not there yet; then the other offers.
    low, high = pair
    switchboard.held = []
    mine = asyncio.ensure_future(low.connect(high.did).__aenter__())
    theirs = asyncio.ensure_future(high.connect(low.did).__aenter__())
    await switchboard.sent_count(2)
    offer = next(message for message in switchboard.sent if message.from_ == low.did)
    switchboard.held = [held for held in switchboard.held if held[0] is not offer]
    switchboard.release(high.did)
    switchboard.held = None
    refusal = ErrorPayload.for_cause("not_online")
    low._signaling.receive(Message.create(switchboard.key.did, low.did, refusal, correlation_id=offer.id))
    await asyncio.gather(mine, theirs)
    await assert_one_connection(low, high)


async def test_loser_gets_a_connection_that_the_winner_gave_up(switchboard: Switchboard, pair: Pair) -> None:
    low, high = pair
    switchboard.held = []
    mine = asyncio.ensure_future(low.connect(high.did).__aenter__())
    await switchboard.sent_count(1)
    mine.cancel()
    with pytest.raises(asyncio.CancelledError):
        await mine
    switchboard.held = None
    peer = await high.connect(low.did)
    assert await peer.execute("add", a=1) == 2


# --- what gets lost ------------------------------------------------------------------------------


async def test_offer_is_made_again_when_the_gateway_returns(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    switchboard.alter = lambda message: message.wire
    one._signaling.gateway_returned()
    assert (await connecting).did == two.did
    assert types(switchboard) == ["OFFER", "OFFER", "ANSWER"]


async def test_answer_is_given_again_when_the_gateway_returns(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None if message.type is MessageType.ANSWER else message.wire
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(2)
    switchboard.alter = lambda message: message.wire
    two._signaling.gateway_returned()
    assert (await connecting).did == two.did
    assert types(switchboard) == ["OFFER", "ANSWER", "ANSWER"]


async def test_offer_whose_fate_is_unknown_is_made_again(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    switchboard.alter = lambda message: message.wire
    unconfirmed = ErrorPayload.for_cause("unconfirmed")
    offer = switchboard.sent[0]
    one._signaling.receive(Message.create(switchboard.key.did, one.did, unconfirmed, correlation_id=offer.id))
    assert (await connecting).did == two.did


async def test_gateway_that_never_confirms_is_not_asked_for_ever(
    switchboard: Switchboard, pair: Pair
) -> None:
    one, two = pair

    def unconfirmed(message: Message) -> None:
        refusal = ErrorPayload.for_cause("unconfirmed")
        reply = Message.create(switchboard.key.did, one.did, refusal, correlation_id=message.id)
        asyncio.get_running_loop().call_soon(one._signaling.receive, reply)

    switchboard.alter = unconfirmed
    with pytest.raises(PeerConnectError, match="it may or may not have arrived; try again"):
        await one.connect(two.did)
    assert types(switchboard) == ["OFFER"] * 2


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("online", "it is online, but has not answered the OFFER"),
        ("away", "it is away: its connection to the gateway is interrupted"),
        ("offline", "is not online any more"),
        (GatewayUnreachableError("no answer"), "and the gateway does not answer either"),
        (
            RemoteError(ErrorCode.MALFORMED_MESSAGE, "it has no directory"),
            "s: it has not answered the OFFER; it may",
        ),
    ],
)
async def test_timeout_says_what_the_gateway_knows(
    status: str | Exception, text: str, switchboard: Switchboard, pair: Pair
) -> None:
    one, two = pair
    asked = []

    async def status_of(did: str, timeout: float) -> str:
        asked.append(did)
        if isinstance(status, Exception):
            raise status
        return status

    one._signaling._status_of = status_of
    switchboard.alter = lambda message: None
    with pytest.raises(PeerConnectError, match=text):
        await one.connect(two.did, timeout=0.2)
    assert asked == [two.did]


@pytest.mark.parametrize("is_sent", [True, False])
async def test_timeout_says_that_the_gateway_is_away(
    is_sent: bool, switchboard: Switchboard, pair: Pair
) -> None:
    one, two = pair
    one._signaling._has_gateway = lambda: False
    switchboard.alter = lambda message: None
    if not is_sent:

        async def never(message: Message) -> None:
            await asyncio.Event().wait()

        one._signaling._send = never
    with pytest.raises(PeerConnectError) as caught:
        await one.connect(two.did, timeout=0.2)
    assert "the gateway ws://127.0.0.1:1/ws is away" in str(caught.value)
    assert ("could not be sent" in str(caught.value)) is not is_sent


async def test_who_is_answered_is_not_asked_after(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair

    async def status_of(did: str, timeout: float) -> str:
        raise AssertionError("there is no need")

    one._signaling._status_of = status_of
    await one.connect(two.did)


async def test_timeout_says_how_far_it_came(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None
    with pytest.raises(PeerConnectError) as caught:
        await one.connect(two.did, timeout=0.2)
    assert caught.value.did == two.did
    assert "in 0.2 s: it is online, but has not answered the OFFER" in str(caught.value)
    assert re.search(r"local candidates: 127\.0\.0\.1:\d+ host; remote candidates: none", str(caught.value))
    assert not one._signaling._attempts


async def test_agent_that_is_not_online(switchboard: Switchboard, pair: Pair) -> None:
    did = DIDKey.generate().did
    with pytest.raises(UnknownAgentError, match=r"z6Mk….. is not online \(asked ws://127\.0\.0\.1:1/ws\)"):
        await pair[0].connect(did)


# --- what passes by itself -----------------------------------------------------------------------


def refuse_first(switchboard: Switchboard, kind: MessageType, refusal: ErrorPayload) -> None:
    """Let the switchboard refuse the first message of a type, as a gateway would."""
    refused: list[Message] = []

    def alter(message: Message) -> bytes | None:
        if message.type is not kind or refused:
            return message.wire
        refused.append(message)
        reply = Message.create(switchboard.key.did, message.from_, refusal, correlation_id=message.id)
        asyncio.get_running_loop().call_soon(switchboard.agents[message.from_]._signaling.receive, reply)
        return None

    switchboard.alter = alter


@pytest.mark.parametrize("kind", [MessageType.OFFER, MessageType.ANSWER])
@pytest.mark.parametrize("cause", ["rate_limited", "overloaded", "unreachable", "unconfirmed"])
async def test_message_that_is_refused_for_the_moment_is_sent_once_more(
    switchboard: Switchboard, pair: Pair, cause: str, kind: MessageType
) -> None:
    refuse_first(switchboard, kind, ErrorPayload.for_cause(cause, retry_after_ms=10))
    await pair[0].connect(pair[1].did, timeout=10)
    assert sorted(types(switchboard)) == sorted(["OFFER", "ANSWER", kind.value])


async def test_refusal_that_lasts_longer_than_the_deadline_fails_at_once(
    switchboard: Switchboard, pair: Pair
) -> None:
    refusal = ErrorPayload.for_cause("rate_limited", retry_after_ms=60_000)
    refuse_first(switchboard, MessageType.OFFER, refusal)
    with pytest.raises(PeerRefusedError, match="too many messages") as caught:
        await asyncio.wait_for(pair[0].connect(pair[1].did, timeout=30).__aenter__(), 5)
    assert caught.value.retry_after_ms == 60_000


async def test_error_of_a_third_agent_ends_nothing(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.held = []
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    declined = ErrorPayload.for_cause("declined")
    eve = DIDKey.generate()
    one._signaling.receive(Message.create(eve.did, one.did, declined, correlation_id=switchboard.sent[0].id))
    switchboard.release(one.did)
    switchboard.held = None
    await switchboard.sent_count(2)
    assert (await connecting).did == two.did


# --- an offer that is given up -------------------------------------------------------------------


async def answering_in_vain(switchboard: Switchboard, one: Workshop, two: Workshop) -> asyncio.Future[Peer]:
    """Let `two` offer and give up; return the connect() of `one`, which has answered and waits."""
    switchboard.held = []
    given_up = asyncio.ensure_future(two.connect(one.did).__aenter__())
    await switchboard.sent_count(1)
    switchboard.release(two.did)
    await switchboard.sent_count(2)
    assert types(switchboard) == ["OFFER", "ANSWER"]
    given_up.cancel()
    await asyncio.wait({given_up})
    connecting = asyncio.ensure_future(one.connect(two.did, timeout=10).__aenter__())
    await asyncio.sleep(0)
    return connecting


@pytest.mark.parametrize("first", [0, 1])
async def test_who_waits_for_an_offer_that_was_given_up_offers(
    switchboard: Switchboard, pair: Pair, first: int
) -> None:
    one, two = pair[first], pair[1 - first]
    connecting = await answering_in_vain(switchboard, one, two)
    switchboard.release(one.did)
    switchboard.held = None
    assert await (await asyncio.wait_for(connecting, 5)).execute("add", a=1) == 2
    assert types(switchboard) == ["OFFER", "ANSWER", "ERROR", "OFFER", "ANSWER"]
    declined = switchboard.sent[2]
    assert isinstance(declined.payload, ErrorPayload)
    assert declined.payload.details is not None
    assert declined.payload.details.name == "declined"
    assert declined.correlation_id == switchboard.sent[1].id


async def test_who_waits_offers_also_where_nobody_says_that_it_was_given_up(
    switchboard: Switchboard, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signaling, "CONNECT_TIMEOUT_SECONDS", 0.3)
    connecting = await answering_in_vain(switchboard, *pair)
    switchboard.held = None  # and the ANSWER is lost
    assert await (await asyncio.wait_for(connecting, 5)).execute("add", a=1) == 2


async def test_who_does_not_wait_lets_it_be(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    connecting = await answering_in_vain(switchboard, one, two)
    connecting.cancel()
    await asyncio.wait({connecting})
    (attempt,) = one._signaling._attempts.values()
    switchboard.release(one.did)
    switchboard.held = None
    await asyncio.wait({attempt.result}, timeout=5)
    assert types(switchboard) == ["OFFER", "ANSWER", "ERROR"]
    assert not one._signaling._attempts


# --- who may connect -----------------------------------------------------------------------------


class Choosy(Workshop):
    """Admits nobody but those that it knows."""

    def __init__(self, switchboard: Switchboard, **options: Any) -> None:
        super().__init__(switchboard, **options)
        self.known: dict[str, bool] = {}
        self.asked: list[str] = []

    async def on_offer(self, did: str) -> bool:
        self.asked.append(did)
        return self.known[did]


async def test_agent_chooses_who_may_connect(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    async with Choosy(switchboard) as choosy:
        choosy.known = {one.did: True, two.did: False}
        assert await (await one.connect(choosy.did)).execute("add", a=1) == 2
        with pytest.raises(PeerRefusedError, match="declined"):
            await two.connect(choosy.did)
        assert choosy.asked == [one.did, two.did]
        # Its addresses have gone to the first alone.
        assert [message.to for message in switchboard.sent if message.type is MessageType.ANSWER] == [one.did]


async def test_agent_that_cannot_choose_declines(
    switchboard: Switchboard, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async with Choosy(switchboard) as choosy:
        with pytest.raises(PeerRefusedError, match="declined"):
            await pair[0].connect(choosy.did)
        assert "cannot be told" in caplog.text


async def test_agent_is_not_asked_about_those_it_connects_with(switchboard: Switchboard, pair: Pair) -> None:
    async with Choosy(switchboard) as choosy:
        await asyncio.gather(
            *(choosy.connect(other.did) for other in pair), *(other.connect(choosy.did) for other in pair)
        )
        assert not choosy.asked


async def test_agent_takes_no_more_peers_than_it_should(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    async with Workshop(switchboard, peers_max=1) as popular:
        await one.connect(popular.did)
        with pytest.raises(PeerRefusedError, match="takes no more connections") as caught:
            await two.connect(popular.did)
        assert caught.value.temporary
        # One that restarts takes its own place; and whom it wants itself, it takes.
        async with Workshop(switchboard, identity=one._key) as again:
            assert await (await again.connect(popular.did)).execute("add", a=1) == 2
            await popular.connect(two.did)


async def test_strangers_that_do_not_connect_give_way(
    switchboard: Switchboard, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    monkeypatch.setattr(signaling, "ATTEMPTS_MAX", 2)
    switchboard.alter = lambda message: None if message.type is MessageType.ANSWER else message.wire
    async with Workshop(switchboard) as silent, Workshop(switchboard) as mute:
        idle = [asyncio.ensure_future(agent.connect(one.did).__aenter__()) for agent in (silent, mute)]
        await switchboard.sent_count(4)
        with pytest.raises(PeerRefusedError, match="takes no more connections"):
            await two.connect(one.did)
        monkeypatch.setattr(signaling, "FAIR_SECONDS", 0.0)
        switchboard.alter = lambda message: message.wire
        assert await (await two.connect(one.did)).execute("add", a=1) == 2
        for connecting in idle:
            connecting.cancel()


# --- restart and replacement ---------------------------------------------------------------------


async def test_agent_that_restarted_replaces_its_connection(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    there = await two.connect(one.did)
    running = asyncio.ensure_future(there.execute("wait"))
    await one.started.wait()
    async with Workshop(switchboard, identity=one._key) as again:
        peer = await again.connect(two.did)
        with pytest.raises(PeerLostError, match="a newer connection takes its place"):
            await running
        assert await peer.execute("add", a=1) == 2
        assert two.peers[one.did] is not there
        assert await two.peers[one.did].execute("add", a=2) == 3


async def test_old_offer_that_comes_late_breaks_no_connection(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None
    with pytest.raises(PeerConnectError):
        await one.connect(two.did, timeout=0.1)
    late = switchboard.sent[0]
    switchboard.alter = lambda message: message.wire
    peer = await one.connect(two.did)
    two._signaling.receive(late)
    await switchboard.sent_count(5)
    assert types(switchboard) == ["OFFER", "OFFER", "ANSWER", "ANSWER", "ERROR"]
    assert await peer.execute("add", a=1) == 2
    assert await two.peers[one.did].execute("add", a=1) == 2


async def test_second_offer_of_one_attempt_replaces_the_first(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None if message.type is MessageType.ANSWER else message.wire
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(2)
    switchboard.alter = lambda message: message.wire
    one._signaling.gateway_returned()
    assert (await connecting).did == two.did
    assert types(switchboard) == ["OFFER", "ANSWER", "OFFER", "ANSWER"]
    assert await one.peers[two.did].execute("add", a=1) == 2


# --- what must be refused ------------------------------------------------------------------------


async def test_altered_answer_is_an_identity_error(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair

    def alter(message: Message) -> bytes | None:
        assert message.wire is not None
        if message.type is MessageType.ANSWER:
            return message.wire.replace(b"a=sctp-port:5000", b"a=sctp-port:5001")
        return message.wire

    switchboard.alter = alter
    with pytest.raises(PeerIdentityError, match=r"is not from did:key:.*does not verify") as caught:
        await one.connect(two.did)
    assert caught.value.did == two.did


async def test_answer_of_another_agent_is_an_identity_error(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    eve = DIDKey.generate()
    switchboard.alter = lambda message: None
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    offer = switchboard.sent[0]
    answer = Message.create(eve.did, one.did, AnswerPayload(sdp="v=0"), correlation_id=offer.id)
    one._signaling.receive(sign_message(answer, eve))
    with pytest.raises(PeerIdentityError, match=f"{eve.did} answered the OFFER to {two.did}"):
        await connecting


async def test_answer_that_nobody_waits_for_is_ignored(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    peer = await one.connect(two.did)
    one._signaling.receive(switchboard.sent[1])
    assert await peer.execute("add", a=1) == 2
    assert types(switchboard) == ["OFFER", "ANSWER"]


@pytest.mark.parametrize("sdp", ["", "v=0\r\nm=audio 9 RTP/AVP 0\r\n"])
async def test_offer_without_data_channel_is_refused(switchboard: Switchboard, pair: Pair, sdp: str) -> None:
    one, two = pair
    two._signaling.receive(Message.create(one.did, two.did, OfferPayload(sdp=sdp)))
    await switchboard.sent_count(1)
    assert isinstance(switchboard.sent[0].payload, ErrorPayload)
    assert "m=application" in switchboard.sent[0].payload.message
    assert not two._signaling._attempts


async def test_answer_that_cannot_be_used_fails_the_connection(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    answer = AnswerPayload(sdp="v=0\r\n")
    one._signaling.receive(Message.create(two.did, one.did, answer, correlation_id=switchboard.sent[0].id))
    with pytest.raises(PeerConnectError, match="its ANSWER cannot be used"):
        await connecting


async def test_agent_that_is_busy_says_so(
    switchboard: Switchboard, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signaling, "ATTEMPTS_MAX", 0)
    one, two = pair
    with pytest.raises(PeerRefusedError, match="takes no more connections"):
        await one.connect(two.did)


async def test_candidate_before_its_offer_waits_for_it(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.held = []
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    text = "candidate:7 1 udp 1 127.0.0.1 9 typ host"
    candidate = IceCandidatePayload(candidate=text, sdp_mid="0")
    two._signaling.receive(Message.create(one.did, two.did, candidate))
    found = record_candidates(two)
    switchboard.release(one.did)
    await switchboard.sent_count(2)
    assert found == [candidate]
    assert not two._signaling._early
    connecting.cancel()


async def test_candidate_for_the_offer_of_the_other_survives_our_own(
    switchboard: Switchboard, pair: Pair
) -> None:
    low, high = pair
    switchboard.held = []
    connecting = asyncio.gather(low.connect(high.did), high.connect(low.did))
    await switchboard.sent_count(2)
    candidate = IceCandidatePayload(candidate="candidate:7 1 udp 1 127.0.0.1 9 typ host", sdp_mid="0")
    high._signaling.receive(Message.create(low.did, high.did, candidate))
    found = record_candidates(high)
    switchboard.release(low.did)  # wins
    assert found == [candidate]
    switchboard.release(high.did)
    switchboard.held = None
    await connecting


async def test_candidate_that_is_none_is_refused(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    bad = Message.create(one.did, two.did, IceCandidatePayload(candidate="candidate:nonsense"))
    two._signaling.receive(bad)
    await switchboard.sent_count(1)
    assert switchboard.sent[0].type is MessageType.ERROR
    assert switchboard.sent[0].correlation_id == bad.id


async def test_early_candidates_of_many_agents_are_bounded(pair: Pair) -> None:
    candidate = IceCandidatePayload(candidate="candidate:7 1 udp 1 127.0.0.1 9 typ host")
    for _ in range(200):
        stranger = DIDKey.generate().did
        for _ in range(2):
            pair[0]._signaling.receive(Message.create(stranger, pair[0].did, candidate))
    assert len(pair[0]._signaling._early) == signaling.EARLY_SENDERS_MAX


# --- giving up -----------------------------------------------------------------------------------


async def test_connect_that_is_cancelled_leaves_nothing(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert not one._signaling._attempts


async def test_one_of_two_who_wait_may_give_up(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.held = []
    first = asyncio.ensure_future(one.connect(two.did).__aenter__())
    second = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    first.cancel()
    switchboard.release(one.did)
    await switchboard.sent_count(2)
    switchboard.release(two.did)
    assert (await second).did == two.did


async def test_closed_agent_ends_its_attempts(switchboard: Switchboard, pair: Pair) -> None:
    one, two = pair
    switchboard.alter = lambda message: None
    connecting = asyncio.ensure_future(one.connect(two.did).__aenter__())
    await switchboard.sent_count(1)
    await one.close()
    with pytest.raises(PeerConnectError, match="this agent was closed"):
        await connecting


async def test_nothing_is_logged_when_all_is_well(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aiconexus")
    async with pair[0].connect(pair[1].did) as peer:
        await peer.execute("add", a=1)
    assert not [record for record in caplog.records if record.name.startswith("aiconexus")]
