"""Presence: which DID is here, with what, and what waits for it while it is away."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from aiconexus.protocol.limits import AWAY_MAX_BYTES, AWAY_MAX_MESSAGES
from gateway._connection import Connection
from gateway._ledger import Ledger
from gateway._routing import RoutingTable, TableBusyError
from gateway.directory import Directory, Offer, View
from gateway.shelf import Shelf

if TYPE_CHECKING:
    from gateway.moves import Move


@dataclass(frozen=True, slots=True)
class Shown:
    """What others may see of an agent: its card (JSON or empty), what that offers; hidden: not listed."""

    card: bytes = b""
    offers: tuple[Offer, ...] = ()
    hidden: bool = False


class Session:
    """A registered agent. `connection` is None while it is away.

    `epoch` grows with every registration: whatever an older connection of the same DID still does, it
    cannot touch what belongs to a newer epoch. `move` is set while the session comes over from another
    worker; `old_path_closed` once what is still on its way through that worker would come too late.
    `proven_at` is the monotonic time at which it was proven, `missed_at` that at which its route was first
    found to be gone, or another session's, if it was.
    """

    __slots__ = (
        "_ledger",
        "away_until",
        "card",
        "connection",
        "did",
        "epoch",
        "hidden",
        "id",
        "missed_at",
        "move",
        "offers",
        "old_path_closed",
        "proven_at",
        "resume_token",
        "shelf",
    )

    def __init__(
        self,
        did: str,
        connection: Connection,
        epoch: int,
        shown: Shown,
        resume_token: str,
        ledger: Ledger,
    ) -> None:
        self.did = did
        self._ledger = ledger
        self.id = str(uuid4())
        self.connection: Connection | None = connection
        self.epoch = epoch
        self.show(shown)
        self.resume_token = resume_token
        self.proven_at = time.monotonic()
        self.away_until = 0.0
        self.missed_at: float | None = None
        self.move: Move | None = None
        self.old_path_closed = False
        self.shelf: Shelf | None = None

    @property
    def status(self) -> str:
        """What others are told of it: "online" or "away"."""
        return "away" if self.connection is None else "online"

    @property
    def view(self) -> View:
        """What may be seen of it."""
        return View(self.card, self.hidden)

    def show(self, shown: Shown) -> None:
        """Let others see this of it, once it is listed."""
        self.card = shown.card
        self.offers = shown.offers
        self.hidden = shown.hidden

    def hold(self, data: bytes) -> bool:
        """Keep a message for the return of an agent that is away; tell whether it fits."""
        if self.shelf is None:
            self.shelf = Shelf(self._ledger, AWAY_MAX_MESSAGES, AWAY_MAX_BYTES)
        return self.shelf.put(data)

    def hold_first(self, data: bytes) -> bool:
        """Keep a message that is older than those that wait; tell whether it fits."""
        if self.shelf is None:
            self.shelf = Shelf(self._ledger, AWAY_MAX_MESSAGES, AWAY_MAX_BYTES)
        return self.shelf.put_first(data)

    def release(self) -> list[bytes]:
        """Return what waits, oldest first, and keep nothing."""
        shelf, self.shelf = self.shelf, None
        return shelf.take() if shelf is not None else []


@dataclass(frozen=True, slots=True)
class Registered:
    """Outcome of a registration.

    Attributes:
        session: The new session; its route is bound.
        resumed: Whether it continues the one before.
        before: What could be seen of it at this worker, here or away; None if it was not.
        replaced: A connection of the same DID at this worker that is still open and must be closed with 4504.
        held: What waited here, to be sent on if resumed, else to go back to its senders; until then it waits.
        elsewhere: Worker and epoch of the session before, if another worker has it.
    """

    session: Session
    resumed: bool
    before: View | None
    replaced: Connection | None
    held: Shelf
    elsewhere: tuple[int, int] | None


class Registry:
    """The sessions of one worker and their routes.

    Args:
        table: Where the routes of the node are kept.
        ledger: Where it is written down what waits.
        worker: The number of the worker.
        away: Seconds for which a dropped session stays routable.
        on_away: Called with a session that dropped.
        on_gone: Called with a session that has ended here and is nowhere else.
    """

    def __init__(
        self,
        table: RoutingTable,
        ledger: Ledger,
        worker: int,
        away: float,
        on_away: Callable[[Session], None] = lambda _: None,
        on_gone: Callable[[Session], None] = lambda _: None,
    ) -> None:
        self._table = table
        self._ledger = ledger
        self._worker = worker
        self._away = away
        self._on_away = on_away
        self._on_gone = on_gone
        self._sessions: dict[str, Session] = {}
        self.directory = Directory(lambda did: self._sessions[did].offers)
        # All are kept for the same time, so the order of dropping is the order of expiry.
        self._dropped: OrderedDict[str, Session] = OrderedDict()
        # By epoch: sessions whose route another worker has taken, but which it has not fetched yet.
        self._taken: dict[int, Session] = {}
        # Changes of routes that wait for the table.
        self._unchanged: deque[tuple[Callable[[bytes, int], bool], bytes, int]] = deque()

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

    def all(self) -> list[Session]:
        """Return the sessions of this worker, here or away."""
        return list(self._sessions.values())

    def find(self, did: str, epoch: int) -> Session | None:
        """Return the session of an epoch, if it has not been given away."""
        session = self._taken.get(epoch) or self._sessions.get(did)
        return session if session is not None and session.epoch == epoch else None

    def register(
        self,
        did: str,
        connection: Connection,
        shown: Shown,
        resume_token: str,
        resume: str | None,
    ) -> Registered:
        """Make `connection` the one of `did`: the newest proven session wins.

        Args:
            did: The proven DID.
            connection: Where it is now.
            shown: What others may see of the agent.
            resume_token: The token that the new session may be resumed with.
            resume: The token that the agent presented.
        """
        epoch, owner = self._table.bind(did.encode(), self._worker, connection.index)
        session = Session(did, connection, epoch, shown, resume_token, self._ledger)
        before = self._sessions.get(did)
        self._sessions[did] = session
        self._list(session, before)
        if before is not None and owner is not None and owner[2] != before.epoch:
            # It was at another worker meanwhile, which will come for what was here.
            self._take_away(before)
            before = None
        held = Shelf(self._ledger, AWAY_MAX_MESSAGES, AWAY_MAX_BYTES)
        if before is None:
            elsewhere = (owner[0], owner[2]) if owner is not None and owner[0] != self._worker else None
            return Registered(session, False, None, None, held, elsewhere)
        replaced = before.connection
        undelivered = replaced.take_undelivered() if replaced is not None else []
        for message in (*undelivered, *before.release()):
            held.carry(message)
        before.connection = None
        self._dropped.pop(did, None)
        resumed = resume is not None and resume == before.resume_token
        if resumed:
            session.id = before.id
        return Registered(session, resumed, before.view, replaced, held, None)

    def show(self, session: Session, shown: Shown) -> None:
        """Let others see something else of an agent."""
        before = Shown(session.card, session.offers, session.hidden)
        session.show(shown)
        self._list(session, before)

    def _list(self, session: Session, before: Session | Shown | None) -> None:
        """List an agent, if it may be, instead of what was listed of it before."""
        was_listed = before is not None and not before.hidden
        if before is not None and was_listed and not session.hidden:
            session.offers = self.directory.replace(session.did, before.offers, session.offers)
        elif before is not None and was_listed:
            self.directory.remove(session.did, before.offers)
        elif not session.hidden:
            session.offers = self.directory.put(session.did, session.offers)

    def _unlist(self, session: Session) -> None:
        if not session.hidden:
            self.directory.remove(session.did, session.offers)

    def _take_away(self, session: Session) -> None:
        self._dropped.pop(session.did, None)
        session.away_until = time.monotonic() + self._away
        self._taken[session.epoch] = session

    def give(self, did: str, epoch: int) -> Session | None:
        """Remove and return the session of an epoch whose route another worker has taken."""
        session = self._taken.pop(epoch, None)
        if session is None:
            session = self._sessions.get(did)
            if session is None or session.epoch != epoch:
                return None
            del self._sessions[did]
            self._dropped.pop(did, None)
            self._unlist(session)
        return session

    def drop(self, session: Session) -> bool:
        """Let a session whose connection broke be away; False if it was replaced meanwhile."""
        if session.connection is None:
            return False
        if self._taken.get(session.epoch) is session:
            session.connection = None
            return True
        if self._sessions.get(session.did) is not session:
            return False
        if not self._change(self._table.set_away, session):
            # Another worker has it now, and will come for what waits.
            session.connection = None
            del self._sessions[session.did]
            self._unlist(session)
            self._take_away(session)
            return True
        session.connection = None
        session.away_until = time.monotonic() + self._away
        self._dropped[session.did] = session
        self._on_away(session)
        return True

    def remove(self, session: Session) -> bool:
        """Forget a session at once; False if it was replaced meanwhile."""
        if self._taken.pop(session.epoch, None) is session:
            session.connection = None
            return True
        if self._sessions.get(session.did) is not session:
            return False
        del self._sessions[session.did]
        self._dropped.pop(session.did, None)
        self._unlist(session)
        session.connection = None
        self._change(self._table.remove, session)
        self._on_gone(session)
        return True

    def _change(self, change: Callable[[bytes, int], bool], session: Session) -> bool:
        """Change the route of a session; later, if a stopped process holds the lock of the table."""
        try:
            return change(session.did.encode(), session.epoch)
        except TableBusyError:
            self._unchanged.append((change, session.did.encode(), session.epoch))
            return True

    def end_away(self) -> Iterator[Session]:
        """Remove and yield all sessions that are away."""
        for session in list(self._dropped.values()):
            self.remove(session)
            yield session

    def expire(self) -> Iterator[Session]:
        """Remove and yield the sessions that were away, or not fetched, for too long."""
        with suppress(TableBusyError):
            while self._unchanged:
                change, did, epoch = self._unchanged[0]
                change(did, epoch)
                self._unchanged.popleft()
        now = time.monotonic()
        while self._dropped:
            session = next(iter(self._dropped.values()))
            if session.away_until > now:
                break
            self.remove(session)
            yield session
        while self._taken:
            session = next(iter(self._taken.values()))
            if session.away_until > now:
                break
            yield self._taken.pop(session.epoch)
