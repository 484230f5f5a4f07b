"""Where agents of other nodes are, with a stand-in for the registry in Redis."""

from __future__ import annotations

import pytest

from aiconexus.protocol import DIDKey
from gateway._mesh import NODE_WORKERS
from gateway._routing import RoutingTable
from gateway.locations import Locations
from gateway.shared_registry import Place

DID = DIDKey.from_seed(b"a" * 32).did


class FakeCluster:
    """Answers every question at once."""

    is_connected = True

    def __init__(self) -> None:
        self.answer: Place | Exception | None = None
        self.asked = 0

    def locate(self, did, done) -> None:
        self.asked += 1
        done(self.answer)

    def reach(self, worker: int) -> bool:
        return True


class Asked:
    """Locations of a node, with what became of the messages."""

    def __init__(self) -> None:
        self.cluster, self.table = FakeCluster(), RoutingTable(100, 100)
        self.delivered: list[bytes] = []
        self.refused: list[tuple[bytes, str]] = []
        self.locations = Locations(
            self.cluster,
            self.table,
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
