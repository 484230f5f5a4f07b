"""What this side asked another agent, until its answer was taken."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from aiconexus.protocol.attachments import Value
from aiconexus.protocol.receipts import Receipt

_log: Final = logging.getLogger("aiconexus.core")


class LateError(Exception):
    """Nothing came in time. Not a TimeoutError: the source of a stream among the arguments may raise one."""


class Question:
    """An INTENT or an execution that waits for its answer, and for the parts before it.

    Attributes:
        answer: The answer, or why there is none.
        feeding: Sends the stream among its arguments, if there is one.
    """

    feeding: asyncio.Task[None] | None = None

    def __init__(
        self,
        on_progress: Callable[[Any], None] | None = None,
        on_receipt: Callable[[Receipt], None] | None = None,
    ) -> None:
        for name, callback in (("on_progress", on_progress), ("on_receipt", on_receipt)):
            if callback is not None and (not callable(callback) or _is_awaited(callback)):
                raise TypeError(f"{name} is called, not awaited: give a plain function")
        self.answer: Final[asyncio.Future[Any]] = asyncio.get_running_loop().create_future()
        self._on_progress = on_progress
        self._on_receipt = on_receipt
        self._parts: deque[Value] = deque()
        self._arrived: asyncio.Future[None] | None = None  # while somebody waits

    def progress(self, value: Any) -> None:
        """Tell whoever asked how far it is."""
        # There may be thousands: one that fails is not called again.
        if self._on_progress is not None and not self._call(self._on_progress, value):
            self._on_progress = None

    def add(self, part: Value) -> None:
        """Take the next part."""
        self._parts.append(part)
        self._wake()

    def succeed(self, value: Any, receipt: Receipt | None = None) -> None:
        """Take the answer; the first one counts."""
        if not self.answer.done():
            self._hand_over(receipt)
            self.answer.set_result(value)
            self._wake()

    def fail(self, error: Exception, receipt: Receipt | None = None) -> None:
        """Take note that there is no answer."""
        if not self.answer.done():
            self._hand_over(receipt)
            self.answer.set_exception(error)
            self._wake()

    async def next_part(self, seconds: float) -> tuple[Value] | None:
        """Return the next part, alone in a tuple; None if only the answer is left.

        Raises:
            LateError: There was neither in that time.
        """
        if not self._parts and not self.answer.done():
            loop = asyncio.get_running_loop()
            self._arrived = loop.create_future()
            timer = loop.call_later(seconds, self._wake)
            try:
                await self._arrived
            finally:
                timer.cancel()
                self._arrived = None
        if self._parts:
            return (self._parts.popleft(),)
        if not self.answer.done():
            raise LateError
        return None

    def close(self) -> None:
        """Want no answer any more."""
        if self.feeding is not None:
            self.feeding.cancel()
        forget(self.answer)

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _hand_over(self, receipt: Receipt | None) -> None:
        if receipt is not None and self._on_receipt is not None:
            self._call(self._on_receipt, receipt)

    def _call(self, callback: Callable[[Any], None], value: Any) -> bool:
        try:
            callback(value)
        except Exception:
            _log.exception("%r failed", callback)
            return False
        return True


def forget(answer: asyncio.Future[Any]) -> None:
    """Want it no more; why there is none is taken note of, also where nobody has waited for it."""
    if not answer.cancel() and not answer.cancelled():
        answer.exception()


def _is_awaited(callback: Callable[..., Any]) -> bool:
    return any(
        is_kind(each)
        for each in (callback, type(callback).__call__)
        for is_kind in (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    )
