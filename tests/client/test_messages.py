"""Sending, requests and their answers, handlers, the queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import pytest
from scripted_gateway import ScriptedGateway, Visit

from aiconexus.client import ClientState, Found, GatewayClient, PresenceEvent, directory, short_did, socket
from aiconexus.protocol import (
    AnswerPayload,
    DIDError,
    DIDKey,
    DiscoverPayload,
    ErrorCode,
    ErrorPayload,
    IceCandidatePayload,
    IntentPayload,
    InvalidSignatureError,
    MalformedMessageError,
    Message,
    MessageType,
    OfferPayload,
    PingPayload,
    PresencePayload,
    RegisterPayload,
    sign_message,
)
from aiconexus.protocol.cards import sign_card
from aiconexus.protocol.errors import (
    GatewayUnreachableError,
    IncompleteAnswerError,
    NotConnectedError,
    PeerRefusedError,
    RemoteTimeoutError,
    StaleMessageError,
    UnknownAgentError,
)

Register = Callable[[], Awaitable[Visit]]
Offer = Callable[..., Message]


@pytest.fixture
def to_other(key: DIDKey, other: DIDKey) -> Message:
    """An OFFER from our agent to the other one."""
    return Message.create(key.did, other.did, OfferPayload(sdp="v=0"))


# --- sending ---------------------------------------------------------------------------------------


async def test_send_signs_and_returns_what_was_sent(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message
) -> None:
    await registered()
    sent = await client.send(to_other)
    arrived = await gateway.message()  # which checks the signature
    assert sent.wire == arrived.wire
    assert client.stats.sent == 1


async def test_message_that_is_signed_already_keeps_its_bytes(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message, key: DIDKey
) -> None:
    await registered()
    signed = sign_message(to_other, key)
    assert await client.send(signed) is signed
    assert (await gateway.message()).wire == signed.wire


async def test_nothing_leaves_that_its_receiver_would_refuse(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message, key: DIDKey
) -> None:
    await registered()
    thief = DIDKey.generate()
    too_large = to_other.model_copy(update={"payload": OfferPayload(sdp="v" * 66_000)})
    candidate = IceCandidatePayload.model_construct(candidate="", sdp_mline_index=-1)
    unchecked = to_other.model_copy(update={"type": MessageType.ICE_CANDIDATE, "payload": candidate})
    bad_id = to_other.model_copy(update={"id": "1"})
    altered = sign_message(to_other, key).model_copy(update={"payload": OfferPayload(sdp="v=1")})
    old = sign_message(to_other.model_copy(update={"timestamp": to_other.timestamp.replace(year=2020)}), key)
    intent = Message.create(key.did, to_other.to, IntentPayload(query="?"))
    for message, error, name in (
        (to_other.model_copy(update={"from_": thief.did}), InvalidSignatureError, "wrong_sender"),
        (
            sign_message(to_other.model_copy(update={"from_": thief.did}), thief),
            InvalidSignatureError,
            "wrong_sender",
        ),
        (too_large, MalformedMessageError, "too_large"),
        (unchecked, MalformedMessageError, "invalid_payload"),
        (bad_id, MalformedMessageError, "bad_id"),
        (altered, InvalidSignatureError, "bad_signature"),
        (old, StaleMessageError, "stale_timestamp"),
        (intent, MalformedMessageError, "data_plane_only"),
    ):
        with pytest.raises(error) as caught:
            await client.send(message)
        assert caught.value.cause.name == name
        with pytest.raises(error):
            await client.request(message)
    assert client.stats.sent == 0
    await client.ping()
    assert gateway.inbox.empty()


async def test_limit_of_the_gateway_is_obeyed(
    gateway: ScriptedGateway, client: GatewayClient, to_other: Message
) -> None:
    async def strict(visit: Visit) -> None:
        challenge = visit.challenge()
        await visit.send(
            challenge.model_copy(update={"ext": {**challenge.ext, "limits": {"message_max_bytes": 300}}})
        )
        await visit.answer(await visit.read())
        await visit.serve()

    gateway.scripts.append(strict)
    await client.register()
    with pytest.raises(MalformedMessageError, match="at most 300"):
        await client.send(to_other)


# --- requests --------------------------------------------------------------------------------------


async def test_request_returns_the_answer_and_the_queue_gets_the_rest(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    to_other: Message,
    other: DIDKey,
    offer: Offer,
) -> None:
    visit = await registered()
    asking = asyncio.create_task(client.request(to_other))
    question = await gateway.message()
    await visit.send(offer("unasked"), other)
    await visit.send(question.reply(AnswerPayload(sdp="v=1")), other)
    assert (await asking).payload == AnswerPayload(sdp="v=1")
    assert (await client.receive(timeout=5)).payload == OfferPayload(sdp="unasked")


async def test_requests_run_side_by_side(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, key: DIDKey, other: DIDKey
) -> None:
    visit = await registered()
    asking = [
        asyncio.create_task(client.request(Message.create(key.did, other.did, OfferPayload(sdp=str(number)))))
        for number in range(50)
    ]
    questions = [await gateway.message() for _ in asking]
    for question in reversed(questions):
        await visit.send(question.reply(AnswerPayload(sdp=question.payload.sdp)), other)  # type: ignore[attr-defined]
    answers = await asyncio.gather(*asking)
    assert [answer.payload.sdp for answer in answers] == [str(number) for number in range(50)]  # type: ignore[attr-defined]


async def test_agent_that_is_not_online_is_named(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message
) -> None:
    visit = await registered()
    asking = asyncio.create_task(client.request(to_other))
    question = await gateway.message()
    await visit.send_unsigned(ErrorPayload.for_cause("not_online", field="to"), question.id)
    with pytest.raises(UnknownAgentError) as caught:
        await asking
    assert str(caught.value) == f"{short_did(to_other.to)} is not online (asked {gateway.url})"
    assert (caught.value.name, caught.value.temporary) == ("not_online", True)


async def test_other_causes_keep_their_words(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message, other: DIDKey
) -> None:
    visit = await registered()
    asking = asyncio.create_task(client.request(to_other))
    await visit.send_unsigned(ErrorPayload.for_cause("away_full"), (await gateway.message()).id)
    with pytest.raises(
        UnknownAgentError, match=r"cannot be reached: the agent is away and its queue is full"
    ):
        await asking

    again = to_other.model_copy(update={"id": "00000000-0000-4000-8000-000000000000"})
    asking = asyncio.create_task(client.request(again))
    await visit.send((await gateway.message()).reply(ErrorPayload.for_cause("busy")), other)
    with pytest.raises(
        PeerRefusedError, match=r"did:key:z6Mk….. refused OFFER: the agent takes no more"
    ) as caught:
        await asking
    assert caught.value.code is ErrorCode.CONNECTION_REFUSED


async def test_unanswered_request_names_who_did_not_answer(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message, other: DIDKey
) -> None:
    visit = await registered()
    with pytest.raises(
        RemoteTimeoutError, match=r"did:key:z6Mk….. did not answer OFFER within 0.05 s"
    ) as caught:
        await client.request(to_other, timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    question = await gateway.message()
    await visit.send(question.reply(AnswerPayload(sdp="late")), other)
    assert (await client.receive(timeout=5)).correlation_id == to_other.id

    discover = Message.create(client.did, gateway.key.did, DiscoverPayload())
    with pytest.raises(GatewayUnreachableError, match="the gateway ws://"):
        await client.request(discover, timeout=0.05)


async def test_nobody_else_can_answer(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message, other: DIDKey
) -> None:
    visit = await registered()
    asking = asyncio.create_task(client.request(to_other))
    question = await gateway.message()
    stranger = DIDKey.generate()
    forged = Message.create(stranger.did, client.did, AnswerPayload(sdp="evil"), correlation_id=question.id)
    refusal = Message.create(
        stranger.did, client.did, ErrorPayload.for_cause("declined"), correlation_id=question.id
    )
    await visit.send(forged, stranger)
    await visit.send(refusal, stranger)
    assert (await client.receive(timeout=5)).from_ == stranger.did
    assert (await client.receive(timeout=5)).from_ == stranger.did
    assert not asking.done()
    await visit.send(question.reply(AnswerPayload(sdp="v=1")), other)
    assert (await asking).payload == AnswerPayload(sdp="v=1")


async def test_answer_of_the_gateway_is_signed_unless_it_is_an_error(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    payload = RegisterPayload(public_key=client.did.removeprefix("did:key:"))
    asking = asyncio.create_task(client.request(Message.create(client.did, gateway.key.did, payload)))
    question = await gateway.message()
    await visit.send_unsigned(payload, question.id)
    await visit.send(question.reply(payload))
    assert (await asking).payload == payload
    assert client.stats.rejected == 1


async def test_answer_of_the_directory_is_not_signed_but_what_agents_say_in_it(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, other: DIDKey
) -> None:
    visit = await registered()
    card = sign_card([{"name": "add"}], other)
    forged = {**card, "issued_at": 1}
    asking = asyncio.create_task(_collect(client.discover()))
    question = await gateway.message()
    agents = [{"did": other.did, "card": forged}, {"did": other.did, "card": card}, {"did": client.did}]
    await visit.send_unsigned(PresencePayload(agents=agents), question.id)
    found = await asking
    assert [each.did for each in found] == [other.did, client.did]
    assert [capability.name for capability in found[0].capabilities] == ["add"]
    assert client.stats.cards_rejected == 1


async def test_answer_of_a_part_of_the_directory_is_told_from_a_whole_one(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    for limit, is_enough in ((None, False), (2, False), (1, True)):
        found: list[str] = []

        async def collect(limit: int | None = limit, found: list[str] = found) -> None:
            async for each in client.discover(limit=limit):
                found.append(each.did)  # noqa: PERF401 -- they stay where an error ends it

        asking = asyncio.create_task(collect())
        question = await gateway.message()
        await visit.send_unsigned(PresencePayload(agents=[{"did": client.did}], partial=True), question.id)
        if is_enough:
            await asking
        else:
            with pytest.raises(IncompleteAnswerError, match="could not ask all"):
                await asking
        assert found == [client.did]


@pytest.mark.parametrize("ask", [GatewayClient.discover, GatewayClient.watch])
async def test_what_is_no_did_is_not_asked_after(
    ask: Callable[..., object], client: GatewayClient, other: DIDKey
) -> None:
    with pytest.raises(DIDError, match="'bad'"):
        ask(client, dids=[other.did, "bad"])


def watch_of(question: Message) -> bool | None:
    """Return what a DISCOVER asks of a watch."""
    assert isinstance(question.payload, DiscoverPayload)
    return question.payload.watch


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a watch that was refused ask again at once."""
    monkeypatch.setattr(directory, "RETRY_SECONDS", 0.0)


