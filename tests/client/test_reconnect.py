"""After a drop: come back, resume, obey what the gateway asks for, and stop where it says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from scripted_gateway import ScriptedGateway, Visit

from aiconexus.client import Backoff, ClientState, GatewayClient, connection
from aiconexus.client.backoff import RETRY_AFTER_MAX_SECONDS, retry_after, retry_after_http
from aiconexus.protocol import (
    CLOSE_CODES,
    AnswerPayload,
    DIDKey,
    DiscoverPayload,
    ErrorPayload,
    Message,
    OfferPayload,
)
from aiconexus.protocol.errors import (
    GatewayClosedError,
    GatewayUnreachableError,
    NotConnectedError,
    close_code,
)

Register = Callable[[], Awaitable[Visit]]

# 1005, 1006 and 1015 never stand in a CLOSE frame (RFC 6455 section 7.4.1).
TEMPORARY = sorted(
    number for number, close in CLOSE_CODES.items() if close.reconnect and number not in (1005, 1006)
)
TERMINAL = sorted(number for number, close in CLOSE_CODES.items() if not close.reconnect)


def to_other(client: GatewayClient, other: DIDKey) -> Message:
    return Message.create(client.did, other.did, OfferPayload(sdp="v=0"))


# --- coming back -----------------------------------------------------------------------------------


async def test_cut_connection_is_made_again_and_resumed(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, other: DIDKey
) -> None:
    states: list[ClientState] = []
    client.on_state(states.append)
    first = await registered()
    first.abort()
    second = await gateway.visit()
    await client.wait_for(ClientState.REGISTERED, timeout=5)
    assert second.register_ext["resume"] == "token-1"
    assert second.register_ext["card"] == first.register_ext["card"]
    assert client.session is not None
    assert client.session.id == "session-2"
    assert client.session.resumed is True
    assert client.stats.reconnects == 1
    await client.send(to_other(client, other))
    await gateway.message()
    assert states == [
        ClientState.CONNECTING,
        ClientState.REGISTERED,
        ClientState.RECONNECTING,
        ClientState.REGISTERED,
    ]


async def test_resume_token_is_the_newest_at_every_drop(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    for number in range(1, 6):
        await visit.close(4001, retry_after_ms=0)
        visit = await gateway.visit()
        assert visit.register_ext["resume"] == f"token-{number}"


async def test_restarted_gateway_is_found_again_with_or_without_its_memory(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    await registered()
    await gateway.stop()
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    await gateway.start()
    await gateway.visit()
    await client.wait_for(ClientState.REGISTERED, timeout=5)
    assert client.session is not None
    assert client.session.resumed is True

    await gateway.stop()
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    gateway.remembers, gateway.key = False, DIDKey.generate()
    await gateway.start()
    await gateway.visit()
    await client.wait_for(ClientState.REGISTERED, timeout=5)
    assert client.session.resumed is False
    assert client.session.gateway_did == gateway.key.did


async def test_resume_token_goes_to_no_other_gateway(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, caplog: pytest.LogCaptureFixture
) -> None:
    visit = await registered()
    first, gateway.key = gateway.key, DIDKey.generate()
    visit.abort()
    visit = await gateway.visit()
    assert "resume" not in visit.register_ext
    await client.wait_for(ClientState.REGISTERED, timeout=5)
    assert f"another gateway answers, {gateway.key.did} in place of {first.did}" in caplog.text
    # What the new one has issued is the new one's.
    visit.abort()
    assert (await gateway.visit()).register_ext["resume"] == "token-2"


async def test_pinned_client_never_registers_with_another_gateway(
    gateway: ScriptedGateway, key: DIDKey
) -> None:
    real = gateway.key
    async with GatewayClient(gateway.url, key, gateway_did=real.did, backoff=Backoff(0.01, 0.01)) as client:
        await client.register()
        visit = await gateway.visit()
        refused = asyncio.Event()

        async def false_gateway(visit: Visit) -> None:
            visit.key = DIDKey.generate()
            await visit.send(visit.challenge())
            await visit.socket.wait_closed()
            refused.set()

        gateway.scripts.append(false_gateway)
        visit.abort()
        await asyncio.wait_for(refused.wait(), 5)
        await gateway.visit()
        await client.wait_for(ClientState.REGISTERED, timeout=5)
        assert client.session is not None
        assert client.session.gateway_did == real.did


@pytest.mark.parametrize("code", [*TEMPORARY, 4499, 3999])
async def test_temporary_close_codes_bring_the_client_back(
    code: int, gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    await visit.close(code, retry_after_ms=0)
    await gateway.visit()
    await client.wait_for(ClientState.REGISTERED, timeout=5)


@pytest.mark.parametrize("code", [*TERMINAL, 4599])
async def test_terminal_close_codes_end_the_client(
    code: int, gateway: ScriptedGateway, client: GatewayClient, registered: Register, other: DIDKey
) -> None:
    visit = await registered()
    pending = asyncio.create_task(client.request(to_other(client, other)))
    reader = asyncio.create_task(client.receive())
    await gateway.message()
    await visit.close(code)
    for waiting in (pending, reader):
        with pytest.raises(GatewayClosedError) as caught:
            await asyncio.wait_for(waiting, 5)
        assert caught.value.close_code == close_code(code)
        assert client.url in str(caught.value)
    with pytest.raises(GatewayClosedError):
        await client.send(to_other(client, other))
    with pytest.raises(GatewayClosedError):
        await client.wait_for(ClientState.REGISTERED, timeout=5)
    assert client.state is ClientState.CLOSED
    assert client.session is None
    assert gateway.connections == 1


async def test_messages_before_a_terminal_close_are_still_read(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    offer: Callable[..., Message],
    other: DIDKey,
) -> None:
    visit = await registered()
    await visit.send(offer("one"), other)
    await visit.send(offer("two"), other)
    await visit.close(4504)
    await client.wait_for(ClientState.CLOSED, timeout=5)
    assert (await anext(client)).payload == OfferPayload(sdp="one")
    assert (await anext(client)).payload == OfferPayload(sdp="two")
    with pytest.raises(GatewayClosedError, match="same key"):
        await anext(client)


async def test_terminal_refusal_of_the_return_ends_the_client(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    gateway.scripts.append(lambda visit: visit.refuse("wrong_audience", 4502))
    visit.abort()
    with pytest.raises(GatewayClosedError, match=r"ext\.aud is not"):
        await asyncio.wait_for(client.receive(), 5)


async def test_temporary_refusal_of_the_return_does_not(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    gateway.scripts.append(lambda visit: visit.refuse("internal", 4002, retry_after_ms=0))
    visit.abort()
    await gateway.visit()
    assert gateway.connections == 3


async def test_client_that_does_not_reconnect_is_closed_by_the_first_drop(
    gateway: ScriptedGateway, key: DIDKey
) -> None:
    async with GatewayClient(gateway.url, key, reconnect=False) as client:
        await client.register()
        (await gateway.visit()).abort()
        with pytest.raises(GatewayClosedError, match="does not reconnect") as caught:
            await asyncio.wait_for(client.receive(), 5)
        assert caught.value.close_code.number == 1006
    assert gateway.connections == 1


async def test_half_open_connection_is_noticed(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "PING_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(connection, "PONG_TIMEOUT_SECONDS", 0.05)
    visit = await registered()
    visit.socket.transport.pause_reading()
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    await gateway.visit()
    visit.abort()


# --- when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["session", "register"])
async def test_retry_after_ms_is_obeyed(
    stage: str, gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    begin = time.monotonic()
    if stage == "session":
        await visit.close(4001, retry_after_ms=400)
    else:
        gateway.scripts.append(lambda visit: visit.refuse("internal", 4002, retry_after_ms=400))
        visit.abort()
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    await gateway.visit()
    assert time.monotonic() - begin >= 0.4


async def test_refusal_cannot_send_a_client_away_for_ever(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    async def refuse(visit: Visit) -> None:
        await visit.send(visit.challenge())
        refusal = ErrorPayload.for_cause("gateway_full", retry_after_ms=10**12)
        register = await visit.read()
        visit.agent = register.from_
        await visit.send_unsigned(refusal, register.id)
        await visit.close(1013)

    visit = await registered()
    gateway.scripts.append(refuse)
    asked: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    def wait(not_before: float) -> float:
        if not_before > 60:
            asked.set_result(not_before)
            return 60.0  # until the client is closed
        return 0.0

    client._backoff.next = wait  # type: ignore[assignment]
    visit.abort()
    assert await asyncio.wait_for(asked, 5) == RETRY_AFTER_MAX_SECONDS


def test_reason_wins_over_the_table() -> None:
    draining = close_code(4001)
    assert retry_after(draining, '{"r": 1234, "n": "draining"}') == 1.234
    assert retry_after(draining, '{"r": 0, "n": "draining"}') == 0
    for reason in ("", "bye", "[]", "{}", '{"r": -1}', '{"r": "9"}', '{"r": true}', '{"r": 1.5}', "null"):
        assert retry_after(draining, reason) == draining.retry_after_ms / 1000
    assert retry_after(draining, '{"r": 99999999999999}') == RETRY_AFTER_MAX_SECONDS


def test_http_retry_after_in_seconds() -> None:
    assert retry_after_http("7") == 7
    assert retry_after_http("9" * 30) == RETRY_AFTER_MAX_SECONDS
    for header in (None, "", "soon", "-1", "1.5", "٣", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert retry_after_http(header) == 0


async def test_attempts_are_counted_and_a_lasting_session_ends_the_count(
    gateway: ScriptedGateway, key: DIDKey
) -> None:
    backoff = Backoff(0.001, 0.01, lasting=3600)
    async with GatewayClient(gateway.url, key, backoff=backoff) as client:
        await client.register()
        visit = await gateway.visit()
        for attempts in (1, 2, 3):
            await visit.close(4001, retry_after_ms=0)
            visit = await gateway.visit()
            assert backoff.attempts == attempts
        backoff.lasting = 0
        await visit.close(4001, retry_after_ms=0)
        await gateway.visit()
        assert backoff.attempts == 1


async def test_close_ends_a_long_wait_at_once(gateway: ScriptedGateway, key: DIDKey) -> None:
    async with GatewayClient(gateway.url, key) as client:
        await client.register()
        await (await gateway.visit()).close(4001, retry_after_ms=3_000_000)
        await client.wait_for(ClientState.RECONNECTING, timeout=5)
        await asyncio.wait_for(client.close(), 1)
    assert client.state is ClientState.CLOSED


async def test_unregister_ends_a_long_wait_too(gateway: ScriptedGateway, key: DIDKey) -> None:
    async with GatewayClient(gateway.url, key) as client:
        await client.register()
        await (await gateway.visit()).close(4001, retry_after_ms=3_000_000)
        await client.wait_for(ClientState.RECONNECTING, timeout=5)
        await asyncio.wait_for(client.unregister(), 1)
        assert client.state is ClientState.DISCONNECTED
        await client.register()


# --- what waits ------------------------------------------------------------------------------------


async def test_send_waits_for_the_connection(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, other: DIDKey
) -> None:
    await registered()
    await gateway.stop()
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    sending = asyncio.create_task(client.send(to_other(client, other)))
    await gateway.start()
    sent = await asyncio.wait_for(sending, 5)
    assert (await gateway.message()).id == sent.id


async def test_send_waits_no_longer_than_its_timeout(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, other: DIDKey
) -> None:
    await registered()
    await gateway.stop()
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    with pytest.raises(NotConnectedError, match=r"the client is reconnecting: .*"):
        await client.send(to_other(client, other), timeout=0.05)
    with pytest.raises(TimeoutError, match="reconnecting, not registered"):
        await client.wait_for(ClientState.REGISTERED, timeout=0.05)
    with pytest.raises(NotConnectedError):
        await client.ping(timeout=0.05)


async def test_nothing_is_sent_before_register_and_after_close(key: DIDKey, other: DIDKey) -> None:
    client = GatewayClient("ws://127.0.0.1:1/ws", key)
    with pytest.raises(NotConnectedError, match="call register"):
        await client.send(to_other(client, other))
    await client.close()
    with pytest.raises(NotConnectedError, match="make a new one"):
        await client.send(to_other(client, other))
    with pytest.raises(NotConnectedError):
        await client.register()


async def test_answer_that_waited_for_our_return_reaches_the_request(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, other: DIDKey
) -> None:
    visit = await registered()
    asking = asyncio.create_task(client.request(to_other(client, other)))
    question = await gateway.message()
    visit.abort()
    visit = await gateway.visit()
    await visit.send(question.reply(AnswerPayload(sdp="v=1")), other)
    assert (await asyncio.wait_for(asking, 5)).payload == AnswerPayload(sdp="v=1")


async def test_request_fails_when_its_answer_cannot_come_any_more(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, other: DIDKey
) -> None:
    gateway.remembers = False
    visit = await registered()
    asking = asyncio.create_task(client.request(to_other(client, other)))
    await gateway.message()
    visit.abort()
    with pytest.raises(NotConnectedError, match=r"could not be resumed.*ask again"):
        await asyncio.wait_for(asking, 5)


async def test_request_to_the_gateway_fails_with_the_connection(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    asking = asyncio.create_task(
        client.request(Message.create(client.did, gateway.key.did, DiscoverPayload()))
    )
    await gateway.message()
    visit.abort()
    with pytest.raises(NotConnectedError, match=r"the connection broke before the gateway ws://"):
        await asyncio.wait_for(asking, 5)


async def test_messages_that_waited_come_in_order_after_the_session(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    offer: Callable[..., Message],
    other: DIDKey,
) -> None:
    sessions: list[Any] = []
    client.on_state(lambda state: sessions.append((state, client.session)))
    visit = await registered()

    async def replay(visit: Visit) -> None:
        await visit.welcome(resumed=True)
        for number in range(64):
            await visit.send(offer(str(number)), other)
        await visit.serve()

    gateway.scripts.append(replay)
    visit.abort()
    got = [await client.receive(timeout=5) for _ in range(64)]
    assert [message.payload.sdp for message in got] == [str(number) for number in range(64)]  # type: ignore[attr-defined]
    state, session = sessions[-1]
    assert state is ClientState.REGISTERED
    assert session.resumed is True


# --- observing -------------------------------------------------------------------------------------


async def test_wait_for_sees_a_state_that_is_left_at_once(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    waiters = [asyncio.create_task(client.wait_for(ClientState.RECONNECTING, timeout=5)) for _ in range(3)]
    await asyncio.gather(asyncio.create_task(client.wait_for(ClientState.REGISTERED, timeout=5)))
    visit.abort()
    await asyncio.gather(*waiters)


async def test_state_handlers_can_be_taken_off_and_do_no_harm(
    gateway: ScriptedGateway, client: GatewayClient, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[ClientState] = []

    def broken(state: ClientState) -> None:
        raise RuntimeError("a fault of the application")

    client.on_state(broken)
    remove = client.on_state(seen.append)
    await client.register()
    assert seen == [ClientState.CONNECTING, ClientState.REGISTERED]
    assert "a fault of the application" in caplog.text
    remove()
    remove()
    await client.unregister()
    assert seen == [ClientState.CONNECTING, ClientState.REGISTERED]


async def test_wait_for_ends_when_the_client_is_closed(client: GatewayClient) -> None:
    waiting = asyncio.create_task(client.wait_for(ClientState.REGISTERED, timeout=5))
    await asyncio.gather(asyncio.create_task(client.close()))
    with pytest.raises(NotConnectedError, match="closed"):
        await waiting


async def test_unreachable_gateway_is_tried_again_and_again(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, caplog: pytest.LogCaptureFixture
) -> None:
    await registered()
    caplog.set_level("WARNING", "aiconexus")
    await gateway.stop()
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    with pytest.raises(NotConnectedError, match="cannot be reached"):
        await client.ping(timeout=1)
    attempts = [record for record in caplog.records if "next attempt in" in record.message]
    assert len(attempts) >= 3
    assert isinstance(attempts[-1].args[0], GatewayUnreachableError)  # type: ignore[index]
