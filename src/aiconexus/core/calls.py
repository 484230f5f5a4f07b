"""The calls over one DataChannel, both ways, as a state machine without I/O.

`Calls` is told what this side asks and what arrives; it says what has happened, and puts into its `outbox`
what is to be sent. It proves every message that counts (INTENT, EXEC_REQUEST and the final EXEC_RESPONSE are
signed: a receipt both sides can keep); PING, PONG, ERROR, parts and progress ride unsigned on the
authenticated channel, but must be from and to the two agents that it connects.

    callee:  EXEC_REQUEST ─▶ accepted ──start──▶ running ──▶ final EXEC_RESPONSE
                                │                 │   ▲
                                │                 └───┘ progress, partial
                                └────────────────────────▶ final EXEC_RESPONSE: cancelled, timeout, busy

    caller:  EXEC_REQUEST ─▶ open ──final EXEC_RESPONSE, ERROR, or given up──▶ over
                             │   ▲
                             └───┘ progress, partial

A request ends in exactly one final response, whatever becomes of the capability. What comes for a call that
is over has crossed its end, and is ignored.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from math import ceil
from typing import Any, Final

from pydantic import JsonValue, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from aiconexus.core.answers import Answer, Answers
from aiconexus.core.detach import describe, detach, detach_arguments, too_large
from aiconexus.core.events import (
    Answered,
    ArgumentsArrived,
    CancelArrived,
    DoneArrived,
    Event,
    ExecutionArrived,
    Failed,
    InputArrived,
    InputEnded,
    IntentArrived,
    Left,
    PartArrived,
    PongArrived,
    ProgressArrived,
    Refused,
    Reply,
)
from aiconexus.core.inbox import Inbox
from aiconexus.core.intents import Intent, Quote
from aiconexus.core.outbox import Outbox
from aiconexus.core.pings import PingTexts
from aiconexus.protocol.attachments import (
    ARGS,
    RESULT,
    Assembly,
    Detached,
    InputDigest,
    StreamDigest,
    StreamSummary,
    Value,
    argument_name,
    attachments_of,
    input_summary_of,
    stream_summary_of,
)
from aiconexus.protocol.errors import (
    CallBusyError,
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
from aiconexus.protocol.frames import Credit, End, end_frame, parse_frame
from aiconexus.protocol.limits import (
    CALL_TIMEOUT_SECONDS,
    DATA_MESSAGE_MAX_BYTES,
)
from aiconexus.protocol.models import (
    ErrorPayload,
    ExecRequestPayload,
    ExecResponsePayload,
    ExecStatus,
    IntentPayload,
    Message,
    MessageType,
    Payload,
    PongPayload,
    UnregisterPayload,
    new_envelope,
)
from aiconexus.protocol.receipts import Receipt
from aiconexus.protocol.security import DIDKey, ReplayGuard, sign_envelope, verify_loaded
from aiconexus.protocol.serialization import dumps, fitting, loads, parse

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
        CallBusyError,
        CallTimeoutError,
        CallCancelledError,
    )
}


class CallState(str, Enum):
    """Where a call of the peer is. One that is over is not kept."""

    ACCEPTED = "accepted"  # its arguments are on their way, or others run before it
    RUNNING = "running"


@dataclass
class _Served:
    """What the peer asked and has no answer to.

    Attributes:
        type: EXEC_REQUEST or INTENT.
        state: Where it is.
        is_stream: Whether the caller wants parts and progress.
        digest: Over the parts that were sent.
        answer: What the same request is answered when it comes again; an INTENT has none.
        args: Those that came in the envelope, while others are on their way.
        input: What has come of the stream in its request.
        size: Bytes of its envelope.
        has_read_input: Whether the capability has read that to its end.
    """

    type: MessageType
    state: CallState = CallState.ACCEPTED
    is_stream: bool = False
    digest: StreamDigest = field(default_factory=StreamDigest)
    answer: Answer | None = None
    args: dict[str, Value] = field(default_factory=dict)
    input: InputDigest = field(default_factory=InputDigest)
    size: int = 0
    has_read_input: bool = False


@dataclass
class _Open:
    """Something this side asked and has no answer to.

    Attributes:
        type: EXEC_REQUEST, INTENT or PING.
        capability: Its name.
        request: The signed text, for the receipt.
        is_stream: Whether this side wants parts.
        digest: Over the parts that came.
        input: What was sent of the stream in its request.
    """

    type: MessageType
    capability: str = ""
    request: str = ""
    is_stream: bool = False
    digest: StreamDigest = field(default_factory=StreamDigest)
    input: InputDigest = field(default_factory=InputDigest)


_PING: Final = _Open(MessageType.PING)  # of every one: nothing in it changes


class Calls:
    """All calls of one connection.

    Attributes:
        peer: DID of the agent at the other end.
        outbox: What is to be sent.
        accepted_bytes: Of the envelopes of the peer's calls that have no answer yet.
    """

    def __init__(
        self,
        key: DIDKey,
        peer: str,
        *,
        limit: int = DATA_MESSAGE_MAX_BYTES,
        answers: Answers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with no calls.

        Args:
            key: Of this agent.
            peer: DID of the other.
            limit: How many bytes the peer takes in one message.
            answers: What was answered to it over earlier connections.
            clock: Seconds, monotonic.
        """
        self.peer: Final = peer
        self.outbox: Final = Outbox()
        self.accepted_bytes = 0
        self._key = key
        self._limit = limit
        # One for each connection: a peer that floods it shuts nobody else out.
        self._guard = ReplayGuard()
        self._answers = Answers() if answers is None else answers
        self._clock = clock
        self._inbox = Inbox()
        self._open: dict[str, _Open] = {}
        self._pings: set[str] = set()  # which of these are PINGs
        self._ping_texts = PingTexts(key.did, peer)
        self._served: dict[str, _Served] = {}

    @property
    def open(self) -> int:
        """How many questions of this side wait for their answer; PINGs do not count."""
        return len(self._open) - len(self._pings)

    # --- what this side asks --------------------------------------------------------------------

    def ask(self, payload: IntentPayload, timeout: float) -> str:
        """Begin an INTENT; return its id.

        Args:
            payload: What is asked.
            timeout: Seconds until this side gives up; the other side is told.

        Raises:
            MalformedMessageError: It has no canonical JSON form, or is too large.
            ValueError: The timeout is none.
        """
        envelope = self._envelope(payload.type, payload.to_dict(), ext={"timeout_ms": _milliseconds(timeout)})
        id_: str = envelope["id"]
        self.outbox.put(id_, self._sign(envelope))
        self._open[id_] = _Open(MessageType.INTENT)
        return id_

    def execute(
        self, capability: str, args: dict[str, Any], timeout: float, *, is_stream: bool = False
    ) -> str:
        """Begin an execution; return the id of its EXEC_REQUEST.

        Args:
            capability: Its name.
            args: Bytes, or anything pydantic can write as JSON; an async iterable is a stream of bytes, to be
                sent by `feed` and `end_feed`.
            timeout: Seconds until the caller gives up; the callee is told.
            is_stream: Whether parts and progress are wanted.

        Raises:
            InvalidArgumentsError: The arguments have no JSON form, or are too many bytes.
            ValueError: The timeout is none.
        """
        timeout_ms = _milliseconds(timeout)
        try:
            outgoing = detach_arguments(args)
            fields = {"stream": True} if is_stream else {}
            payload = ExecRequestPayload(args=outgoing.inline, timeout_ms=timeout_ms, **fields)
            # The member of an enum travels as its text, as it does among the arguments.
            name = str.__str__(capability) if isinstance(capability, str) else capability
            ext = describe({"capability": name}, outgoing.detached, outgoing.stream)
            envelope = self._envelope(payload.type, payload.to_dict(), ext=ext)
            text = self._sign(envelope)
        except (MalformedMessageError, PydanticSerializationError, ValueError) as error:
            raise InvalidArgumentsError(f"the arguments cannot be sent: {error}", capability) from error
        id_: str = envelope["id"]
        self.outbox.put(id_, text, [each.data for each in outgoing.detached])
        self._inbox.open(id_)
        self._open[id_] = _Open(MessageType.EXEC_REQUEST, capability, text, is_stream)
        return id_

    def feed(self, id_: str, data: bytes) -> bool:
        """Send the next bytes of the stream in a request; tell whether anybody still wants them."""
        entry = self._open.get(id_)
        if entry is None:
            return False
        entry.input.add(data)
        if data:
            self.outbox.put_data(id_, data)
        return True

    def end_feed(self, id_: str) -> None:
        """Send the end of the stream in a request."""
        if (entry := self._open.get(id_)) is not None:
            self.outbox.put_end(id_, end_frame(id_, entry.input.digest()))

    def ping(self, *, is_done: bool = False) -> tuple[str, str]:
        """Begin a PING; return its id and the text to send at once.

        Args:
            is_done: Whether this side no longer needs the connection (`ext.done`); the PONG tells the
                same of the other side.
        """
        if is_done:
            envelope = self._envelope(MessageType.PING, {}, ext={"done": True})
            id_, text = envelope["id"], self._text(envelope)
        else:
            id_, text = self._ping_texts.ping()
        self._open[id_] = _PING
        self._pings.add(id_)
        return id_, text

    def abandon(self, id_: str) -> str | None:
        """Forget a question of this side; return the text that cancels it, if the peer may know of it."""
        entry = self._open.pop(id_, None)
        self._pings.discard(id_)
        if entry is None or entry is _PING:
            return None
        is_unsent = self.outbox.is_unsent(id_)
        self._over(id_)
        if is_unsent:
            return None
        return self._sign(self._envelope(MessageType.INTENT, {"status": "cancel"}, correlation_id=id_))

    def took(self, id_: str) -> None:
        """Take note that the reader has taken the next part of a stream."""
        self._inbox.took(id_)
        self._grant(id_)

    def leave(self, reason: str) -> str:
        """Return the text that says goodbye; the connection is closed after it."""
        return self._text(self._envelope(MessageType.UNREGISTER, {"reason": _sendable(reason)}))

    # --- what this side answers -----------------------------------------------------------------

    def start(self, id_: str) -> None:
        """Take note that a call of the peer begins to run."""
        if (served := self._served.get(id_)) is not None:
            served.state = CallState.RUNNING

    def took_input(self, id_: str, size: int) -> None:
        """Take note that a running execution has taken so many bytes of the stream in its request."""
        self._inbox.took_input(id_, size)
        self._grant(id_)

    def has_read_input(self, id_: str) -> None:
        """Take note that a running execution has read the stream in its request to the end."""
        if (served := self._served.get(id_)) is not None:
            served.has_read_input = True

    def progress(self, id_: str, value: Any) -> None:
        """Tell the caller how far a running execution is, if it wants to know; only the latest counts.

        Raises:
            CapabilityError: It has no JSON form, or is too large.
        """
        if (served := self._running_stream(id_)) is None:
            return
        text, _ = self._unsigned(id_, ExecStatus.PROGRESS, _jsonable(value), served)
        self.outbox.put(id_, text, is_counted=True, is_progress=True)

    def part(self, id_: str, value: Value) -> bool:
        """Send the next part of a running execution's result.

        Args:
            id_: Of the EXEC_REQUEST.
            value: Bytes or JSON.

        Returns:
            Whether it is sent: not if the call is over.

        Raises:
            CapabilityError: It has no JSON form.
        """
        served = self._running_stream(id_)
        if served is None:
            return False
        text, detached = self._unsigned(id_, ExecStatus.PARTIAL, value, served)
        if detached is None:
            served.digest.add(value)
        else:
            served.digest.add_data(detached.data, is_bytes=detached.is_bytes)
        attached = [] if detached is None else [detached.data]
        self.outbox.put(id_, text, attached, is_counted=True)
        return True

    def quote(self, id_: str, quote: Quote) -> None:
        """Answer an INTENT, unless it was answered before."""
        if id_ not in self._served:
            return
        try:
            payload = IntentPayload(**quote.model_dump(exclude_none=True, warnings=False))
            text = self._signed(payload, id_)
        except (MalformedMessageError, ValidationError) as error:  # a Quote may be derived from, or copied
            text = self._error(ErrorPayload.for_cause("internal", f"the answer cannot be sent: {error}"), id_)
        self._answer(id_, text)

    def succeed(self, id_: str, result: Any, seconds: float) -> None:
        """Answer an execution by its result, unless it was answered before."""
        if id_ not in self._served:
            return
        try:
            detached = detach(RESULT, result)
            fields = {} if detached is not None else {"result": result}
            payload = ExecResponsePayload(
                status=ExecStatus.SUCCESS, execution_time_ms=round(seconds * 1e3), **fields
            )
            all_detached = [] if detached is None else [detached]
            ext = describe(self._input_ext(id_), all_detached)
            text = self._signed(payload, id_, ext)
        except (MalformedMessageError, ValidationError) as error:
            self.fail(id_, CapabilityError.name, f"the result cannot be sent: {error}", seconds)
            return
        self._answer(id_, text, [each.data for each in all_detached])

    def finish(self, id_: str, seconds: float) -> None:
        """End an execution whose result went out in parts, unless it was answered before."""
        served = self._served.get(id_)
        if served is None:
            return
        payload = ExecResponsePayload(status=ExecStatus.SUCCESS, execution_time_ms=round(seconds * 1e3))
        ext = {**self._input_ext(id_), "stream": served.digest.summary().model_dump()}
        self._answer(id_, self._signed(payload, id_, ext), is_kept=False)

    def fail(self, id_: str, name: str, text: str, seconds: float = 0.0) -> None:
        """Say why there is no answer, unless there was one before; what waits of it is dropped.

        Args:
            id_: Of the EXEC_REQUEST or INTENT.
            name: A `CallError.name`.
            text: For people.
            seconds: How long it ran.
        """
        served = self._served.get(id_)
        if served is None:
            return
        self.outbox.drop(id_)
        self._answer(id_, self._failure(id_, served, name, text, seconds))

    def _turn_down(self, id_: str, name: str, text: str) -> Reply:
        """End a call of the peer before it has begun, at once: so much waits for nobody's turn."""
        failure = self._failure(id_, self._served[id_], name, text, 0.0)
        self._close_served(id_, failure)
        return Reply(failure)

    def _failure(self, id_: str, served: _Served, name: str, text: str, seconds: float) -> str:
        text = _sendable(text)
        if served.type is MessageType.INTENT:
            cause = {"busy": "busy", "timeout": "deadline"}.get(name, "internal")
            return self._error(ErrorPayload.for_cause(cause, text), id_)
        status = ExecStatus.CANCELLED if name == CallCancelledError.name else ExecStatus.ERROR
        payload = ExecResponsePayload(status=status, error=text, execution_time_ms=round(seconds * 1e3))
        ext: dict[str, JsonValue] = {**self._input_ext(id_), "error": {"name": name}}
        return self._signed(payload, id_, ext)

    def _input_ext(self, id_: str) -> dict[str, JsonValue]:
        served = self._served[id_]
        return {"input": served.input.summary().model_dump()} if served.has_read_input else {}

    def _running_stream(self, id_: str) -> _Served | None:
        served = self._served.get(id_)
        is_one = served is not None and served.is_stream and served.state is CallState.RUNNING
        return served if is_one else None

    def _unsigned(
        self, id_: str, status: ExecStatus, value: Value, served: _Served
    ) -> tuple[str, Detached | None]:
        try:
            detached = detach(RESULT, value)
            if detached is not None and status is ExecStatus.PROGRESS:
                raise MalformedMessageError("progress is short, and no bytes", name="too_large")
            fields: dict[str, Any] = {} if detached is not None else {"result": value}
            ext = describe({}, [] if detached is None else [detached], is_signed=False)
            payload = ExecResponsePayload(status=status, **fields)
            envelope = self._envelope(payload.type, payload.to_dict(), correlation_id=id_, ext=ext)
            return self._text(envelope), detached
        except (MalformedMessageError, ValidationError) as error:
            what = "a part" if status is ExecStatus.PARTIAL else "the progress"
            raise CapabilityError(f"{what} cannot be sent: {error}") from error

    def _answer(
        self, id_: str, text: str, attached: list[bytes] | None = None, *, is_kept: bool = True
    ) -> None:
        self.outbox.put(id_, text, attached or [])
        self.outbox.end(id_)
        self._close_served(id_, text if is_kept and not attached else None)

    def _close_served(self, id_: str, text: str | None) -> None:
        """Take a call of the peer for over; the same request is answered by `text` from now on."""
        served = self._served.pop(id_)
        self.accepted_bytes -= served.size
        self._inbox.close(id_)
        if served.answer is not None:
            self._answers.end(served.answer, text)

    # --- what arrives ---------------------------------------------------------------------------

    def receive(self, data: str | bytes, *, is_done: bool = False, busy: str = "") -> Event | None:
        """Take one message of the DataChannel; return what has happened, if anything.

        Args:
            data: An envelope, or a frame.
            is_done: Whether this side needs the connection no longer, for a peer that asks.
            busy: Why nothing more can be begun for the peer now, if so.
        """
        envelope: dict[str, Any] = {}
        try:
            if isinstance(data, bytes):
                return self._take_frame(data)
            if (usual := self._ping_texts.read(data)) is not None:
                return self._take_ping_text(*usual)
            envelope = loads(data, limit=DATA_MESSAGE_MAX_BYTES)
            message = self._prove(data, envelope)
            if message.type is MessageType.PING:
                return self._pong(message, is_done)
            return self._take(message, busy)
        except ReplayedMessageError as error:
            if self._is_repeated(envelope):
                return None
            return self._refused(error, envelope)
        except MessageError as error:
            return self._refused(error, envelope, is_frame=isinstance(data, bytes))

    def _take_ping_text(self, type_: MessageType, id_: str) -> Event | None:
        return Reply(self._ping_texts.pong(id_)) if type_ is MessageType.PING else self._take_pong(id_)

    def _take_pong(self, asked: str | None, *, is_done: bool = False) -> PongArrived | None:
        closed = self._close(asked, MessageType.PING)
        return PongArrived(closed[0], is_done) if closed else None

    def _pong(self, ping: Message, is_done: bool) -> Reply | DoneArrived:
        payload = ping.payload.to_dict()
        if ping.ext.get("done") is not True:
            return Reply(self._text(self._envelope(MessageType.PONG, payload, correlation_id=ping.id)))
        pong = self._envelope(MessageType.PONG, payload, correlation_id=ping.id, ext={"done": is_done})
        return DoneArrived(self._text(pong), is_done)

    def _prove(self, data: str, envelope: dict[str, Any]) -> Message:
        if _must_be_signed(envelope):
            return verify_loaded(envelope, data, recipient=self._key.did, sender=self.peer, guard=self._guard)
        message = parse(envelope, data.encode())
        if message.from_ != self.peer:
            raise InvalidSignatureError(name="wrong_sender", field="from", message_id=message.id)
        if message.to != self._key.did:
            raise WrongRecipientError(field="to", message_id=message.id)
        return message

    def _refused(self, error: MessageError, envelope: dict[str, Any], *, is_frame: bool = False) -> Refused:
        failed = cancelled = None
        asked = str(envelope.get("correlation_id")).lower()
        if is_frame:  # it names its call in the error
            asked = cancelled = error.message_id or ""
        if asked in self._open and not isinstance(error, ReplayedMessageError):
            entry = self._open[asked]
            self._give_up(asked)
            if error.is_forged:
                text = f"what came in answer is not from {self.peer}: {error}"
                failed = Failed(asked, PeerIdentityError(text, self.peer))
            else:
                text = f"the answer of {self.peer} cannot be used: {error}"
                failed = Failed(asked, CallError(text, entry.capability))
        if cancelled is not None and cancelled in self._served:
            self.outbox.drop(cancelled)
            self.outbox.end(cancelled)
            self._close_served(cancelled, None)
        else:
            cancelled = None
        if envelope.get("type") == MessageType.ERROR:
            return Refused(error, None, failed)
        reply = self._error(ErrorPayload.for_error(error), error.message_id)
        return Refused(error, reply, failed, cancelled)

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
                return self._take_pong(message.correlation_id, is_done=message.ext.get("done") is True)
            case UnregisterPayload() as payload:
                return Left(payload.reason or "it gave no reason")
        raise MalformedMessageError(
            f"{message.type.value} has no place on the DataChannel",
            name="unexpected_type",
            field="type",
            message_id=message.id,
        )

    def _take_frame(self, data: bytes) -> Event | None:
        frame = parse_frame(data)
        if isinstance(frame, Credit):
            self.outbox.credit(frame.call, frame.taken)
            return None
        if isinstance(frame, End):
            return self._take_end(frame)
        if self._inbox.is_streaming(frame.call):
            self._inbox.hold_input(frame.call, len(frame.chunk))
            self._served[frame.call].input.add(frame.chunk)
            return InputArrived(frame.call, frame.chunk)
        assembly = self._inbox.add(frame.call, frame.chunk)
        event = None if assembly is None else self._take_attached(frame.call, assembly)
        self._grant(frame.call)
        return event

    def _take_end(self, end: End) -> Event | None:
        if not self._inbox.end_input(end.call):
            return None
        is_whole = self._served[end.call].input.digest() == end.digest
        return InputEnded(end.call, "" if is_whole else "what came of the stream is not what was sent")

    def _grant(self, call: str) -> None:
        frame = self._inbox.credit(call)
        if frame is not None:
            self.outbox.grant(call, frame)

    def _take_attached(self, call: str, assembly: Assembly) -> Event | None:
        """Take an envelope whose attachments are complete now."""
        payload = assembly.message.payload
        try:
            values = assembly.values()
        except MalformedMessageError as error:
            if isinstance(payload, ExecRequestPayload):
                return ArgumentsArrived(call, {}, str(error))
            self._give_up(call)
            text = f"the answer of {self.peer} cannot be used: {error}"
            return Failed(call, PeerIdentityError(text, self.peer))
        if isinstance(payload, ExecResponsePayload):
            return self._take_value(call, assembly.message, payload, values[RESULT], assembly.size)
        args = self._served[call].args
        whole = values.pop(ARGS, None)
        if isinstance(whole, dict):
            args.update(whole)
        elif whole is not None:
            return ArgumentsArrived(call, {}, "the arguments are no object")
        named = {argument_name(at) or "": value for at, value in values.items()}
        stream = set() if assembly.stream is None else {argument_name(assembly.stream) or ""}
        if twice := args.keys() & (named.keys() | stream):
            return ArgumentsArrived(call, {}, f"the argument {min(twice)[:64]!r} came twice")
        args.update(named)
        return ArgumentsArrived(call, args)

    def _take_intent(self, message: Message, payload: IntentPayload, busy: str) -> Event | None:
        if message.correlation_id is not None:
            asked = message.correlation_id.lower()
            if payload.status == "cancel" and asked not in self._open:
                return self._take_cancel(asked)
            closed = self._close(message.correlation_id, MessageType.INTENT)
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

    def _take_cancel(self, asked: str) -> Event | None:
        """Stop a call of the peer; of one that is over, what is still on its way out."""
        if asked in self._served:
            return CancelArrived(asked)
        self.outbox.cut(asked)
        return None

    def _take_request(self, message: Message, payload: ExecRequestPayload, busy: str) -> Event | None:
        id_ = message.id.lower()
        capability = message.ext.get("capability")
        if not isinstance(capability, str):
            raise MalformedMessageError(
                "ext.capability must name what to execute",
                name="invalid_ext",
                field="ext.capability",
                message_id=message.id,
            )
        if self._answers.find(id_, self._clock()) is not None:  # it came over an earlier connection
            if self._repeat(id_, message.signature):
                return None
            raise ReplayedMessageError(message_id=message.id)
        attachments = attachments_of(message)
        if (refusal := self._begin(message, busy)) is not None:
            return refusal
        served = self._served[id_]
        served.is_stream = payload.stream is True
        served.args = dict(payload.args)
        timeout = CALL_TIMEOUT_SECONDS if payload.timeout_ms is None else payload.timeout_ms / 1e3
        timeout = min(timeout, TIMEOUT_MAX_SECONDS)
        args, stream = served.args, None
        self._inbox.open(id_)
        if attachments:
            assembly = Assembly(message, attachments)
            stream = None if assembly.stream is None else argument_name(assembly.stream)
            if not self._inbox.could_have_room(assembly):
                return self._turn_down(id_, InvalidArgumentsError.name, too_large(assembly.size))
            if not self._inbox.has_room(assembly):
                text = f"busy: {self._inbox.kept} bytes of your calls are kept here; try again"
                return self._turn_down(id_, CallBusyError.name, text)
            self._inbox.collect(id_, assembly)
            if self._inbox.completed(id_) is None:
                return ExecutionArrived(id_, capability, None, timeout, served.is_stream, stream)
            arrived = self._take_attached(id_, assembly)
            assert isinstance(arrived, ArgumentsArrived)
            if arrived.fault:
                return self._turn_down(id_, InvalidArgumentsError.name, arrived.fault)
            args = arrived.args
        return ExecutionArrived(id_, capability, args, timeout, served.is_stream, stream)

    def _begin(self, message: Message, busy: str) -> Reply | None:
        """Accept a call of the peer, or return why there is no room for it."""
        id_ = message.id.lower()
        if id_ in self._open:  # frames of the one would pass for frames of the other
            raise ReplayedMessageError("the id is that of a call of this side", message_id=message.id)
        served = self._served[id_] = _Served(message.type, size=len(message.wire or b""))
        self.accepted_bytes += served.size
        if message.type is MessageType.EXEC_REQUEST and not busy:
            served.answer = self._answers.begin(id_, message.signature or "", self._clock())
        return self._turn_down(id_, CallBusyError.name, f"busy: {busy}; try again") if busy else None

    def _is_repeated(self, envelope: dict[str, Any]) -> bool:
        """Tell whether a message that came before is a request whose answer is known, or under way."""
        is_request = envelope.get("type") == MessageType.EXEC_REQUEST
        return is_request and self._repeat(str(envelope["id"]).lower(), envelope.get("signature"))

    def _repeat(self, id_: str, signature: str | None) -> bool:
        answer = self._answers.find(id_, self._clock())
        if answer is None or answer.signature != signature:
            return False
        if not answer.is_over:
            if id_ not in self._served:  # it runs for an earlier connection
                answer.listeners.add(self._answer_again)
            return True
        if answer.text is None:
            return False
        self._answer_again(id_, answer.text)
        return True

    def _answer_again(self, id_: str, text: str | None) -> None:
        if self.outbox.holds(id_):  # who asks again and again, and does not read, has one answer
            return
        if text is None:
            text = self._error(ErrorPayload.for_cause("replayed"), id_)
        self.outbox.put(id_, text)
        self.outbox.end(id_)

    def _take_response(self, message: Message, payload: ExecResponsePayload) -> Event | None:
        asked = (message.correlation_id or "").lower()
        entry = self._open.get(asked)
        if entry is None or entry.type is not MessageType.EXEC_REQUEST:
            return None
        self._inbox.give_up(asked)
        attachments = attachments_of(message)
        if not payload.status.is_final:
            assert message.wire is not None
            self._inbox.count(asked, len(message.wire))
            if payload.status is ExecStatus.PROGRESS or not entry.is_stream:  # it waits for no reader
                self._grant(asked)
        if not attachments:
            return self._take_value(asked, message, payload, payload.result, 0)
        assembly = Assembly(message, attachments)
        if not self._inbox.has_room(assembly):
            text = too_large(assembly.size)
            if self._inbox.could_have_room(assembly):
                kept = f"{self._inbox.kept} bytes of other calls are kept here"
                text = f"{assembly.size} bytes are attached, and {kept}: make fewer at a time"
            raise MalformedMessageError(text, name="too_large", message_id=message.id)
        self._inbox.collect(asked, assembly)
        if self._inbox.completed(asked) is None:
            return None
        return self._take_attached(asked, assembly)

    def _take_value(
        self, asked: str, message: Message, payload: ExecResponsePayload, value: Value, attached: int
    ) -> Event | None:
        """Take a response that is complete."""
        entry = self._open[asked]
        if payload.status is ExecStatus.PROGRESS:
            self._inbox.release(asked, attached)
            return ProgressArrived(asked, value)
        assert message.wire is not None
        if payload.status is ExecStatus.PARTIAL:
            if not entry.is_stream:
                self._inbox.release(asked, attached)
                return None
            entry.digest.add(value)
            self._inbox.hold(asked, len(message.wire), attached)
            return PartArrived(asked, value)
        del self._open[asked]
        self._over(asked)
        receipt = Receipt(entry.request, message.wire.decode())
        try:
            streamed = stream_summary_of(message)
            read = input_summary_of(message)
        except MalformedMessageError as error:
            text = f"the answer of {self.peer} cannot be used: {error}"
            return Failed(asked, CallError(text, entry.capability), receipt)
        if read is not None and read != entry.input.summary():
            text = f"what {self.peer} has read is not the stream that was sent"
            return Failed(asked, PeerIdentityError(text, self.peer), receipt)
        if payload.status is ExecStatus.SUCCESS:
            return self._succeeded(asked, entry, streamed, value, receipt)
        if payload.status is ExecStatus.CANCELLED:
            text = payload.error or f"{entry.capability} was cancelled"
            return Failed(asked, CallCancelledError(text, entry.capability), receipt)
        detail = message.ext.get("error")
        name = detail.get("name") if isinstance(detail, dict) else None
        kind = _CALL_ERRORS.get(name, CallError) if isinstance(name, str) else CallError
        text = payload.error or f"{entry.capability} failed without saying why"
        return Failed(asked, kind(text, entry.capability), receipt)

    def _succeeded(
        self, asked: str, entry: _Open, said: StreamSummary | None, value: Value, receipt: Receipt
    ) -> Event:
        if said is None and not entry.digest.parts:
            return Answered(asked, value, receipt=receipt)
        came = entry.digest.summary()
        if said != came:
            text = f"the {came.parts} parts that came are not the stream that {self.peer} has signed"
            return Failed(asked, PeerIdentityError(text, self.peer), receipt)
        return Answered(asked, value, True, receipt)

    def _take_error(self, message: Message, payload: ErrorPayload) -> Event | None:
        closed = self._close(message.correlation_id, None)
        if closed is None:
            return self._take_cancel((message.correlation_id or "").lower())
        if payload.code is ErrorCode.TIMEOUT:
            return Failed(closed[0], CallTimeoutError(payload.message, closed[1].capability))
        details = payload.details.model_dump(exclude_none=True) if payload.details else None
        return Failed(closed[0], remote_error(ErrorCode(payload.code), payload.message, details))

    def _close(self, asked: str | None, kind: MessageType | None) -> tuple[str, _Open] | None:
        """Take the question that is answered out of the open ones, if it is of that kind."""
        asked = (asked or "").lower()
        entry = self._open.get(asked)
        if entry is None or (kind is not None and entry.type is not kind):
            return None
        del self._open[asked]
        self._pings.discard(asked)
        self._over(asked)
        return asked, entry

    def _give_up(self, id_: str) -> None:
        """Forget a question of this side whose answer cannot be used, and cancel it there."""
        if (cancel := self.abandon(id_)) is not None:
            self.outbox.put(id_, cancel)
            self.outbox.end(id_)

    def _over(self, id_: str) -> None:
        """Neither send nor expect anything more of a call."""
        self.outbox.drop(id_)
        self.outbox.end(id_)
        self._inbox.close(id_)

    # --- messages -------------------------------------------------------------------------------

    def _envelope(
        self,
        type_: MessageType,
        payload: dict[str, JsonValue],
        *,
        correlation_id: str | None = None,
        ext: dict[str, JsonValue] | None = None,
    ) -> dict[str, Any]:
        return new_envelope(self._key.did, self.peer, type_, payload, correlation_id=correlation_id, ext=ext)

    def _signed(self, payload: Payload, asked: str, ext: dict[str, JsonValue] | None = None) -> str:
        return self._sign(self._envelope(payload.type, payload.to_dict(), correlation_id=asked, ext=ext))

    def _sign(self, envelope: dict[str, Any]) -> str:
        return fitting(sign_envelope(envelope, self._key), self._limit).decode()

    def _text(self, envelope: dict[str, Any]) -> str:
        return fitting(dumps(envelope), self._limit).decode()

    def _error(self, payload: ErrorPayload, id_: str | None) -> str:
        readable = id_ if id_ is not None and _MESSAGE_ID.fullmatch(id_) else None
        return self._text(self._envelope(payload.type, payload.to_dict(), correlation_id=readable))


def _milliseconds(timeout: float) -> int:
    if not 0 < timeout <= TIMEOUT_MAX_SECONDS:
        raise ValueError(f"timeout is in seconds, above 0 and at most a day, not {timeout}")
    return max(1, ceil(timeout * 1e3))


def _sendable(text: str) -> str:
    """Return `text` cut to size. A str may hold lone surrogates (undecodable file names do): JSON may not."""
    return text[:ERROR_TEXT_MAX].encode("utf-8", "backslashreplace").decode()


def _must_be_signed(envelope: dict[str, Any]) -> bool:
    kind = envelope.get("type")
    if kind == MessageType.EXEC_RESPONSE:
        payload = envelope.get("payload")
        status = payload.get("status") if isinstance(payload, dict) else None
        return isinstance(status, str) and status in _FINAL
    return kind in (MessageType.INTENT, MessageType.EXEC_REQUEST)


def _jsonable(value: Any) -> JsonValue:
    try:
        jsonable: JsonValue = to_jsonable_python(value)
    except (PydanticSerializationError, ValueError) as error:
        raise CapabilityError(f"the progress has no JSON form: {error}") from error
    return jsonable
