"""What a fault of the gateway's own code costs: the connection that met it, and nobody else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from wire import TEXT, Agent, assert_exchange, frame
from worker_here import closed, run

from gateway.worker import Gateway


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("a fault")


def faults(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> tuple[object, int]:
    """Return how many were counted, and how many logged since."""
    return gateway.node.totals()["faults"], capfd.readouterr().err.count('"event": "fault"')


def test_a_fault_closes_with_4002_and_the_agent_resumes(monkeypatch, capfd):
    def scenario(gateway: Gateway, port: int) -> None:
        with Agent(port) as a, Agent(port) as b:
            with monkeypatch.context() as broken:
                broken.setattr(gateway, "on_message", fail)
                a.send(b"whatever")
                close = a.read_close()
            assert (close.close_code, close.close_reason["n"]) == (4002, "internal")
            a.assert_ended()
            assert faults(gateway, capfd) == (1, 1)
            assert closed(gateway) == {"4002": 1}
            with Agent(port, a.key, resume=a.resume_token) as again:
                assert again.resumed
                assert_exchange(again, b)

    run(lambda gateway, port: asyncio.to_thread(scenario, gateway, port))


def test_a_fault_before_register_closes_with_4002(monkeypatch, capfd):
    def scenario(gateway: Gateway, port: int) -> None:
        monkeypatch.setattr(gateway, "_register", fail)
        with Agent(port, register=False) as a:
            a.send(a.signed(a.registration()))
            assert a.read_close().close_code == 4002
        assert faults(gateway, capfd) == (1, 1)

    run(lambda gateway, port: asyncio.to_thread(scenario, gateway, port))


@pytest.mark.parametrize("size", [50, 200_000])  # the rest of a long frame is read behind its beginning
def test_what_follows_a_fault_in_a_frame_that_came_in_pieces_is_not_read(size, monkeypatch, capfd):
    def scenario(gateway: Gateway, port: int) -> None:
        with Agent(port) as a, Agent(port) as b:
            data = frame(TEXT, b"x" * size)
            a.write(data[:-1])
            b.ping()  # a pass of the loop, in which the first piece is read
            with monkeypatch.context() as broken:
                broken.setattr(gateway, "on_message", fail)
                a.write(data[-1:] + data)
                assert a.read_close().close_code == 4002
            a.assert_ended()
            b.ping()
        assert faults(gateway, capfd) == (1, 1)
        assert gateway.node.totals()["refused"] == {}

    run(lambda gateway, port: asyncio.to_thread(scenario, gateway, port))


def test_where_even_the_close_fails_the_connection_ends(monkeypatch, capfd):
    def scenario(gateway: Gateway, port: int) -> None:
        with Agent(port) as a, Agent(port) as b:
            with monkeypatch.context() as broken:
                broken.setattr(gateway, "on_message", fail)
                broken.setattr(gateway, "_close", fail)
                a.send(b"whatever")
                a.assert_ended()
            b.ping()
            assert faults(gateway, capfd) == (1, 2)
            assert gateway.router.connection_count == 1

    run(lambda gateway, port: asyncio.to_thread(scenario, gateway, port))


def test_a_fault_of_a_connection_that_is_being_closed_ends_it(monkeypatch, capfd):
    def scenario(gateway: Gateway, port: int) -> None:
        def close_and_fail(connection: Any, data: bytes) -> None:
            connection.close(4006)
            fail()

        with Agent(port) as a:
            with monkeypatch.context() as broken:
                broken.setattr(gateway, "on_message", close_and_fail)
                a.send(b"whatever")
                assert a.read_close().close_code == 4006
                a.assert_ended()
            assert faults(gateway, capfd) == (1, 1)

    run(lambda gateway, port: asyncio.to_thread(scenario, gateway, port))
