"""Cards: what an agent says of itself, signed, so that it is true whoever hands it on.

A gateway keeps cards and gives them to whoever asks; it cannot change one. A card is signed like an envelope,
over RFC 8785 canonical bytes without `signature`. Its `type` is no type of a message, so neither can pass for
the other.
"""

from __future__ import annotations

import binascii
import time
from base64 import b64decode, b64encode
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from aiconexus.protocol.did import decode_did
from aiconexus.protocol.errors import InvalidSignatureError, MalformedMessageError
from aiconexus.protocol.limits import CAPABILITIES_MAX, CAPABILITIES_MAX_BYTES, INTEGER_MAX
from aiconexus.protocol.models import Capability
from aiconexus.protocol.security import DIDKey, verify_signature
from aiconexus.protocol.serialization import canonicalize

CARD_TYPE: Final = "CARD"


class Card(BaseModel):
    """What an agent can do. `issued_at` is in ms since the epoch, by the agent's clock."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    type: Literal["CARD"]
    did: str
    issued_at: int = Field(ge=0, le=INTEGER_MAX)
    capabilities: list[Capability] = Field(max_length=CAPABILITIES_MAX)
    signature: str


def sign_card(
    capabilities: list[JsonValue], key: DIDKey, issued_at: int | None = None
) -> dict[str, JsonValue]:
    """Return the card of the key's agent.

    Args:
        capabilities: JSON of `Capability` objects.
        key: Of the agent.
        issued_at: Milliseconds since the epoch; now if None.
    """
    card: dict[str, JsonValue] = {
        "type": CARD_TYPE,
        "did": key.did,
        "issued_at": round(time.time() * 1000) if issued_at is None else issued_at,
        "capabilities": capabilities,
    }
    card["signature"] = b64encode(key.sign(canonicalize(card))).decode()
    return card


def read_card(value: object, did: str, *, field: str = "card") -> Card:
    """Check everything about a card but its signature.

    Args:
        value: Parsed JSON.
        did: The agent whose card it must be.
        field: What the text of an error calls it.

    Raises:
        MalformedMessageError: It is no card, or not that of `did`; `field` says where.
    """
    try:
        card = Card.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join((field, *map(str, first["loc"])))
        raise MalformedMessageError(f"{where}: {first['msg']}", name="invalid_ext", field=where) from None
    if card.did != did:
        raise MalformedMessageError(
            f"{field}.did is {card.did}, not {did}", name="invalid_ext", field=f"{field}.did"
        )
    names = {capability.name for capability in card.capabilities}
    where = f"{field}.capabilities"
    if len(names) != len(card.capabilities):
        raise MalformedMessageError(f"{where} names one twice", name="invalid_ext", field=where)
    assert isinstance(value, dict)
    size = len(canonicalize(value["capabilities"]))
    if size > CAPABILITIES_MAX_BYTES:
        raise MalformedMessageError(
            f"{where} has {size} bytes; at most {CAPABILITIES_MAX_BYTES} are kept",
            name="invalid_ext",
            field=where,
        )
    return card


def verify_card(value: object, did: str) -> Card:
    """Check a card that somebody handed on: that the agent `did` has signed it just so.

    It may be an old one: `issued_at` tells.

    Raises:
        MalformedMessageError: It is no card, or not that of `did`.
        InvalidSignatureError: It was not signed by `did`.
        DIDError: `did` holds no key.
    """
    decode_did(did)
    card = read_card(value, did)
    assert isinstance(value, dict)
    signed: dict[str, Any] = {name: item for name, item in value.items() if name != "signature"}
    try:
        signature = b64decode(card.signature, validate=True)
    except (binascii.Error, ValueError):
        signature = b""
    if len(signature) != 64 or not verify_signature(did, canonicalize(signed), signature):
        raise InvalidSignatureError(f"the card of {did} was not signed by it", field="signature")
    return card
