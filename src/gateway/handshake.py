"""The server-first REGISTER handshake, without I/O: what to send, and whether the answer proves a DID."""

from __future__ import annotations

import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from aiconexus.protocol import (
    DIDKey,
    InvalidSignatureError,
    MalformedMessageError,
    Message,
    RegisterPayload,
    sign_message,
    verify_envelope,
)
from aiconexus.protocol.cards import read_card
from aiconexus.protocol.errors import StaleMessageError, WrongRecipientError
from aiconexus.protocol.limits import (
    AWAY_MAX_BYTES,
    AWAY_MAX_MESSAGES,
    CAPABILITIES_MAX,
    CAPABILITIES_MAX_BYTES,
    MESSAGE_MAX_BYTES,
    NONCE_BYTES,
    REGISTER_CLOCK_SKEW_SECONDS,
)
from aiconexus.protocol.serialization import loads, parse
from gateway.directory import Offer
from gateway.ice import IceServers
from gateway.registry import Shown
from gateway.urls import parse_url


@dataclass(frozen=True, slots=True)
class Handshake:
    """What a connection must remember until its REGISTER: `timeout` is in seconds."""

    nonce: str
    host: str
    timeout: float


@dataclass(frozen=True, slots=True)
class Registration:
    """A proven REGISTER."""

    message: Message
    shown: Shown
    resume_token: str | None

    @property
    def did(self) -> str:
        """The DID that was proven."""
        return self.message.from_


def _token() -> str:
    return urlsafe_b64encode(secrets.token_bytes(NONCE_BYTES)).rstrip(b"=").decode()


def read_shown(message: Message) -> Shown:
    """Return what others may see of the agent that sent a REGISTER.

    Its card is kept as it is, and its signature not checked: that is for those who get it, who trust no
    gateway, and costs as much as all the rest of a registration.

    Raises:
        MalformedMessageError: The card is none, or not the sender's.
    """
    hidden = message.ext.get("hidden", False)
    if not isinstance(hidden, bool):
        raise MalformedMessageError("ext.hidden is not a boolean", name="invalid_ext", field="ext.hidden")
    value = message.ext.get("card")
    if value is None:
        return Shown(hidden=hidden)
    card = read_card(value, message.from_, field="ext.card")
    return Shown(orjson.dumps(value), tuple(Offer.of(each) for each in card.capabilities), hidden)