async def begin_watch(
    client: GatewayClient, gateway: ScriptedGateway, timeout: float = 10.0
) -> tuple[AsyncGenerator[PresenceEvent, None], asyncio.Future[PresenceEvent], Message]:
    """Return a watch, its first event, which is to come, and its question."""
    events = client.watch(timeout=timeout)
    return events, asyncio.ensure_future(anext(events)), await gateway.message()


async def end_watch(
    events: AsyncGenerator[PresenceEvent, None], gateway: ScriptedGateway, visit: Visit
) -> None:
    """End a watch, which the gateway is told."""
    ending = asyncio.ensure_future(events.aclose())
    end = await gateway.message()
    await visit.send_unsigned(PresencePayload(agents=[]), end.id)
    await ending


async def test_watch_asks_again_when_not_everybody_could_be_asked(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    other: DIDKey,
    no_pause: None,
) -> None:
    visit = await registered()
    events, first, question = await begin_watch(client, gateway)
    await visit.send_unsigned(PresencePayload(agents=[{"did": client.did}], partial=True), question.id)
    assert (await first).agent.did == client.did
    second = asyncio.ensure_future(anext(events))
    again = await gateway.message()
    await visit.send_unsigned(PresencePayload(agents=[{"did": other.did}]), again.id)
    assert [(event.event, event.agent.did) for event in (await second, await anext(events))] == [
        ("join", other.did),
        ("leave", client.did),  # that a page which was not whole did not name it said nothing
    ]
    await end_watch(events, gateway, visit)


