"""What has happened on a connection: the outcomes of `Calls.receive`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from aiconexus.core.intents import Intent
from aiconexus.protocol.attachments import Value
from aiconexus.protocol.errors import MessageError
from aiconexus.protocol.receipts import Receipt


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
    """The peer calls a capability; `Calls.succeed`, `Calls.finish` or `Calls.fail` answers.

    Attributes:
        id: Of the call.
        capability: Its name.
        args: By name; None while their attachments are still on their way (`ArgumentsArrived`).
        timeout: Seconds, from now.
        is_stream: Whether the caller wants parts and progress.
        input: Name of the argument that is a stream of bytes (`InputArrived`), if one is.
    """

    id: str
    capability: str
    args: dict[str, Value] | None
    timeout: float
    is_stream: bool = False
    input: str | None = None


@dataclass(frozen=True)
class ArgumentsArrived:
    """The attached arguments of the execution `id` are complete, or not what was signed (`fault`)."""

    id: str
    args: dict[str, Value]
    fault: str = ""


@dataclass(frozen=True)
class InputArrived:
    """The next bytes of the stream in the request `id`; `Calls.took_input` tells when they were taken."""

    id: str
    chunk: bytes


@dataclass(frozen=True)
class InputEnded:
    """The stream in the request `id` is complete, or not what was sent (`fault`)."""

    id: str
    fault: str = ""


@dataclass(frozen=True)
class CancelArrived:
    """The peer no longer wants the answer to its message `id`, which is not given yet."""

    id: str


@dataclass(frozen=True)
class PartArrived:
    """The next part of the stream that this side asked for; `Calls.took` tells when it was taken."""

    id: str
    value: Value


@dataclass(frozen=True)
class ProgressArrived:
    """How far the execution `id` is, in the callee's own terms."""

    id: str
    value: Any


@dataclass(frozen=True)
class Answered:
    """What this side asked with the message `id` has its answer.

    Attributes:
        id: Of the message.
        value: The result of an execution, or a Quote.
        is_streamed: Whether the result came in parts before.
        receipt: Of an execution.
    """

    id: str
    value: Any
    is_streamed: bool = False
    receipt: Receipt | None = None


@dataclass(frozen=True)
class Failed:
    """What this side asked with the message `id` has failed; `receipt` if the callee has signed that."""

    id: str
    error: Exception
    receipt: Receipt | None = None


@dataclass(frozen=True)
class PongArrived:
    """The PING `id` of this side is answered; `is_done` if the peer no longer needs the connection."""

    id: str
    is_done: bool = False


@dataclass(frozen=True)
class Reply:
    """Nothing for this side to do but to send `text` at once."""

    text: str


@dataclass(frozen=True)
class Refused:
    """A message that was not accepted.

    Attributes:
        error: Why.
        reply: The ERROR to send; None where an ERROR was refused, or two sides would never stop.
        failed: The call of this side that it spoils.
        cancelled: The call of the peer that it spoils.
    """

    error: MessageError
    reply: str | None
    failed: Failed | None = None
    cancelled: str | None = None


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


Event: TypeAlias = (
    IntentArrived
    | ExecutionArrived
    | ArgumentsArrived
    | InputArrived
    | InputEnded
    | CancelArrived
    | PartArrived
    | ProgressArrived
    | Answered
    | Failed
    | PongArrived
    | Reply
    | Refused
    | DoneArrived
    | Left
)
