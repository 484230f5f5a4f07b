"""The swarm must notice what happens to its agents: `python -m pytest bench/test_swarm.py`."""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from rich.console import Console

from bench import servers, swarm
from bench.clients import Clients, Place, Totals
from bench.hold import Hold
from bench.holders import capabilities
from bench.memory import memory
from bench.swarm import Display, Plan, SwarmGateway, is_clean, pair_up, sample, summary

AGENTS = 200
PLAN = Plan(AGENTS, clients=3, hold=0.5, pairs=40, rate=1000, relay=0.5)


@pytest.fixture
def any_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured here: a test build will do."""
    monkeypatch.setattr(servers, "_check_extensions", lambda: None)


@pytest.fixture
def gateway(any_build: None) -> Iterator[SwarmGateway]:
    running = SwarmGateway(2, AGENTS)
    running.start(None)
    try:
        yield running
    finally:
        running.stop()


def ignore(totals: Totals) -> None:
    pass


def test_a_small_swarm_is_held_and_talks(any_build):
    figures = swarm.run(PLAN, 2, None, None, Console(quiet=True))
    assert is_clean(figures), summary(figures)
    assert figures["registered"] == sum(figures["agents_per_worker"].values()) == AGENTS
    assert figures["private_kib_per_connection"] > 0
    for relay in figures["relay"].values():
        assert relay["messages"] >= 500
        assert 0 < relay["p50_ms"] <= relay["p99_ms"] <= relay["percentiles_ms"]["99.9"]
    json.dumps(figures)


def test_one_worker_has_no_relay_across(any_build):
    figures = swarm.run(PLAN, 1, None, None, Console(quiet=True))
    assert is_clean(figures), summary(figures)
    assert figures["relay"]["across"] is None


def test_a_gateway_that_runs_already_is_measured(gateway):
    figures = swarm.run(replace(PLAN, relay=0), 1, gateway.url, gateway.pid, Console(quiet=True))
    assert is_clean(figures), summary(figures)
    assert figures["workers"] == 2
    figures = swarm.run(PLAN, 1, gateway.url, None, Console(quiet=True))
    assert is_clean(figures), summary(figures)
    assert figures["private_kib_per_connection"] is figures["idle_cores"] is None


def test_held_agents_answer_pings(any_build, monkeypatch):
    command = SwarmGateway.command
    options = ["--ping-interval", "1", "--pong-timeout", "2"]
    monkeypatch.setattr(SwarmGateway, "command", lambda self, port: command(self, port) + options)
    figures = swarm.run(replace(PLAN, hold=4, relay=0), 2, None, None, Console(quiet=True))
    assert is_clean(figures), summary(figures)
    assert figures["pings_answered"] >= AGENTS


def test_an_agent_that_is_replaced_is_lost(gateway):
    with Clients(gateway.url, AGENTS, 2, 0) as clients:
        places = clients.connect(ignore)
        [agent] = clients.take(places[:1])
        # Its key registers again: the gateway closes the connection that it had.
        gateway.connect(agent.key)
        agent.connection.settimeout(10)
        assert agent.connection.recv(2)[0] == 0x88
        agent.connection.close()
        assert clients.call_roll().held == AGENTS - 1
    with Clients(gateway.url, AGENTS, 2, 0) as clients:
        clients.connect(ignore)
        assert clients.call_roll().lost == 0


def test_agents_of_a_worker_that_dies_are_lost(gateway):
    with Clients(gateway.url, AGENTS, 2, 0) as clients:
        places = clients.connect(ignore)
        died = places[0].worker
        os.kill(worker_pid(gateway, died), signal.SIGKILL)
        while clients.totals().lost < sum(place.worker == died for place in places):
            clients.hold(0.1, ignore)
        totals = clients.call_roll()
        assert totals.held + totals.lost == AGENTS
        assert totals.silent == 0
        assert "dropped" in totals.first_loss


def worker_pid(gateway: SwarmGateway, number: int) -> int:
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{gateway.port}/health") as answer:
            worker = json.load(answer)["worker"]
        if worker["number"] == number:
            return int(worker["pid"])


def test_a_lost_agent_is_reported(gateway, monkeypatch):
    hold = Clients.hold

    def hold_while_a_worker_dies(clients, seconds, on_progress):
        monkeypatch.setattr(Clients, "hold", hold)
        os.kill(worker_pid(gateway, 0), signal.SIGKILL)
        hold(clients, seconds, on_progress)

    monkeypatch.setattr(Clients, "hold", hold_while_a_worker_dies)
    figures = swarm.run(PLAN, 2, gateway.url, gateway.pid, Console(quiet=True))
    assert figures["lost"] == figures["agents_per_worker"]["0"]
    assert not is_clean(figures)


def test_what_dies_while_it_talks_is_counted(gateway, monkeypatch):
    run, died, plan = swarm.Load.run, [], replace(PLAN, pairs=80, relay=0.7)

    def run_while_a_worker_dies(load, seconds, rate=0):
        if seconds == plan.relay and not died:
            died.append(worker_pid(gateway, 0))
            os.kill(died[0], signal.SIGKILL)
        return run(load, seconds, rate)

    monkeypatch.setattr(swarm.Load, "run", run_while_a_worker_dies)
    figures = swarm.run(plan, 2, gateway.url, gateway.pid, Console(quiet=True))
    assert figures["lost"] == figures["agents_per_worker"]["0"]
    within = figures["relay"]["within"]
    assert within["undelivered"] > 0
    assert within["messages"] > 0
    assert "dropped" in within["first_fault"]
    assert not is_clean(figures)


def test_agents_that_are_refused_are_not_registered(any_build, monkeypatch):
    monkeypatch.setattr(swarm, "MAX_CONNECTIONS_SPARE", -50)
    figures = swarm.run(replace(PLAN, relay=0), 2, None, None, Console(quiet=True))
    assert figures["registered"] < AGENTS
    assert "503" in figures["first_failure"]
    assert not is_clean(figures)


# --- holding ---------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[Hold, socket.socket]]:
    """One held connection, and the gateway's end of it."""
    with ExitStack() as stack:
        agent, gateway_end = socket.socketpair()
        stack.enter_context(gateway_end)
        hold = stack.enter_context(Hold(3))
        hold.add(1, agent)
        gateway_end.settimeout(10)
        yield hold, gateway_end


