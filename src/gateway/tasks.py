"""How the tasks of a worker end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

# Until a task that has not ended is told again.
AGAIN_SECONDS = 0.05


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended; how they did is nobody's concern.

    Once is not enough: before Python 3.12 `asyncio.wait_for`, with which redis-py writes, loses a
    cancellation that comes just when what it waits for is done (github.com/python/cpython/issues/86296).
    """
    tasks = list(tasks)
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)
