"""Binary messages of the DataChannel, both ways."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiconexus.protocol import MalformedMessageError
from aiconexus.protocol.frames import Credit, Data, End, credit_frame, data_frame, end_frame, parse_frame
from aiconexus.protocol.limits import CHUNK_MAX_BYTES, FRAME_HEAD_BYTES, INTEGER_MAX

CALL = "01234567-89ab-4def-8123-456789abcdef"
HEAD = UUID(CALL).bytes


@given(st.uuids(), st.binary(min_size=1, max_size=200))
def test_data_survives(call: UUID, chunk: bytes) -> None:
    frame = data_frame(str(call), memoryview(chunk))
    assert len(frame) == FRAME_HEAD_BYTES + len(chunk)
    assert parse_frame(frame) == Data(str(call), chunk)


@given(st.uuids(), st.integers(0, INTEGER_MAX))
def test_credit_survives(call: UUID, taken: int) -> None:
    assert parse_frame(credit_frame(str(call), taken)) == Credit(str(call), taken)


@given(st.uuids(), st.binary(min_size=32, max_size=32))
def test_end_survives(call: UUID, digest: bytes) -> None:
    assert parse_frame(end_frame(str(call), digest)) == End(str(call), digest)


def test_id_may_be_written_in_capitals() -> None:
    assert parse_frame(data_frame(CALL.upper(), b"x")) == Data(CALL, b"x")


def test_call_may_be_any_16_bytes() -> None:
    """Ids of other versions than 4, and nil, are UUIDs of the envelope, too."""
    frame = parse_frame(b"\x01" + b"\xff" * 16 + b"x")
    assert frame.call == "ffffffff-ffff-ffff-ffff-ffffffffffff"


@pytest.mark.parametrize("size", [1, CHUNK_MAX_BYTES])
def test_chunk_is_as_long_as_it_may_be(size: int) -> None:
    assert parse_frame(data_frame(CALL, bytes(size))) == Data(CALL, bytes(size))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x01",
        b"\x01" + HEAD[:-1],
        b"\x01" + HEAD,
        b"\x01" + HEAD + bytes(CHUNK_MAX_BYTES + 1),
        b"\x02" + HEAD,
        b"\x02" + HEAD + bytes(7),
        b"\x02" + HEAD + bytes(9),
        b"\x02" + HEAD + (INTEGER_MAX + 1).to_bytes(8, "big"),
        b"\x02" + HEAD + b"\xff" * 8,
        b"\x00" + HEAD + b"x",
        b"\x03" + HEAD,
        b"\x03" + HEAD + bytes(31),
        b"\x03" + HEAD + bytes(33),
        b"\x04" + HEAD + bytes(8),
        b"\xff" + HEAD + b"x",
        b'{"type": "PING"}',
    ],
)
def test_frame_of_another_form_is_refused(frame: bytes) -> None:
    with pytest.raises(MalformedMessageError, match=f"^{len(frame)} bytes that begin with ") as caught:
        parse_frame(frame)
    assert caught.value.cause.name == "bad_frame"
    assert caught.value.message_id is None


@given(st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_refused(data: bytes) -> None:
    try:
        frame = parse_frame(data)
    except MalformedMessageError:
        return
    match frame:
        case Data(call, chunk):
            assert data_frame(call, chunk) == data
        case Credit(call, taken):
            assert credit_frame(call, taken) == data
        case End(call, digest):
            assert end_frame(call, digest) == data
