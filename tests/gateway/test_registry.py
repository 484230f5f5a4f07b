"""Presence: registration, takeover, away, expiry, with a stand-in for the connection."""

from __future__ import annotations

import time

import pytest

from aiconexus.protocol import DIDKey
from aiconexus.protocol.limits import AWAY_MAX_BYTES, AWAY_MAX_MESSAGES
from gateway._ledger import Ledger
from gateway._routing import AWAY_INDEX, RoutingTable
from gateway.registry import Registry, Shown

LEDGER = Ledger(1)
LEDGER.begin(0, 0)
A, B = (DIDKey.from_seed(letter * 32).did for letter in (b"a", b"b"))


class FakeConnection:
    """What the registry uses of a connection."""

    def __init__(self, index: int, undelivered: tuple[bytes, ...] = ()) -> None:
        self.index = index
        self._undelivered = list(undelivered)

    def take_undelivered(self) -> list[bytes]:
        taken, self._undelivered = self._undelivered, []
        return taken


@pytest.fixture
def table() -> RoutingTable:
    return RoutingTable()


@pytest.fixture
def registry(table) -> Registry:
    return Registry(table, LEDGER, worker=0, away=30)


def register(registry, did=A, connection=None, token="token", resume=None):
    return registry.register(did, connection or FakeConnection(1), Shown(), token, resume)


def test_a_registered_agent_has_a_route_and_is_online(registry, table):
    session = registry.register(A, FakeConnection(7), Shown(b"{}"), "token", None).session
    assert table.get(A.encode()) == (0, 7, session.epoch)
    assert (A in registry, B in registry, len(registry)) == (True, False, 1)
    assert (registry.get(A), registry.get(B)) == (session, None)
    assert (session.status, session.card) == ("online", b"{}")


def test_the_newest_registration_wins_and_returns_the_connection_it_replaced(registry, table):
    old = FakeConnection(1, (b"one", b"two"))
    first = register(registry, connection=old).session
    done = register(registry, connection=FakeConnection(2), token="other")
    assert done.replaced is old
    assert done.held.take() == [b"one", b"two"]
    assert not done.resumed
    assert done.session.id != first.id
    assert done.session.epoch > first.epoch
    assert table.get(A.encode()) == (0, 2, done.session.epoch)
    assert len(registry) == 1


def test_late_close_of_a_replaced_session_keeps_the_new_route(registry, table):
    first = register(registry).session
    second = register(registry, connection=FakeConnection(2)).session
    assert not registry.drop(first)
    assert not registry.remove(first)
    assert table.get(A.encode()) == (0, 2, second.epoch)
    assert registry.get(A) is second
    assert registry.away_count == 0


def test_a_dropped_session_is_away_and_keeps_its_route(registry, table):
    session = register(registry).session
    assert registry.drop(session)
    assert not registry.drop(session)
    assert table.get(A.encode()) == (0, AWAY_INDEX, session.epoch)
    assert session.status == "away"
    assert (len(registry), registry.away_count) == (1, 1)


def test_a_resume_with_the_token_continues_the_session(registry):
    first = register(registry, token="first").session
    registry.drop(first)
    assert first.hold(b"waits")
    done = register(registry, token="second", resume="first")
    assert done.resumed
    assert done.replaced is None
    assert done.held.take() == [b"waits"]
    assert done.session.id == first.id
    assert done.session.epoch > first.epoch
    assert registry.away_count == 0


@pytest.mark.parametrize("resume", [None, "", "wrong", "second"])
def test_another_token_begins_a_new_session(registry, resume):
    first = register(registry, token="first").session
    registry.drop(first)
    first.hold(b"waits")
    done = register(registry, token="second", resume=resume)
    assert not done.resumed
    assert done.held.take() == [b"waits"]
    assert done.session.id != first.id


def test_the_token_of_another_agent_is_another_token(registry):
    registry.drop(register(registry, A, token="first").session)
    assert not register(registry, B, resume="first").resumed


def test_a_removed_session_is_gone_with_its_route(registry, table):
    session = register(registry).session
    assert registry.remove(session)
    assert not registry.remove(session)
    assert table.get(A.encode()) is None
    assert (A in registry, len(registry), len(table)) == (False, 0, 0)
    assert not register(registry, resume="token").resumed


