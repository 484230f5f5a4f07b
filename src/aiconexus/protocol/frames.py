"""Binary messages of the DataChannel: bytes of attachments, and credit (PROTOCOL_DESIGN.md, section 13.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from aiconexus.protocol.errors import MalformedMessageError
from aiconexus.protocol.limits import CHUNK_MAX_BYTES, FRAME_HEAD_BYTES, INTEGER_MAX

_DATA: Final = 1
_CREDIT: Final = 2
_END: Final = 3
_COUNT_BYTES: Final = 8
_DIGEST_BYTES: Final = 32


@dataclass(frozen=True)
class Data:
    """The next bytes of what is attached to the last envelope of a call."""

    call: str
    chunk: bytes


@dataclass(frozen=True)
class Credit:
    """How many bytes of a call its receiver has taken since the call began."""

    call: str
    taken: int


@dataclass(frozen=True)
class End:
    """A stream of bytes in a request is complete; `digest` is its SHA-256."""

    call: str
    digest: bytes


def data_frame(call: str, chunk: bytes | memoryview) -> bytes:
    """Return the frame that carries 1 to 16,384 bytes for the call of the EXEC_REQUEST with this id."""
    return b"".join((b"\x01", UUID(call).bytes, chunk))


def credit_frame(call: str, taken: int) -> bytes:
    """Return the frame that says how many bytes of a call were taken so far."""
    return b"".join((b"\x02", UUID(call).bytes, taken.to_bytes(_COUNT_BYTES, "big")))


def end_frame(call: str, digest: bytes) -> bytes:
    """Return the frame that ends the stream of bytes in a request, whose SHA-256 is `digest`."""
    return b"".join((b"\x03", UUID(call).bytes, digest))


def parse_frame(frame: bytes) -> Data | Credit | End:
    """Read one binary message.

    Raises:
        MalformedMessageError: It is no frame (`bad_frame`).
    """
    kind, size = frame[0] if frame else 0, len(frame) - FRAME_HEAD_BYTES
    if kind == _DATA and 1 <= size <= CHUNK_MAX_BYTES:
        return Data(_call(frame), frame[FRAME_HEAD_BYTES:])
    if kind == _CREDIT and size == _COUNT_BYTES:
        taken = int.from_bytes(frame[FRAME_HEAD_BYTES:], "big")
        if taken <= INTEGER_MAX:
            return Credit(_call(frame), taken)
    if kind == _END and size == _DIGEST_BYTES:
        return End(_call(frame), frame[FRAME_HEAD_BYTES:])
    raise MalformedMessageError(
        f"{len(frame)} bytes that begin with {frame[:1].hex() or 'nothing'} are no frame", name="bad_frame"
    )


def _call(frame: bytes) -> str:
    return str(UUID(bytes=frame[1:FRAME_HEAD_BYTES]))