class Registrar:
    """Makes nonces and checks proofs for one gateway.

    Args:
        key: The gateway's identity.
        public_urls: The URLs under which agents may dial; where there are none, the audience's host and
            port must be those of the request's `Host`.
        register_timeout: Seconds from the 101 response to a complete REGISTER.
        ping_interval: Announced, in seconds.
        away: How long a dropped session is kept, in seconds.
        message_rate: Messages per second that one session may send; 0 for no limit. Announced.
        message_burst: How many of them at once.
        ice: STUN and TURN servers, which agents are told.
        worker: The number of the worker, for people and benchmarks.
    """

    def __init__(
        self,
        key: DIDKey,
        *,
        public_urls: Sequence[str] = (),
        register_timeout: float,
        ping_interval: float,
        away: float,
        message_rate: int,
        message_burst: int,
        ice: IceServers | None = None,
        worker: int = 0,
    ) -> None:
        self._worker = worker
        self.key = key
        self.did = key.did
        self._audiences = {parse_url(url) for url in public_urls}
        self._timeout = register_timeout
        self._ice = ice if ice is not None else IceServers()
        self._ping_interval_ms = round(ping_interval * 1000)
        self._limits: dict[str, Any] = {
            "message_max_bytes": MESSAGE_MAX_BYTES,
            "message_rate": message_rate,
            "message_burst": message_burst,
            "capabilities_max": CAPABILITIES_MAX,
            "capabilities_max_bytes": CAPABILITIES_MAX_BYTES,
            "away_ms": round(away * 1000),
            "away_max_messages": AWAY_MAX_MESSAGES,
            "away_max_bytes": AWAY_MAX_BYTES,
            "register_timeout_ms": round(register_timeout * 1000),
        }

    def begin(self, host: str) -> tuple[Handshake, bytes]:
        """Return the state of a new connection that asked for `host`, and the REGISTER to send it."""
        handshake = Handshake(nonce=_token(), host=host, timeout=self._timeout)
        message = Message.create(
            self.did,
            self.did,  # the agent is not known yet
            RegisterPayload(public_key=self.key.public_key_base58),
            ext={
                "nonce": handshake.nonce,
                "features": ["resume", "discover"],
                "limits": self._limits,
                "ping_interval_ms": self._ping_interval_ms,
                "time": round(time.time() * 1000),
            },
        )
        return handshake, self._sign(message)

    def check(self, handshake: Handshake, data: bytes) -> Registration:
        """Check the first message of a connection.

        The cheap checks come first: a stranger costs one Ed25519 verification at most.

        Raises:
            MessageError: It does not prove the DID in `from`; holds the ERROR to answer.
            DIDError: `from` is no canonical DID.
        """
        envelope = loads(data)
        message = parse(envelope, data)
        try:
            if not isinstance(message.payload, RegisterPayload):
                raise MalformedMessageError(
                    f"the first message must be REGISTER, not {message.type.value}",
                    name="unexpected_type",
                    field="type",
                )
            shown = read_shown(message)
            resume_token = message.ext.get("resume")
            if resume_token is not None and not isinstance(resume_token, str):
                raise MalformedMessageError(
                    "ext.resume is not a string", name="invalid_ext", field="ext.resume"
                )
            if message.to != self.did:
                raise WrongRecipientError(f"to is not this gateway, {self.did}", field="to")
            if "did:key:" + message.payload.public_key != message.from_:
                raise InvalidSignatureError(name="wrong_key", field="payload.public_key")
            nonce = message.ext.get("nonce")
            if not isinstance(nonce, str) or not secrets.compare_digest(
                nonce.encode(), handshake.nonce.encode()
            ):
                raise InvalidSignatureError(name="wrong_nonce", field="ext.nonce")
            self._check_audience(message.ext.get("aud"), handshake.host)
            late = time.time() - message.timestamp.timestamp()
            if abs(late) > REGISTER_CLOCK_SKEW_SECONDS:
                where = "behind" if late > 0 else "ahead of"
                raise StaleMessageError(
                    f"the timestamp is {abs(late):.0f} s {where} the time here; "
                    f"at most {REGISTER_CLOCK_SKEW_SECONDS:.0f} s are accepted: check the clock",
                    field="timestamp",
                )
            verify_envelope(envelope)
        except (MalformedMessageError, InvalidSignatureError) as error:
            error.message_id = message.id
            raise
        return Registration(message, shown, resume_token)

    def accept(self, registration: Registration, *, session: str, resume_token: str, resumed: bool) -> bytes:
        """Return the answer to a REGISTER that was accepted."""
        return self._sign(
            registration.message.reply(
                RegisterPayload(public_key=self.key.public_key_base58),
                ext={
                    "session": session,
                    "worker": self._worker,
                    "resume_token": resume_token,
                    **self._ice.ext(registration.did),
                    "resumed": resumed,
                },
            )
        )

    def note(self, message: Message) -> bytes:
        """Return the answer to a REGISTER on a session: new credentials, and others see the new card."""
        payload = RegisterPayload(public_key=self.key.public_key_base58)
        return self._sign(message.reply(payload, ext=self._ice.ext(message.from_)))

    @staticmethod
    def new_resume_token() -> str:
        """Return a token that cannot be guessed, for one resume."""
        return _token()

    def _sign(self, message: Message) -> bytes:
        wire = sign_message(message, self.key).wire
        assert wire is not None
        return wire

    def _check_audience(self, audience: object, host: str) -> None:
        """The signature covers the URL that the agent dialled, so that nobody can pass the proof on."""
        try:
            url = parse_url(audience if isinstance(audience, str) else "")
            if self._audiences:
                matches = url in self._audiences
            else:
                # `Host` leaves the default port out; which one that is the dialled scheme tells.
                scheme, *dialled, _ = url
                _, *asked, path = parse_url(f"{scheme}://{host}")
                matches = dialled == asked and not path and "?" not in host
        except ValueError:
            matches = False
        if not matches:
            shown = str(audience)[:120]
            raise InvalidSignatureError(
                f"ext.aud {shown!r} is not an address of this gateway", name="wrong_audience", field="ext.aud"
            )
