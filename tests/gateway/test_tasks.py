"""Tasks end, even those that lose a cancellation."""

from __future__ import annotations

import asyncio

from gateway.tasks import end


async def test_a_task_that_loses_a_cancellation_ends():
    lost = asyncio.Event()

    async def lose_one() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            lost.set()
        await asyncio.Event().wait()

    async def fail() -> None:
        raise ValueError

    tasks = [
        asyncio.create_task(lose_one()),
        asyncio.create_task(fail()),
        asyncio.create_task(asyncio.sleep(0)),
    ]
    await asyncio.sleep(0)  # they have begun
    await end(tasks)
    assert lost.is_set()
    assert all(task.done() for task in tasks)
