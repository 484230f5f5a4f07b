"""Watches: agents that are told who comes, goes, drops and changes.

A worker tells what happens to its agents to those other workers that have a watch. The same agent may be
told of by two workers, when it moves; the epoch of its session says which of the two is newer. With other
nodes the shared registry tells, in the order in which it was changed, and then only it is heard.

A watch keeps nothing of the agents that it has told of. Where events may have been missed, because a worker
died, or Redis was lost, the watchers are told so, and ask again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from gateway import replies
from gateway.directory import Offer, Query, View
from gateway.kinds import CHANGED, WATCHING

if TYPE_CHECKING:
    from gateway.registry import Session

# Of one session.
WATCHES_MAX = 16
# Longer than anything is on its way between two workers.
RECENT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Change:
    """What has happened to an agent.

    Attributes:
        event: "join", "leave", "away" or "update".
        did: The agent.
        status: "online", "away" or "offline".
        epoch: Of its session.
        before: None if it was not there.
        now: None if it is not there any more.
    """

    event: str
    did: str
    status: str
    epoch: int
    before: View | None
    now: View | None

    def dumps(self) -> bytes:
        """Return it as a record."""
        views = [view and (view.card.decode(), view.hidden) for view in (self.before, self.now)]
        return orjson.dumps([self.event, self.did, self.status, self.epoch, *views])

    @classmethod
    def loads(cls, data: bytes) -> Change:
        """Read a record."""
        event, did, status, epoch, *views = orjson.loads(data)
        before, now = (view and View(view[0].encode(), view[1]) for view in views)
        return cls(event, did, status, epoch, before, now)


@dataclass(frozen=True, slots=True)
class Watch:
    """What a session wants to be told of. `id` is that of its DISCOVER."""

    session: Session
    id: str
    query: Query


class Watches:
    """The watches of the agents of one worker.

    Args:
        worker: The number of this worker.
        read_offers: Returns what a card offers.
        others: Returns the other workers of this node.
        tell: Sends a record to another worker, as `Router.tell`.
        notify: Called with a watch, the event, and the agents to tell of, each as JSON.
        on_wanted: Called when there is a watch, and when there is none any more.
    """

    def __init__(
        self,
        worker: int,
        *,
        read_offers: Callable[[bytes], Iterable[Offer]],
        others: Callable[[], list[int]],
        tell: Callable[[int, int, int, int, bytes], bool],
        notify: Callable[[Watch, str, list[bytes]], None],
        on_wanted: Callable[[bool], None],
    ) -> None:
        self._worker = worker
        self._read_offers = read_offers
        self._others = others
        self._tell = tell
        self._notify = notify
        self._on_wanted = on_wanted
        # By session, whose own id changes while it comes over from another worker, and id.
        self._watches: dict[Session, dict[str, Watch]] = {}
        self._interested: set[int] = set()  # other workers that have a watch
        self._behind: set[int] = set()  # those of them that could not be told something
        self._untold: set[int] = set()  # other workers that could not be told whether there is a watch here
        self._recent: dict[str, tuple[float, int]] = {}  # of agents: when, and the epoch

    @property
    def has_any(self) -> bool:
        """Whether somebody here watches."""
        return bool(self._watches)

    def add(self, session: Session, id_: str, query: Query) -> bool:
        """Begin a watch; False if the session has too many."""
        own = self._watches.get(session, {})
        if len(own) >= WATCHES_MAX:
            return False
        was_empty = not self._watches
        self._watches.setdefault(session, own)[id_] = Watch(session, id_, query)
        if was_empty:
            self._say_wanted(self._others())
            self._on_wanted(True)
        return True

    def remove(self, session: Session, id_: str | None = None) -> None:
        """End one watch of a session, or all."""
        own = self._watches.get(session)
        if own is None:
            return
        if id_ is not None:
            own.pop(id_, None)
        if id_ is None or not own:
            del self._watches[session]
        if not self._watches:
            self._recent.clear()
            self._say_wanted(self._others())
            self._on_wanted(False)

    def _say_wanted(self, workers: Iterable[int]) -> None:
        for worker in workers:
            if self._tell(worker, WATCHING, self._worker, 0, b"1" if self._watches else b"0"):
                self._untold.discard(worker)
            else:
                self._untold.add(worker)

    # --- other workers -------------------------------------------------------------------------

    def on_link(self, worker: int) -> None:
        """Another worker has begun."""
        if self._watches:
            self._say_wanted([worker])

    def on_link_lost(self, worker: int) -> None:
        """Another worker has gone, with its agents: what became of them is not told."""
        self._interested.discard(worker)
        self._behind.discard(worker)
        self._untold.discard(worker)
        self.doubt()

    def on_watching(self, worker: int, data: bytes) -> None:
        """Another worker has a watch, or none any more."""
        if data == b"1":
            self._interested.add(worker)
        else:
            self._interested.discard(worker)

    def doubt(self) -> None:
        """Tell all watchers that they may have missed something."""
        for own in list(self._watches.values()):
            for watch in list(own.values()):
                self._notify(watch, "missed", [])

    def on_changed(self, data: bytes) -> None:
        """Another worker tells what has happened to one of its agents; with no data: that it could not."""
        if data:
            self.take(Change.loads(data))
        else:
            self.doubt()

    def catch_up(self) -> None:
        """Tell other workers what they could not be told, or that they have missed something."""
        if self._untold:
            self._say_wanted(list(self._untold))
            if self._watches and not self._untold:
                self.doubt()
        for worker in list(self._behind):
            if self._tell(worker, CHANGED, self._worker, 0, b""):
                self._behind.discard(worker)

    # --- changes -------------------------------------------------------------------------------

    def publish(self, change: Change) -> None:
        """Tell whoever wants to know what has happened to an agent of this worker."""
        if self._watches:
            self.take(change)
        if self._interested:
            data = change.dumps()
            for worker in list(self._interested):
                if worker in self._behind or not self._tell(worker, CHANGED, self._worker, 0, data):
                    self._behind.add(worker)

    def take(self, change: Change, *, is_ordered: bool = False) -> None:
        """Tell the watchers here; `is_ordered`: nothing older can follow."""
        is_stale = not is_ordered and not self._is_news(change)
        matches_now = self._matcher(change.did, change.now)
        matched = matches_now if change.before == change.now else self._matcher(change.did, change.before)
        gone = replies.agent(change.did, "offline", b"")
        agent = replies.agent(change.did, change.status, change.now.card) if change.now else gone
        for own in list(self._watches.values()):
            for watch in list(own.values()):
                was, is_ = matched(watch.query), matches_now(watch.query)
                if is_ and not is_stale:
                    # Who had not heard of it before sees it come.
                    self._notify(watch, change.event if was else "join", [agent])
                elif was and not is_:
                    # What is newer is told to others only: this one does not fit any more.
                    self._notify(watch, "leave", [gone])

    def _is_news(self, change: Change) -> bool:
        """Whether nothing newer was told of an agent."""
        now = time.monotonic()
        if change.epoch < self._recent.get(change.did, (0.0, 0))[1]:
            return False
        self._recent.pop(change.did, None)  # the oldest come first
        self._recent[change.did] = (now, change.epoch)
        while next(iter(self._recent.values()))[0] < now - RECENT_SECONDS:
            del self._recent[next(iter(self._recent))]
        return True

    def _matcher(self, did: str, view: View | None) -> Callable[[Query], bool]:
        """Return what tells whether an agent that can be seen so is what is asked for."""
        if view is None:
            return lambda _: False
        offers = tuple(self._read_offers(view.card)) if view.card else ()
        return lambda query: query.matches(did, offers, hidden=view.hidden)