@pytest.mark.parametrize("is_begun", [False, True])
async def test_watch_begins_anew_only_where_it_had_not_begun(
    is_begun: bool,
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    other: DIDKey,
    no_pause: None,
) -> None:
    visit = await registered()
    events, first, question = await begin_watch(client, gateway)
    if is_begun:
        await visit.send_unsigned(PresencePayload(agents=[], cursor="more"), question.id)
        question = await gateway.message()
    await visit.send_unsigned(ErrorPayload.for_cause("busy"), question.id)
    again = await gateway.message()
    assert watch_of(again) is (None if is_begun else True)
    await visit.send_unsigned(PresencePayload(agents=[{"did": other.did}]), again.id)
    assert (await first).agent.did == other.did
    await end_watch(events, gateway, visit)


async def test_watch_that_may_have_begun_is_ended_before_it_begins_anew(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    other: DIDKey,
    no_pause: None,
) -> None:
    visit = await registered()
    events, first, question = await begin_watch(client, gateway, timeout=2.0)
    end = await gateway.message()  # when nobody has answered in time
    assert (watch_of(end), end.correlation_id) == (False, question.id)
    await visit.send_unsigned(PresencePayload(agents=[]), end.id)
    again = await gateway.message()
    assert watch_of(again)
    await visit.send_unsigned(PresencePayload(agents=[{"did": other.did}]), again.id)
    assert (await first).agent.did == other.did
    await end_watch(events, gateway, visit)


