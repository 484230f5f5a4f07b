"""Arguments and results made ready to travel: what stays in the envelope, and what goes beside it.

Bytes have no JSON form, and a long text would hold up the other calls: both are attached (PROTOCOL_DESIGN.md,
section 13.6).
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from io import IOBase
from pathlib import PurePath
from typing import Any, Final

import orjson
from pydantic import JsonValue
from pydantic_core import PydanticSerializationError, to_jsonable_python

from aiconexus.protocol.attachments import ARGS, Detached, argument_pointer
from aiconexus.protocol.errors import MalformedMessageError
from aiconexus.protocol.limits import (
    ATTACHED_JSON_MAX_BYTES,
    ATTACHMENTS_MAX,
    ATTACHMENTS_MAX_BYTES,
    INLINE_MAX_BYTES,
)

ENVELOPE_BYTES: Final = 1_024  # of an EXEC_REQUEST or EXEC_RESPONSE around its arguments or result


@dataclass
class Outgoing:
    """The arguments of a request.

    Attributes:
        inline: Those in the envelope.
        detached: Those beside it.
        stream: JSON Pointer of the one that is a stream of bytes, if one is.
    """

    inline: dict[str, JsonValue] = field(default_factory=dict)
    detached: list[Detached] = field(default_factory=list)
    stream: str | None = None


def detach_arguments(args: dict[str, Any]) -> Outgoing:
    """Split the arguments of a request.

    Args:
        args: By name: bytes, an async iterable of them, or anything that pydantic can write as JSON.

    Raises:
        MalformedMessageError: One has no JSON form, or no canonical one, or they are too many, or too large.
    """
    whole: dict[str, Any] = {}
    outgoing, streams = Outgoing(), []
    for name, value in args.items():
        if isinstance(value, bytes | bytearray | memoryview):
            outgoing.detached.append(Detached(argument_pointer(name), bytes(value), True))
        elif isinstance(value, AsyncIterable):
            streams.append(argument_pointer(name))
        else:
            whole[name] = value
    for name, value in whole.items():
        try:
            # pydantic would read a file to its end, as a list of lines, and send a path as text.
            if isinstance(value, IOBase | PurePath):
                raise ValueError(f"a {type(value).__name__} is not what the file holds")
            outgoing.inline[name] = to_jsonable_python(value)
        except (PydanticSerializationError, ValueError) as error:  # noqa: PERF203
            text = f"{name}: {error}; give JSON, bytes, or an async iterator of bytes"
            raise MalformedMessageError(text) from error
    if _is_long(outgoing.inline):
        outgoing.detached.insert(0, Detached.of(ARGS, outgoing.inline))
        outgoing.inline = {}
    if len(streams) > 1:
        raise MalformedMessageError(f"{len(streams)} arguments are streams; one can be")
    outgoing.stream = streams[0] if streams else None
    count = len(outgoing.detached) + len(streams)
    if count > ATTACHMENTS_MAX:
        raise MalformedMessageError(f"{count} arguments are bytes; at most {ATTACHMENTS_MAX} can be")
    _check_size(outgoing.detached)
    return outgoing


def detach(at: str, value: Any) -> Detached | None:
    """Return what `value` is beside its envelope; None if it fits into it.

    Raises:
        MalformedMessageError: It has no canonical JSON form, or is too large.
    """
    if not isinstance(value, bytes) and not _is_long(value):
        return None
    detached = Detached.of(at, value)
    _check_size([detached])
    return detached


def describe(
    ext: dict[str, JsonValue], detached: list[Detached], stream: str | None = None, *, is_signed: bool = True
) -> dict[str, JsonValue]:
    """Return the `ext` of an envelope with what travels beside it."""
    described: list[JsonValue] = [each.described(is_signed=is_signed) for each in detached]
    if stream is not None:
        described.append({"at": stream, "as": "bytes"})
    return {**ext, "attachments": described} if described else ext


def too_large(size: int) -> str:
    """Say why attachments of this many bytes are refused."""
    return (
        f"{size} bytes are attached; at most {ATTACHMENTS_MAX_BYTES} are kept, "
        f"and {ATTACHED_JSON_MAX_BYTES} of JSON: stream them"
    )


def _check_size(detached: list[Detached]) -> None:
    size = sum(len(each.data) for each in detached)
    json_size = sum(len(each.data) for each in detached if not each.is_bytes)
    if size > ATTACHMENTS_MAX_BYTES or json_size > ATTACHED_JSON_MAX_BYTES:
        raise MalformedMessageError(too_large(size), name="too_large")


def size_of(value: Any) -> int:
    """Return how many bytes a value travels in, without its envelope."""
    if isinstance(value, bytes):
        return len(value)
    try:
        return len(orjson.dumps(value))
    except TypeError:
        return 0  # whoever writes it in canonical form says what is wrong with it


def _is_long(value: Any) -> bool:
    return size_of(value) > INLINE_MAX_BYTES - ENVELOPE_BYTES
