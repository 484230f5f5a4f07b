"""The server-first REGISTER handshake as the agent sees it, without I/O.

Three messages: the gateway's REGISTER with a nonce, ours that signs this nonce together with the URL that
was dialled, and its answer. Nothing is believed for where it came from: each message must prove its key.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from pydantic import JsonValue, ValidationError

from aiconexus.protocol import (
    Capability,
    DIDKey,
    ErrorPayload,
    MalformedMessageError,
    Message,
    MessageError,
    RegisterPayload,
    ReplayGuard,
    canonicalize,
    decode,
    sign_message,
    verify_message,
)
from aiconexus.protocol.cards import sign_card
from aiconexus.protocol.errors import (
    GatewayIdentityError,
    RegistrationError,
    StaleMessageError,
    remote_error,
)
from aiconexus.protocol.limits import CAPABILITIES_MAX, CAPABILITIES_MAX_BYTES, REGISTER_CLOCK_SKEW_SECONDS

# Of a URL, or of what should be one: userinfo and query.
_SECRETS = re.compile(r"(?<=//)[^?]*@|^[^/?]*@|\?.*", re.DOTALL)
_RESUME_TOKEN_MAX = 512  # characters; a longer one would not leave room for our REGISTER

CapabilityLike: TypeAlias = Capability | str | dict[str, Any]


@dataclass(frozen=True)
class Session:
    """What the gateway granted with its answer to REGISTER.

    Attributes:
        id: For people and logs.
        resumed: Whether this continues the session before a drop. If so, what came for this agent in between
            follows; if not, senders were told, and whoever watches presence must ask again.
        ice_servers: STUN and TURN servers, as WebRTC's `RTCIceServer` dictionaries. The client gets new ones
            before they expire.
        ice_servers_ttl: How long they could be used when they came, in seconds; None if for ever.
        gateway_did: The DID that the gateway has proven.
        features: What this gateway can do beside routing.
        limits: What it announced: `message_max_bytes`; `message_rate` and `message_burst`, how many messages
            this agent may send per second and at once (rate 0: any number); and others.
    """

    id: str
    resumed: bool
    ice_servers: list[dict[str, Any]]
    ice_servers_ttl: float | None
    gateway_did: str
    features: tuple[str, ...]
    limits: dict[str, Any]


@dataclass(frozen=True)
class Resume:
    """What resumes a session: a secret between this agent and the gateway that issued it."""

    gateway_did: str
    token: str


@dataclass(frozen=True)
class Challenge:
    """The gateway's first message: its proven DID, and the nonce that the agent must sign."""

    gateway_did: str
    nonce: str
    features: tuple[str, ...]
    limits: dict[str, Any]


