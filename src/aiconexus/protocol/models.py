"""The messages of IoAP 1.0: one envelope, one payload model per type.

The payload model is chosen by the envelope's `type`, never guessed from the payload's shape: an ANSWER
is not parsed as an OFFER because both hold an `sdp`. Payloads refuse unknown fields; what is new goes
into the envelope's `ext`, whose unknown keys are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timezone
from enum import Enum
from typing import Annotated, Any, ClassVar, Final, Literal
from uuid import uuid4

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    SerializeAsAny,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from aiconexus.protocol.did import decode_did
from aiconexus.protocol.errors import CAUSES, ErrorCode, MessageError
from aiconexus.protocol.limits import PROTOCOL_VERSION

# RFC 3339 section 5.6 in UTC. The offset form is refused: one instant, one kind of text.
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z", re.ASCII)


def parse_timestamp(value: object) -> datetime:
    """Read a timestamp of an envelope; a datetime is taken as it is, in UTC.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a timestamp needs a time zone")
        return value.astimezone(timezone.utc)
    if not isinstance(value, str) or not _TIMESTAMP.fullmatch(value):
        raise ValueError("not an RFC 3339 timestamp in UTC such as 2026-01-12T10:00:00Z")
    seconds, _, fraction = value[:-1].partition(".")
    # Python 3.10 reads no other form of it; strptime takes 20 µs more, of a message's 60.
    return datetime.fromisoformat(f"{seconds}.{fraction[:6]:0<6}+00:00")


def format_timestamp(moment: datetime) -> str:
    """Write it as it stands in an envelope, with milliseconds."""
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds")[:-6] + "Z"


def _check_did(value: str) -> str:
    decode_did(value)
    return value


Timestamp = Annotated[datetime, BeforeValidator(parse_timestamp), PlainSerializer(format_timestamp)]
"""UTC; written with milliseconds, read with up to nine digits of a second."""

DID = Annotated[str, AfterValidator(_check_did)]
"""A canonical Ed25519 did:key of 56 characters (W3C did:key)."""

UUID_PATTERN: Final = r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"

MessageId = Annotated[str, StringConstraints(pattern=rf"^{UUID_PATTERN}\z", strict=True)]
"""A UUID in its text form (RFC 9562 section 4)."""


class MessageType(str, Enum):
    """`type` of the envelope."""

    REGISTER = "REGISTER"
    UNREGISTER = "UNREGISTER"
    OFFER = "OFFER"
    ANSWER = "ANSWER"
    ICE_CANDIDATE = "ICE_CANDIDATE"
    INTENT = "INTENT"
    EXEC_REQUEST = "EXEC_REQUEST"
    EXEC_RESPONSE = "EXEC_RESPONSE"
    ERROR = "ERROR"
    PING = "PING"
    PONG = "PONG"
    DISCOVER = "DISCOVER"
    PRESENCE = "PRESENCE"


class ExecStatus(str, Enum):
    """`status` of an EXEC_RESPONSE; exactly one that `is_final` ends a call."""

    SUCCESS = "success"
    ERROR = "error"
    PARTIAL = "partial"
    PROGRESS = "progress"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether this response ends the call."""
        return self in (ExecStatus.SUCCESS, ExecStatus.ERROR, ExecStatus.CANCELLED)


class Payload(BaseModel):
    """Base of all payloads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    type: ClassVar[MessageType]

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the JSON object of this payload. Fields that were not set are left out."""
        return self.model_dump(mode="json", exclude_unset=True)


class RegisterPayload(Payload):
    """The key that the sender will prove, written as in its DID (`z6Mk...`)."""

    type = MessageType.REGISTER
    public_key: str


class UnregisterPayload(Payload):
    """The agent leaves; nothing waits for it."""

    type = MessageType.UNREGISTER
    reason: str | None = None


class OfferPayload(Payload):
    """An SDP offer (RFC 8829); its DTLS fingerprint is bound to the DID by the message's signature."""

    type = MessageType.OFFER
    sdp: str


class AnswerPayload(Payload):
    """An SDP answer (RFC 8829)."""

    type = MessageType.ANSWER
    sdp: str


class IceCandidatePayload(Payload):
    """One trickled candidate (RFC 8838). The empty `candidate` is end-of-candidates."""

    type = MessageType.ICE_CANDIDATE
    candidate: str = Field(max_length=1024)  # the longest real ones have 300
    sdp_mid: str | None = Field(default=None, max_length=64)
    sdp_mline_index: int | None = Field(default=None, ge=0)


