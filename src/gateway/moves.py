"""How a session comes over from another worker when its agent does: with what waits for it, in order.

The agent was at worker OLD and registers at worker NEW. NEW binds the route, so that every worker sends to
NEW from then on, but what was sent before may still be on its way through OLD. So::

    NEW → OLD           MOVE       give me the session of that epoch
    NEW → every other   FENCE      say so to OLD behind all that you have sent it
    each → OLD → NEW    MARK       behind this nothing of mine comes through OLD
    OLD → NEW           HANDED     whether the resume token was right; behind it HELD: what waited, in order
    OLD → NEW           FORWARDED  what still reached OLD

At another node the route is not in the table of NEW: there FENCE redirects it first. Of those nodes, the ones
are told that have asked where the agent was, so that they may have cached the route.

NEW holds back what a worker sends directly until that worker's MARK has come. What one agent sends to
another thus arrives in the order in which it was sent. If OLD does not answer in time, NEW goes on without
it, and what comes through OLD later goes back to its senders: never out of order, never in silence.

OLD answers for what it passes on (HELD, FORWARDED) until NEW has confirmed it: it stays in the ledger so
long. If it came from a third node, NEW tells that one that it is here now, and OLD that it has left
(gateway.custody).

The words in capitals are kinds of records (gateway.kinds); the epoch in a record is that of the
session at NEW. Numbers of workers in what is said are those that other nodes use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import orjson

from aiconexus.protocol.limits import WRITE_QUEUE_MAX_BYTES
from gateway._connection import Connection, Router
from gateway._frames import scan
from gateway._ledger import Ledger
from gateway._mesh import NODE_WORKERS
from gateway._routing import AWAY_INDEX, RoutingTable, TableBusyError
from gateway.directory import View
from gateway.kinds import FENCE, FORWARDED, HANDED, HELD, MARK, MESSAGE_KINDS, MOVE, ROUTE
from gateway.shelf import Shelf

if TYPE_CHECKING:
    from gateway.cluster import Cluster
    from gateway.handshake import Registration
    from gateway.registry import Registry, Session

# A worker that is alive answers within a loop pass.
MOVE_SECONDS = 2.0
# From one worker, for one session that is on its way.
MOVING_MAX_MESSAGES = 4_096
# For which it is known where a session went: longer than anything is on its way between workers.
GONE_SECONDS = 10.0


def is_lasting(data: bytes) -> bool:
    """Tell whether a message that waits means anything on the agent's next connection."""
    return scan(data).type not in ("REGISTER", "PONG")


@dataclass(slots=True)
class Move:
    """A session on its way.

    Attributes:
        session: At this worker, the new one.
        registration: To be answered once it is known whether the session is resumed.
        old: The worker it comes from; None while the shared registry is asked.
        waits: Workers whose MARK has not come.
        early: Workers whose MARK came before that of the old worker: what they sent through it may be among
            what waited there, and comes behind HANDED.
        held: What they sent directly, by worker.
        is_answered: The agent has the answer to its REGISTER.
        deadline: In seconds of the monotonic clock.
        next: A MOVE that asks for the session already: (worker, epoch there, data).
    """

    session: Session
    registration: Registration
    old: int | None
    waits: set[int]
    deadline: float
    early: set[int] = field(default_factory=set)
    held: dict[int, Shelf] = field(default_factory=dict)
    is_answered: bool = False
    next: tuple[int, int, bytes] | None = None


