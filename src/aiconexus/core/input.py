"""A stream of bytes among the arguments of an execution, as the capability reads it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

from aiconexus.protocol.errors import InvalidArgumentsError


class BrokenInputError(InvalidArgumentsError):
    """What came of the stream is not what was sent: the caller's fault, not the capability's."""


class Input(AsyncIterator[bytes]):
    """The bytes that a caller sends while the capability runs; whoever reads slowly slows the caller down.

    Args:
        taken: Called when the next bytes were taken.
        ended: Called when all of them were, up to the end.
    """

    def __init__(self, taken: Callable[[], None], ended: Callable[[], None]) -> None:
        self._taken: Final = taken
        self._ended: Final = ended
        self._chunks: deque[bytes] = deque()
        self._end: str | None = None
        self._arrived: asyncio.Future[None] | None = None  # while somebody waits

    def add(self, chunk: bytes) -> None:
        """Take the next bytes from the connection."""
        self._chunks.append(chunk)
        self._wake()

    def end(self, fault: str = "") -> None:
        """Expect nothing more: it is complete, or not to be had (`fault`)."""
        if self._end is None:
            self._end = fault
            self._wake()

    async def __anext__(self) -> bytes:
        """Return the next bytes.

        Raises:
            BrokenInputError: What came is not what was sent.
        """
        while not self._chunks and self._end is None:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        if self._chunks:
            chunk = self._chunks.popleft()
            self._taken()
            return chunk
        if self._end:
            raise BrokenInputError(self._end)
        self._ended()
        raise StopAsyncIteration

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


async def whole(data: bytes) -> AsyncIterator[bytes]:
    """Return bytes that came as a whole as a stream, for a capability that wants one."""
    yield data