def audience(url: str) -> str:
    """Return `url` as `ext.aud` names it: without userinfo, query and fragment.

    Raises:
        ValueError: It is not a WebSocket URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        form = "ws://host:port/ws or wss://host/ws"
        raise ValueError(f"the gateway's URL must look like {form}, not {_SECRETS.sub('', url)!r}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@dataclass(frozen=True)
class Shown:
    """What others may see of an agent: its card, if it has one; hidden: only if they know its DID."""

    card: dict[str, JsonValue] | None = None
    hidden: bool = False

    def ext(self) -> dict[str, JsonValue]:
        """Return what of it stands in `ext` of REGISTER."""
        ext: dict[str, JsonValue] = {}
        if self.card is not None:
            ext["card"] = self.card
        if self.hidden:
            ext["hidden"] = True
        return ext


def show(capabilities: Iterable[CapabilityLike], key: DIDKey, *, hidden: bool = False) -> Shown:
    """Return what others may see of an agent with these capabilities; with none, it has no card.

    Raises:
        MalformedMessageError: They do not fit on a card.
    """
    described = describe(capabilities)
    return Shown(sign_card(described, key) if described else None, hidden)


def describe(capabilities: Iterable[CapabilityLike]) -> list[JsonValue]:
    """Return what stands of them on a card; a string is a capability that has a name only.

    Raises:
        MalformedMessageError: One of them does not fit the model, or they are too many or too large.
    """
    field = "ext.card.capabilities"
    described: list[JsonValue] = []
    for index, item in enumerate(capabilities):
        try:
            model = Capability.model_validate({"name": item} if isinstance(item, str) else item)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            path = ".".join((field, str(index), *map(str, first["loc"])))
            raise MalformedMessageError(f"{path}: {first['msg']}", name="invalid_ext", field=path) from None
        described.append(model.model_dump(mode="json", exclude_defaults=True))
    size = len(canonicalize(described))
    if len(described) > CAPABILITIES_MAX or size > CAPABILITIES_MAX_BYTES:
        raise MalformedMessageError(
            f"{len(described)} capabilities of together {size} bytes; a gateway takes at most "
            f"{CAPABILITIES_MAX} and {CAPABILITIES_MAX_BYTES} bytes: shorten descriptions and schemas",
            name="invalid_ext",
            field=field,
        )
    return described


def read_challenge(data: bytes | str, expected_did: str | None = None, now: float | None = None) -> Challenge:
    """Check the gateway's first message.

    Args:
        data: As it arrived.
        expected_did: The DID that the gateway must prove; any if None.
        now: Seconds since the epoch; the system's clock if None.

    Raises:
        RegistrationError: It is an ERROR: the gateway takes no agents now.
        GatewayIdentityError: It proves no key, not the expected one, or was not made just now.
    """
    now = time.time() if now is None else now
    try:
        message = decode(data)
        _raise_error(message)
        did = expected_did or message.from_
        if message.from_ != did:
            raise GatewayIdentityError(
                f"this gateway is {message.from_}, not {did}: another one answers at this address, "
                "or it has a new key; ask its operator before you change gateway_did"
            )
        gap = message.timestamp.timestamp() - now
        guard = ReplayGuard(window=REGISTER_CLOCK_SKEW_SECONDS)
        message = verify_message(data, recipient=did, sender=did, guard=guard, now=now)
    except StaleMessageError:
        raise GatewayIdentityError(
            f"the gateway's clock is {abs(gap):.0f} s {'ahead of' if gap > 0 else 'behind'} the clock here; "
            f"at most {REGISTER_CLOCK_SKEW_SECONDS:.0f} s are accepted: set the clock of this machine"
        ) from None
    except MessageError as error:
        raise GatewayIdentityError(f"the gateway's first message does not prove its key: {error}") from error
    nonce = message.ext.get("nonce")
    if not isinstance(message.payload, RegisterPayload) or not isinstance(nonce, str):
        raise GatewayIdentityError(
            f"the gateway's first message is {message.type.value}, not a REGISTER with a nonce: "
            "does this URL lead to a gateway?"
        )
    if "did:key:" + message.payload.public_key != did:
        raise GatewayIdentityError("the public_key in the gateway's REGISTER is not the key in its DID")
    features, limits = message.ext.get("features"), message.ext.get("limits")
    return Challenge(
        gateway_did=did,
        nonce=nonce,
        features=tuple(str(name) for name in features) if isinstance(features, list) else (),
        limits=dict(limits) if isinstance(limits, dict) else {},
    )


def answer_challenge(
    key: DIDKey, challenge: Challenge, aud: str, shown: Shown, resume: Resume | None
) -> Message:
    """Return our signed REGISTER; see `audience`, `show`. `resume` is of the last session.

    Nonce and audience are signed together: a fake gateway that passes the proof on to the real one is
    refused there, for the agent dialled another URL. A gateway with another DID than the last one gets no
    token: it has not issued it.

    Raises:
        RegistrationError: This gateway takes fewer capabilities.
    """
    check_limits(shown, challenge.limits)
    ext: dict[str, JsonValue] = {"nonce": challenge.nonce, "aud": aud, **shown.ext()}
    if resume is not None and resume.gateway_did == challenge.gateway_did:
        ext["resume"] = resume.token
    payload = RegisterPayload(public_key=key.public_key_base58)
    return sign_message(Message.create(key.did, challenge.gateway_did, payload, ext=ext), key)


def read_answer(
    data: bytes | str, request: Message, challenge: Challenge, guard: ReplayGuard
) -> tuple[Session, Resume | None]:
    """Check the gateway's answer to our REGISTER `request`; return the session and what resumes it.

    Raises:
        RegistrationError: It refused, or its answer holds no session.
        GatewayIdentityError: The answer does not prove the key of the challenge.
    """
    try:
        _raise_error(decode(data))
        message = verify_message(data, recipient=request.from_, sender=challenge.gateway_did, guard=guard)
    except MessageError as error:
        raise GatewayIdentityError(
            f"the gateway's answer to REGISTER does not prove its key: {error}"
        ) from error
    session, token = message.ext.get("session"), message.ext.get("resume_token")
    if (
        not isinstance(message.payload, RegisterPayload)
        or message.correlation_id != request.id
        or not isinstance(session, str)
    ):
        raise RegistrationError("the gateway did not answer our REGISTER with a session")
    granted = Session(
        id=session,
        resumed=message.ext.get("resumed") is True,
        **read_ice_servers(message),
        gateway_did=challenge.gateway_did,
        features=challenge.features,
        limits=challenge.limits,
    )
    if isinstance(token, str) and len(token) <= _RESUME_TOKEN_MAX:
        return granted, Resume(challenge.gateway_did, token)
    return granted, None


def read_ice_servers(answer: Message) -> dict[str, Any]:
    """Return the fields of a Session that every answer to REGISTER renews."""
    servers, ttl_ms = answer.ext.get("ice_servers"), answer.ext.get("ice_servers_ttl_ms")
    return {
        "ice_servers": [dict(server) for server in servers if isinstance(server, dict)]
        if isinstance(servers, list)
        else [],
        "ice_servers_ttl": ttl_ms / 1e3 if type(ttl_ms) is int and ttl_ms > 0 else None,
    }


def check_limits(shown: Shown, limits: dict[str, Any]) -> None:
    """Refuse what the gateway has announced that it will refuse.

    Raises:
        RegistrationError: This gateway takes fewer capabilities.
    """
    capabilities = shown.card["capabilities"] if shown.card is not None else []
    assert isinstance(capabilities, list)
    for name, found, unit in (
        ("capabilities_max", len(capabilities), "capabilities"),
        ("capabilities_max_bytes", len(canonicalize(capabilities)), "bytes of capabilities"),
    ):
        most = limits.get(name)
        if type(most) is int and found > most:
            raise RegistrationError(
                f"this gateway takes at most {most} {unit}, these are {found}: announce fewer, or shorten "
                "descriptions and schemas"
            )


def _raise_error(message: Message) -> None:
    """Raise the ERROR that came instead.

    It carries no signature, and needs none: who could forge it could also cut the connection.
    """
    if isinstance(message.payload, ErrorPayload):
        details = message.payload.details.model_dump(exclude_none=True) if message.payload.details else {}
        text = message.payload.message
        raise RegistrationError(
            f"the gateway refused to register this agent: {text}",
            remote_error(message.payload.code, text, details),
        )
