"""Sessions whose agent has registered at another worker: it fetches them, or they are found."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from wire import Agent
from worker_here import run

from gateway import worker
from gateway.worker import Gateway

ELSEWHERE = 7


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_worker_has_time_to_fetch_a_session_whose_route_it_has(seconds, monkeypatch):
    monkeypatch.setattr(worker, "FETCH_SECONDS", seconds)

    async def test(gateway: Gateway, port: int) -> None:
        agent = await asyncio.to_thread(Agent, port)
        with agent:
            sweep: Any = gateway._look_for_taken_sessions
            for _ in range(3):
                sweep()
            assert gateway.registry.get(agent.did) is not None
            gateway.node.table.bind(agent.did.encode(), ELSEWHERE, 0)
            sweep()
            assert gateway.registry.get(agent.did) is not None
            sweep()
            session = gateway.registry.get(agent.did)
            if seconds:
                assert session is not None
                await asyncio.to_thread(agent.ping)
            else:
                assert session is None
                close = await asyncio.to_thread(agent.read_close)
                assert close.close_code == 4504

    run(test)
