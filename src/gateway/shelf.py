"""Messages that wait in a worker, in order, bounded, and written down in case it dies."""

from __future__ import annotations

from collections import deque

from gateway._ledger import LEDGER_FULL, Ledger


class Shelf:
    """A queue of messages.

    Args:
        ledger: Where they are written down.
        messages_max: How many fit.
        bytes_max: How many bytes of them.
    """

    __slots__ = ("_bytes_free", "_ledger", "_messages", "_messages_max")

    def __init__(self, ledger: Ledger, messages_max: int, bytes_max: int) -> None:
        self._ledger = ledger
        self._messages_max = messages_max
        self._bytes_free = bytes_max
        self._messages: deque[tuple[bytes, int]] = deque()

    def _admit(self, data: bytes) -> tuple[bytes, int] | None:
        if len(self._messages) >= self._messages_max or len(data) > self._bytes_free:
            return None
        number = self._ledger.add(data)
        if number == LEDGER_FULL:
            return None
        self._bytes_free -= len(data)
        return data, number

    def put(self, data: bytes) -> bool:
        """Keep a message; tell whether it fits."""
        if (admitted := self._admit(data)) is None:
            return False
        self._messages.append(admitted)
        return True

    def put_first(self, data: bytes) -> bool:
        """Keep a message that is older than all others; tell whether it fits."""
        if (admitted := self._admit(data)) is None:
            return False
        self._messages.appendleft(admitted)
        return True

    def carry(self, data: bytes) -> None:
        """Keep a message that has waited already, whatever fits."""
        self._bytes_free -= len(data)
        self._messages.append((data, self._ledger.add(data)))

    def take(self) -> list[bytes]:
        """Return all messages, oldest first, and keep none."""
        taken = []
        while self._messages:
            data, number = self._messages.popleft()
            self._ledger.strike(number)
            self._bytes_free += len(data)
            taken.append(data)
        return taken