class IntentPayload(Payload):
    """What the sender wants: in words (`query`), structured (`task`), or the answer to that (`status`).

    `status` "cancel" with the `correlation_id` of an EXEC_REQUEST asks to cancel that execution.
    """

    type = MessageType.INTENT
    query: str | None = None
    context: JsonValue = None
    task: str | None = None
    params: dict[str, JsonValue] | None = None
    status: str | None = None
    required_input: str | list[str] | None = None
    cost: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.query is None and self.task is None and self.status is None:
            raise ValueError("an INTENT needs query, task or status")
        return self


class ExecRequestPayload(Payload):
    """Arguments of an execution; `ext.capability` of the envelope names the capability.

    `timeout_ms` is what is left of the caller's deadline.
    """

    type = MessageType.EXEC_REQUEST
    args: dict[str, JsonValue]
    timeout_ms: int | None = Field(default=None, gt=0)
    stream: bool | None = None


class ExecResponsePayload(Payload):
    """Result of an execution, or a part of it. The finer cause of an error is `ext.error.name`."""

    type = MessageType.EXEC_RESPONSE
    result: JsonValue = None
    error: str | None = None
    status: Annotated[ExecStatus, Field(strict=False)]
    execution_time_ms: int | float | None = Field(default=None, ge=0)
    stream_url: str | None = None


class ErrorDetails(BaseModel):
    """Finer cause of an ERROR; every field is optional and others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    num: int | None = None
    name: str | None = None
    temporary: bool | None = None
    retry_after_ms: int | None = Field(default=None, ge=0)
    field: str | None = None


class ErrorPayload(Payload):
    """A refusal; the envelope's `correlation_id` names the refused message."""

    type = MessageType.ERROR
    code: Annotated[ErrorCode, Field(strict=False)]
    message: str
    details: ErrorDetails | None = None

    @classmethod
    def for_cause(
        cls, name: str, message: str = "", *, field: str | None = None, retry_after_ms: int | None = None
    ) -> ErrorPayload:
        """Build the ERROR of a cause in `errors.CAUSES`; `message` replaces its text."""
        cause = CAUSES[name]
        details: dict[str, Any] = {"num": cause.num, "name": cause.name, "temporary": cause.temporary}
        if field is not None:
            details["field"] = field
        if retry_after_ms is not None:
            details["retry_after_ms"] = retry_after_ms
        return cls(code=cause.code, message=message or cause.message, details=ErrorDetails(**details))

    @classmethod
    def for_error(cls, error: MessageError) -> ErrorPayload:
        """Build the ERROR that answers a refused message.

        It quotes at most 512 characters of it: an answer never outgrows what it answers.
        """
        field = error.field and error.field[:64]
        return cls.for_cause(error.cause.name, str(error)[:512], field=field)


class PingPayload(Payload):
    """Asks for a PONG with the same `sequence`."""

    type = MessageType.PING
    sequence: int | None = None


class PongPayload(Payload):
    """Answers a PING; `correlation_id` is that PING's id."""

    type = MessageType.PONG
    sequence: int | None = None


class DiscoverPayload(Payload):
    """Asks the gateway for agents. The answer is PRESENCE, in pages of `limit`.

    `capability`, `tag` and `text` (part of its name or description, in any case) must hold for one capability
    of an agent. With `watch` true, what changes later is told, too; with false, the watch ends whose DISCOVER
    is named by `correlation_id`.
    """

    type = MessageType.DISCOVER
    capability: str | None = None
    tag: str | None = None
    text: str | None = Field(default=None, min_length=1, max_length=256)
    dids: list[str] | None = Field(default=None, max_length=200)
    watch: bool | None = None
    limit: int = Field(default=50, ge=1, le=200)
    cursor: str | None = None


class PresencePayload(Payload):
    """A page of agents, or one event of a watch.

    Each of `agents` has `did`, `status` ("online" or "away") and, if it has shown one, `card`. A page that is
    not the last has a `cursor`. `partial`: not everybody who knows could be asked. The event "missed" has no
    agents: others may have been lost, so ask again.
    """

    type = MessageType.PRESENCE
    agents: list[dict[str, JsonValue]] = Field(default_factory=list)
    event: Literal["join", "leave", "away", "update", "missed"] | None = None
    cursor: str | None = None
    partial: bool | None = None