def test_sessions_expire_in_the_order_in_which_they_dropped(table):
    registry = Registry(table, LEDGER, worker=0, away=0.05)
    sessions = [register(registry, did).session for did in (A, B)]
    assert list(registry.expire()) == []
    for session in reversed(sessions):
        registry.drop(session)
    deadline = time.monotonic() + 5
    expired = []
    while len(expired) < 2:
        expired += registry.expire()
        assert time.monotonic() < deadline
    assert expired == sessions[::-1]
    assert (len(registry), registry.away_count, len(table)) == (0, 0, 0)


def test_one_that_came_back_in_time_does_not_expire(table):
    registry = Registry(table, LEDGER, worker=0, away=0.05)
    registry.drop(register(registry, A).session)
    back = register(registry, A, connection=FakeConnection(2)).session
    registry.drop(register(registry, B).session)
    deadline = time.monotonic() + 5
    while not list(registry.expire()):
        assert time.monotonic() < deadline
    assert registry.get(A) is back
    assert table.get(A.encode()) == (0, 2, back.epoch)


def test_what_waits_is_bounded_in_messages_and_bytes(registry):
    session = register(registry).session
    for number in range(AWAY_MAX_MESSAGES):
        assert session.hold(b"%d" % number)
    assert not session.hold(b"x")
    assert list(session.release()) == [b"%d" % number for number in range(AWAY_MAX_MESSAGES)]
    assert list(session.release()) == []
    assert session.hold(b"x" * AWAY_MAX_BYTES)
    assert not session.hold(b"x")
    assert session.hold(b"")
    session.release()
    assert session.hold(b"x" * AWAY_MAX_BYTES)


def test_an_older_message_can_be_put_first(registry):
    session = register(registry).session
    assert session.hold(b"two")
    assert session.hold_first(b"one")
    assert list(session.release()) == [b"one", b"two"]


def test_epochs_only_grow(registry):
    epochs = [register(registry, did).session.epoch for did in (A, B, A, A, B)]
    assert epochs == sorted(set(epochs))
    assert epochs[0] >= 1


# --- sessions that other workers take ----------------------------------------------------------


def test_a_session_that_is_at_another_worker_is_named_not_taken(registry, table):
    theirs, _ = table.bind(A.encode(), 3, 9)
    done = register(registry)
    assert done.elsewhere == (3, theirs)
    assert (done.resumed, done.replaced, done.held.take()) == (False, None, [])
    assert table.get(A.encode()) == (0, 1, done.session.epoch)


def test_a_session_whose_route_was_taken_is_given_to_who_asks_by_its_epoch(registry, table):
    connection = FakeConnection(1, (b"one",))
    session = register(registry, connection=connection).session
    table.bind(A.encode(), 3, 9)
    assert registry.give(A, session.epoch + 1) is None
    assert registry.give(A, session.epoch) is session
    assert registry.give(A, session.epoch) is None
    assert len(registry) == 0


def test_a_dropped_session_whose_route_was_taken_still_waits_to_be_fetched(registry, table):
    session = register(registry).session
    table.bind(A.encode(), 3, 9)
    assert registry.drop(session)
    assert session.hold(b"waits")
    assert A not in registry
    assert registry.away_count == 0
    assert registry.give(A, session.epoch) is session
    assert list(session.release()) == [b"waits"]


def test_an_agent_that_returns_before_the_other_worker_has_fetched_it_leaves_two_sessions(registry, table):
    old = register(registry).session
    theirs, _ = table.bind(A.encode(), 3, 9)
    done = register(registry, connection=FakeConnection(2))
    assert done.elsewhere == (3, theirs)
    assert registry.get(A) is done.session
    assert registry.drop(old)
    assert registry.give(A, old.epoch) is old
    assert registry.get(A) is done.session


def test_a_taken_session_that_nobody_fetches_expires(table):
    registry = Registry(table, LEDGER, worker=0, away=0.05)
    session = register(registry).session
    table.bind(A.encode(), 3, 9)
    registry.drop(session)
    deadline = time.monotonic() + 5
    while not (expired := list(registry.expire())):
        assert time.monotonic() < deadline
    assert expired == [session]
    assert table.get(A.encode())[0] == 3, "the route is the other worker's"
