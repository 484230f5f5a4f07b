"""The calls over one DataChannel, both ways, as a state machine without I/O.

`Calls` is told what this side asks and what arrives; it says what to send and what has happened. It
proves every message that counts (INTENT, EXEC_REQUEST and the final EXEC_RESPONSE are signed: a receipt
both sides can keep); PING, PONG, ERROR and partial results ride unsigned on the authenticated channel, but
must be from and to the two agents that it connects.

A request ends in exactly one final response, whatever becomes of the capability.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from aiconexus.core.intents import Intent, Quote
from aiconexus.protocol.errors import (
    CallCancelledError,
    CallError,
    CallTimeoutError,
    CapabilityError,
    ErrorCode,
    InvalidArgumentsError,
    InvalidSignatureError,
    MalformedMessageError,
    MessageError,
    PeerIdentityError,
    ReplayedMessageError,
    UnknownCapabilityError,
    WrongRecipientError,
    remote_error,
)
from aiconexus.protocol.limits import CALL_TIMEOUT_SECONDS, DATA_MESSAGE_MAX_BYTES
from aiconexus.protocol.models import (
    ErrorPayload,
    ExecRequestPayload,
    ExecResponsePayload,
    ExecStatus,
    IntentPayload,
    Message,
    MessageType,
    Payload,
    PingPayload,
    PongPayload,
    UnregisterPayload,
)
from aiconexus.protocol.security import DIDKey, ReplayGuard, sign_message, verify_message
from aiconexus.protocol.serialization import encode, loads, parse

ERROR_TEXT_MAX: Final = 4_096  # characters of an exception's text that travel
TIMEOUT_MAX_SECONDS: Final = 86_400.0  # whoever needs longer should not hold a connection for it

_MESSAGE_ID: Final = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_FINAL: Final = frozenset(status.value for status in ExecStatus if status.is_final)
_CALL_ERRORS: Final[dict[str, type[CallError]]] = {
    kind.name: kind
    for kind in (
        UnknownCapabilityError,
        InvalidArgumentsError,
        CapabilityError,
        CallTimeoutError,
        CallCancelledError,
    )
}


# --- what has happened -------------------------------------------------------------------------


@dataclass(frozen=True)
class IntentArrived:
    """The peer asks; `Calls.quote` or `Calls.fail` answers. `timeout` is in seconds, from now."""

    intent: Intent
    timeout: float

    @property
    def id(self) -> str:
        """Of the message that asks."""
        return self.intent.id


@dataclass(frozen=True)
class ExecutionArrived:
    """The peer calls a capability; `Calls.succeed` or `Calls.fail` answers.

    `timeout` is in seconds, from now.
    """

    id: str
    capability: str
    args: dict[str, Any]
    timeout: float


@dataclass(frozen=True)
class CancelArrived:
    """The peer no longer wants the answer to its message `id`, which is not given yet."""

    id: str


@dataclass(frozen=True)
class Answered:
    """What this side asked with the message `id` has its answer.

    `value` is the result of an execution, a Quote, or for a PING whether the peer is done, too.
    """

    id: str
    value: Any


@dataclass(frozen=True)
class Failed:
    """What this side asked with the message `id` has failed."""

    id: str
    error: Exception


@dataclass(frozen=True)
class Reply:
    """Nothing for this side to do but to send `text`."""

    text: str


@dataclass(frozen=True)
class Refused:
    """A message that was not accepted.

    Attributes:
        error: Why.
        reply: The ERROR to send; None where an ERROR was refused, or two sides would never stop.
        failed: The call that it pretends to answer.
    """

    error: MessageError
    reply: str | None
    failed: Failed | None = None


@dataclass(frozen=True)
class DoneArrived:
    """The peer no longer needs the connection and asks whether this side does.

    `is_done` is what the reply says: if true, the peer will close the connection.
    """

    reply: str
    is_done: bool


@dataclass(frozen=True)
class Left:
    """The peer is about to close the connection."""

    reason: str


Event = (
    IntentArrived
    | ExecutionArrived
    | CancelArrived
    | Answered
    | Failed
    | Reply
    | Refused
    | DoneArrived
    | Left
)


# --- the state machine -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Open:
    """Something this side asked and has no answer to."""

    type: MessageType
    capability: str = ""


class Calls:
    """All calls of one connection. Messages to send are text, ready for the DataChannel.

    Attributes:
        peer: DID of the agent at the other end.
    """

    def __init__(self, key: DIDKey, peer: str, *, limit: int = DATA_MESSAGE_MAX_BYTES) -> None:
        """Begin with no calls; `limit` is how many bytes the peer takes in one message."""
        self.peer: Final = peer
        self._key = key
        self._limit = limit
        # One for each connection: a peer that floods it shuts nobody else out.
        self._guard = ReplayGuard()
        self._open: dict[str, _Open] = {}
        self._running: dict[str, MessageType] = {}

    @property
    def open(self) -> int:
        """How many questions of this side wait for their answer; PINGs do not count."""
        return sum(entry.type is not MessageType.PING for entry in self._open.values())

    # --- what this side asks --------------------------------------------------------------------

    def ask(self, payload: IntentPayload, timeout: float) -> tuple[str, str]:
        """Begin an INTENT; return its id and the text to send.

        Args:
            payload: What is asked.
            timeout: Seconds until this side gives up; the other side is told.

        Raises:
            MalformedMessageError: It has no canonical JSON form, or is too large.
            ValueError: The timeout is none.
        """
        message = self._message(payload, ext={"timeout_ms": _milliseconds(timeout)})
        text = self._sign(message)
        self._open[message.id] = _Open(MessageType.INTENT)
        return message.id, text

    def execute(self, capability: str, args: dict[str, Any], timeout: float) -> tuple[str, str]:
        """Begin an execution; return the id of its EXEC_REQUEST and the text to send.

        Args:
            capability: Its name.
            args: Anything pydantic can write as JSON.
            timeout: Seconds until the caller gives up; the callee is told.

        Raises:
            InvalidArgumentsError: The arguments have no JSON form, or are too large for one message.
            ValueError: The timeout is none.
        """
        timeout_ms = _milliseconds(timeout)
        try:
            payload = ExecRequestPayload(args=to_jsonable_python(args), timeout_ms=timeout_ms)
            message = self._message(payload, ext={"capability": capability})
            text = self._sign(message)
        except (MalformedMessageError, PydanticSerializationError, ValueError) as error:
            raise InvalidArgumentsError(f"the arguments cannot be sent: {error}", capability) from error
        self._open[message.id] = _Open(MessageType.EXEC_REQUEST, capability)
        return message.id, text

    def ping(self, *, is_done: bool = False) -> tuple[str, str]:
        """Begin a PING; return its id and the text to send.

        Args:
            is_done: Whether this side no longer needs the connection (`ext.done`); the PONG tells the
                same of the other side.
        """
        message = self._message(PingPayload(), ext={"done": True} if is_done else None)
        self._open[message.id] = _Open(MessageType.PING)
        return message.id, self._text(message)

    def abandon(self, id_: str) -> str | None:
        """Forget a question of this side; return the text that cancels it, if it still had no answer."""
        entry = self._open.pop(id_, None)
        if entry is None or entry.type is MessageType.PING:
            return None
        return self._sign(self._message(IntentPayload(status="cancel"), correlation_id=id_))

    def leave(self, reason: str) -> str:
        """Return the text that says goodbye; the connection is closed after it."""
        return self._text(self._message(UnregisterPayload(reason=_sendable(reason))))

    # --- what this side answers -----------------------------------------------------------------

    def quote(self, id_: str, quote: Quote) -> str | None:
        """Return the text that answers an INTENT, or None if it was answered before."""
        if self._running.pop(id_, None) is None:
            return None
        try:
            payload = IntentPayload(**quote.model_dump(exclude_none=True, warnings=False))
            return self._sign(self._message(payload, correlation_id=id_))
        except (MalformedMessageError, ValidationError) as error:  # a Quote may be derived from, or copied
            return self._error(ErrorPayload.for_cause("internal", f"the answer cannot be sent: {error}"), id_)

    def succeed(self, id_: str, result: Any, seconds: float) -> str | None:
        """Return the text of an execution's result, or None if it was answered before."""
        if id_ not in self._running:
            return None
        try:
            payload = ExecResponsePayload(
                status=ExecStatus.SUCCESS, result=result, execution_time_ms=round(seconds * 1e3)
            )
            text = self._sign(self._message(payload, correlation_id=id_))
        except (MalformedMessageError, ValidationError) as error:
            return self.fail(id_, "capability_error", f"the result cannot be sent: {error}", seconds)
        del self._running[id_]
        return text

    def fail(self, id_: str, name: str, text: str, seconds: float = 0.0) -> str | None:
        """Return the text that says why there is no answer, or None if it was answered before.

        Args:
            id_: Of the EXEC_REQUEST or INTENT.
            name: A `CallError.name`.
            text: For people.
            seconds: How long it ran.
        """
        kind = self._running.pop(id_, None)
        if kind is None:
            return None
        text = _sendable(text)
        if kind is MessageType.INTENT:
            cause = {"busy": "busy", "timeout": "deadline"}.get(name, "internal")
            return self._error(ErrorPayload.for_cause(cause, text), id_)
        status = ExecStatus.CANCELLED if name == CallCancelledError.name else ExecStatus.ERROR
        payload = ExecResponsePayload(status=status, error=text, execution_time_ms=round(seconds * 1e3))
        return self._sign(self._message(payload, correlation_id=id_, ext={"error": {"name": name}}))

    # --- what arrives ---------------------------------------------------------------------------

    def receive(self, data: str | bytes, *, is_done: bool = False, busy: str = "") -> Event | None:
        """Take one message of the DataChannel; return what has happened, if anything.

        Args:
            data: The message; only text is accepted.
            is_done: Whether this side needs the connection no longer, for a peer that asks.
            busy: Why nothing more can be begun for the peer now, if so.
        """
        envelope: dict[str, Any] = {}
        try:
            if isinstance(data, bytes):
                raise MalformedMessageError(name="binary_frame")
            envelope = loads(data, limit=DATA_MESSAGE_MAX_BYTES)
            message = self._prove(data, envelope)
            if message.type is MessageType.PING:
                return self._pong(message, is_done)
            return self._take(message, busy)
        except MessageError as error:
            return self._refused(error, envelope)

    def _pong(self, ping: Message, is_done: bool) -> Reply | DoneArrived:
        payload = PongPayload(**ping.payload.model_dump(exclude_unset=True))
        if ping.ext.get("done") is not True:
            return Reply(self._text(self._message(payload, correlation_id=ping.id)))
        pong = self._message(payload, correlation_id=ping.id, ext={"done": is_done})
        return DoneArrived(self._text(pong), is_done)

    def _prove(self, data: str, envelope: dict[str, Any]) -> Message:
        if _must_be_signed(envelope):
            return verify_message(
                data,
                recipient=self._key.did,
                sender=self.peer,
                guard=self._guard,
                limit=DATA_MESSAGE_MAX_BYTES,
            )
        message = parse(envelope, data.encode())
        if message.from_ != self.peer:
            raise InvalidSignatureError(name="wrong_sender", field="from", message_id=message.id)
        if message.to != self._key.did:
            raise WrongRecipientError(field="to", message_id=message.id)
        return message

    def _refused(self, error: MessageError, envelope: dict[str, Any]) -> Refused:
        failed = None
        asked = str(envelope.get("correlation_id")).lower()
        if asked in self._open and not isinstance(error, ReplayedMessageError):
            entry = self._open.pop(asked)
            if error.is_forged:
                text = f"what came in answer is not from {self.peer}: {error}"
                failed = Failed(asked, PeerIdentityError(text, self.peer))
            else:
                text = f"the answer of {self.peer} cannot be used: {error}"
                failed = Failed(asked, CallError(text, entry.capability))
        if envelope.get("type") == MessageType.ERROR.value:
            return Refused(error, None, failed)
        return Refused(error, self._error(ErrorPayload.for_error(error), error.message_id), failed)

    def _take(self, message: Message, busy: str) -> Event | None:
        match message.payload:
            case IntentPayload() as payload:
                return self._take_intent(message, payload, busy)
            case ExecRequestPayload() as payload:
                return self._take_request(message, payload, busy)
            case ExecResponsePayload() as payload:
                return self._take_response(message, payload)
            case ErrorPayload() as payload:
                return self._take_error(message, payload)
            case PongPayload():
                closed = self._close(message, MessageType.PING)
                return Answered(closed[0], message.ext.get("done") is True) if closed else None
            case UnregisterPayload() as payload:
                return Left(payload.reason or "it gave no reason")
        raise MalformedMessageError(
            f"{message.type.value} has no place on the DataChannel",
            name="unexpected_type",
            field="type",
            message_id=message.id,
        )

    def _take_intent(self, message: Message, payload: IntentPayload, busy: str) -> Event | None:
        if message.correlation_id is not None:
            asked = message.correlation_id.lower()
            if payload.status == "cancel" and asked not in self._open:
                return CancelArrived(asked) if asked in self._running else None
            closed = self._close(message, MessageType.INTENT)
            if closed is None:
                return None  # it was abandoned, and the answer crossed the cancel
            try:
                quote = Quote(
                    status=payload.status or "", required_input=payload.required_input, cost=payload.cost
                )
            except ValidationError:
                return Failed(closed[0], CallError(f"{self.peer} answered the INTENT without a status"))
            return Answered(closed[0], quote)
        if payload.query is None and payload.task is None:
            raise MalformedMessageError(
                "an INTENT that asks needs query or task", field="payload", message_id=message.id
            )
        timeout_ms = message.ext.get("timeout_ms", round(CALL_TIMEOUT_SECONDS * 1e3))
        if type(timeout_ms) is not int or timeout_ms <= 0:
            raise MalformedMessageError(
                "ext.timeout_ms is no number of milliseconds",
                name="invalid_ext",
                field="ext.timeout_ms",
                message_id=message.id,
            )
        intent = Intent(
            id=message.id.lower(),
            sender=message.from_,
            query=payload.query,
            context=payload.context,
            task=payload.task,
            params=payload.params,
        )
        timeout = min(timeout_ms / 1e3, TIMEOUT_MAX_SECONDS)
        return self._begin(message, busy) or IntentArrived(intent, timeout)

    def _take_request(self, message: Message, payload: ExecRequestPayload, busy: str) -> Event:
        capability = message.ext.get("capability")
        if not isinstance(capability, str):
            raise MalformedMessageError(
                "ext.capability must name what to execute",
                name="invalid_ext",
                field="ext.capability",
                message_id=message.id,
            )
        timeout = CALL_TIMEOUT_SECONDS if payload.timeout_ms is None else payload.timeout_ms / 1e3
        timeout = min(timeout, TIMEOUT_MAX_SECONDS)
        return self._begin(message, busy) or ExecutionArrived(
            message.id.lower(), capability, payload.args, timeout
        )

    def _begin(self, message: Message, busy: str) -> Reply | None:
        id_ = message.id.lower()
        self._running[id_] = message.type
        text = self.fail(id_, "busy", f"busy: {busy}; try again") if busy else None
        return Reply(text) if text is not None else None

    def _take_response(self, message: Message, payload: ExecResponsePayload) -> Event | None:
        if not payload.status.is_final:
            return None
        closed = self._close(message, MessageType.EXEC_REQUEST)
        if closed is None:
            return None
        asked, entry = closed
        if payload.status is ExecStatus.SUCCESS:
            return Answered(asked, payload.result)
        if payload.status is ExecStatus.CANCELLED:
            text = payload.error or f"{entry.capability} was cancelled"
            return Failed(asked, CallCancelledError(text, entry.capability))
        detail = message.ext.get("error")
        name = detail.get("name") if isinstance(detail, dict) else None
        kind = _CALL_ERRORS.get(name, CallError) if isinstance(name, str) else CallError
        text = payload.error or f"{entry.capability} failed without saying why"
        return Failed(asked, kind(text, entry.capability))

    def _take_error(self, message: Message, payload: ErrorPayload) -> Event | None:
        closed = self._close(message, None)
        if closed is None:
            return None
        if payload.code is ErrorCode.TIMEOUT:
            return Failed(closed[0], CallTimeoutError(payload.message, closed[1].capability))
        details = payload.details.model_dump(exclude_none=True) if payload.details else None
        return Failed(closed[0], remote_error(ErrorCode(payload.code), payload.message, details))

    def _close(self, message: Message, kind: MessageType | None) -> tuple[str, _Open] | None:
        """Take the question that `message` answers out of the open ones, if it is of that kind."""
        asked = (message.correlation_id or "").lower()
        entry = self._open.get(asked)
        if entry is None or (kind is not None and entry.type is not kind):
            return None
        del self._open[asked]
        return asked, entry

    # --- messages -------------------------------------------------------------------------------

    def _message(
        self, payload: Payload, *, correlation_id: str | None = None, ext: dict[str, Any] | None = None
    ) -> Message:
        return Message.create(self._key.did, self.peer, payload, correlation_id=correlation_id, ext=ext)

    def _sign(self, message: Message) -> str:
        return self._text(sign_message(message, self._key))

    def _text(self, message: Message) -> str:
        return encode(message, limit=self._limit).decode()

    def _error(self, payload: ErrorPayload, id_: str | None) -> str:
        readable = id_ if id_ is not None and _MESSAGE_ID.fullmatch(id_) else None
        return self._text(self._message(payload, correlation_id=readable))


def _milliseconds(timeout: float) -> int:
    if not 0 < timeout <= TIMEOUT_MAX_SECONDS:
        raise ValueError(f"timeout is in seconds, above 0 and at most a day, not {timeout}")
    return max(1, ceil(timeout * 1e3))


def _sendable(text: str) -> str:
    """Return `text` cut to size. A str may hold lone surrogates (undecodable file names do): JSON may not."""
    return text[:ERROR_TEXT_MAX].encode("utf-8", "backslashreplace").decode()


def _must_be_signed(envelope: dict[str, Any]) -> bool:
    kind = envelope.get("type")
    if kind == MessageType.EXEC_RESPONSE.value:
        payload = envelope.get("payload")
        status = payload.get("status") if isinstance(payload, dict) else None
        return isinstance(status, str) and status in _FINAL
    return kind in (MessageType.INTENT.value, MessageType.EXEC_REQUEST.value)