async def test_watch_that_waited_for_the_gateway_begins_once(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, other: DIDKey
) -> None:
    visit = await registered()
    gone = asyncio.ensure_future(client.wait_for(ClientState.RECONNECTING, timeout=10))
    await asyncio.sleep(0)
    visit.abort()
    await gone
    events = client.watch()
    first = asyncio.ensure_future(anext(events))
    await client.wait_for(ClientState.REGISTERED, timeout=10)
    visit = await gateway.visit()
    question = await gateway.message()
    assert watch_of(question)
    await visit.send_unsigned(PresencePayload(agents=[{"did": client.did}]), question.id)
    assert (await first).agent.did == client.did
    second = asyncio.ensure_future(anext(events))
    again = await gateway.message()
    assert watch_of(again) is None
    await visit.send_unsigned(PresencePayload(agents=[{"did": other.did}]), again.id)
    assert (await second).agent.did == other.did
    await end_watch(events, gateway, visit)


@pytest.mark.parametrize("is_dropped", [False, True])
async def test_watch_that_is_read_too_slowly_tells_how_it_is(
    is_dropped: bool,
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directory, "EVENTS_MAX", 8)
    visit = await registered()
    others = [DIDKey.generate().did for _ in range(20)]
    events, first, question = await begin_watch(client, gateway)
    await visit.send_unsigned(PresencePayload(agents=[{"did": others[0]}]), question.id)
    assert (await first).agent.did == others[0]
    for did in others[1:]:
        await visit.send_unsigned(PresencePayload(event="join", agents=[{"did": did}]), question.id)
    await visit.send_unsigned(
        PresencePayload(event="leave", agents=[{"did": others[0], "status": "offline"}]), question.id
    )
    await client.ping()  # it has got all of that
    if is_dropped:
        gone = asyncio.ensure_future(client.wait_for(ClientState.RECONNECTING, timeout=10))
        await asyncio.sleep(0)
        visit.abort()
        await gone
        await client.wait_for(ClientState.REGISTERED, timeout=10)
        visit = await gateway.visit()
    second = asyncio.ensure_future(anext(events))
    again = await gateway.message()
    assert watch_of(again) is (True if is_dropped else None)
    await visit.send_unsigned(PresencePayload(agents=[{"did": did} for did in others[2:]]), again.id)
    told = [await second, *[await anext(events) for _ in range(18)]]
    # others[1] was dropped, or told by the last few events.
    joined = {event.agent.did for event in told if event.event == "join"}
    assert joined | {others[1]} == set(others[1:])
    assert [event.agent.did for event in told if event.event == "leave"] == [others[0]]
    await end_watch(events, gateway, visit)


