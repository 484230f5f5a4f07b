from __future__ import annotations

import pytest

from aiconexus.core.collection import PARTS_MAX, Collection
from aiconexus.protocol.errors import CapabilityError
from aiconexus.protocol.limits import ATTACHMENTS_MAX_BYTES


def test_parts_are_joined() -> None:
    collection = Collection()
    assert collection.join() == []
    collection.add(b"one")
    collection.add(b"two")
    assert collection.join() == b"onetwo"
    collection.add({"three": 3})
    assert collection.join() == [b"one", b"two", {"three": 3}]


def test_parts_have_a_largest_number() -> None:
    collection = Collection()
    for _ in range(PARTS_MAX):
        collection.add(0)
    with pytest.raises(CapabilityError, match="ask for them with `stream`"):
        collection.add(0)


def test_parts_have_a_largest_size() -> None:
    collection = Collection()
    half = bytes(ATTACHMENTS_MAX_BYTES // 2)
    collection.add(half)
    collection.add(half)
    collection.add(b"")
    with pytest.raises(CapabilityError, match=f"more than .* or {ATTACHMENTS_MAX_BYTES} bytes"):
        collection.add([""])