class Moves:
    """The sessions that come to this worker and go from it.

    Args:
        worker: The number of this worker.
        router: Where what was queued is written.
        tell: Sends a record to another worker, as `Router.tell`.
        registry: The sessions of this worker.
        table: The routes of the node.
        ledger: Where it is written down what waits.
        cluster: The other nodes, if there are any.
        pass_on: Sends a message that waited here or was on its way, as `Router.pass_on`.
        origin_of: Tells which worker of another node answers for a message that waits here, if one does.
        admit: Answers a REGISTER: (session, registration, resumed).
        give: Delivers a message to a session, or gives it back to its sender.
        give_back: Tells the sender of a message that it was not delivered: (data, cause).
        replace: Closes a connection whose agent is elsewhere now.
        tell_arrival: Tells who watches that an agent has come over from another worker of this node, or is
            back: (DID, epoch, what could be seen of it, what can be).
    """

    def __init__(
        self,
        worker: int,
        router: Router,
        registry: Registry,
        table: RoutingTable,
        ledger: Ledger,
        *,
        cluster: Cluster | None,
        tell: Callable[[int, int, int, int, bytes], bool],
        pass_on: Callable[[int, int, int, int, bytes], bool],
        origin_of: Callable[[bytes], int | None],
        admit: Callable[[Session, Registration, bool], None],
        give: Callable[[Session, bytes], None],
        give_back: Callable[[bytes, str], None],
        replace: Callable[[Connection], None],
        tell_arrival: Callable[[str, int, View | None, View], None],
    ) -> None:
        self._worker = worker
        self._router = router
        self._tell = tell
        self._send_on = pass_on
        self._origin_of = origin_of
        self._cluster = cluster
        self._table = table
        self._registry = registry
        self._ledger = ledger
        self._admit = admit
        self._give = give
        self._give_back = give_back
        self._replace = replace
        self._tell_arrival = tell_arrival
        self._moves: dict[int, Move] = {}
        # By epoch, of sessions that were given away: worker and epoch where they went, until when messages
        # for them may still come here, and whether what comes on the old path is too late.
        self._gone: dict[int, tuple[int, int, float, bool]] = {}

    # --- at the new worker ---------------------------------------------------------------------

    def prepare(self, session: Session, registration: Registration) -> None:
        """Hold back what is sent to a session until the shared registry has said where it was before."""
        session.move = Move(session, registration, None, waits={self._worker}, deadline=0.0)
        self._set_moving(session.move, True)

    def begin(
        self,
        session: Session,
        registration: Registration,
        old: int,
        old_epoch: int,
        remote: Iterable[int] = (),
    ) -> None:
        """Fetch a session from the worker that had it.

        Args:
            session: At this worker.
            registration: To be answered.
            old: The worker.
            old_epoch: Of the session there.
            remote: Workers of other nodes that may send to it there.
        """
        others = {*self._router.linked_workers(), *remote} - {old}
        others -= {worker for worker in others if worker >= NODE_WORKERS and worker not in remote}
        move = session.move
        if move is None:
            move = Move(session, registration, old, waits=set(), deadline=0.0)
        move.old = old
        move.waits = {old, self._worker, *others}
        move.deadline = time.monotonic() + MOVE_SECONDS
        connection = session.connection.index if session.connection is not None else AWAY_INDEX
        session.move = move
        request = {
            "did": session.did,
            "epoch": old_epoch,
            "connection": connection,
            "resume": registration.resume_token,
        }
        is_near = old < NODE_WORKERS  # else the shared registry tells who watches
        if is_near:
            # Only there it is known who could see the agent until now.
            request["card"], request["hidden"] = session.card.decode(), session.hidden
        self._moves[session.epoch] = move
        self._set_moving(move, True)
        if not self._tell(old, MOVE, self._worker, session.epoch, orjson.dumps(request)):
            # Nobody is there any more. Its route names an epoch that nobody owns.
            if is_near:
                self._tell_arrival(session.did, session.epoch, None, session.view)
            self.end(session, resumed=False)
            return
        home = orjson.dumps(
            {
                "old": self._name(old),
                "new": self._name(self._worker),
                "did": session.did,
                "epoch": old_epoch,
                "connection": connection,
            }
        )
        for worker in others:
            # If it does not fit, the MARK will not come, and the old path is closed when the time is up.
            self._tell(worker, FENCE, self._worker, session.epoch, home)
        self._tell(old, MARK, self._worker, session.epoch, home)

    def _name(self, worker: int) -> int:
        return worker if self._cluster is None else self._cluster.name_of(worker)

    def _number(self, name: int) -> int:
        return name if self._cluster is None else self._cluster.number_of(name)

    def end(self, session: Session, *, resumed: bool, held: Iterable[bytes] = ()) -> None:
        """Let a session be like any other: it does not come from elsewhere.

        Args:
            session: At this worker.
            resumed: What its agent is told, unless it was answered already.
            held: What waited here for its return: it comes before all else.
        """
        move = session.move
        if move is None:
            return
        if not move.is_answered:
            move.is_answered = True
            self._admit(session, move.registration, resumed)
            self._router.flush()  # what waited for the agent may fill the queue alone
            for data in held:
                self._give(session, data)
        self._end(move)

    def hold(self, session: Session, origin: int, data: bytes) -> None:
        """Take a message that a worker, or this one, sent directly to a session that is on its way."""
        move = session.move
        if move is None or (move.is_answered and origin not in move.waits):
            self._give(session, data)
            return
        if origin not in move.held:
            move.held[origin] = Shelf(self._ledger, MOVING_MAX_MESSAGES, WRITE_QUEUE_MAX_BYTES)
        if not move.held[origin].put(data):
            self._give_back(data, "overloaded")

    def _handed(self, move: Move, data: bytes) -> None:
        answer = orjson.loads(data)
        if move.is_answered:
            return
        session = move.session
        if answer["resumed"]:
            session.id = answer["session"]
        move.is_answered = True
        self._admit(session, move.registration, answer["resumed"])

    def _mark(self, move: Move, origin: int) -> None:
        move.early.add(origin)
        if origin != move.old and move.old in move.waits:
            return
        for worker in move.early:
            move.waits.discard(worker)
            self._release(move, worker)
        move.early.clear()
        if not move.waits:
            self._end(move)

    def _release(self, move: Move, worker: int) -> None:
        shelf = move.held.pop(worker, None)
        if shelf is not None:
            for data in shelf.take():
                self._give(move.session, data)
            self._router.flush()  # all of them together might fill the queue

    def _end(self, move: Move) -> None:
        """Let the session be like any other."""
        session = move.session
        self._moves.pop(session.epoch, None)
        if not move.is_answered:
            move.is_answered = True
            self._admit(session, move.registration, False)
        for worker in list(move.held):
            self._release(move, worker)
        session.move = None
        self._set_moving(move, False)
        if move.next is not None:
            self._hand_over(*move.next)

    def _give_up(self, move: Move) -> None:
        """Go on without what is still to come through the old worker."""
        move.session.old_path_closed = True
        self._end(move)

    def give_up(self, session: Session) -> None:
        """Go on at once, for the session itself is being replaced."""
        if session.move is not None:
            self._give_up(session.move)

    @staticmethod
    def _set_moving(move: Move, value: bool) -> None:
        if move.session.connection is not None:
            move.session.connection.is_moving = value

    # --- at the old worker ---------------------------------------------------------------------

    def _hand_over(self, new: int, epoch: int, data: bytes) -> None:
        request = orjson.loads(data)
        session = self._registry.get(request["did"])
        if session is not None and session.epoch == request["epoch"] and session.move is not None:
            session.move.next = (new, epoch, data)
            return
        session = self._registry.give(request["did"], request["epoch"])
        if "card" in request:
            # With the old epoch: what the new worker tells already is newer.
            now = View(request["card"].encode(), request["hidden"])
            self._tell_arrival(request["did"], request["epoch"], session.view if session else None, now)
        if new >= NODE_WORKERS:
            self._redirect(request["did"], request["epoch"], new, request["connection"], epoch)
        is_closed = session is not None and session.old_path_closed
        self._gone[request["epoch"]] = (new, epoch, time.monotonic() + GONE_SECONDS, is_closed)
        resumed = (
            session is not None
            and request["resume"] is not None
            and request["resume"] == session.resume_token
        )
        answer: dict[str, object] = {"resumed": resumed}
        waiting: list[bytes] = []
        if session is not None:
            if resumed:
                answer["session"] = session.id
            connection, session.connection = session.connection, None
            if connection is not None:
                waiting.extend(connection.take_undelivered())
                self._replace(connection)
            waiting.extend(session.release())
        self._tell(new, HANDED, self._worker, epoch, orjson.dumps(answer))
        for message in waiting:
            if not resumed:
                self._give_back(message, "away_expired")
            elif is_lasting(message):
                origin = self._origin_of(message)
                if not self._send_on(new, HELD, self._worker if origin is None else origin, epoch, message):
                    self._give_back(message, "overloaded")
        self._tell(new, MARK, self._worker, epoch, b"")

    # --- at every worker -----------------------------------------------------------------------

    def on_record(self, worker: int, kind: int, origin: int, epoch: int, data: bytes) -> None:
        """Take a record from another worker."""
        if kind == MOVE:
            self._hand_over(worker, epoch, data)
        elif kind == FENCE:
            home = orjson.loads(data)
            if worker >= NODE_WORKERS:
                self._redirect(home["did"], home["epoch"], worker, home["connection"], epoch)
            self._tell(self._number(home["old"]), MARK, self._worker, epoch, data)
        elif kind == MARK and data:
            self._tell(self._number(orjson.loads(data)["new"]), MARK, origin, epoch, b"")
        elif kind in (MARK, HANDED):
            if (move := self._moves.get(epoch)) is None:
                pass
            elif kind == MARK:
                self._mark(move, origin)
            else:
                self._handed(move, data)
        elif kind == ROUTE:
            self._correct(worker, epoch, data)
        elif kind in MESSAGE_KINDS:
            self._on_old_path(origin, epoch, data)

    def _on_old_path(self, origin: int, epoch: int, data: bytes) -> None:
        """Take a message that came through the worker which had the session before."""
        session = self._session(epoch, data)
        if session is None:
            is_closed = epoch in self._gone and self._gone[epoch][3]
            self._pass_on(origin, epoch, data, is_closed=is_closed)
        elif session.old_path_closed:
            self._give_back(data, "away_expired")
        else:
            self._give(session, data)

    def on_stray(self, origin: int, epoch: int, data: bytes) -> None:
        """Take a message that a worker sent to the session of an epoch, which has dropped or gone since."""
        session = self._session(epoch, data)
        if session is not None:
            self.hold(session, origin, data)
        else:
            self._pass_on(origin, epoch, data)

    def _session(self, epoch: int, data: bytes) -> Session | None:
        to = scan(data).to
        return self._registry.find(to, epoch) if to is not None else None

    def _pass_on(self, origin: int, epoch: int, data: bytes, *, is_closed: bool = False) -> None:
        """Deliver a message to a session that is not here any more.

        It goes the way that the session went, worker by worker: on the short way it might overtake what is
        older. Where that way is not known, the agent has another session here, or none.
        """
        if is_closed:
            self._give_back(data, "away_expired")
        elif epoch in self._gone:
            worker, epoch, *_ = self._gone[epoch]
            if not self._send_on(worker, FORWARDED, origin, epoch, data):
                self._give_back(data, "unreachable")
        else:
            did = scan(data).to
            assert did is not None
            session = self._registry.get(did)
            if origin >= NODE_WORKERS:
                self.correct(origin, did, epoch, session)
            if session is None:
                self._give_back(data, "not_online")
            else:
                self.hold(session, origin, data)

    def dismiss(self, session: Session, worker: int, epoch: int) -> None:
        """Let another worker end an older session of the same agent; what waits there goes back."""
        request = {
            "did": session.did,
            "epoch": epoch,
            "connection": session.connection.index if session.connection is not None else AWAY_INDEX,
            "resume": None,
        }
        self._tell(worker, MOVE, self._worker, session.epoch, orjson.dumps(request))

    def correct(self, worker: int, did: str, epoch: int, session: Session | None) -> None:
        """Tell a worker of another node which session has taken the place of one here, if any has."""
        route: dict[str, object] = {"did": did}
        if session is not None:
            connection = session.connection.index if session.connection is not None else AWAY_INDEX
            route.update(connection=connection, epoch=session.epoch)
        self._tell(worker, ROUTE, self._worker, epoch, orjson.dumps(route))

    def _correct(self, worker: int, epoch: int, data: bytes) -> None:
        route = orjson.loads(data)
        if "epoch" in route:
            self._redirect(route["did"], epoch, worker, route["connection"], route["epoch"])
        else:
            with suppress(TableBusyError):  # it is asked for again then
                self._table.remove(route["did"].encode(), epoch)

    def _redirect(self, did: str, epoch: int, worker: int, connection: int, new: int) -> None:
        # If it cannot be done now, what follows the old route goes the way that the session went.
        with suppress(TableBusyError):
            self._table.redirect(did.encode(), epoch, worker, connection, new)

    def on_link_lost(self, worker: int) -> None:
        """Another worker has gone: its marks will not come, nor what had to come through it."""
        for move in list(self._moves.values()):
            if worker == move.old:
                self._give_up(move)
            else:
                self._mark(move, worker)

    def expire(self) -> None:
        """Go on with the sessions whose old worker does not answer."""
        now = time.monotonic()
        # The oldest come first.
        while self._moves and (move := next(iter(self._moves.values()))).deadline <= now:
            self._give_up(move)
        while self._gone and next(iter(self._gone.values()))[2] <= now:
            del self._gone[next(iter(self._gone))]
