"""Everything that can go wrong, as one tree.

::

    AIConexusError
    ├── IdentityError
    │   ├── DIDError                   a text that is not a canonical Ed25519 did:key
    │   │   ├── DIDTypeError           not a string
    │   │   ├── DIDMethodError         does not begin with "did:key:"
    │   │   ├── DIDMultibaseError      the part after it does not begin with "z" (base58btc)
    │   │   ├── DIDLengthError         not 56 characters
    │   │   ├── DIDAlphabetError       a character that base58btc does not have
    │   │   ├── DIDCodecError          another key type than Ed25519 (multicodec 0xed 0x01)
    │   │   └── DIDCanonicalError      a DID URL, or another text than how that key is written
    │   └── KeyFileError
    │       ├── KeyFilePermissionError readable by others
    │       ├── KeyFilePassphraseError wrong, missing or needless passphrase
    │       └── KeyFileFormatError     not an Ed25519 private key in PKCS #8 PEM
    ├── MessageError                   a message that must be refused; knows its ERROR
    │   ├── MalformedMessageError
    │   ├── UnsupportedVersionError
    │   └── InvalidSignatureError
    │       ├── WrongRecipientError
    │       ├── StaleMessageError
    │       └── ReplayedMessageError
    ├── RemoteError                    an ERROR that arrived
    │   ├── UnknownAgentError
    │   ├── PeerRefusedError
    │   └── RemoteTimeoutError
    ├── GatewayError
    │   ├── GatewayUnreachableError    no connection, or no answer in time
    │   ├── IncompleteAnswerError      it could not ask all who is there
    │   ├── GatewayIdentityError       its first message does not prove its key
    │   ├── RegistrationError          it refused our REGISTER
    │   ├── NotConnectedError          nothing can be sent now
    │   └── GatewayClosedError         closed for good (a terminal close code)
    ├── PeerError
    │   ├── PeerConnectError           no DataChannel could be opened
    │   ├── PeerIdentityError          the other end is not who it should be
    │   └── PeerLostError              the DataChannel went away under a running call
    └── CallError                      an execution that did not succeed
        ├── UnknownCapabilityError
        ├── InvalidArgumentsError
        ├── CapabilityError            the capability raised
        ├── CallBusyError              the other agent takes no more at present: try again
        ├── CallTimeoutError           (is a TimeoutError)
        └── CallCancelledError
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Final


class ErrorCode(str, Enum):
    """`payload.code` of an ERROR. The list is closed; finer causes are `details.name`."""

    INVALID_SIGNATURE = "INVALID_SIGNATURE"
    UNKNOWN_AGENT = "UNKNOWN_AGENT"
    CONNECTION_REFUSED = "CONNECTION_REFUSED"
    TIMEOUT = "TIMEOUT"
    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    UNSUPPORTED_VERSION = "UNSUPPORTED_VERSION"
    INTERNAL_ERROR = "INTERNAL_ERROR"


@dataclass(frozen=True)
class Cause:
    """One cause of an ERROR: `details.num`, `details.name`, its code, and a text for people.

    `temporary` tells whether the same message may succeed later.
    """

    num: int
    name: str
    code: ErrorCode
    message: str
    temporary: bool = False


def _causes() -> dict[str, Cause]:
    malformed, signature = ErrorCode.MALFORMED_MESSAGE, ErrorCode.INVALID_SIGNATURE
    unknown, refused = ErrorCode.UNKNOWN_AGENT, ErrorCode.CONNECTION_REFUSED
    rows = (
        Cause(100, "not_json", malformed, "the message is not one JSON text (RFC 8259)"),
        Cause(101, "not_object", malformed, "the message is not a JSON object"),
        Cause(102, "invalid_utf8", malformed, "the message is not UTF-8"),
        Cause(103, "lone_surrogate", malformed, "a \\u escape names half a surrogate pair"),
        Cause(104, "too_deep", malformed, "the message nests more than 32 levels deep"),
        Cause(105, "too_large", malformed, "the message is larger than 65536 bytes"),
        Cause(106, "duplicate_key", malformed, "a key stands twice in one object"),
        Cause(107, "escaped_key", malformed, "an envelope key is written with an escape"),
        Cause(108, "escaped_value", malformed, "this field must be written without escapes"),
        Cause(109, "unknown_field", malformed, "the envelope has no such field; new ones go into ext"),
        Cause(110, "missing_field", malformed, "a required envelope field is missing"),
        Cause(111, "wrong_type", malformed, "a field has the wrong JSON type"),
        Cause(112, "bad_id", malformed, "an id is not a UUID of 36 characters"),
        Cause(113, "bad_did", malformed, "not a canonical Ed25519 did:key of 56 characters"),
        Cause(114, "unknown_type", malformed, "no such message type"),
        Cause(115, "binary_frame", malformed, "messages are text frames"),
        Cause(116, "unexpected_type", malformed, "this message type has no place here"),
        Cause(117, "invalid_payload", malformed, "the payload does not fit the message type"),
        Cause(118, "invalid_ext", malformed, "ext does not fit the message type"),
        Cause(119, "not_canonical", malformed, "a number has no canonical JSON form (RFC 8785)"),
        Cause(120, "number_out_of_range", malformed, "a number is larger than a double can hold"),
        Cause(121, "bad_frame", malformed, "not a frame of a call that this side knows"),
        Cause(200, "bad_signature", signature, "the signature does not verify"),
        Cause(201, "missing_signature", signature, "this message must be signed"),
        Cause(202, "wrong_sender", signature, "from is not the DID that this session has proven"),
        Cause(203, "wrong_key", signature, "public_key is not the key in from"),
        Cause(204, "wrong_nonce", signature, "ext.nonce is not the nonce of this connection"),
        Cause(205, "wrong_audience", signature, "ext.aud is not the address of this gateway"),
        Cause(206, "stale_timestamp", signature, "the timestamp is too far from the time here"),
        Cause(207, "replayed", signature, "a message with this id came before"),
        Cause(208, "wrong_recipient", signature, "the message is addressed to somebody else"),
        Cause(300, "not_online", unknown, "no agent with this DID is online", temporary=True),
        Cause(301, "away_expired", unknown, "the agent dropped and did not come back", temporary=True),
        Cause(302, "away_full", unknown, "the agent is away and its queue is full", temporary=True),
        Cause(
            303,
            "unreachable",
            unknown,
            "its part of the gateway cannot be reached: try again",
            temporary=True,
        ),
        Cause(400, "data_plane_only", refused, "this type travels on the DataChannel, not the gateway"),
        Cause(401, "slow_consumer", refused, "the agent does not read fast enough", temporary=True),
        Cause(402, "not_offered", refused, "this gateway does not offer this feature"),
        Cause(403, "declined", refused, "the agent declined the connection"),
        Cause(404, "busy", refused, "the agent takes no more connections now", temporary=True),
        Cause(405, "overloaded", refused, "too much waits on the way to the agent", temporary=True),
        Cause(406, "rate_limited", refused, "this session sends too many messages", temporary=True),
        Cause(407, "gateway_full", refused, "the gateway takes no more agents", temporary=True),
        Cause(500, "register_timeout", ErrorCode.TIMEOUT, "no REGISTER in time", temporary=True),
        Cause(501, "deadline", ErrorCode.TIMEOUT, "not done in time", temporary=True),
        Cause(600, "unsupported_version", ErrorCode.UNSUPPORTED_VERSION, "this side speaks version 1.0 only"),
        Cause(700, "internal", ErrorCode.INTERNAL_ERROR, "a fault on this side", temporary=True),
        Cause(701, "unconfirmed", ErrorCode.INTERNAL_ERROR, "it may or may not have arrived", temporary=True),
    )
    return {row.name: row for row in rows}


CAUSES: Final[dict[str, Cause]] = _causes()
"""All causes by `details.name`. Names and numbers are part of the wire protocol: never reuse one."""


@dataclass(frozen=True)
class CloseCode:
    """One WebSocket close code (RFC 6455 section 7.4) and what a client does on it.

    Attributes:
        number: 1000-1015 as in RFC 6455, 4000-4499 reconnect, 4500-4599 do not.
        name: Also the `n` of the reason text `{"r": retry_after_ms, "n": name}`.
        meaning: For people.
        reconnect: Whether the client may come back by itself.
        retry_after_ms: Earliest return where the reason text names no `r`; the client adds jitter.
    """

    number: int
    name: str
    meaning: str
    reconnect: bool
    retry_after_ms: int = 0


CLOSE_CODES: Final[dict[int, CloseCode]] = {
    row.number: row
    for row in (
        CloseCode(1000, "normal", "done: after UNREGISTER, or the client's own close", False),
        CloseCode(1001, "going_away", "the server stops", True, 500),
        CloseCode(1002, "protocol_error", "a frame broke RFC 6455", True, 5_000),
        CloseCode(1003, "unsupported_data", "a binary frame arrived", True, 5_000),
        CloseCode(1005, "no_status", "closed without a code", True, 500),
        CloseCode(1006, "abnormal", "the connection broke", True, 500),
        CloseCode(1007, "invalid_text", "a text frame was not UTF-8", True, 5_000),
        CloseCode(1009, "too_large", "a message was over the size limit", True, 5_000),
        CloseCode(1011, "internal_error", "the server met a fault", True, 1_000),
        CloseCode(1012, "service_restart", "the server restarts", True, 1_000),
        CloseCode(1013, "try_again_later", "the server is full", True, 5_000),
        CloseCode(4001, "draining", "the gateway is being stopped or upgraded", True, 500),
        CloseCode(4002, "internal", "the gateway met a fault with this session", True, 1_000),
        CloseCode(4003, "slow_consumer", "over 1 MiB waited to be read by this client", True, 1_000),
        CloseCode(4004, "no_pong", "no answer to a ping", True, 500),
        CloseCode(4005, "rate_limited", "too many messages", True, 5_000),
        CloseCode(4006, "idle", "no message for the idle time", True, 1_000),
        CloseCode(4007, "register_timeout", "no REGISTER in time", True, 1_000),
        CloseCode(4500, "protocol_violation", "the first message was not a valid REGISTER", False),
        CloseCode(4502, "authentication_failed", "the proof of the DID was refused", False),
        CloseCode(4503, "not_allowed", "this agent may not use this gateway", False),
        CloseCode(4504, "replaced", "a newer session has proven the same DID", False),
        CloseCode(4505, "unsupported_version", "the client speaks another version", False),
    )
}


def close_code(number: int) -> CloseCode:
    """Look a close code up; one that is not in the table follows its range."""
    known = CLOSE_CODES.get(number)
    if known is not None:
        return known
    return CloseCode(number, "unknown", "not in the table", not 4500 <= number <= 4999, 1_000)


class AIConexusError(Exception):
    """Base of all errors of this package.

    Attributes:
        temporary: Whether the same may succeed later with nothing changed here, as far as can be known.
    """

    temporary: bool = False


# --- identity ----------------------------------------------------------------------------------


class IdentityError(AIConexusError):
    """A DID or a key file that cannot be used."""


class DIDError(IdentityError, ValueError):
    """The text is not a canonical Ed25519 did:key. `text` holds it."""

    def __init__(self, reason: str, text: object) -> None:
        self.text = text
        shown = repr(text)
        super().__init__(f"{reason}: {shown if len(shown) <= 80 else shown[:77] + '...'}")


class DIDTypeError(DIDError):
    """Not a string."""


class DIDMethodError(DIDError):
    """Does not begin with `did:key:`."""


class DIDMultibaseError(DIDError):
    """The identifier does not begin with `z`, the multibase letter of base58btc."""


class DIDLengthError(DIDError):
    """Not 56 characters long."""


class DIDAlphabetError(DIDError):
    """A character that base58btc does not have."""


class DIDCodecError(DIDError):
    """Another key type than Ed25519: the decoded bytes do not begin with 0xed 0x01."""


class DIDCanonicalError(DIDError):
    """A DID URL (with path, query or fragment), or not how encoding the key writes it."""


class KeyFileError(IdentityError):
    """A key file that cannot be used. `path` names it."""

    def __init__(self, path: object, reason: str) -> None:
        self.path = path
        super().__init__(f"{path}: {reason}")


class KeyFilePermissionError(KeyFileError):
    """An unencrypted key that others may read."""


class KeyFilePassphraseError(KeyFileError):
    """Wrong, missing or needless passphrase."""


class KeyFileFormatError(KeyFileError):
    """Not an Ed25519 private key in PKCS #8 PEM."""


