"""What is on its way from agent to agent: whether it arrives, once and in order. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXCUSED_MAX = 10_000  # messages that may still come although nobody waits; the oldest are forgotten


class DeliveryError(Exception):
    """A message was lost, repeated or reordered. Its text counts in the statistics, so it names no ids."""


@dataclass
class Sent:
    """One message on its way.

    Attributes:
        sender: DID.
        target: DID.
        kind: Its type.
        at: When it was sent, by the caller's clock.
        exchange: What it belongs to.
        excused: It may be missing: a connection that it had to cross has ended, or its loss is reported.
    """

    id: str
    sender: str
    target: str
    kind: str
    at: float
    exchange: Any
    excused: bool = False


class Ledger:
    """All messages that were sent and have not arrived."""

    def __init__(self) -> None:
        self._by_id: dict[str, Sent] = {}
        self._by_pair: dict[tuple[str, str], dict[str, Sent]] = {}  # in the order of sending
        self._excused: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def send(self, sent: Sent) -> None:
        """Note a message that is written now."""
        self._by_id[sent.id] = sent
        self._by_pair.setdefault((sent.sender, sent.target), {})[sent.id] = sent

    def arrive(self, sender: str, target: str, id_: str) -> tuple[Sent, list[Sent]]:
        """Note an arrival.

        Returns:
            The message, and those that were sent before it and should have come before it.

        Raises:
            DeliveryError: It has arrived before, or was never sent.
        """
        pair = self._by_pair.get((sender, target), {})
        sent = pair.get(id_)
        if sent is None:
            raise DeliveryError("came twice, or was never sent")
        overtaken = []
        for other in pair.values():
            if other is sent:
                break
            if not other.excused:
                overtaken.append(other)
        for other in overtaken:
            self.excuse(other)
        self._remove(sent)
        return sent, overtaken

    def give_back(self, id_: str) -> Sent | None:
        """Note that the gateway has returned a message to its sender."""
        sent = self._by_id.get(id_)
        if sent is not None:
            self._remove(sent)
        return sent

    def excuse(self, sent: Sent) -> None:
        """Expect a message no longer; if it comes after all, that is no fault."""
        if sent.excused or sent.id not in self._by_id:
            return
        sent.excused = True
        self._excused[sent.id] = None
        if len(self._excused) > EXCUSED_MAX:
            self._remove(self._by_id[next(iter(self._excused))])

    def _remove(self, sent: Sent) -> None:
        del self._by_id[sent.id]
        self._excused.pop(sent.id, None)
        pair = self._by_pair[sent.sender, sent.target]
        del pair[sent.id]
        if not pair:
            del self._by_pair[sent.sender, sent.target]
