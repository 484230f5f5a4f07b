"""`within`: await something for a limited time, on every Python from 3.10."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

if sys.version_info >= (3, 12):
    within = asyncio.wait_for
else:

    async def within(awaitable: Awaitable[T], timeout: float | None) -> T:
        """Await `awaitable` for at most `timeout` seconds, as `asyncio.wait_for` of Python 3.12 does.

        That of 3.10 and 3.11 loses a cancellation which arrives together with the result
        (python/cpython#86296): a task that lives in a loop could then not be ended.

        Raises:
            asyncio.TimeoutError: The time is up; `awaitable` is cancelled.
        """
        task = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait((task,), timeout=timeout)
            if task.done():
                return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        raise asyncio.TimeoutError
