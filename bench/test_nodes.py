"""The benchmarks of several nodes run on real ones: `python -m pytest bench/test_nodes.py`."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from rich.console import Console
from rich.progress import Progress

from aiconexus.protocol import DIDKey
from bench import discover, registry, servers
from bench.nodes import RELAYS, Nodes, measure
from bench.redis_server import RedisServer
from bench.relay import Mode
from bench.servers import ServerError
from bench.swarm import Display, SwarmGateway


@pytest.fixture(autouse=True)
def any_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured here: a test build will do."""
    monkeypatch.setattr(servers, "_check_extensions", lambda: None)


def quiet() -> Progress:
    return Progress(console=Console(quiet=True))


@pytest.mark.parametrize("kind", RELAYS, ids=lambda kind: kind.name)
def test_agents_of_a_relay_talk(kind):
    relay = kind()
    agents = [DIDKey.generate() for _ in range(4)]
    with ExitStack() as stack:
        try:
            relay.start(stack)
        except ServerError as error:
            pytest.skip(str(error))
        figures = measure(relay, Mode("few", 2, burst=4), 0.2, agents)
        assert figures.messages_per_second > 10
        assert figures.us_per_message > 0
        if isinstance(relay, Nodes):
            assert len({server.pid for server in relay.servers} | {relay.redis.pid}) == 3


def test_the_registry_has_a_price():
    with RedisServer() as redis:
        costs = asyncio.run(registry.measure(redis, registry.TOGETHER, quiet()))
    assert costs["bytes_per_agent"] > 100
    assert all(cost["redis_us"] > 0 for name, cost in costs.items() if name != "bytes_per_agent")


def test_searches_are_timed_in_a_worker_and_at_a_gateway():
    worker = asyncio.run(discover.search_one_worker(200, 20, 5, quiet()))
    plan = discover.Plan(agents=1_000, kinds=20, clients=2, rounds=1, seconds=0.5, rate=500, searches=50)
    gateway = SwarmGateway(2, plan.agents)
    gateway.start(None)
    try:
        with Display(Console(quiet=True)) as display:
            served = discover.search_gateway(gateway, plan, display)
    finally:
        gateway.stop()
    assert worker.keys() == served["searches"].keys()
    assert all(0 < times["p50_ms"] <= times["p99_ms"] for times in worker.values())
    assert all(0 < run["p50_ms"] <= run["p99_ms"] for run in served["routing"].values())
