"""Messages that are lost all at once, with another worker: their senders are told a few at a time.

Megabytes of them may be on their way to a worker, or wait in it. Nobody here waits until all are answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from gateway._ledger import LEDGER_NO_RECORD, Ledger

# In one pass of the loop: 5 ms.
TOLD_PER_PASS = 50


class Losses:
    """What one worker has to tell because of others.

    Args:
        ledger: Where it is written down what is lost, as long as nobody is told: this worker may die, too.
        after: Called when some were told.
    """

    def __init__(self, ledger: Ledger, after: Callable[[], None]) -> None:
        self._ledger = ledger
        self._after = after
        self._lost: deque[tuple[Callable[[], None], int]] = deque()
        self._is_at_it = False

    def __len__(self) -> int:
        return len(self._lost)

    def add(self, tell: Callable[[], None], data: bytes | None = None) -> None:
        """Call `tell` soon; `data` is the message that was lost, if that is known."""
        number = self._ledger.add(data) if data is not None else LEDGER_NO_RECORD
        self._lost.append((tell, number))
        self._go_on()

    def _go_on(self) -> None:
        if self._lost and not self._is_at_it:
            self._is_at_it = True
            asyncio.get_running_loop().call_soon(self._tell_some)

    def _tell_some(self) -> None:
        try:
            for _ in range(min(len(self._lost), TOLD_PER_PASS)):
                tell, number = self._lost.popleft()
                self._ledger.strike(number)
                tell()
            self._after()
        finally:
            self._is_at_it = False
            self._go_on()
