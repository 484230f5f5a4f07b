"""PING and PONG as texts: what is read so is what the protocol's own reader would say."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from uuid import uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiconexus.core.pings import PingTexts
from aiconexus.protocol import DIDKey, Message, MessageType, PingPayload, PongPayload, decode
from aiconexus.protocol.errors import MessageError
from aiconexus.protocol.models import new_envelope
from aiconexus.protocol.serialization import dumps

ALICE, BOB = (DIDKey.from_seed(bytes([seed]) * 32).did for seed in (1, 2))
ID = "0b5d6c1e-3c3a-4b9d-8f3a-5a4d1f2e3c4b"


@pytest.fixture
def alice() -> PingTexts:
    return PingTexts(ALICE, BOB)


@pytest.fixture
def bob() -> PingTexts:
    return PingTexts(BOB, ALICE)


def as_written(text: str) -> str:
    """Return the text of a message with this one's content as all others are written."""
    envelope = json.loads(text)
    timestamp = datetime.fromisoformat(envelope["timestamp"].replace("Z", "+00:00"))
    return dumps(
        new_envelope(
            envelope["from"],
            envelope["to"],
            MessageType(envelope["type"]),
            {},
            correlation_id=envelope["correlation_id"],
            id_=envelope["id"],
            timestamp=timestamp,
        )
    ).decode()


def test_they_are_written_as_other_messages_are(alice: PingTexts, bob: PingTexts) -> None:
    id_, ping = alice.ping()
    pong = bob.pong(id_)
    assert (as_written(ping), as_written(pong)) == (ping, pong)
    assert decode(ping).payload == PingPayload()
    assert decode(pong).payload == PongPayload()
    age = datetime.now(timezone.utc) - decode(ping).timestamp
    assert 0 <= age.total_seconds() < 10


def test_each_reads_what_the_other_writes(alice: PingTexts, bob: PingTexts) -> None:
    id_, ping = alice.ping()
    assert bob.read(ping) == (MessageType.PING, id_)
    assert alice.read(bob.pong(id_)) == (MessageType.PONG, id_)
    assert bob.pong(id_) != bob.pong(id_)  # of each its own id


def test_what_is_not_between_these_two_is_not_read(alice: PingTexts, bob: PingTexts) -> None:
    _, ping = alice.ping()
    assert alice.read(ping) is None
    assert PingTexts(BOB, DIDKey.generate().did).read(ping) is None
    assert PingTexts(DIDKey.generate().did, ALICE).read(ping) is None


def test_a_pong_that_answers_nothing_is_left_to_others(alice: PingTexts, bob: PingTexts) -> None:
    pong = bob.pong(ID)
    assert alice.read(pong.replace(f'"correlation_id":"{ID}"', '"correlation_id":null')) is None


def edited(text: str, edits: list[tuple[int, str, int]]) -> str:
    """Replace so many characters at these places."""
    for place, put, count in edits:
        at = place % len(text)
        text = text[:at] + put + text[at + count :]
    return text


EDITS = st.lists(
    st.tuples(
        st.integers(0, 10_000),
        st.text('abcdef0123456789ABCDEF-:.,"{}\\ ZTuk\n\u0664é', max_size=3),
        st.integers(0, 3),
    ),
    max_size=3,
)


@given(is_pong=st.booleans(), edits=EDITS)
@example(is_pong=False, edits=[])
@example(is_pong=True, edits=[])
def test_what_is_read_is_what_the_protocol_says(is_pong: bool, edits: list[tuple[int, str, int]]) -> None:
    reader, writer = PingTexts(ALICE, BOB), PingTexts(BOB, ALICE)
    text = edited(writer.pong(ID) if is_pong else writer.ping()[1], edits)
    got = reader.read(text)
    if not edits:
        assert got is not None
    if got is not None:
        message = decode(text)
        asked = message.correlation_id if is_pong else message.id
        assert got == (message.type, asked)
        assert (message.from_, message.to, message.ext) == (BOB, ALICE, {})
        assert message.payload.to_dict() == {}


@pytest.mark.parametrize(
    "timestamp",
    [
        "2026-11-28T08:00:00Z",
        "2026-11-28T08:00:00.123456789Z",
        "2026-11-28T08:00:00.Z",
        "2026-11-28T08:00:00+00:00",
        "2026-02-29T08:00:00Z",
        "2024-02-29T08:00:00Z",
        "2026-13-01T08:00:00Z",
        "2026-11-28T24:00:00Z",
        "2026-11-28T08:00:60Z",
        "0000-11-28T08:00:00Z",
        "2026-11-28 08:00:00Z",
        "٢٠٢٦-11-28T08:00:00Z",
        "",
    ],
)
def test_no_timestamp_passes_that_the_protocol_refuses(bob: PingTexts, timestamp: str) -> None:
    envelope = Message.create(ALICE, BOB, PingPayload()).envelope()
    text = dumps({**envelope, "id": str(uuid4()), "timestamp": timestamp}).decode()
    try:
        is_valid = decode(text).timestamp is not None
    except MessageError:
        is_valid = False
    assert (bob.read(text) is not None) is is_valid
