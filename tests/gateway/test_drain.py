"""What a worker that stops does with those who are just coming."""

from __future__ import annotations

import asyncio

from wire import CLOSE, Agent
from worker_here import run

from gateway.worker import Gateway


def test_a_gateway_that_stops_grants_no_session_any_more():
    async def test(gateway: Gateway, port: int) -> None:
        agent = await asyncio.to_thread(Agent, port, register=False)
        with agent:
            gateway.stop()
            for _ in range(100):
                await asyncio.sleep(0)
            assert gateway.health()["status"] == "draining"
            agent.send(agent.signed(agent.registration()))
            close = await asyncio.to_thread(agent.read_frame)
            assert close.opcode == CLOSE
            assert (close.close_code, close.close_reason["n"]) == (4001, "draining")
            assert 500 <= close.close_reason["r"] < 1500

    run(test, drain_seconds=2)
