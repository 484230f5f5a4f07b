"""The benchmark of connecting connects: `python -m pytest bench/test_connect.py`."""

from __future__ import annotations

import asyncio
import json

import pytest

from bench import connect, servers


@pytest.fixture(autouse=True)
def any_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured here: a test build will do."""
    monkeypatch.setattr(servers, "_check_extensions", lambda: None)


def test_agents_and_aiortc_connect_in_turns():
    gateway, steps = servers.Gateway(), []
    gateway.start(None)
    try:
        results = asyncio.run(connect.measure(gateway.url, gateway.pid, 2, 2, lambda: steps.append(1)))
    finally:
        gateway.stop()
    assert len(steps) == connect.WARM_UP + 4
    assert [(name, len(result.rounds)) for name, result in results.items()] == [("agents", 2), ("aiortc", 2)]
    figures = json.loads(json.dumps(connect.as_json(results)))
    assert figures["agents"]["ms"] > 0
    assert figures["agents"]["cpu_ms"] > 0
    assert figures["ratio_range"][0] <= figures["ratio"] <= figures["ratio_range"][1]
    text = connect.describe(results, "Somewhere.")
    assert text.count("\n| a") == 2