# --- messages ----------------------------------------------------------------------------------


class MessageError(AIConexusError):
    """A message that must be refused.

    Attributes:
        cause: What goes into the ERROR that answers it.
        field: Envelope or payload field at fault, if one is.
        message_id: Its `id`, where it could be read: the `correlation_id` of the ERROR.
        is_forged: Whether it is not from whom it should be, or not as they sent it.
    """

    default: ClassVar[str] = "internal"
    is_forged: ClassVar[bool] = False

    def __init__(
        self, text: str = "", *, name: str = "", field: str | None = None, message_id: str | None = None
    ) -> None:
        self.cause = CAUSES[name or self.default]
        self.field = field
        self.message_id = message_id
        self.temporary = self.cause.temporary
        super().__init__(text or self.cause.message)


class MalformedMessageError(MessageError):
    """Not a message of this protocol."""

    default = "invalid_payload"


class UnsupportedVersionError(MessageError):
    """A `version` other than 1.0."""

    default = "unsupported_version"


class InvalidSignatureError(MessageError):
    """The sender did not prove that this message is its own."""

    default = "bad_signature"
    is_forged = True


class WrongRecipientError(InvalidSignatureError):
    """Signed, but for somebody else."""

    default = "wrong_recipient"


class StaleMessageError(InvalidSignatureError):
    """The timestamp is too far from the time here."""

    default = "stale_timestamp"
    is_forged = False


