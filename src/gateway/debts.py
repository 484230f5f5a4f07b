"""ERRORs to senders that cannot be reached for now, most often because Redis is lost: sent when they can be.

What comes back while a node is cut off would otherwise go back to nobody, if its sender is at another node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

# 6 MiB in one worker. The oldest goes when another one comes: its sender has waited for the longest.
DEBTS_MAX = 10_000


class Debts:
    """What one worker owes.

    Args:
        pay: Sends an ERROR on its way to an agent: (DID, data). What cannot be sent now comes back by `owe`.
        on_dropped: Called for each that does not fit.
    """

    def __init__(self, pay: Callable[[str, bytes], None], on_dropped: Callable[[], None]) -> None:
        self._pay = pay
        self._on_dropped = on_dropped
        self._owed: deque[tuple[str, bytes]] = deque()

    def __len__(self) -> int:
        return len(self._owed)

    def owe(self, did: str, data: bytes) -> None:
        """Keep an ERROR for later."""
        if len(self._owed) >= DEBTS_MAX:
            self._owed.popleft()
            self._on_dropped()
        self._owed.append((did, data))

    def settle(self) -> None:
        """Try to send all."""
        owed, self._owed = self._owed, deque()
        for did, data in owed:
            self._pay(did, data)
