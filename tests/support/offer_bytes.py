"""OFFERs of A to B as bytes, for tests that look no further than their envelopes."""

from __future__ import annotations

import json

from aiconexus.protocol import DIDKey

A, B = (DIDKey.from_seed(letter * 32).did for letter in (b"a", b"b"))


def name(number: int) -> str:
    """Return the id of an OFFER."""
    return f"{number:08x}-0000-4000-8000-000000000000"


def message(number: int, size: int = 0) -> bytes:
    """Return an OFFER with an SDP of so many bytes."""
    return json.dumps(
        {
            "id": name(number),
            "timestamp": "2026-01-12T10:00:00Z",
            "from": A,
            "to": B,
            "type": "OFFER",
            "payload": {"sdp": "x" * size},
            "version": "1.0",
        }
    ).encode()