PAYLOADS: dict[MessageType, type[Payload]] = {
    model.type: model
    for model in (
        RegisterPayload,
        UnregisterPayload,
        OfferPayload,
        AnswerPayload,
        IceCandidatePayload,
        IntentPayload,
        ExecRequestPayload,
        ExecResponsePayload,
        ErrorPayload,
        PingPayload,
        PongPayload,
        DiscoverPayload,
        PresencePayload,
    )
}


class Capability(BaseModel):
    """One thing an agent can do, as it stands on its card (`aiconexus.protocol.cards`).

    `input` and `output` are JSON Schemas (2020-12) of the arguments object and of the result; with `stream`,
    `output` is that of each part.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    name: str = Field(min_length=1, max_length=64)
    description: str = Field(default="", max_length=1024)
    tags: list[Annotated[str, StringConstraints(min_length=1, max_length=64)]] = Field(
        default_factory=list, max_length=16
    )
    version: str = Field(default="1.0", max_length=32)
    input: dict[str, JsonValue] | None = None
    output: dict[str, JsonValue] | None = None
    stream: bool = False
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


def new_envelope(
    from_: str,
    to: str,
    type_: MessageType,
    payload: dict[str, JsonValue],
    *,
    correlation_id: str | None = None,
    ext: dict[str, JsonValue] | None = None,
    id_: str | None = None,
    timestamp: datetime | None = None,
) -> dict[str, Any]:
    """Return the JSON object of an unsigned message, a new one unless it is given an id and a time.

    Nothing is validated: it is for those who know that all is valid, and takes a third of the time of a
    `Message`.
    """
    envelope: dict[str, Any] = {
        "id": id_ or str(uuid4()),
        "correlation_id": correlation_id,
        "timestamp": format_timestamp(timestamp or datetime.now(timezone.utc)),
        "from": from_,
        "to": to,
        "type": type_.value,
        "payload": payload,
        "version": PROTOCOL_VERSION,
    }
    if ext:
        envelope["ext"] = ext
    return envelope


class Message(BaseModel):
    """The envelope. Immutable: signing gives a new one.

    `wire` holds the exact bytes, once there are any: those that arrived, or those that were signed.
    Signatures are made and checked over these, never over a model that was dumped again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    id: MessageId = Field(default_factory=lambda: str(uuid4()))
    correlation_id: MessageId | None = None
    timestamp: Timestamp = Field(default_factory=lambda: datetime.now(timezone.utc))
    from_: DID = Field(alias="from")
    to: DID
    type: MessageType
    payload: SerializeAsAny[Payload]
    version: Literal["1.0"] = PROTOCOL_VERSION
    signature: str | None = None
    ext: dict[str, JsonValue] = Field(default_factory=dict)

    # Strict: nothing in a JSON object is bytes, so no text passes for them.
    wire: bytes | None = Field(default=None, strict=True, exclude=True, repr=False)

    @field_validator("payload", mode="before")
    @classmethod
    def _choose_payload(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("type")  # absent where it did not validate: then that is the error
        if isinstance(value, dict) and kind is not None:
            return PAYLOADS[kind].model_validate(value)
        return value

    @model_validator(mode="after")
    def _payload_fits_type(self) -> Self:
        if type(self.payload) is not PAYLOADS[self.type]:
            raise ValueError(f"the payload of {self.type.value} is not a {type(self.payload).__name__}")
        return self

    @classmethod
    def create(
        cls,
        from_: str,
        to: str,
        payload: Payload,
        *,
        correlation_id: str | None = None,
        ext: dict[str, JsonValue] | None = None,
    ) -> Message:
        """Build an unsigned message; `type` follows from the payload, `id` and `timestamp` are new."""
        return cls(
            from_=from_,
            to=to,
            type=payload.type,
            payload=payload,
            correlation_id=correlation_id,
            ext=ext or {},
        )

    def reply(self, payload: Payload, *, ext: dict[str, JsonValue] | None = None) -> Message:
        """Build the unsigned answer to this message: its sender, its `id` as `correlation_id`."""
        return self.create(self.to, self.from_, payload, correlation_id=self.id, ext=ext)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the message. A copy with changes has no bytes yet, whatever this one was signed as."""
        return super().model_copy(update={"wire": None, **update} if update else None, deep=deep)

    def envelope(self) -> dict[str, Any]:
        """Return the JSON object of this message. Payload fields that were not set are left out."""
        envelope = new_envelope(
            self.from_,
            self.to,
            self.type,
            self.payload.to_dict(),
            correlation_id=self.correlation_id,
            ext=self.ext,
            id_=self.id,
            timestamp=self.timestamp,
        )
        if self.signature is not None:
            envelope["signature"] = self.signature
        return envelope
