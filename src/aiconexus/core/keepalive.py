"""When to ping a silent peer, and when to give it up.

aiortc by itself notices a dead peer only after 63 s (RFC 7675 consent, then SCTP's retransmissions).
"""

from __future__ import annotations

from enum import Enum

from aiconexus.protocol.limits import PEER_PING_INTERVAL_SECONDS, PEER_PONG_TIMEOUT_SECONDS


class Verdict(Enum):
    """What to do at `KeepAlive.due`."""

    WAIT = "wait"
    PING = "ping"
    DEAD = "dead"


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
    ) -> None:
        """Begin at `now` to ping after `interval` seconds of silence and wait `timeout` for any message."""
        self._interval = interval
        self._timeout = timeout
        self._pinged = False
        self.due = now + interval

    def heard(self, now: float) -> None:
        """Note that a message came, of whatever kind."""
        self._pinged = False
        self.due = now + self._interval

    def check(self, now: float) -> Verdict:
        """Tell what is to be done at `now`."""
        if now < self.due:
            return Verdict.WAIT
        # Woken late, this process itself did not run (suspended, blocked, starved): what the peer sent
        # may lie unread in the socket. It gets another chance.
        late = now - self.due > self._interval
        if self._pinged and not late:
            return Verdict.DEAD
        self._pinged = True
        self.due = now + self._timeout
        return Verdict.PING
