"""ERRORs to senders that cannot be reached for now: sent when they can be.

What comes back while the node is cut off from Redis, or while another worker stands still, would otherwise go
back to nobody if its sender is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from gateway._ledger import Ledger

# 6 MiB in one worker. The oldest goes when another one comes: its sender has waited for the longest.
DEBTS_MAX = 10_000
# Agents here do not wait for longer than 10 ms.
PAID_PER_TICK = 200


class Debts:
    """What one worker owes.

    Args:
        ledger: Where it is written down: if this worker dies, others answer for the messages in question.
        pay: Sends an ERROR on its way to an agent: (DID, data). What cannot be sent now comes back by `owe`.
        on_dropped: Called for each that does not fit.
    """

    def __init__(
        self, ledger: Ledger, pay: Callable[[str, bytes], None], on_dropped: Callable[[], None]
    ) -> None:
        self._ledger = ledger
        self._pay = pay
        self._on_dropped = on_dropped
        self._owed: deque[tuple[str, bytes, int]] = deque()
        self._due = 0  # of the oldest

    def __len__(self) -> int:
        return len(self._owed)

    def owe(self, did: str, data: bytes) -> None:
        """Keep an ERROR for later."""
        if len(self._owed) >= DEBTS_MAX:
            self._take()
            self._on_dropped()
        self._owed.append((did, data, self._ledger.owe(data)))

    def _take(self) -> tuple[str, bytes]:
        did, data, number = self._owed.popleft()
        self._due = max(self._due - 1, 0)
        self._ledger.strike(number)
        return did, data

    def fall_due(self) -> None:
        """Try to send all that is owed now, from the next tick on."""
        self._due = len(self._owed)

    def pay_some(self) -> None:
        """Try to send some of what is due."""
        for _ in range(min(self._due, PAID_PER_TICK)):
            self._pay(*self._take())