class ReplayedMessageError(InvalidSignatureError):
    """A message with this id was accepted before."""

    default = "replayed"
    is_forged = False


class RemoteError(AIConexusError):
    """An ERROR that arrived in answer to a message of ours.

    Attributes:
        code: The ErrorCode.
        name: `details.name`, or "" where the sender gave none.
        temporary: Whether the sender said that the same message may succeed later.
        retry_after_ms: Earliest time for that, if the sender named one.
        details: The `details` as they came.
    """

    def __init__(self, code: ErrorCode, text: str, details: dict[str, Any] | None = None) -> None:
        self.code = code
        self.details = details or {}
        self.name = str(self.details.get("name") or "")
        self.temporary = bool(self.details.get("temporary"))
        retry_after_ms = self.details.get("retry_after_ms")
        self.retry_after_ms = retry_after_ms if isinstance(retry_after_ms, int) else None
        super().__init__(text)


class UnknownAgentError(RemoteError):
    """The agent is not online."""


class PeerRefusedError(RemoteError):
    """The other side refused (CONNECTION_REFUSED)."""


class RemoteTimeoutError(RemoteError, TimeoutError):
    """The other side gave up waiting (TIMEOUT)."""


# --- gateway -----------------------------------------------------------------------------------


class GatewayError(AIConexusError):
    """Trouble between this agent and its gateway."""


