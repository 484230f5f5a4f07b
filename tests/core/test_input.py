from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from aiconexus.core.input import PIECE_MAX_BYTES, BrokenInputError, Input


class Reading:
    """An Input, and what it has told."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.ended = 0
        self.stream = Input(self.taken.append, self.end)

    def end(self) -> None:
        self.ended += 1


async def test_what_has_come_is_read_in_order_and_told() -> None:
    reading = Reading()
    reading.stream.add(b"ab")
    reading.stream.add(b"c")
    assert await anext(reading.stream) == b"abc"
    reading.stream.add(bytes(PIECE_MAX_BYTES) + b"d")
    reading.stream.end()
    assert not reading.ended
    assert [piece async for piece in reading.stream] == [bytes(PIECE_MAX_BYTES), b"d"]
    assert reading.taken == [3, PIECE_MAX_BYTES, 1]
    assert reading.ended == 1


async def test_reader_waits_for_what_comes() -> None:
    reading = Reading()
    waiting = asyncio.ensure_future(anext(reading.stream))
    await asyncio.sleep(0)
    reading.stream.add(b"a")
    assert await asyncio.wait_for(waiting, 10) == b"a"
    waiting = asyncio.ensure_future(anext(reading.stream))
    await asyncio.sleep(0)
    reading.stream.end()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(waiting, 10)


async def test_fault_comes_after_what_has_come_before_it() -> None:
    reading = Reading()
    reading.stream.add(b"a")
    reading.stream.end("it was altered")
    reading.stream.end()  # the first one counts
    assert await anext(reading.stream) == b"a"
    with pytest.raises(BrokenInputError, match="it was altered"):
        await anext(reading.stream)
    assert not reading.ended


def test_tiny_frames_cost_no_more_memory_than_large_ones() -> None:
    reading = Reading()
    tracemalloc.start()
    try:
        for _ in range(100_000):
            reading.stream.add(b"ab")
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 400_000