def test_a_ping_in_two_pieces_is_answered(pair):
    hold, gateway_end = pair
    for piece in (b"\x89\x04pi", b"ng\x89\x00"):
        gateway_end.sendall(piece)
        hold.serve(1)
    assert gateway_end.recv(100) == b"\x8a\x84" + bytes(4) + b"ping" + b"\x8a\x80" + bytes(4)
    assert hold.counts().pings == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "dropped a connection: EOF"),
        (b'\x88\x08\x0f\xa4{"n":1}', 'closed a connection: 4004 {"n":1'),
        (b"\x81\xff", "masked"),
    ],
)
def test_a_lost_connection_is_counted_with_its_reason(pair, data, reason):
    hold, gateway_end = pair
    gateway_end.sendall(data)
    gateway_end.shutdown(socket.SHUT_WR)
    hold.serve(1)
    counts = hold.counts()
    assert (counts.held, counts.lost, hold.socket(1)) == (0, 1, -1)
    assert reason in counts.first_loss


def test_a_connection_that_leads_nowhere_is_silent(pair, monkeypatch):
    hold, _ = pair
    monkeypatch.setattr("bench.hold.CALL_TIMEOUT", 0.1)
    hold.call_roll()
    counts = hold.counts()
    assert (counts.held, counts.lost, counts.silent) == (1, 0, 1)


def test_who_answers_late_is_not_silent(pair, monkeypatch):
    hold, gateway_end = pair
    monkeypatch.setattr("bench.hold.CALL_TIMEOUT", 0.1)
    hold.call_roll()
    assert gateway_end.recv(100) == b"\x89\x84" + bytes(4) + b"call"
    gateway_end.sendall(b"\x8a\x04call")
    hold.serve(1)
    assert hold.counts().silent == 0


def test_a_released_connection_stays_open_elsewhere(pair):
    hold, gateway_end = pair
    with socket.socket(fileno=os.dup(hold.socket(1))) as taken:
        hold.release(1)
        gateway_end.sendall(b"\x89\x00")
        assert select.select([hold.fileno()], [], [], 0)[0] == []
        assert taken.recv(2) == b"\x89\x00"
    assert hold.counts().lost == hold.counts().held == 0


# --- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("pairs", [1, 7, 40, 5000])
def test_partners_are_at_one_worker_or_at_two(workers, pairs):
    places = [Place(number % 5, number // 5, number * 7 % workers) for number in range(800)]
    chosen = sample(places, pairs)
    assert len(set(chosen)) == len(chosen) <= 2 * pairs
    found = pair_up(chosen)
    assert all(a.worker == b.worker for a, b in found["within"])
    assert all(a.worker != b.worker for a, b in found["across"])
    assert len(found["within"]) == len(chosen) // 2
    if workers > 1:
        assert len(found["across"]) == len(found["within"])


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_capabilities_have_the_size_asked_for(size):
    text = json.dumps(capabilities(size, 0, 1), separators=(",", ":"))
    assert len(text) == max(size, 2)


def test_memory_of_this_process_is_found():
    before = memory(os.getpid()).private
    with mmap.mmap(-1, 8 << 20) as block:  # of its own, where bytearray may get freed pages
        block.write(b"x" * len(block))
        assert memory(os.getpid()).private - before >= len(block) // 1024


def test_the_display_needs_no_terminal():
    with Display(Console(quiet=True)) as display:
        display.phase("holding", 0)(0, "nothing")
