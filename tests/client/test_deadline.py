"""A deadline neither loses a cancellation nor leaves anything running."""

from __future__ import annotations

import asyncio

import pytest

from aiconexus.client.deadline import within


async def test_result_in_time() -> None:
    assert await within(asyncio.sleep(0, "done"), 5) == "done"
    assert await within(asyncio.sleep(0, "done"), None) == "done"


async def test_fault_in_time() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(LookupError("nothing"))
    with pytest.raises(LookupError, match="nothing"):
        await within(future, 5)


@pytest.mark.parametrize("timeout", [0, 0.01])
async def test_what_takes_longer_is_cancelled_before_the_error_is_raised(timeout: float) -> None:
    ended = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    with pytest.raises(asyncio.TimeoutError):
        await within(endless(), timeout)
    assert ended.is_set() or timeout == 0  # with no time at all it may not even have begun


async def test_cancelling_cancels_what_runs() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def endless() -> None:
        begun.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    task = asyncio.create_task(within(endless(), 5))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_cancellation_that_arrives_with_the_result_is_not_lost() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(within(future, 5))
    await asyncio.sleep(0)  # it waits now
    future.set_result(None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