async def _collect(found: AsyncIterator[Found]) -> list[Found]:
    return [each async for each in found]


async def test_cancelled_request_is_forgotten(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message
) -> None:
    await registered()
    asking = asyncio.create_task(client.request(to_other))
    await gateway.message()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    asking = asyncio.create_task(client.request(to_other))  # the same id is free again
    await gateway.message()
    with pytest.raises(ValueError, match="waiting already"):
        await client.request(to_other)
    await client.close()
    with pytest.raises(NotConnectedError, match="the client left"):
        await asking


async def test_ping_measures_the_round_trip(client: GatewayClient, registered: Register) -> None:
    await registered()
    assert 0 < await client.ping() < 5


async def test_ping_of_the_gateway_is_answered(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    await visit.send_unsigned(PingPayload(sequence=7))
    pong = await gateway.message()
    assert (pong.type, pong.to) == (MessageType.PONG, gateway.key.did)
    assert pong.payload.sequence == 7  # type: ignore[attr-defined]


# --- handlers --------------------------------------------------------------------------------------


async def test_handler_takes_its_type_from_the_queue_until_it_is_taken_off(
    client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    offers: asyncio.Queue[Message] = asyncio.Queue()
    remove = client.on(MessageType.OFFER, offers.put_nowait)
    candidate = Message.create(other.did, client.did, IceCandidatePayload(candidate=""))
    await visit.send(offer("one"), other)
    await visit.send(candidate, other)
    assert (await client.receive(timeout=5)).type is MessageType.ICE_CANDIDATE
    assert offers.get_nowait().payload == OfferPayload(sdp="one")
    remove()
    await visit.send(offer("two"), other)
    assert (await client.receive(timeout=5)).payload == OfferPayload(sdp="two")
    assert offers.empty()


async def test_fault_of_a_handler_harms_nothing(
    client: GatewayClient, registered: Register, offer: Offer, other: DIDKey, caplog: pytest.LogCaptureFixture
) -> None:
    visit = await registered()
    seen: asyncio.Queue[Message] = asyncio.Queue()

    def broken(message: Message) -> None:
        raise RuntimeError("broken at once")

    async def broken_later(message: Message) -> None:
        raise RuntimeError("broken later")

    client.on(MessageType.OFFER, broken)
    client.on(MessageType.OFFER, broken_later)
    client.on(MessageType.OFFER, seen.put_nowait)
    for sdp in ("one", "two"):
        await visit.send(offer(sdp), other)
        assert (await asyncio.wait_for(seen.get(), 5)).payload == OfferPayload(sdp=sdp)
    await client.ping()
    assert caplog.text.count("RuntimeError: broken at once") == 2
    assert caplog.text.count("RuntimeError: broken later") == 2
    assert client.state is ClientState.REGISTERED


async def test_handler_may_ask_and_wait_while_others_run(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    started: list[str] = []
    done = asyncio.Event()

    async def ask_back(message: Message) -> None:
        started.append(message.payload.sdp)  # type: ignore[attr-defined]
        await client.request(message.reply(OfferPayload(sdp="back")))
        done.set()

    client.on(MessageType.OFFER, ask_back)
    await visit.send(offer("one"), other)
    await visit.send(offer("two"), other)
    first, second = await gateway.message(), await gateway.message()
    assert started == ["one", "two"]
    await visit.send(second.reply(AnswerPayload(sdp="v=1")), other)
    await asyncio.wait_for(done.wait(), 5)
    assert first.correlation_id != second.correlation_id


async def test_close_cancels_running_handlers(
    client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    running, cancelled = asyncio.Event(), asyncio.Event()

    async def endless(message: Message) -> None:
        running.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    client.on(MessageType.OFFER, endless)
    await visit.send(offer(), other)
    await running.wait()
    await client.close()
    assert cancelled.is_set()


async def test_handler_may_close_the_client(
    client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    after = asyncio.Event()

    async def enough(message: Message) -> None:
        await client.close()
        after.set()

    client.on(MessageType.OFFER, enough)
    await visit.send(offer(), other)
    assert [message async for message in client] == []
    await asyncio.wait_for(after.wait(), 5)


async def test_refusal_of_a_sent_message_reaches_the_error_handler(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, to_other: Message
) -> None:
    visit = await registered()
    errors: asyncio.Queue[Message] = asyncio.Queue()
    remove = client.on(MessageType.ERROR, errors.put_nowait)
    sent = await client.send(to_other)
    await visit.send_unsigned(ErrorPayload.for_cause("not_online"), sent.id)
    assert (await asyncio.wait_for(errors.get(), 5)).correlation_id == sent.id
    remove()
    await visit.send_unsigned(ErrorPayload.for_cause("not_online"), sent.id)
    assert (await client.receive(timeout=5)).correlation_id == sent.id


# --- the queue -------------------------------------------------------------------------------------


async def test_full_queue_refuses_and_tells_the_sender(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    offer: Offer,
    other: DIDKey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "INBOX_MAX_MESSAGES", 2)
    visit = await registered()
    messages = [offer(str(number)) for number in range(4)]
    for message in messages:
        await visit.send(message, other)
    for message in messages[2:]:
        refusal = await gateway.message()
        assert refusal.to == other.did
        assert refusal.correlation_id == message.id
        assert refusal.payload == ErrorPayload.for_cause("slow_consumer")
    # Nor does it stall anything else: the gateway answers, and so does the other agent.
    await client.ping()
    await visit.send(
        messages[3]
        .reply(ErrorPayload.for_cause("busy"))
        .model_copy(update={"from_": other.did, "to": client.did}),
        other,
    )
    await client.ping()
    assert gateway.inbox.empty()  # an ERROR is never answered, not even where it is lost
    assert client.stats.refused == 3
    assert [(await client.receive()).id for _ in range(2)] == [message.id for message in messages[:2]]
    # The refusal could not be delivered: that is no news for the application.
    await visit.send_unsigned(ErrorPayload.for_cause("not_online"), refusal.id)
    await client.ping()
    with pytest.raises(TimeoutError):
        await client.receive(timeout=0)


async def test_busy_handlers_refuse_too(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    offer: Offer,
    other: DIDKey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "HANDLERS_MAX", 1)
    visit = await registered()
    ready: asyncio.Queue[Message] = asyncio.Queue()
    release = asyncio.Event()

    async def slow(message: Message) -> None:
        ready.put_nowait(message)
        await release.wait()

    client.on(MessageType.OFFER, slow)
    await visit.send(offer("one"), other)
    await visit.send(offer("two"), other)
    assert (await gateway.message()).payload == ErrorPayload.for_cause("slow_consumer")
    release.set()
    assert ready.qsize() == 1
    await client.ping()
    await visit.send(offer("three"), other)
    await ready.get()
    assert (await asyncio.wait_for(ready.get(), 5)).payload == OfferPayload(sdp="three")


async def test_receive_waits_no_longer_than_its_timeout(client: GatewayClient, registered: Register) -> None:
    await registered()
    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        await client.receive(timeout=0.05)


async def test_several_readers_share_the_queue(
    client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    readers = [asyncio.create_task(client.receive(timeout=5)) for _ in range(3)]
    for number in range(3):
        await visit.send(offer(str(number)), other)
    got = await asyncio.gather(*readers)
    assert sorted(message.payload.sdp for message in got) == ["0", "1", "2"]  # type: ignore[attr-defined]


async def test_cancelled_reader_loses_no_message(
    client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    reader = asyncio.create_task(client.receive())
    await asyncio.gather(asyncio.create_task(client.ping()))
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await visit.send(offer(), other)
    await client.receive(timeout=5)


async def test_iteration_ends_after_close_when_the_queue_is_empty(
    client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    await visit.send(offer("one"), other)
    await client.ping()
    await client.close()
    assert [message.payload async for message in client] == [OfferPayload(sdp="one")]
    with pytest.raises(NotConnectedError):
        await client.receive()
