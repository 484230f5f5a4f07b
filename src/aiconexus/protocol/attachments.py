"""Values that travel beside their envelope, and streams of them (PROTOCOL_DESIGN.md, section 13.6).

The envelope says what belongs where and, if it is signed, what its digest is; so its signature holds for what
is attached, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, TypeAdapter, ValidationError

from aiconexus.protocol.errors import MalformedMessageError
from aiconexus.protocol.limits import ATTACHMENTS_MAX, INTEGER_MAX
from aiconexus.protocol.models import ExecRequestPayload, ExecResponsePayload, Message
from aiconexus.protocol.serialization import canonicalize

RESULT: Final = "/result"
ARGS: Final = "/args"

Value: TypeAlias = JsonValue | bytes

_SHA256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}\z", strict=True)]


class Attachment(BaseModel):
    """An entry of `ext.attachments`.

    Attributes:
        at: A JSON Pointer into the payload (RFC 6901).
        as_: "json" (RFC 8785) or "bytes".
        size: In bytes; None for a stream of bytes.
        sha256: Of these bytes, in hexadecimal digits.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, validate_by_name=True)

    at: str
    as_: Literal["json", "bytes"] = Field(alias="as")
    size: int | None = Field(default=None, ge=0, le=INTEGER_MAX)
    sha256: _SHA256 | None = None


class InputSummary(BaseModel):
    """`ext.input` of a final response: what the callee has read of the stream in its request."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    size: int = Field(ge=0, le=INTEGER_MAX)
    sha256: _SHA256


class StreamSummary(BaseModel):
    """`ext.stream` of the response that ends a stream: how many parts there were, and their digest."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    parts: int = Field(ge=0, le=INTEGER_MAX)
    sha256: _SHA256


_Summary = TypeVar("_Summary", StreamSummary, InputSummary)

_ATTACHMENTS: Final = TypeAdapter(Annotated[list[Attachment], Field(max_length=ATTACHMENTS_MAX)])


def argument_pointer(name: str) -> str:
    """Return the JSON Pointer of an argument."""
    return f"{ARGS}/{name.replace('~', '~0').replace('/', '~1')}"


@dataclass(frozen=True)
class Detached:
    """A value made ready to travel beside an envelope."""

    at: str
    data: bytes
    is_bytes: bool

    @classmethod
    def of(cls, at: str, value: Value) -> Detached:
        """Detach `value` from the place `at`.

        Raises:
            MalformedMessageError: It has no canonical JSON form.
        """
        if isinstance(value, bytes):
            return cls(at, value, True)
        return cls(at, canonicalize(value), False)

    def described(self, *, is_signed: bool) -> dict[str, JsonValue]:
        """Return its entry in `ext.attachments`."""
        entry: dict[str, JsonValue] = {
            "at": self.at,
            "as": "bytes" if self.is_bytes else "json",
            "size": len(self.data),
        }
        if is_signed:
            entry["sha256"] = sha256(self.data).hexdigest()
        return entry


def attachments_of(message: Message) -> list[Attachment]:
    """Return what an EXEC_REQUEST or EXEC_RESPONSE announces.

    Raises:
        MalformedMessageError: It announces what does not belong there, or a signed one leaves out a digest.
    """
    announced = message.ext.get("attachments")
    if announced is None:
        return []
    try:
        attachments = _ATTACHMENTS.validate_python(announced)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(("ext.attachments", *map(str, first["loc"])))
        raise _refused(message, f"{where}: {first['msg']}", where) from None
    if len({attachment.at for attachment in attachments}) != len(attachments):
        raise _refused(message, "ext.attachments names one place twice")
    for attachment in attachments:
        is_last = attachment is attachments[-1] and isinstance(message.payload, ExecRequestPayload)
        may_stream = is_last and attachment.as_ == "bytes" and attachment.sha256 is None
        if attachment.size is None and not may_stream:
            raise _refused(message, f"the size of {attachment.at!r} is missing: it cannot be a stream")
        if not _is_free(message, attachment.at):
            text = f"{attachment.at!r} is no place for an attachment of this {message.type.value}"
            raise _refused(message, text)
        is_whole = attachment.size is not None
        if is_whole and attachment.sha256 is None and message.signature is not None:
            raise _refused(message, f"the digest of {attachment.at!r} is missing: this message is signed")
        if attachment.at == ARGS and attachment.as_ != "json":
            raise _refused(message, "the arguments are an object, not bytes")
    return attachments


def input_summary_of(message: Message) -> InputSummary | None:
    """Return what a final response says that was read of the stream in its request.

    Raises:
        MalformedMessageError: It says it in another form.
    """
    said = message.ext.get("input")
    return None if said is None else _validated(message, InputSummary, said, "ext.input")


def stream_summary_of(message: Message) -> StreamSummary | None:
    """Return what the response that ends a stream says of it.

    Raises:
        MalformedMessageError: It says it in another form.
    """
    said = message.ext.get("stream")
    return None if said is None else _validated(message, StreamSummary, said, "ext.stream")


def _validated(message: Message, model: type[_Summary], said: object, field: str) -> _Summary:
    try:
        return model.model_validate(said)
    except ValidationError as error:
        raise _refused(message, f"{field}: {error.errors()[0]['msg']}", field) from None


def _is_free(message: Message, at: str) -> bool:
    payload = message.payload
    if isinstance(payload, ExecResponsePayload):
        return at == RESULT and payload.result is None
    if isinstance(payload, ExecRequestPayload):
        name = argument_name(at)
        return not payload.args if at == ARGS else name is not None and name not in payload.args
    return False


