"""Receipts: what was asked and what was answered, signed by both, for anyone to verify later and offline.

Only the bytes as they came verify; a receipt keeps exactly these. What travelled beside an envelope, because
it was large, or came in parts, is not in the receipt, but its digest is: `Verified.covers` tells whether a
value is the one that was signed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

import orjson
from pydantic import JsonValue

from aiconexus.protocol.attachments import (
    ARGS,
    RESULT,
    Attachment,
    Detached,
    InputSummary,
    StreamDigest,
    StreamSummary,
    Value,
    argument_name,
    attachments_of,
    input_summary_of,
    stream_summary_of,
)
from aiconexus.protocol.errors import InvalidSignatureError, MalformedMessageError
from aiconexus.protocol.limits import DATA_MESSAGE_MAX_BYTES
from aiconexus.protocol.models import ExecRequestPayload, ExecResponsePayload, ExecStatus, Message
from aiconexus.protocol.security import verify_envelope
from aiconexus.protocol.serialization import canonicalize, loads, parse


@dataclass(frozen=True)
class Receipt:
    """A signed EXEC_REQUEST and the signed EXEC_RESPONSE that ended it, as JSON texts."""

    request: str
    response: str

    def to_json(self) -> bytes:
        """Return one JSON object with both texts, to be stored."""
        return orjson.dumps({"request": self.request, "response": self.response})

    @classmethod
    def from_json(cls, data: bytes | str) -> Receipt:
        """Read what `to_json` has written; nothing is verified yet.

        Raises:
            MalformedMessageError: It is something else.
        """
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise MalformedMessageError(f"not a receipt: {error}", name="not_json") from None
        if not isinstance(value, dict):
            raise MalformedMessageError("not a receipt: it is no JSON object", name="not_object")
        request, response = value.get("request"), value.get("response")
        if not isinstance(request, str) or not isinstance(response, str):
            text = "not a receipt: it has no texts `request` and `response`"
            raise MalformedMessageError(text, name="wrong_type")
        return cls(request, response)

    def verify(self) -> Verified:
        """Check both signatures, and that the one message answers the other.

        Raises:
            MalformedMessageError: They are no request and its final response.
            InvalidSignatureError: One was not signed by whom it names.
        """
        request, response = _read(self.request), _read(self.response)
        asked, answered = request.payload, response.payload
        if not isinstance(asked, ExecRequestPayload) or not isinstance(answered, ExecResponsePayload):
            raise MalformedMessageError("a receipt is an EXEC_REQUEST and an EXEC_RESPONSE")
        if not answered.status.is_final:
            raise MalformedMessageError(f"the response {answered.status.value!r} does not end a call")
        if (response.correlation_id or "").lower() != request.id.lower():
            raise MalformedMessageError("the response answers another request", field="correlation_id")
        if (response.from_, response.to) != (request.to, request.from_):
            raise InvalidSignatureError(
                "the response is not from the agent that was asked to the one that asked", name="wrong_sender"
            )
        capability = request.ext.get("capability")
        if not isinstance(capability, str):
            raise MalformedMessageError("the request names no capability", name="invalid_ext")
        return Verified(
            caller=request.from_,
            callee=request.to,
            capability=capability,
            args=asked.args,
            asked_at=request.timestamp,
            status=answered.status,
            result=answered.result,
            error=answered.error,
            answered_at=response.timestamp,
            stream=stream_summary_of(response),
            attached={
                attachment.at: attachment
                for message in (request, response)
                for attachment in _attachments(message, input_summary_of(response))
            },
        )


@dataclass(frozen=True)
class Verified:
    """What a receipt proves.

    Attributes:
        caller: DID of the agent that asked.
        callee: DID of the agent that answered.
        capability: What was executed.
        args: Its arguments, without those that were attached.
        asked_at: By the caller's clock, UTC.
        status: How it ended.
        result: Its result, if it was not attached.
        error: What went wrong, in the callee's words.
        answered_at: By the callee's clock, UTC.
        stream: How many parts the result had, and their digest, if it came in parts.
        attached: What was attached, by JSON Pointer (`/result`, `/args`, `/args/` and a name), with its
            SHA-256; a stream among the arguments has one if the callee has read it to its end.
    """

    caller: str
    callee: str
    capability: str
    args: dict[str, JsonValue]
    asked_at: datetime
    status: ExecStatus
    result: JsonValue
    error: str | None
    answered_at: datetime
    stream: StreamSummary | None
    attached: dict[str, Attachment]

    def covers_result(self, result: Value) -> bool:
        """Tell whether this is the result that was signed; an execution that failed has none."""
        if self.status is not ExecStatus.SUCCESS or self.stream is not None:
            return False
        if RESULT in self.attached:
            return _is_attached(self.attached[RESULT], result)
        return _is_same(self.result, result)

    def covers_parts(self, parts: Iterable[Value]) -> bool:
        """Tell whether these are the parts of the stream, all and in order."""
        digest = StreamDigest()
        try:
            for part in parts:
                digest.add(part)
        except MalformedMessageError:
            return False
        return self.stream == digest.summary()

    def covers_args(self, args: dict[str, Value]) -> bool:
        """Tell whether these are the arguments that were signed."""
        rest: dict[str, Any] = dict(args)
        for at, attachment in self.attached.items():
            name = argument_name(at)
            if name is None:
                continue
            if name not in rest or not _is_attached(attachment, rest.pop(name)):
                return False
        return _is_attached(self.attached[ARGS], rest) if ARGS in self.attached else _is_same(self.args, rest)


def _attachments(message: Message, read: InputSummary | None) -> list[Attachment]:
    """Return what travelled beside a message; of a stream, what the callee has signed to have read."""
    return [
        each if each.size is not None or read is None else each.model_copy(update=read.model_dump())
        for each in attachments_of(message)
    ]


def _is_attached(attachment: Attachment, value: Value | dict[str, Any]) -> bool:
    try:
        detached = Detached.of(attachment.at, value)
    except MalformedMessageError:
        return False
    is_bytes = attachment.as_ == "bytes"
    return detached.is_bytes is is_bytes and sha256(detached.data).hexdigest() == attachment.sha256


def _is_same(signed: JsonValue, value: Value | dict[str, Any]) -> bool:
    try:
        return canonicalize(signed) == canonicalize(value)
    except MalformedMessageError:  # `value` is bytes, or has them in it
        return False


def _read(text: str) -> Message:
    envelope = loads(text, limit=DATA_MESSAGE_MAX_BYTES)
    message = parse(envelope, text)
    verify_envelope(envelope)
    return message
