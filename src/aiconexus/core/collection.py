"""The parts of a result, put together for a caller who wants no stream."""

from __future__ import annotations

from typing import Final

from aiconexus.core.detach import size_of
from aiconexus.protocol.attachments import Value, join_parts
from aiconexus.protocol.errors import CapabilityError
from aiconexus.protocol.limits import ATTACHMENTS_MAX_BYTES

PARTS_MAX: Final = 65_536  # small ones cost more memory than their bytes


class Collection:
    """The parts so far, as long as they fit into memory: either side may stream without an end.

    Attributes:
        size: Their bytes.
    """

    def __init__(self) -> None:
        self._parts: list[Value] = []
        self.size = 0

    def add(self, part: Value) -> None:
        """Take the next part.

        Raises:
            CapabilityError: They are too many, or too large.
        """
        self._parts.append(part)
        self.size += size_of(part)
        if len(self._parts) > PARTS_MAX or self.size > ATTACHMENTS_MAX_BYTES:
            text = f"more than {PARTS_MAX} parts or {ATTACHMENTS_MAX_BYTES} bytes: ask for them with `stream`"
            raise CapabilityError(text)

    def join(self) -> Value:
        """Return all of them as one value: bytes if all are bytes, else a list."""
        return join_parts(self._parts)
