"""The text of an identity: an Ed25519 public key as W3C `did:key`."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import base58

from aiconexus.protocol.errors import (
    DIDAlphabetError,
    DIDCanonicalError,
    DIDCodecError,
    DIDLengthError,
    DIDMethodError,
    DIDMultibaseError,
    DIDTypeError,
)

DID_PREFIX: Final = "did:key:"
DID_LENGTH: Final = 56  # "did:key:" + "z" + 47 characters for 34 bytes that begin with 0xed
_ED25519_CODEC: Final = b"\xed\x01"  # multicodec ed25519-pub, 0xed as an unsigned varint
_ALPHABET: Final = frozenset(base58.BITCOIN_ALPHABET.decode())


def encode_did(public_key: bytes) -> str:
    """Write an Ed25519 public key of 32 bytes as a did:key."""
    if len(public_key) != 32:
        raise ValueError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    return DID_PREFIX + "z" + base58.b58encode(_ED25519_CODEC + public_key).decode()


@lru_cache(maxsize=4096)
def _decode_did(text: str) -> bytes:
    if not text.startswith(DID_PREFIX):
        raise DIDMethodError("not a did:key", text)
    identifier = text[len(DID_PREFIX) :]
    if not identifier.startswith("z"):
        raise DIDMultibaseError("the key is not base58btc (multibase z)", text)
    if len(text) > DID_LENGTH and text[DID_LENGTH] in "#?/;":
        raise DIDCanonicalError(f"a DID URL; the DID is its first {DID_LENGTH} characters", text)
    if len(text) != DID_LENGTH:
        raise DIDLengthError(f"an Ed25519 did:key has {DID_LENGTH} characters, this has {len(text)}", text)
    if not _ALPHABET.issuperset(identifier):
        raise DIDAlphabetError("a character that base58btc does not have", text)
    decoded = base58.b58decode(identifier[1:])
    if decoded[:2] != _ED25519_CODEC:
        raise DIDCodecError("not an Ed25519 key (multicodec 0xed 0x01)", text)
    key = decoded[2:]
    if len(key) != 32 or encode_did(key) != text:
        raise DIDCanonicalError("not the canonical form of its key", text)
    return key


def decode_did(text: str) -> bytes:
    """Return the 32 bytes of the Ed25519 public key in a did:key.

    Strict: 56 characters that encoding the key gives again, without path, query or fragment.

    Raises:
        DIDError: A subclass for each way to be wrong.
    """
    if not isinstance(text, str):
        raise DIDTypeError("a DID is a string", text)
    return _decode_did(text)
