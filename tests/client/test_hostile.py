"""A gateway that forges, alters, repeats and misroutes: nothing of that reaches the application."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone

import orjson
import pytest
from scripted_gateway import ScriptedGateway, Visit

from aiconexus.client import ClientState, GatewayClient
from aiconexus.client.verification import Verifier
from aiconexus.protocol import (
    DIDKey,
    ErrorPayload,
    ExecRequestPayload,
    IntentPayload,
    Message,
    MessageError,
    OfferPayload,
    Payload,
    PingPayload,
    PongPayload,
    PresencePayload,
    RegisterPayload,
    canonicalize,
    encode,
    sign_message,
)

Register = Callable[[], Awaitable[Visit]]
Offer = Callable[..., Message]


class Rejections:
    """What a client has rejected: the names of the causes."""

    def __init__(self, client: GatewayClient) -> None:
        self.names: list[str] = []
        client.on_rejected(self._note)

    def _note(self, error: MessageError, data: str | bytes) -> None:
        self.names.append(error.cause.name)


async def settle(client: GatewayClient) -> None:
    """Wait until everything that was sent before has been read."""
    await client.ping()


async def assert_dropped(
    gateway: ScriptedGateway, client: GatewayClient, data: bytes, name: str, visit: Visit
) -> None:
    rejections = Rejections(client)
    await visit.send_raw(data)
    await settle(client)
    assert rejections.names == [name]
    assert client.stats.rejected == 1
    assert client.state is ClientState.REGISTERED
    with pytest.raises(TimeoutError):
        await client.receive(timeout=0)
    assert gateway.inbox.empty()  # and nobody was written to


async def test_altered_sdp_is_dropped(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    offer: Offer,
    other: DIDKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = encode(sign_message(offer("a=fingerprint:sha-256 AA"), other))
    visit = await registered()
    await assert_dropped(gateway, client, data.replace(b"256 AA", b"256 BB"), "bad_signature", visit)
    logged = [record for record in caplog.records if "a message was dropped" in record.message]
    assert [record.levelname for record in logged] == ["WARNING"]


async def test_changed_sender_is_dropped(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    data = encode(sign_message(offer(), other))
    changed = data.replace(other.did.encode(), DIDKey.generate().did.encode())
    await assert_dropped(gateway, client, changed, "bad_signature", await registered())


async def test_changed_correlation_is_dropped_and_the_request_still_waits(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, key: DIDKey, other: DIDKey
) -> None:
    visit = await registered()
    questions = []
    asking = []
    for sdp in ("one", "two"):
        message = Message.create(key.did, other.did, OfferPayload(sdp=sdp))
        asking.append(asyncio.create_task(client.request(message)))
        questions.append(await gateway.message())
    data = encode(sign_message(questions[0].reply(OfferPayload(sdp="1")), other))
    await visit.send_raw(data.replace(questions[0].id.encode(), questions[1].id.encode()))
    await settle(client)
    assert client.stats.rejected == 1
    assert not asking[1].done()


async def test_unsigned_message_is_dropped(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer
) -> None:
    await assert_dropped(gateway, client, encode(offer()), "missing_signature", await registered())


async def test_message_to_somebody_else_is_dropped_and_not_answered(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    data = encode(sign_message(offer(to=DIDKey.generate().did), other))
    await assert_dropped(gateway, client, data, "wrong_recipient", await registered())


async def test_replay_is_dropped_and_not_answered(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    data = encode(sign_message(offer(), other))
    visit = await registered()
    await visit.send_raw(data)
    await client.receive(timeout=5)
    await assert_dropped(gateway, client, data, "replayed", visit)


async def test_replay_over_a_reconnection_is_dropped(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    data = encode(sign_message(offer(), other))
    visit = await registered()
    await visit.send_raw(data)
    await client.receive(timeout=5)
    await visit.close(4001, retry_after_ms=0)
    visit = await gateway.visit()
    await client.wait_for(ClientState.REGISTERED, timeout=5)
    await assert_dropped(gateway, client, data, "replayed", visit)


async def test_replay_of_our_own_message_is_dropped(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, key: DIDKey, other: DIDKey
) -> None:
    visit = await registered()
    sent = await client.send(Message.create(key.did, other.did, OfferPayload(sdp="v=0")))
    await gateway.message()
    await assert_dropped(gateway, client, encode(sent), "wrong_recipient", visit)


@pytest.mark.parametrize("minutes", [-3, 3])
async def test_stale_message_is_dropped_and_its_sender_is_told(
    minutes: int,
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    offer: Offer,
    other: DIDKey,
) -> None:
    visit = await registered()
    stale = offer(timestamp=datetime.now(timezone.utc) + timedelta(minutes=minutes))
    await visit.send(stale, other)
    refusal = await gateway.message()  # which checks our signature
    assert (refusal.from_, refusal.to, refusal.correlation_id) == (client.did, other.did, stale.id)
    assert isinstance(refusal.payload, ErrorPayload)
    assert refusal.payload.details is not None
    assert refusal.payload.details.name == "stale_timestamp"
    assert client.stats.received == 0


async def test_stale_error_is_dropped_and_never_answered(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, key: DIDKey, other: DIDKey
) -> None:
    error = Message.create(other.did, key.did, ErrorPayload.for_cause("busy"))
    stale = error.model_copy(update={"timestamp": datetime.now(timezone.utc) - timedelta(minutes=3)})
    data = encode(sign_message(stale, other))
    await assert_dropped(gateway, client, data, "stale_timestamp", await registered())


def resigned(message: Message, key: DIDKey, **changes: object) -> bytes:
    """Sign an envelope that the models would not let pass."""
    from base64 import b64encode

    envelope = {**message.envelope(), **changes}
    envelope["signature"] = b64encode(key.sign(canonicalize(envelope))).decode()
    return orjson.dumps(envelope)


async def test_proven_sender_of_a_malformed_message_is_told(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    message = offer()
    await visit.send_raw(resigned(message, other, payload={"sdp": "v=0", "colour": "red"}))
    refusal = await gateway.message()
    assert (refusal.to, refusal.correlation_id) == (other.did, message.id)
    assert refusal.payload.details.field == "payload.colour"  # type: ignore[attr-defined]


async def test_malformed_message_of_nobody_is_not_answered(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    data = resigned(offer(), other, payload={"sdp": "v=0", "colour": "red"})
    altered = data.replace(b'"red"', b'"blu"')
    await assert_dropped(gateway, client, altered, "invalid_payload", await registered())


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"hello", "not_json"),
        (b"", "not_json"),
        (b"[]", "not_object"),
        (b"{}", "missing_field"),
        (b'{"id": "a", "id": "b"}', "duplicate_key"),
        (b"[" * 60_000, "too_deep"),
        (b'{"from": {"from": 1}, "to": [], "type": {}, "signature": 7}', "missing_field"),
    ],
)
async def test_garbage_is_dropped(
    data: bytes, name: str, client: GatewayClient, registered: Register
) -> None:
    rejections = Rejections(client)
    visit = await registered()
    await visit.send_raw(data)
    await settle(client)
    assert rejections.names == [name]
    assert client.state is ClientState.REGISTERED


async def test_each_fault_of_a_sender_is_logged_once(
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    offer: Offer,
    other: DIDKey,
    caplog: pytest.LogCaptureFixture,
) -> None:
    visit = await registered()
    third = DIDKey.generate()
    for _ in range(3):
        await visit.send_raw(b"garbage")
        for key in (other, third):
            await visit.send_raw(resigned(offer(from_=key.did), key, payload={"sdp": 1}))
            await visit.send_raw(resigned(offer(from_=key.did), key, colour="red"))
    await settle(client)
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in logged if "was dropped" in text]) == 5
    assert client.stats.rejected == 15


async def test_binary_frame_is_dropped(
    client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    rejections = Rejections(client)
    visit = await registered()
    await visit.socket.send(encode(sign_message(offer(), other)))
    await settle(client)
    assert rejections.names == ["binary_frame"]


@pytest.mark.parametrize(
    "payload",
    [
        RegisterPayload(public_key="z"),
        PresencePayload(agents=[]),
        PingPayload(),
        PongPayload(),
        IntentPayload(query="?"),
        ExecRequestPayload(args={}),
    ],
    ids=lambda payload: payload.type.value,
)
async def test_agents_cannot_say_what_is_the_gateways_or_the_data_channels(
    payload: Payload,
    gateway: ScriptedGateway,
    client: GatewayClient,
    registered: Register,
    key: DIDKey,
    other: DIDKey,
) -> None:
    rejections = Rejections(client)
    visit = await registered()
    await visit.send(Message.create(other.did, key.did, payload), other)
    refusal = await gateway.message()
    assert refusal.to == other.did
    assert rejections.names == ["unexpected_type"]
    assert client.stats.received == 0


async def test_unsigned_error_counts_from_the_gateway_only(
    client: GatewayClient, registered: Register, key: DIDKey, other: DIDKey
) -> None:
    rejections = Rejections(client)
    visit = await registered()
    error = ErrorPayload.for_cause("not_online")
    await visit.send_raw(encode(Message.create(other.did, key.did, error)))
    await visit.send_raw(encode(Message.create(visit.key.did, other.did, error)))
    await visit.send_unsigned(OfferPayload(sdp="v=0"))
    await settle(client)
    assert rejections.names == ["missing_signature"] * 3
    await visit.send_unsigned(error)
    assert (await client.receive(timeout=5)).payload == error


async def test_wrong_signature_of_the_gateway_is_worse_than_none(
    client: GatewayClient, registered: Register, key: DIDKey
) -> None:
    rejections = Rejections(client)
    visit = await registered()
    data = encode(
        sign_message(Message.create(visit.key.did, key.did, ErrorPayload.for_cause("busy")), visit.key)
    )
    await visit.send_raw(data.replace(b"busy", b"lazy"))
    await settle(client)
    assert rejections.names == ["bad_signature"]


async def test_oversized_message_costs_the_connection_not_the_client(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    await visit.send_raw(b'"' + b"a" * 70_000 + b'"')
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    assert await visit.closed() == 1009


async def test_text_that_is_not_utf8_costs_the_connection_not_the_client(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register
) -> None:
    visit = await registered()
    await visit.send_raw(b"\xff\xfe")
    await client.wait_for(ClientState.RECONNECTING, timeout=5)
    assert await visit.closed() == 1007


async def test_connection_that_is_cut_within_a_message_gives_none(
    gateway: ScriptedGateway, client: GatewayClient, registered: Register, offer: Offer, other: DIDKey
) -> None:
    visit = await registered()
    data = encode(sign_message(offer(), other))
    frame = b"\x81\x7e" + len(data).to_bytes(2, "big") + data
    visit.socket.transport.write(frame[: len(frame) // 2])
    visit.socket.transport.close()
    await gateway.visit()
    await client.wait_for(ClientState.REGISTERED, timeout=5)
    assert (client.stats.received, client.stats.rejected) == (0, 0)


async def test_faulty_rejection_handler_harms_nothing(client: GatewayClient, registered: Register) -> None:
    def broken(error: MessageError, data: str | bytes) -> None:
        raise RuntimeError("a fault of the application")

    client.on_rejected(broken)
    visit = await registered()
    await visit.send_raw(b"{}")
    await settle(client)
    assert client.stats.rejected == 1


def test_no_change_of_a_byte_gets_through(offer: Offer, key: DIDKey, other: DIDKey) -> None:
    """Whatever the gateway changes, the receiver refuses it, and by MessageError alone."""
    gateway_did = DIDKey.generate().did
    verifier = Verifier(key.did)
    data = encode(sign_message(offer("a=fingerprint:sha-256 AA:BB"), other))
    source = random.Random(7)
    for _ in range(3_000):
        changed = bytearray(data)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(changed))
            match source.randrange(3):
                case 0:
                    changed[at] = source.randrange(32, 127)
                case 1:
                    del changed[at]
                case _:
                    changed.insert(at, source.choice(b'"\\{}[],:0 '))
        text = bytes(changed).decode()
        try:
            accepted = verifier.verify(text, gateway_did)
        except MessageError as error:
            verifier.sender_to_answer(error, text)
        else:  # white space between tokens, or no change at all
            assert orjson.loads(text) == orjson.loads(data)
            assert accepted.payload == OfferPayload(sdp="a=fingerprint:sha-256 AA:BB")
            verifier = Verifier(key.did)
    assert verifier.verify(data.decode(), gateway_did).from_ == other.did
