"""Streams, attachments and progress between two connected agents, over a real DataChannel on 127.0.0.1."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from switchboard import Switchboard, Workshop

from aiconexus.core import Peer, collection, current_call
from aiconexus.core import capability as as_capability
from aiconexus.core.call import time_left
from aiconexus.protocol import Receipt
from aiconexus.protocol.errors import (
    CallCancelledError,
    CallTimeoutError,
    CapabilityError,
    InvalidArgumentsError,
    MalformedMessageError,
    PeerIdentityError,
    PeerLostError,
)
from aiconexus.protocol.limits import CALL_WINDOW_BYTES, CHUNK_MAX_BYTES, INLINE_MAX_BYTES

Pair = tuple[Workshop, Workshop]


@pytest.fixture
async def peer(pair: Pair) -> AsyncIterator[Peer]:
    """The second agent, as the first sees it."""
    async with pair[0].connect(pair[1].did) as peer:
        yield peer


async def collected(parts: AsyncIterator[Any]) -> list[Any]:
    return [part async for part in parts]


async def test_what_is_no_question_is_refused_before_it_is_asked(peer: Peer) -> None:
    wrong: Any = peer  # for the type checker
    with pytest.raises(TypeError, match="arguments go by name: 'add' takes no positional ones"):
        await wrong.execute("add", 1, 2)
    with pytest.raises(TypeError, match="arguments go by name"):
        await collected(wrong.stream("numbers", 3))
    for asked in (
        wrong.execute("add", a=1, timeout="5"),
        wrong.intent("Hello?", timeout="5"),
        wrong.ping(timeout="5"),
        collected(wrong.stream("numbers", until=1, timeout="5")),
    ):
        with pytest.raises(TypeError, match="timeout is in seconds, a number, not '5'"):
            await asked
    for asked in (wrong.intent({"task": "add"}), wrong.intent(task=["add"])):
        with pytest.raises(TypeError, match="query and task are texts"):
            await asked
    with pytest.raises(TypeError, match="params is a dict, not list"):
        await wrong.intent(task="add", params=[1, 2])
    with pytest.raises(MalformedMessageError, match=r"^the intent has no JSON form: context, params$"):
        await wrong.intent(task="add", params={"a": object()}, context=object())


async def test_progress_without_json_form_is_said_once(pair: Pair, peer: Peer) -> None:
    class Vague(Workshop):
        @as_capability
        async def tell(self) -> None:
            current_call().progress(object())

    async with Vague(pair[0]._switchboard) as vague, pair[0].connect(vague.did) as there:
        with pytest.raises(CapabilityError, match=r"^the progress has no JSON form"):
            await there.execute("tell", on_progress=print)


# --- streams -----------------------------------------------------------------------------------


async def test_parts_come_in_order_and_end(peer: Peer) -> None:
    assert await collected(peer.stream("numbers", until=100)) == list(range(100))
    assert await collected(peer.stream("numbers", until=0)) == []


async def test_parts_may_be_bytes_of_any_size(peer: Peer) -> None:
    parts = await collected(peer.stream("blocks", count=3, size=2 * CALL_WINDOW_BYTES + 1))
    assert [(part[:1], len(part)) for part in parts] == [
        (bytes([number]), 2 * CALL_WINDOW_BYTES + 1) for number in range(3)
    ]


async def test_capability_that_does_not_stream_yields_its_result(peer: Peer) -> None:
    assert await collected(peer.stream("add", a=1, b=2)) == [3]


async def test_parts_are_collected_for_who_executes(peer: Peer) -> None:
    seen: list[Any] = []
    assert await peer.execute("numbers", until=5) == [0, 1, 2, 3, 4]
    assert await peer.execute("numbers", until=5, on_progress=seen.append) == [0, 1, 2, 3, 4]
    assert await peer.execute("blocks", count=3, size=4) == bytes([0] * 4 + [1] * 4 + [2] * 4)


@pytest.mark.parametrize("wants_progress", [False, True])  # they are collected there, or here
async def test_result_without_end_is_not_collected(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch, wants_progress: bool
) -> None:
    monkeypatch.setattr(collection, "ATTACHMENTS_MAX_BYTES", 1_000_000)
    on_progress = (lambda _: None) if wants_progress else None
    with pytest.raises(CapabilityError, match="1000000 bytes: ask for them with `stream`"):
        await peer.execute("blocks", count=10**9, size=100_000, on_progress=on_progress)
    there = pair[1].peers[pair[0].did]
    await asyncio.wait_for(asyncio.gather(*there._serving), 10)
    assert await peer.execute("add", a=1) == 2


async def test_failure_comes_after_the_parts_before_it(peer: Peer) -> None:
    stream = peer.stream("numbers", until=10, fail_at=3)
    parts = [await anext(stream) for _ in range(3)]
    with pytest.raises(CapabilityError, match="ValueError: out of numbers"):
        await anext(stream)
    assert parts == [0, 1, 2]
    with pytest.raises(CapabilityError, match="ValueError: out of numbers"):
        await peer.execute("numbers", until=10, fail_at=3)


async def test_wrong_arguments_of_a_stream_are_refused_before_it_begins(pair: Pair, peer: Peer) -> None:
    with pytest.raises(InvalidArgumentsError, match="until"):
        await collected(peer.stream("numbers", until="ten"))
    assert pair[1].made == 0


async def test_slow_reader_slows_its_writer(pair: Pair, peer: Peer) -> None:
    size, count = 65_536, 200
    async with aclosing(peer.stream("blocks", count=count, size=size)) as parts:
        await anext(parts)
        made = 0
        while made != pair[1].made:  # until it makes no more
            made = pair[1].made
            await peer.ping()
        # What the window lets through, what the channel holds, and the one that is being made.
        assert size * made <= CALL_WINDOW_BYTES + 8 * size
        assert len(await collected(parts)) == count - 1
    assert pair[1].made == count


async def test_slow_reader_slows_nobody_else(peer: Peer) -> None:
    async with aclosing(peer.stream("blocks", count=100, size=65_536)) as parts:
        await anext(parts)
        assert await peer.execute("add", a=1) == 2
        data = os.urandom(3 * CALL_WINDOW_BYTES)
        assert await peer.execute("reverse", data=data) == data[::-1]


async def test_leaving_a_stream_cancels_it_there(pair: Pair, peer: Peer) -> None:
    async for part in peer.stream("numbers", until=10**9):
        if part == 5:
            break
    gc.collect()
    await asyncio.wait_for(pair[1].cancelled.wait(), 10)
    assert await peer.execute("add", a=1) == 2


async def test_cancelling_the_reader_cancels_the_stream_there(pair: Pair, peer: Peer) -> None:
    task = asyncio.ensure_future(collected(peer.stream("numbers", until=10**9)))
    while not pair[1].made:  # noqa: ASYNC110 -- loop passes until it runs
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(pair[1].cancelled.wait(), 10)


async def test_stream_has_a_deadline(pair: Pair, peer: Peer) -> None:
    with pytest.raises(CallTimeoutError):
        await collected(peer.stream("numbers", until=10**9, timeout=0.3))
    await asyncio.wait_for(pair[1].cancelled.wait(), 10)


async def test_stream_ends_when_the_peer_goes(pair: Pair, peer: Peer) -> None:
    stream = peer.stream("numbers", until=10**9)
    await anext(stream)
    await pair[1].peers[pair[0].did].close("out of paper")
    with pytest.raises(PeerLostError, match="out of paper"):
        await collected(stream)


async def test_stream_that_the_callee_cancels_says_so(pair: Pair, peer: Peer) -> None:
    stream = peer.stream("numbers", until=10**9)
    await anext(stream)
    for execution in pair[1].peers[pair[0].did]._executions.values():
        execution.end("cancelled")
    with pytest.raises(CallCancelledError):
        await collected(stream)
    assert await peer.execute("add", a=1) == 2


async def test_part_that_is_not_what_was_signed_fails_the_stream(pair: Pair, peer: Peer) -> None:
    there = pair[1].peers[pair[0].did]
    take = there._outbox.take

    def altered() -> str | bytes | None:
        message = take()
        return message.replace('"result":1', '"result":7') if isinstance(message, str) else message

    there._outbox.take = altered  # type: ignore[method-assign]
    with pytest.raises(PeerIdentityError, match=r"are not the stream that did:key:z6Mk.* has signed"):
        await collected(peer.stream("numbers", until=3))


# --- attachments -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_MAX_BYTES, CHUNK_MAX_BYTES + 1, 3 * CALL_WINDOW_BYTES])
async def test_bytes_travel_as_they_are(peer: Peer, size: int) -> None:
    data = os.urandom(size)
    assert await peer.execute("reverse", data=data) == data[::-1]


@pytest.mark.parametrize("size", [INLINE_MAX_BYTES - 2_000, INLINE_MAX_BYTES, 1_000_000])
async def test_json_of_any_size_travels(peer: Peer, size: int) -> None:
    value = {"text": "é" * (size // 2), "numbers": list(range(size // 100)), "half": 0.5}
    assert await peer.execute("echo", value=value) == value


async def test_bytes_are_bytes_whatever_the_hint_says(peer: Peer) -> None:
    assert await peer.execute("echo", value=b"\x00\xff") == b"\x00\xff"
    with pytest.raises(InvalidArgumentsError, match="a: Input should be a valid integer"):
        await peer.execute("add", a=b"1")
    with pytest.raises(InvalidArgumentsError, match="more: Unexpected keyword argument"):
        await peer.execute("add", a=1, more=b"1")


async def test_bytes_may_also_come_as_text(peer: Peer) -> None:
    assert await peer.execute("reverse", data="AAEC") == b"\x02\x01\x00"


async def test_many_large_calls_share_the_channel(peer: Peer) -> None:
    blocks = [os.urandom(300_000) for _ in range(10)]
    results = await asyncio.gather(*(peer.execute("reverse", data=block) for block in blocks))
    assert results == [block[::-1] for block in blocks]


async def test_short_call_does_not_wait_for_a_long_one(peer: Peer) -> None:
    long = asyncio.ensure_future(peer.execute("reverse", data=bytes(8_000_000)))
    assert await peer.execute("add", a=1) == 2
    assert not long.done()
    assert await long == bytes(8_000_000)


async def test_cancelled_upload_is_over_and_harms_nobody(pair: Pair, peer: Peer) -> None:
    task = asyncio.ensure_future(peer.execute("reverse", data=bytes(8_000_000)))
    there = pair[1].peers[pair[0].did]
    while not there._executions:  # noqa: ASYNC110 -- loop passes until it has arrived
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert not peer._calls.outbox._lanes
    await asyncio.wait_for(asyncio.wait(set(there._serving)), 10)
    assert await peer.execute("reverse", data=b"ab") == b"ba"
    assert there._calls._inbox.kept == 0


# --- progress, the current call, receipts --------------------------------------------------------


async def test_progress_is_told_to_who_wants_it(pair: Pair, peer: Peer) -> None:
    seen: list[Any] = []
    assert await peer.execute("work", steps=3, on_progress=seen.append) == pair[0].did
    assert seen[-1] == {"step": 2}
    assert await peer.execute("work", steps=3) == pair[0].did


async def test_progress_never_piles_up(peer: Peer) -> None:
    seen: list[Any] = []
    await peer.execute("work", steps=20_000, on_progress=seen.append)
    assert seen[-1] == {"step": 19_999}
    assert seen == sorted(seen, key=lambda value: value["step"])


async def test_callback_that_fails_harms_nobody(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    def fail(value: object) -> None:
        raise RuntimeError("no")

    assert await peer.execute("work", steps=3, on_progress=fail, on_receipt=fail)
    # Once each, however often there was progress.
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [f"{fail!r} failed"] * 2


def test_there_is_no_current_call_outside_of_one() -> None:
    with pytest.raises(RuntimeError, match="no call"):
        current_call()


async def test_deadline_is_inherited_by_what_is_called_on_the_way(
    switchboard: Switchboard, pair: Pair, peer: Peer
) -> None:
    async with Workshop(switchboard) as third:
        with pytest.raises((CallTimeoutError, CapabilityError)):
            await peer.execute("ask_on", did=third.did, capability="wait", timeout=0.5)
        await asyncio.wait_for(third.cancelled.wait(), 10)
        with pytest.raises((CallTimeoutError, CapabilityError)):
            await peer.execute("ask_on", did=third.did, capability="wait", seconds=50.0, timeout=0.5)


async def test_deadline_does_not_bind_what_outlives_the_call(switchboard: Switchboard) -> None:
    class Starter(Workshop):
        @as_capability
        async def begin(self) -> float:
            self.job = asyncio.ensure_future(self.go_on())
            return time_left(None, 1_000.0)

        async def go_on(self) -> float:
            await self.release.wait()
            return time_left(None, 1_000.0)

    other = Workshop(switchboard)
    async with Starter(switchboard) as starter, other, other.connect(starter.did) as peer:
        assert await peer.execute("begin", timeout=30) <= 30
        starter.release.set()
        assert await starter.job == 1_000.0


async def test_receipt_of_a_call_can_be_verified_by_anybody(pair: Pair, peer: Peer) -> None:
    receipts: list[Receipt] = []
    assert await peer.execute("add", a=1, b=2, on_receipt=receipts.append) == 3
    with pytest.raises(CapabilityError):
        await peer.execute("fail", text="no", on_receipt=receipts.append)
    done, failed = (Receipt.from_json(receipt.to_json()).verify() for receipt in receipts)
    assert (done.caller, done.callee) == (pair[0].did, pair[1].did)
    assert (done.capability, done.args, done.result) == ("add", {"a": 1, "b": 2}, 3)
    assert done.covers_result(3)
    assert not done.covers_result(4)
    assert (failed.status.value, failed.error) == ("error", "ValueError: no")


async def test_receipt_covers_what_travelled_beside_it(peer: Peer) -> None:
    receipts: list[Receipt] = []
    await peer.execute("reverse", data=b"abc", on_receipt=receipts.append)
    parts = await collected(peer.stream("blocks", count=3, size=5, on_receipt=receipts.append))
    attached, streamed = (receipt.verify() for receipt in receipts)
    assert attached.covers_result(b"cba")
    assert not attached.covers_result(b"cb")
    assert attached.covers_args({"data": b"abc"})
    assert not attached.covers_args({"data": b"abd"})
    assert not attached.covers_args({})
    assert streamed.covers_parts(parts)
    assert not streamed.covers_parts(parts[:-1])


def test_capability_says_that_it_streams() -> None:
    @as_capability
    async def parts(self: object) -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match="neither an async method nor an async generator"):

        @as_capability
        def plain(self: object) -> Any:
            return 1


# --- a stream among the arguments ----------------------------------------------------------------


async def source(count: int, size: int, fail_at: int = -1) -> AsyncIterator[bytes]:
    for number in range(count):
        if number == fail_at:
            raise OSError("the disk is gone")
        yield bytes([number % 256]) * size


async def test_stream_of_bytes_is_read_as_it_comes(peer: Peer) -> None:
    receipts: list[Receipt] = []
    result = await peer.execute("measure", data=source(50, 100_000), unit="kB", on_receipt=receipts.append)
    assert result == "5000.0 kB"
    assert await peer.execute("measure", data=source(0, 1), unit="kB") == "0.0 kB"
    assert b'"input"' in receipts[0].to_json().replace(b"\\", b"")


async def test_bytes_that_are_there_pass_for_a_stream(peer: Peer) -> None:
    assert await peer.execute("measure", data=bytes(300_000), unit="kB") == "300.0 kB"
    assert await peer.execute("measure", data="AAEC", unit="B") == "0.003 B"


async def test_stream_goes_in_and_comes_out(peer: Peer) -> None:
    parts = await collected(peer.stream("flip", data=source(100, 40_000)))
    assert b"".join(parts) == b"".join([bytes([255 - number]) * 40_000 for number in range(100)])


async def test_slow_capability_slows_its_caller(pair: Pair, peer: Peer) -> None:
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield bytes(65_536)

    task = asyncio.ensure_future(peer.execute("leave_it", data=endless()))
    await asyncio.wait_for(pair[1].started.wait(), 10)
    before = -1
    while before != given:  # until it is asked for no more
        before = given
        await peer.ping()
    assert given * 65_536 <= CALL_WINDOW_BYTES + 8 * 65_536
    pair[1].release.set()
    assert await task == "enough"
    assert await peer.execute("add", a=1) == 2


async def test_source_that_fails_cancels_the_call(pair: Pair, peer: Peer) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        await peer.execute("measure", data=source(50, 100_000, fail_at=20), unit="kB")
    there = pair[1].peers[pair[0].did]
    await asyncio.wait_for(asyncio.gather(*there._serving), 10)
    with pytest.raises(TypeError, match="has bytes, not int"):
        await peer.execute("measure", data=numbers(), unit="kB")
    assert await peer.execute("add", a=1) == 2


async def test_source_is_asked_for_no_more_when_the_peer_goes(pair: Pair, peer: Peer) -> None:
    given = 0

    async def never_waits() -> AsyncIterator[bytes]:
        nonlocal given
        while given < 10_000:  # an endless one would never come back
            given += 1
            yield bytes(65_536)

    task = asyncio.ensure_future(peer.execute("leave_it", data=never_waits()))
    await asyncio.wait_for(pair[1].started.wait(), 10)
    await pair[1].peers[pair[0].did].close("out of paper")
    with pytest.raises(PeerLostError, match="out of paper"):
        await task
    assert given * 65_536 <= CALL_WINDOW_BYTES + 8 * 65_536


async def test_source_that_is_too_late_is_no_late_answer(peer: Peer) -> None:
    async def late() -> AsyncIterator[bytes]:
        yield b"x"
        raise asyncio.TimeoutError("the disk is asleep")

    with pytest.raises(asyncio.TimeoutError, match="the disk is asleep"):
        await peer.execute("measure", data=late(), unit="kB")
    with pytest.raises(asyncio.TimeoutError, match="the disk is asleep"):
        await collected(peer.stream("flip", data=late()))


async def numbers() -> AsyncIterator[Any]:
    yield 1


async def test_stream_where_none_is_taken_is_refused(peer: Peer) -> None:
    with pytest.raises(InvalidArgumentsError, match="data: takes no stream"):
        await peer.execute("reverse", data=source(1, 1))
    with pytest.raises(InvalidArgumentsError, match="data: takes a stream of bytes"):
        await peer.execute("measure", data=5, unit="kB")
    with pytest.raises(InvalidArgumentsError, match="data: Missing"):
        await peer.execute("measure", unit="kB")
    with pytest.raises(InvalidArgumentsError, match="2 arguments are streams; one can be"):
        await peer.execute("measure", data=source(1, 1), unit=source(1, 1))


async def test_stream_that_is_altered_fails_its_reader(peer: Peer) -> None:
    take = peer._calls.outbox.take

    def altered() -> str | bytes | None:
        message = take()
        if isinstance(message, bytes) and message[0] == 1:
            return message[:-1] + b"\xff"
        return message

    peer._calls.outbox.take = altered  # type: ignore[method-assign]
    with pytest.raises(InvalidArgumentsError, match="what came of the stream is not what was sent"):
        await peer.execute("measure", data=source(3, 10), unit="kB")


def test_parameter_that_streams_something_else_is_refused(switchboard: Switchboard) -> None:
    class Wrong(Workshop):
        @as_capability
        async def take(self, data: AsyncIterator[int]) -> int:
            return 1

    with pytest.raises(TypeError, match="data is a stream of something else than bytes"):
        Wrong(switchboard)
