"""When to ping a silent peer, and when to give it up.

aiortc by itself notices a dead peer only after 63 s (RFC 7675 consent, then SCTP's retransmissions).

On a slow link a PING and its PONG wait behind the messages before them, and one message of 256 KiB takes 42 s
at 50 kbit/s. So it is not the late PONG that tells a dead peer, but that not a single packet comes any more:
whoever is sent something acknowledges it. Nor may a peer that acknowledges and reads nothing hold what waits
for it for ever.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from aiconexus.protocol.limits import (
    PEER_PING_INTERVAL_SECONDS,
    PEER_PONG_TIMEOUT_SECONDS,
    PEER_STALL_SECONDS,
)

_LOOKS: Final = 4  # within the timeout: how exactly the last packet's time is known


class Verdict(Enum):
    """What to do at `KeepAlive.due`."""

    WAIT = "wait"
    PING = "ping"
    DEAD = "dead"
    STALLED = "stalled"  # it is there, but takes nothing of what waits for it


class KeepAlive:
    """Decides without a clock of its own: every time is in seconds of one monotonic clock.

    Attributes:
        due: When to ask `check` again.
    """

    def __init__(
        self,
        now: float,
        *,
        interval: float = PEER_PING_INTERVAL_SECONDS,
        timeout: float = PEER_PONG_TIMEOUT_SECONDS,
        stall: float = PEER_STALL_SECONDS,
    ) -> None:
        """Begin at `now`.

        Args:
            now: The time.
            interval: Silence after which to ping.
            timeout: After that, how long without any packet until the peer is dead.
            stall: How long a congested peer may take nothing.
        """
        self._interval = interval
        self._timeout = timeout
        self._stall = stall
        self._pinged = False
        self._received = 0
        self._alive_at = now
        self._taken = 0
        self._taken_at = now
        self.due = now + interval

    def heard(self, now: float) -> None:
        """Note that a message came, of whatever kind."""
        self._pinged = False
        self.due = now + self._interval

    def check(self, now: float, *, received: int = 0, taken: int = 0, is_congested: bool = False) -> Verdict:
        """Tell what is to be done at `now`.

        Args:
            now: The time.
            received: Bytes that the transport has received so far.
            taken: Bytes of messages that have left so far.
            is_congested: Whether more waits to leave than should.
        """
        if taken != self._taken or not is_congested:
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at >= self._stall:
            return Verdict.STALLED
        if now < self.due:
            return Verdict.WAIT
        # Woken late, this process itself did not run (suspended, blocked, starved): what the peer sent
        # may lie unread in the socket. It gets another chance.
        late = now - self.due > self._interval
        begins = not self._pinged or late
        if begins or received != self._received:
            self._alive_at = now
        self._pinged, self._received = True, received
        if now - self._alive_at >= self._timeout:
            return Verdict.DEAD
        self.due = min(now + self._timeout / _LOOKS, self._alive_at + self._timeout)
        return Verdict.PING if begins else Verdict.WAIT
