"""What the client believes of a message that came through the gateway. No I/O."""

from __future__ import annotations

from aiconexus.protocol import (
    DIDError,
    InvalidSignatureError,
    MalformedMessageError,
    Message,
    MessageError,
    MessageType,
    ReplayGuard,
    decode,
    verify_envelope,
    verify_message,
)
from aiconexus.protocol.errors import ReplayedMessageError
from aiconexus.protocol.serialization import loads

# What the gateway sends unsigned: it could drop or invent these anyway.
_UNSIGNED = frozenset({MessageType.ERROR, MessageType.PING, MessageType.PONG, MessageType.PRESENCE})
# What one agent may say to another by way of the gateway. The rest is the gateway's, or the DataChannel's.
_FROM_AGENTS = frozenset(
    {MessageType.OFFER, MessageType.ANSWER, MessageType.ICE_CANDIDATE, MessageType.ERROR}
)


class Verifier:
    """Checks messages to one agent, and remembers their ids for as long as they could be replayed."""

    def __init__(self, did: str) -> None:
        self.did = did
        self.guard = ReplayGuard()

    def verify(self, data: str | bytes, gateway_did: str) -> Message:
        """Return the message in a frame: proven by its sender, or by the gateway's place on the wire.

        Args:
            data: The frame; str if it was a text frame.
            gateway_did: The DID that the gateway has proven on this connection.

        Raises:
            MessageError: It must not reach the application.
        """
        if isinstance(data, bytes):
            raise MalformedMessageError(name="binary_frame")
        try:
            message = verify_message(data, recipient=self.did, guard=self.guard)
        except InvalidSignatureError as error:
            if error.cause.name != "missing_signature":
                raise
            message = decode(data)
            if message.from_ != gateway_did or message.to != self.did or message.type not in _UNSIGNED:
                raise
        if message.from_ != gateway_did and message.type not in _FROM_AGENTS:
            raise MalformedMessageError(
                f"an agent does not send {message.type.value} through the gateway",
                name="unexpected_type",
                field="type",
                message_id=message.id,
            )
        return message

    def sender_to_answer(self, error: MessageError, data: str | bytes) -> str | None:
        """Return who may be told that `data` was refused with `error`; None if nobody may.

        Only one that is proven to have asked us: the signature verifies, `to` is this agent, and it is no
        ERROR. So nobody can make this agent write to a third party, and no two agents can argue for ever.
        Nor a replay: a sender may repeat what it is not sure about, and an ERROR for the second copy would
        deny the first, which was accepted.
        """
        if isinstance(data, bytes) or error.message_id is None or isinstance(error, ReplayedMessageError):
            return None
        try:
            envelope = loads(data)
            if envelope.get("to") != self.did or envelope.get("type") == MessageType.ERROR.value:
                return None
            verify_envelope(envelope)
        except (MessageError, DIDError):
            return None
        sender: str = envelope["from"]
        return sender if sender != self.did else None
