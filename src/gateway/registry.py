"""Presence: which DID is here, since when, with what, and what waits for it while it is away."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import uuid4

from aiconexus.protocol.limits import AWAY_MAX_BYTES, AWAY_MAX_MESSAGES
from gateway._connection import Connection
from gateway._routing import AWAY_INDEX, RoutingTable


class Session:
    """A registered agent. `connection` is None while it is away.

    `epoch` grows with every registration: whatever an older connection of the same DID still does, it
    cannot touch what belongs to a newer epoch.
    """

    __slots__ = (
        "away_until",
        "capabilities",
        "connected_at",
        "connection",
        "did",
        "epoch",
        "id",
        "last_activity",
        "resume_token",
        "waiting",
        "waiting_bytes",
    )

    def __init__(
        self, did: str, connection: Connection, epoch: int, capabilities: bytes, resume_token: str
    ) -> None:
        self.did = did
        self.id = str(uuid4())
        self.connection: Connection | None = connection
        self.epoch = epoch
        self.capabilities = capabilities
        self.resume_token = resume_token
        self.connected_at = time.time()
        self.last_activity = self.connected_at
        self.away_until = 0.0
        self.waiting: deque[bytes] | None = None
        self.waiting_bytes = 0

    def hold(self, data: bytes) -> bool:
        """Keep a message for the return of an agent that is away; tell whether it fits."""
        return self._hold(data, deque.append)

    def hold_first(self, data: bytes) -> bool:
        """Keep a message that is older than those that wait; tell whether it fits."""
        return self._hold(data, deque.appendleft)

    def _hold(self, data: bytes, put: Callable[[deque[bytes], bytes], None]) -> bool:
        if self.waiting is None:
            self.waiting = deque()
        if len(self.waiting) >= AWAY_MAX_MESSAGES or self.waiting_bytes + len(data) > AWAY_MAX_BYTES:
            return False
        put(self.waiting, data)
        self.waiting_bytes += len(data)
        return True

    def release(self) -> deque[bytes]:
        """Return what waits, oldest first, and keep nothing."""
        waiting = self.waiting or deque()
        self.waiting = None
        self.waiting_bytes = 0
        return waiting


@dataclass(frozen=True, slots=True)
class Presence:
    """What the gateway knows of one agent. Times are seconds since the epoch; `capabilities` is JSON."""

    did: str
    session: str
    connected_at: float
    last_activity: float
    capabilities: bytes
    away: bool


@dataclass(frozen=True, slots=True)
class Registered:
    """Outcome of a registration.

    Attributes:
        session: The new session; its route is bound.
        resumed: Whether it continues the one before.
        replaced: A connection of the same DID that is still open and must be closed with 4504.
        held: What waited, to be sent on if resumed, else to go back to its senders.
    """

    session: Session
    resumed: bool
    replaced: Connection | None
    held: deque[bytes]


class Registry:
    """The sessions of one node and their routes.

    Args:
        table: Where the routes are kept.
        away: Seconds for which a dropped session stays routable.
    """

    def __init__(self, table: RoutingTable, away: float) -> None:
        self._table = table
        self._away = away
        self._sessions: dict[str, Session] = {}
        # All are kept for the same time, so the order of dropping is the order of expiry.
        self._dropped: OrderedDict[str, Session] = OrderedDict()
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, did: str) -> bool:
        return did in self._sessions

    @property
    def away_count(self) -> int:
        """Sessions that dropped and may still resume."""
        return len(self._dropped)

    def get(self, did: str) -> Session | None:
        """Return the session of a DID, here or away."""
        return self._sessions.get(did)

    def presence(self, did: str) -> Presence | None:
        """Return what is known of a DID."""
        session = self._sessions.get(did)
        if session is None:
            return None
        last_activity = session.last_activity
        if session.connection is not None:
            last_activity = time.time() - session.connection.silent_seconds
        return Presence(
            did=did,
            session=session.id,
            connected_at=session.connected_at,
            last_activity=last_activity,
            capabilities=session.capabilities,
            away=session.connection is None,
        )

    def register(
        self, did: str, connection: Connection, capabilities: bytes, resume_token: str, resume: str | None
    ) -> Registered:
        """Make `connection` the one of `did`: the newest proven session wins.

        Args:
            did: The proven DID.
            connection: Where it is now.
            capabilities: JSON, as it was registered.
            resume_token: The token that the new session may be resumed with.
            resume: The token that the agent presented.
        """
        before = self._sessions.get(did)
        self._epoch += 1
        session = Session(did, connection, self._epoch, capabilities, resume_token)
        resumed = before is not None and resume is not None and resume == before.resume_token
        replaced = None
        held: deque[bytes] = deque()
        if before is not None:
            replaced = before.connection
            if replaced is not None:
                held.extend(replaced.take_undelivered())
            held.extend(before.release())
            before.connection = None
            self._dropped.pop(did, None)
            if resumed:
                session.id = before.id
                session.connected_at = before.connected_at
        self._sessions[did] = session
        self._table.set(did.encode(), connection.index, session.epoch)
        return Registered(session, resumed, replaced, held)

    def drop(self, session: Session) -> bool:
        """Let a session whose connection broke be away; False if it was replaced meanwhile."""
        if self._sessions.get(session.did) is not session or session.connection is None:
            return False
        session.last_activity = time.time() - session.connection.silent_seconds
        session.connection = None
        session.away_until = time.monotonic() + self._away
        self._dropped[session.did] = session
        self._table.set(session.did.encode(), AWAY_INDEX, session.epoch)
        return True

    def remove(self, session: Session) -> bool:
        """Forget a session at once; False if it was replaced meanwhile."""
        if self._sessions.get(session.did) is not session:
            return False
        del self._sessions[session.did]
        self._dropped.pop(session.did, None)
        session.connection = None
        return self._table.remove(session.did.encode(), session.epoch)

    def end_away(self) -> Iterator[Session]:
        """Remove and yield all sessions that are away."""
        for session in list(self._dropped.values()):
            self.remove(session)
            yield session

    def expire(self) -> Iterator[Session]:
        """Remove and yield the sessions that were away for too long."""
        now = time.monotonic()
        while self._dropped:
            session = next(iter(self._dropped.values()))
            if session.away_until > now:
                return
            self.remove(session)
            yield session
