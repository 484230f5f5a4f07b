"""Watches: who is told, and that nothing stays behind when a watcher leaves."""

from __future__ import annotations

import pytest

from aiconexus.protocol import DIDKey
from aiconexus.protocol.models import DiscoverPayload
from gateway._ledger import Ledger
from gateway.directory import Query
from gateway.registry import Session, Shown
from gateway.watches import WATCHES_MAX, Change, View, Watches

LEDGER = Ledger(1)
A, B = (DIDKey.from_seed(letter * 32).did for letter in (b"a", b"b"))
EVERYBODY = Query.of(DiscoverPayload())


class Told:
    """Watches of worker 0, with what they said to whom."""

    def __init__(self) -> None:
        self.wanted: list[bool] = []
        self.events: list[tuple[str, str]] = []
        self.watches = Watches(
            0,
            read_offers=lambda card: (),
            others=list,
            tell=lambda worker, kind, origin, epoch, data: True,
            notify=lambda watch, event, agents: self.events.append((watch.id, event)),
            on_wanted=self.wanted.append,
        )


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def session() -> Session:
    return Session(A, None, 1, Shown(), "token", LEDGER)


def test_a_watch_hears_what_happens_until_it_ends(told, session):
    assert told.watches.add(session, "w", EVERYBODY)
    told.watches.publish(Change("join", B, "online", 7, None, View(b"{}", ())))
    told.watches.remove(session, "w")
    told.watches.publish(Change("leave", B, "online", 7, View(b"{}", ()), None))
    assert told.events == [("w", "join")]
    assert told.wanted == [True, False]


def test_a_session_has_a_limit_of_watches(told, session):
    assert all(told.watches.add(session, str(number), EVERYBODY) for number in range(WATCHES_MAX))
    assert not told.watches.add(session, "one more", EVERYBODY)


def test_a_session_that_gets_its_id_back_from_another_worker_leaves_no_watch_behind(told, session):
    told.watches.add(session, "w", EVERYBODY)
    session.id = "what it was at the other worker"
    told.watches.remove(session)
    assert not told.watches.has_any
    assert told.wanted == [True, False]
