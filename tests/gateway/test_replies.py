"""What the gateway writes without the models is what the models read."""

from __future__ import annotations

import json

import pytest

from aiconexus.protocol import CAUSES, CLOSE_CODES, DIDKey, ErrorPayload, MessageType, decode
from gateway import replies
from gateway._frames import scan

GATEWAY = DIDKey.from_seed(b"g" * 32).did
AGENT = DIDKey.from_seed(b"a" * 32).did
ID = "123e4567-e89b-42d3-a456-426614174000"


@pytest.mark.parametrize("name", CAUSES)
def test_every_error_reads_as_the_message_of_its_cause(name):
    for options in ({}, {"field": "to"}, {"message": 'é"\n'}, {"correlation_id": ID}):
        data = replies.error(GATEWAY, AGENT, name, **options)
        message = decode(data)
        assert scan(data).status == "ok"
        expected = ErrorPayload.for_cause(name, options.get("message", ""), field=options.get("field"))
        assert message.payload == expected
        assert message.correlation_id == options.get("correlation_id")
        assert (message.from_, message.to, message.type) == (GATEWAY, AGENT, MessageType.ERROR)


def test_every_reply_has_an_id_of_its_own():
    made = [json.loads(replies.error(GATEWAY, AGENT, "not_online"))["id"] for _ in range(100)]
    assert len(set(made)) == 100


@pytest.mark.parametrize("sequence", [None, 0, -7, 2**53 - 1])
def test_a_pong_reads_as_one(sequence):
    message = decode(replies.pong(GATEWAY, AGENT, ID, sequence))
    assert (message.type, message.correlation_id) == (MessageType.PONG, ID)
    assert message.payload.sequence == sequence
    assert message.payload.model_dump(exclude_unset=True) == (
        {} if sequence is None else {"sequence": sequence}
    )


@pytest.mark.parametrize("code", CLOSE_CODES)
def test_every_close_reason_fits_its_frame_and_tells_when_to_return(code):
    """A control frame has 125 bytes at most, two of which are the code (RFC 6455 section 5.5)."""
    row = CLOSE_CODES[code]
    reason = replies.close_reason(code)
    assert len(reason) <= 123
    assert json.loads(reason) == (
        {"n": row.name, "r": row.retry_after_ms} if row.reconnect else {"n": row.name}
    )
    later = json.loads(replies.close_reason(code, 2**31))
    assert later.get("r") == (2**31 if row.reconnect else None)
