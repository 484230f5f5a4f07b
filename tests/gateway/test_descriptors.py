"""How many connections fit into the descriptors that the system allows."""

from __future__ import annotations

import resource

import pytest

from gateway import descriptors


@pytest.mark.parametrize(
    ("limit", "connections", "requests"),
    [(64, 1, 1), (256, 144, 48), (1_024, 720, 240), (20_000, 15_840, 4_096), (1_048_576, 1_044_416, 4_096)],
)
def test_connections_and_requests_share_the_descriptors(monkeypatch, limit, connections, requests):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert descriptors.connections_per_worker() == connections
    assert descriptors.requests_per_worker() == requests
    assert connections + requests <= max(limit, 3)