def argument_name(at: str) -> str | None:
    """Return which argument a JSON Pointer names; None where it names none."""
    found = re.fullmatch(r"/args/((?:[^~/]|~[01])*)", at, re.DOTALL)
    return None if found is None else found[1].replace("~1", "/").replace("~0", "~")


def _refused(message: Message, text: str, field: str = "ext.attachments") -> MalformedMessageError:
    return MalformedMessageError(text, name="invalid_ext", field=field[:64], message_id=message.id)


class Assembly:
    """The attachments of one envelope, as their bytes come in; a stream among them is not part of it.

    Attributes:
        message: The envelope.
        stream: Where in the payload a stream follows, if one does.
        missing: How many bytes are still to come.
        size: How many bytes there are together.
        json_size: How many of them are JSON.
    """

    def __init__(self, message: Message, attachments: Iterable[Attachment]) -> None:
        self.message: Final = message
        announced = list(attachments)
        self.stream: Final = next((each.at for each in announced if each.size is None), None)
        self._attachments = [(each, each.size) for each in announced if each.size is not None]
        self.size: Final = sum(size for _, size in self._attachments)
        self.json_size: Final = sum(size for each, size in self._attachments if each.as_ == "json")
        self.missing = self.size
        self._parts = [bytearray() for _ in self._attachments]
        self._next = 0

    def add(self, chunk: bytes) -> None:
        """Take the next bytes; there must not be more of them than `missing`."""
        self.missing -= len(chunk)
        view = memoryview(chunk)
        while view:
            (_, size), part = self._attachments[self._next], self._parts[self._next]
            room = size - len(part)
            part += view[:room]
            view = view[room:]
            if len(part) == size:
                self._next += 1

    def values(self) -> dict[str, Value]:
        """Return the values by their JSON Pointers, once nothing is missing.

        Raises:
            MalformedMessageError: They are not what the envelope says.
        """
        values: dict[str, Value] = {}
        for (attachment, _), part in zip(self._attachments, self._parts, strict=True):
            if attachment.sha256 is not None and sha256(part).hexdigest() != attachment.sha256:
                raise _refused(self.message, f"what came for {attachment.at!r} is not what its digest says")
            values[attachment.at] = bytes(part) if attachment.as_ == "bytes" else self._json(attachment, part)
            part.clear()
        return values

    def _json(self, attachment: Attachment, part: bytearray) -> JsonValue:
        try:
            return loads_canonical(part)
        except MalformedMessageError as error:
            raise _refused(self.message, f"what came for {attachment.at!r}: {error}") from None


# An integer that may be beyond 2^53: then it is a double, which RFC 8785 writes in digits up to 10^21.
_LONG_NUMBER: Final = re.compile(rb"[0-9]{16}")


def loads_canonical(data: bytes | bytearray) -> JsonValue:
    """Parse canonical JSON (RFC 8785) of any type and size.

    That it is canonical also says that no key stands twice, and that every reader reads the same.

    Raises:
        MalformedMessageError: It is not JSON, or not in canonical form.
    """
    try:
        value: JsonValue = (
            json.loads(data.decode(), parse_int=_number) if _LONG_NUMBER.search(data) else orjson.loads(data)
        )
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"not JSON: {error}", name="not_json") from None
    if canonicalize(value) != data:
        raise MalformedMessageError("not in canonical form (RFC 8785)", name="not_canonical")
    return value


def _number(text: str) -> int | float:
    double = float(text)
    return int(text) if -INTEGER_MAX <= double <= INTEGER_MAX else double


class InputDigest:
    """The running digest over a stream of bytes in a request."""

    def __init__(self) -> None:
        self._hash = sha256()
        self._size = 0

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        self._size += len(data)
        self._hash.update(data)

    def digest(self) -> bytes:
        """Return the SHA-256 so far."""
        return self._hash.digest()

    def summary(self) -> InputSummary:
        """Return what there was so far."""
        return InputSummary(size=self._size, sha256=self._hash.hexdigest())


class StreamDigest:
    """The running digest over the parts of a stream, as its last response signs it.

    Attributes:
        parts: How many there were so far.
    """

    def __init__(self) -> None:
        self._hash = sha256()
        self.parts = 0

    def add(self, part: Value) -> None:
        """Take the next part.

        Raises:
            MalformedMessageError: It has no canonical JSON form.
        """
        is_bytes = isinstance(part, bytes)
        self.add_data(part if isinstance(part, bytes) else canonicalize(part), is_bytes=is_bytes)

    def add_data(self, data: bytes, *, is_bytes: bool) -> None:
        """Take the next part as it travels: its bytes, or its canonical JSON."""
        self.parts += 1
        self._hash.update((b"b" if is_bytes else b"j") + len(data).to_bytes(8, "big"))
        self._hash.update(data)

    def summary(self) -> StreamSummary:
        """Return what there was so far."""
        return StreamSummary(parts=self.parts, sha256=self._hash.hexdigest())


def join_parts(parts: list[Value]) -> Value:
    """Return the parts of a stream as one value: bytes if all are bytes, else a list."""
    if parts and all(isinstance(part, bytes) for part in parts):
        return b"".join(part for part in parts if isinstance(part, bytes))
    return parts  # type: ignore[return-value]  # bytes among them are refused when it is written
