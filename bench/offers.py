"""The message that the relay benchmark sends: a signed OFFER of exactly 600 bytes."""

from __future__ import annotations

from functools import cache

from aiconexus.protocol import DIDKey, Message, OfferPayload, encode, sign_message
from bench.load import Template

MESSAGE_BYTES = 600  # an OFFER without candidates; those follow by trickle ICE (RFC 8838)

_SDP = (
    "v=0\r\no=- 1 2 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n"
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n"
    "a=ice-ufrag:EsAw\r\na=ice-pwd:{password}\r\n"
)


@cache  # every round and server sends the same
def offer(sender: DIDKey, target: DIDKey) -> Template:
    """Build an OFFER whose `id` begins with eight hex digits for the sequence number.

    Its signature is real when it is built. The load client then counts in its `id`; nobody notices, for
    the gateway leaves signatures to the receiver.
    """
    shortest = _encode(sender, target, "")
    # ice-pwd may have up to 256 characters (RFC 8839 section 5.4): it brings every offer to its size.
    payload = _encode(sender, target, "p" * (MESSAGE_BYTES - len(shortest)))
    return Template(payload, payload.index(b'"id":"') + len(b'"id":"'))


def _encode(sender: DIDKey, target: DIDKey, password: str) -> bytes:
    message = Message.create(sender.did, target.did, OfferPayload(sdp=_SDP.format(password=password)))
    return encode(sign_message(message, sender))