class GatewayUnreachableError(GatewayError):
    """No connection could be made, or no answer came in time. It is temporary unless the address is wrong."""

    def __init__(self, text: str, *, temporary: bool = True) -> None:
        self.temporary = temporary
        super().__init__(text)


class IncompleteAnswerError(GatewayError):
    """The gateway could not ask all of its workers and nodes: there may be more agents. Ask again later."""

    temporary = True


class GatewayIdentityError(GatewayError):
    """The gateway's first message does not prove the key that it names, or is not the expected key."""


class RegistrationError(GatewayError):
    """The gateway refused our REGISTER. `cause` is the RemoteError it sent."""

    def __init__(self, text: str, cause: RemoteError | None = None) -> None:
        self.cause = cause
        self.temporary = cause is not None and cause.temporary
        super().__init__(text)


class NotConnectedError(GatewayError):
    """Nothing can be sent now. It is temporary while the client is about to reconnect."""

    def __init__(self, text: str, *, temporary: bool = False) -> None:
        self.temporary = temporary
        super().__init__(text)


class GatewayClosedError(GatewayError):
    """The gateway closed the connection for good. `close_code` says why."""

    def __init__(self, text: str, code: CloseCode) -> None:
        self.close_code = code
        super().__init__(text)


# --- data plane --------------------------------------------------------------------------------


class PeerError(AIConexusError):
    """Trouble between this agent and another.

    Attributes:
        did: Of the other.
    """

    temporary = True

    def __init__(self, text: str, did: str = "") -> None:
        self.did = did
        super().__init__(text)


class PeerConnectError(PeerError):
    """No DataChannel could be opened."""


class PeerIdentityError(PeerError):
    """The other end is not who it should be: a message that it did not sign, or altered on its way."""

    temporary = False


class PeerLostError(PeerError):
    """The DataChannel went away under a running call; whether it finished is not known. Connect again."""


class CallError(AIConexusError):
    """An execution that did not succeed.

    Attributes:
        name: The cause as it travels in `ext.error.name` of an EXEC_RESPONSE.
        temporary: As for all; nothing was executed then.
        capability: What was called.
    """

    name: ClassVar[str] = "error"

    def __init__(self, text: str, capability: str = "") -> None:
        self.capability = capability
        super().__init__(text)


class UnknownCapabilityError(CallError):
    """The agent has no such capability."""

    name = "unknown_capability"


class InvalidArgumentsError(CallError):
    """The arguments do not fit the capability's JSON Schema."""

    name = "invalid_arguments"


class CapabilityError(CallError):
    """The capability raised an exception."""

    name = "capability_error"


class CallBusyError(CallError):
    """The other agent takes no more calls at present; nothing was executed. Try again later."""

    name = "busy"
    temporary = True


class CallTimeoutError(CallError, TimeoutError):
    """No result before the deadline."""

    name = "timeout"


class CallCancelledError(CallError):
    """The execution was cancelled at the other end."""

    name = "cancelled"


def remote_error(code: ErrorCode, text: str, details: dict[str, Any] | None = None) -> RemoteError:
    """Choose the RemoteError class for an ERROR that arrived."""
    kinds: dict[ErrorCode, type[RemoteError]] = {
        ErrorCode.UNKNOWN_AGENT: UnknownAgentError,
        ErrorCode.CONNECTION_REFUSED: PeerRefusedError,
        ErrorCode.TIMEOUT: RemoteTimeoutError,
    }
    return kinds.get(code, RemoteError)(code, text, details)
