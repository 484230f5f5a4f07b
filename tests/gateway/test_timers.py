"""The timer wheel, seen through what it does to connections. Time is moved by hand, not waited for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from wire import PING, PONG, Agent
from worker_here import closed, run

from gateway.worker import Gateway

# The wheel has 512 slots of 0.1 s; what is due later goes round.
WHEEL_SECONDS = 51.2


class Clock:
    """Moves a gateway's time, relative to when it was made."""

    def __init__(self, gateway: Gateway) -> None:
        self._router: Any = gateway.router
        self._start = self._router.timers.now / 10

    def move(self, seconds: float) -> None:
        self._router.advance(self._start + seconds)


def pings(gateway: Gateway) -> int:
    return gateway.node.counters.total("pings_sent")


@pytest.mark.parametrize("seconds", [1, 51.1, 51.2, 51.3, 60, 102.4, 153.7, 3600])
def test_a_ping_is_sent_when_it_is_due_however_far_ahead(seconds):
    async def test(gateway: Gateway, port: int) -> None:
        agent = await asyncio.to_thread(Agent, port)
        with agent:
            clock = Clock(gateway)
            for share in (0.25, 0.5, 0.75):
                clock.move(seconds * share)
            clock.move(seconds - 0.25)
            assert pings(gateway) == 0
            clock.move(seconds + 0.2)
            assert pings(gateway) == 1
            assert (await asyncio.to_thread(agent.read_frame)).opcode == PING

    run(test, ping_interval=seconds, pong_timeout=3600)


def test_a_jump_over_several_rounds_of_the_wheel_misses_nothing():
    async def test(gateway: Gateway, port: int) -> None:
        agent = await asyncio.to_thread(Agent, port)
        with agent:
            Clock(gateway).move(100 + 3 * WHEEL_SECONDS)
            close = await asyncio.to_thread(agent.read_close)
            assert close.close_code == 4004

    run(test, ping_interval=60, pong_timeout=60)


def test_activity_puts_the_ping_off():
    async def test(gateway: Gateway, port: int) -> None:
        agent = await asyncio.to_thread(Agent, port)
        with agent:
            clock = Clock(gateway)
            clock.move(99)
            await asyncio.to_thread(agent.ping)
            clock.move(198)
            assert pings(gateway) == 0
            clock.move(200)
            assert pings(gateway) == 1
            assert (await asyncio.to_thread(agent.read_frame)).opcode == PING
            agent.write_frame(PONG)
            await asyncio.to_thread(agent.ping)
            clock.move(299)
            assert pings(gateway) == 1
            clock.move(301)
            assert pings(gateway) == 2

    run(test, ping_interval=100, pong_timeout=50)


def test_a_missing_pong_and_a_late_register_are_told_apart():
    async def test(gateway: Gateway, port: int) -> None:
        agent = await asyncio.to_thread(Agent, port)
        stranger = await asyncio.to_thread(lambda: Agent(port, register=False))
        with agent, stranger:
            clock = Clock(gateway)
            clock.move(59)
            assert (gateway.router.connection_count, pings(gateway)) == (2, 0)
            clock.move(61)
            assert (await asyncio.to_thread(stranger.read_close)).close_code == 4007
            clock.move(99)
            assert pings(gateway) == 0
            clock.move(101)
            clock.move(129)
            assert closed(gateway) == {"4007": 1}
            clock.move(131)
            assert (await asyncio.to_thread(agent.read_close)).close_code == 4004

    run(test, register_timeout=60, ping_interval=100, pong_timeout=30)


def test_the_idle_timeout_counts_messages_only():
    async def test(gateway: Gateway, port: int) -> None:
        agent = await asyncio.to_thread(Agent, port)
        with agent:
            clock = Clock(gateway)
            clock.move(100)
            agent.write_frame(PING, b"x")
            assert (await asyncio.to_thread(agent.read_frame)).opcode == PONG
            clock.move(299)
            assert closed(gateway) == {}
            clock.move(301)
            assert closed(gateway) == {"4006": 1}

    run(test, idle_timeout=300, ping_interval=3600)


def test_a_fault_with_one_connection_does_not_stop_the_clock_of_the_others(monkeypatch, capfd):
    async def test(gateway: Gateway, port: int) -> None:
        agents = [await asyncio.to_thread(lambda: Agent(port, register=False)) for _ in range(20)]
        on_timeout = gateway.on_timeout
        calls = 0

        def fail_every_other(connection: Any, name: str) -> None:
            nonlocal calls
            calls += 1
            if calls % 2:
                raise RuntimeError("a fault")
            on_timeout(connection, name)

        monkeypatch.setattr(gateway, "on_timeout", fail_every_other)
        clock = Clock(gateway)
        clock.move(61)
        assert calls == 20
        assert closed(gateway) == {"4007": 10, "4002": 10}
        clock.move(64)  # nobody answers the CLOSE
        codes = []
        for agent in agents:
            codes.append((await asyncio.to_thread(agent.read_close)).close_code)
            agent.drop()
        assert sorted(codes) == [4002] * 10 + [4007] * 10
        assert gateway.node.totals()["faults"] == 10
        assert gateway.router.connection_count == 0

    run(test, register_timeout=60)
    assert capfd.readouterr().err.count('"event": "fault"') == 10


def test_one_that_does_not_read_has_longer_to_find_the_close():
    async def test(gateway: Gateway, port: int) -> None:
        sender = await asyncio.to_thread(Agent, port)
        slow = await asyncio.to_thread(lambda: Agent(port, receive_buffer=2048))
        quick = await asyncio.to_thread(Agent, port)
        with sender, slow, quick:
            data = sender.offer(slow.did, 60_000)
            while not closed(gateway):
                sender.write_frame(PING)
                await asyncio.to_thread(sender.read_frame)
                if not closed(gateway):
                    sender.send(data)
            quick.unregister()
            await asyncio.to_thread(quick.read_close)
            clock = Clock(gateway)
            clock.move(3)
            await asyncio.to_thread(quick.assert_ended)
            assert closed(gateway) == {"4003": 1, "1000": 1}
            assert gateway.router.connection_count == 2
            clock.move(11)
            sender.write_frame(PING)
            while (await asyncio.to_thread(sender.read_frame)).opcode != PONG:
                pass
            assert gateway.router.connection_count == 1

    run(test)
