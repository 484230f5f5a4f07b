"""Where agents of other nodes are, with a stand-in for the registry in Redis."""

from __future__ import annotations

import pytest

from aiconexus.protocol import DIDKey
from gateway import replies
from gateway._ledger import Ledger
from gateway._mesh import NODE_WORKERS
from gateway._routing import RoutingTable
from gateway.locations import Locations
from gateway.shared_registry import Place

DID, GATEWAY = (DIDKey.from_seed(letter * 32).did for letter in (b"a", b"g"))


class FakeCluster:
    """Answers every question at once, unless it `answers_late`."""

    is_connected = True

    def __init__(self) -> None:
        self.answer: Place | Exception | None = None
        self.answers_late = False
        self.asked = 0

    def locate(self, did, done) -> None:
        self.asked += 1
        self.answer_now = done
        if not self.answers_late:
            done(self.answer)

    def reach(self, worker: int) -> bool:
        return True


class Asked:
    """Locations of a node, with what became of the messages."""

    def __init__(self) -> None:
        self.cluster, self.table, self.ledger = FakeCluster(), RoutingTable(100, 100), Ledger(1)
        self.ledger.begin(0, 0, GATEWAY.encode())
        self.delivered: list[bytes] = []
        self.refused: list[tuple[bytes, str]] = []
        self.locations = Locations(
            self.cluster,
            self.table,
            self.ledger,
            deliver=lambda did, waiting: self.delivered.append(waiting.data),
            refuse=lambda did, waiting, cause: self.refused.append((waiting.data, cause)),
        )


@pytest.fixture
def asked() -> Asked:
    return Asked()


def test_who_is_at_another_node_has_a_route_from_then_on(asked):
    asked.cluster.answer = Place(NODE_WORKERS + 1, 5, 9)
    assert asked.locations.search(DID, b"hello", None) is None
    assert asked.delivered == [b"hello"]
    assert asked.table.get(DID.encode()) == (NODE_WORKERS + 1, 5, 9)


def test_who_is_nowhere_is_not_online(asked):
    assert asked.locations.search(DID, b"hello", None) is None
    assert asked.refused == [(b"hello", "not_online")]


def test_who_is_said_to_be_here_and_is_not_is_asked_for_once(asked):
    asked.cluster.answer = Place(0, 5, 9)  # of a worker that has died
    assert asked.locations.search(DID, b"hello", None) is None
    assert asked.refused == [(b"hello", "unreachable")]
    assert asked.cluster.asked == 1
    assert DID not in asked.locations


def test_an_error_is_written_down_while_its_receiver_is_looked_for(asked):
    """For if this process dies now, its receiver would not hear of the message at all."""
    message_id = "00000001-0000-4000-8000-000000000000"
    error = replies.error(GATEWAY, DID, "away_expired", correlation_id=message_id)
    asked.cluster.answers_late = True
    assert asked.locations.search(DID, error, None) is None
    assert asked.ledger.read(0, 0) == [(DID, GATEWAY, message_id, 0)]
    asked.cluster.answer_now(Place(NODE_WORKERS + 1, 5, 9))
    assert asked.delivered == [error]
    asked.ledger.settle()
    assert asked.ledger.read(0, 0) == []
