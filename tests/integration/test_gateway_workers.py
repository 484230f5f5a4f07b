"""Several workers as one gateway: routing across them, takeover, resume, and what happens when one goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from async_agent import AsyncAgent
from flock import Flock
from processes import children, process_state, send_signal
from searches import dids, discover
from wire import Agent, agents_at, assert_exchange, wait_until

from aiconexus.protocol import DIDKey

WORKERS = 4


@pytest.fixture
def gateway(start_gateway):
    return start_gateway("--workers", str(WORKERS), "--message-rate", "0")


def agents_apart(port: int) -> tuple[Agent, Agent]:
    """Two agents at different workers."""
    first = Agent(port)
    while True:
        second = Agent(port)
        if second.register_answer["ext"]["worker"] != first.register_answer["ext"]["worker"]:
            return first, second
        second.close()


def moved(agent: Agent, *, resume: bool) -> Agent:
    """Register the agent anew until another worker has it."""
    token = agent.resume_token
    before = agent.register_answer["ext"]["worker"]
    while True:
        back = Agent(agent.port, agent.key, resume=token if resume else None)
        if back.register_answer["ext"]["worker"] != before:
            return back
        token = back.resume_token
        back.drop()


# --- routing -----------------------------------------------------------------------------------


def test_agents_at_different_workers_exchange_exact_bytes(gateway):
    first, second = agents_apart(gateway.port)
    with first, second:
        for _ in range(20):
            assert_exchange(first, second)
        big = first.offer(second.did, 65_536)
        first.send(big)
        assert second.read_text() == big
    assert gateway.health()["counters"]["messages_crossed"] >= 41


def test_who_has_its_answer_can_be_reached_from_every_worker(gateway):
    senders: dict[int, Agent] = {}
    while len(senders) < WORKERS:
        agent = Agent(gateway.port)
        worker = agent.register_answer["ext"]["worker"]
        if worker in senders:
            agent.close()
        else:
            senders[worker] = agent
    for _ in range(20):
        with Agent(gateway.port) as fresh:
            for sender in senders.values():
                data = sender.offer(fresh.did)
                sender.send(data)
                assert fresh.read_text() == data
            fresh.close()
    for sender in senders.values():
        sender.drop()


def test_an_agent_that_nobody_knows_is_unknown_at_every_worker(gateway):
    for _ in range(2 * WORKERS):
        with Agent(gateway.port) as agent:
            data = agent.envelope(DIDKey.generate().did)
            agent.send(agent.offer(data["to"]))
            assert agent.receive()["payload"]["details"]["name"] == "not_online"


# --- takeover and resume -----------------------------------------------------------------------


def test_a_takeover_at_another_worker_closes_the_old_session_and_keeps_the_new_route(gateway):
    with Agent(gateway.port) as other:
        agent = Agent(gateway.port)
        for _ in range(10):
            new = moved(agent, resume=False)
            close = agent.read_close()
            assert (close.close_code, close.close_reason["n"]) == (4504, "replaced")
            agent.drop()
            assert_exchange(new, other)
            agent = new
        agent.close()
    wait_until(lambda: gateway.health()["routes"] == gateway.health()["sessions"] == 1)


def test_what_waits_comes_along_to_another_worker_in_order(gateway):
    with Agent(gateway.port) as sender:
        agent = Agent(gateway.port)
        moves = 0
        while moves < 5:
            away = gateway.health()["away"]
            agent.drop()
            wait_until(lambda away=away: gateway.health()["away"] == away + 1)
            sent = [sender.candidate(agent.did, number) for number in range(20)]
            sender.send(*sent)
            sender.ping()
            back = Agent(gateway.port, agent.key, resume=agent.resume_token)
            assert back.resumed
            assert back.session == agent.session
            assert [back.read_text() for _ in sent] == sent
            assert_exchange(back, sender)
            moves += back.register_answer["ext"]["worker"] != agent.register_answer["ext"]["worker"]
            agent = back
        agent.close()


@pytest.mark.timeout(180)
async def test_order_is_kept_while_the_target_moves_from_worker_to_worker(gateway):
    """Four senders never stop; the target registers anew a hundred times, now here, now there."""
    target = AsyncAgent(gateway.port, DIDKey.generate())
    senders = [AsyncAgent(gateway.port, DIDKey.generate()) for _ in range(4)]
    for agent in (target, *senders):
        await agent.connect(resume=False)
    number = 0
    seen = set()

    async def send() -> None:
        nonlocal number
        while True:
            for sender in senders:
                number += 1
                sender.send(target.did, number)
            await asyncio.sleep(0.001)

    sending = asyncio.create_task(send())
    for _ in range(100):
        await target.connect(resume=True)
        seen.add(target.worker)
        await asyncio.sleep(0.01)
    sending.cancel()
    for _ in range(2):
        for agent in (target, *senders):
            await agent.sync()
    deadline = time.monotonic() + 10
    sent = {name for sender in senders for name in sender.sent}

    def accounted() -> set[str]:
        return {name for _, name in target.got} | {name for sender in senders for name in sender.errors}

    while accounted() != sent:
        assert time.monotonic() < deadline, f"{len(sent - accounted())} of {len(sent)} are lost"
        await asyncio.sleep(0.05)
    delivered = Counter(name for _, name in target.got)
    assert set(delivered.values()) == {1}
    last: dict[str, str] = {}
    for sender, name in target.got:
        assert last.get(sender, "") < name, "the order changed"
        last[sender] = name
    assert len(delivered) > 0.9 * len(sent)
    assert len(seen) > 1
    assert target.resumed > 90
    for agent in (target, *senders):
        assert agent.writer is not None
        agent.writer.close()


# --- a worker goes -----------------------------------------------------------------------------


def is_accepted(port: int) -> bool:
    """Whether connections are no longer given to a worker that has died, which resets them."""
    try:
        for _ in range(20):
            Agent(port, register=False).drop()
    except (ConnectionError, EOFError):
        return False
    return True


def kill_worker_of(gateway, agent: Agent) -> None:
    number = agent.register_answer["ext"]["worker"]
    gateway.kill_worker(gateway.worker_pids[number])


def test_what_waits_for_an_agent_that_is_away_comes_back_if_its_worker_dies(gateway):
    sender, agent = agents_apart(gateway.port)
    with sender:
        agent.drop()
        wait_until(lambda: gateway.health()["away"] == 1)
        sent = [sender.candidate(agent.did, number) for number in range(20)]
        sender.send(*sent)
        wait_until(lambda: gateway.health()["counters"]["messages_crossed"] == 20)
        # Confirmed, but for the confirmations themselves: the agent's worker is answerable for them now.
        wait_until(lambda: gateway.health()["unconfirmed_bytes"] < 1_000)
        kill_worker_of(gateway, agent)
        for data in sent:
            sender.receive_error("unconfirmed", json.loads(data)["id"])
        wait_until(lambda: len(gateway.worker_pids) == WORKERS)
        wait_until(lambda: is_accepted(gateway.port))
        with Agent(gateway.port, agent.key, resume=agent.resume_token) as back:
            assert not back.resumed
            assert_exchange(sender, back)


def test_what_a_slow_agent_has_not_taken_comes_back_if_its_worker_dies(gateway):
    sender, slow = agents_apart(gateway.port)
    slow.drop()
    slow = Agent(gateway.port, slow.key, receive_buffer=2048)
    while slow.register_answer["ext"]["worker"] == sender.register_answer["ext"]["worker"]:
        slow.drop()
        slow = Agent(gateway.port, slow.key, receive_buffer=2048)
    with sender, slow:
        sent: dict[str, bytes] = {}
        # As much as both kernels take, and half of what may wait in the gateway.
        while gateway.health()["waiting"] < 10:
            data = sender.offer(slow.did, 8_000)
            sent[json.loads(data)["id"]] = data
            sender.send(data)
            if len(sent) % 20 == 0:
                # A worker that gets no core for a moment would else find more than may wait.
                wait_until(lambda: gateway.health()["counters"]["messages_crossed"] == len(sent))
                wait_until(lambda: gateway.health()["unconfirmed_bytes"] < 1_000)
        wait_until(lambda: gateway.health()["unconfirmed_bytes"] < 1_000)
        kill_worker_of(gateway, slow)
        returned = set()
        got = set()
        try:
            while True:
                got.add(json.loads(slow.read_text())["id"])
        except (EOFError, ConnectionResetError):
            pass
        while returned | got != set(sent):
            answer = sender.receive()
            assert answer["payload"]["details"]["name"] == "unconfirmed"
            returned.add(answer["correlation_id"])
        assert len(returned) >= 10


@pytest.mark.soak
@pytest.mark.timeout(400)
async def test_workers_killed_under_load_lose_no_message_in_silence(tmp_path, start_gateway):
    """SIGKILL, twenty times, with 2,000 agents, some of them away: every agent is back within ten seconds."""
    gateway = start_gateway("--workers", str(WORKERS), "--message-rate", "0")
    count = int(os.environ.get("AICONEXUS_FLOCK", "2000"))
    flock = Flock([gateway.port], count, seed=3)
    await flock.start()
    total: Counter[str] = Counter()
    waited = 0
    for _ in range(20):
        sent = []
        for step in range(3_000):
            if step == 1_500:
                waited += gateway.health()["waiting"]
                gateway.kill_worker(flock.rng.choice(gateway.worker_pids))
            if step % 20 == 0:
                flock.rest(2.0)
            message = flock.send()
            if message is not None:
                sent.append(message)
            if step % 100 == 99:
                await asyncio.sleep(0)
        total.update(await flock.settle(sent, 10))
        wait_until(lambda: len(gateway.worker_pids) == WORKERS)
    state = gateway.health()
    assert (state["sessions"], state["routes"], state["connections"]) == (count, count, count)
    assert total["delivered"] > 20 * 1_500
    assert waited > 0
    await flock.leave()
    wait_until(lambda: gateway.health()["connections"] == 0)
    died = [line for line in gateway.log_lines() if line["event"] == "worker died"]
    assert len(died) == 20


@pytest.mark.soak
@pytest.mark.timeout(200)
async def test_a_drain_and_a_restart_under_load_lose_no_message_in_silence(start_gateway):
    """The next gateway has the port while the old one still sends its agents away."""
    old = start_gateway("--workers", "2", "--message-rate", "0", "--drain-seconds", "3")
    flock = Flock([old.port], 500, seed=4)
    await flock.start()
    sent = []

    async def send(count: int) -> None:
        for step in range(count):
            message = flock.send()
            if message is not None:
                sent.append(message)
            if step % 20 == 19:
                await asyncio.sleep(0.01)

    await send(1_000)
    old.signal(signal.SIGTERM)
    new = await asyncio.to_thread(
        start_gateway, "--workers", "2", "--message-rate", "0", "--port", str(old.port)
    )
    await send(3_000)
    assert await asyncio.to_thread(old.wait) == 0
    outcome = await flock.settle(sent, 10)
    assert outcome["delivered"] > 1_000
    codes = sum((agent.close_codes for agent in flock.agents), Counter())
    assert codes == {4001: 500}
    state = new.health()
    assert (state["sessions"], state["routes"]) == (500, 500)
    await flock.leave()


def ask(sender: Agent, target: Agent) -> str:
    """Write to an agent that takes nothing; return the name of the ERROR."""
    sender.send(sender.candidate(target.did, 0))
    name: str = sender.receive()["payload"]["details"]["name"]
    return name


def test_errors_for_a_worker_that_stands_still_wait_until_it_goes_on(start_gateway):
    """More than may be on the way to it: what does not fit is not dropped."""
    gateway = start_gateway("--workers", "2", "--message-rate", "0", "--away", "6")
    sender, other = agents_apart(gateway.port)
    number = sender.register_answer["ext"]["worker"]
    (flooded,), (witness, *gone) = agents_at(gateway.port, number, 1), agents_at(gateway.port, 1 - number, 91)
    with sender, other, flooded, witness:
        sent = [sender.candidate(agent.did, number) for agent in gone for number in range(64)]
        for agent in gone:
            agent.drop()
        wait_until(lambda: gateway.health()["away"] >= len(gone))
        sender.send(*sent)
        wait_until(lambda: gateway.health()["waiting"] == len(sent))
        stopped = gateway.worker_pids[number]
        os.kill(stopped, signal.SIGSTOP)
        try:
            other.send(*(other.offer(flooded.did, 65_536) for _ in range(100)))
            assert other.receive()["payload"]["details"]["name"] == "overloaded"
            # The one that dropped last has no room for another message, until it is not awaited any more.
            wait_until(lambda: ask(witness, gone[-1]) == "not_online")
        finally:
            os.kill(stopped, signal.SIGCONT)
        returned = [sender.receive() for _ in sent]
        assert {got["payload"]["details"]["name"] for got in returned} == {"away_expired"}
        assert {got["correlation_id"] for got in returned} == {json.loads(data)["id"] for data in sent}


async def test_a_stopped_worker_costs_its_own_agents_only(gateway):
    """SIGSTOP: the others go on; what is for the stopped one is bounded, and then comes back as an ERROR."""
    flock = Flock([gateway.port], 40, seed=5)
    await flock.start()
    by_worker: dict[int, list[AsyncAgent]] = {}
    for agent in flock.agents:
        by_worker.setdefault(agent.worker, []).append(agent)
    busy, idle = sorted(by_worker, key=lambda number: len(by_worker[number]))[-2:]
    sender, receiver = by_worker[idle][:2]
    target = by_worker[busy][0]
    pids = gateway.worker_pids  # in the order in which they were started
    victim, survivor = pids[busy], pids[idle]
    os.kill(victim, signal.SIGSTOP)
    try:
        before = resident(survivor)
        names = []
        for number in range(1, 40_001):
            names.append(sender.send(target.did, number))
            if number % 500 == 0:
                await asyncio.sleep(0)
        await sender.sync()
        for number in range(100_000, 100_050):
            sender.send(receiver.did, number)
        await sender.sync()
        await receiver.sync()
        assert len(receiver.got) == 50
        assert set(sender.error_names) == {"overloaded"}
        refused = sum(sender.errors.values())
        assert refused > len(names) / 2
        assert resident(survivor) - before < 32 * 2**20
    finally:
        os.kill(victim, signal.SIGCONT)
    # All that was taken comes now, faster than a busy client may read it: then some of it goes back, too.
    deadline = time.monotonic() + 30
    while len({name for _, name in target.got} | set(sender.errors)) < len(names):
        assert time.monotonic() < deadline, (len(target.got), sender.error_names, len(names))
        await asyncio.sleep(0.05)
    delivered = [name for _, name in target.got]
    assert delivered == sorted(set(delivered))
    assert not set(delivered) & set(sender.errors)
    await flock.leave()


def resident(pid: int) -> int:
    _, pages, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (pages - shared) * 4096


# --- the supervisor ----------------------------------------------------------------------------


def is_running(pid: int) -> bool:
    try:
        return process_state(pid) != "Z"
    except FileNotFoundError:
        return False


def test_no_worker_survives_its_supervisor(gateway):
    workers = gateway.worker_pids
    assert len(workers) == WORKERS
    gateway.kill()
    wait_until(lambda: not any(is_running(pid) for pid in workers))


@pytest.mark.parametrize("is_missed", [False, True])
def test_agents_of_a_node_that_dies_have_not_left_one_by_one(is_missed):
    # Without PR_SET_PDEATHSIG, so that workers can be as late as the test wants them.
    code = """
from aiconexus.protocol import DIDKey
from gateway import log, supervisor
from gateway.config import Settings
log.configure("info", "json")
supervisor._libc.prctl = lambda *_: 0
address = supervisor.reserve("127.0.0.1", 0)
port = address.getsockname()[1]
settings = Settings(workers=2)
supervisor.Supervisor(settings, DIDKey.generate(), address, lambda: print(port, flush=True)).run()
"""
    node = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with ExitStack() as stack:
        assert node.stdout is not None
        stack.enter_context(node)
        stack.callback(node.kill)
        port = int(node.stdout.readline())
        workers = children(node.pid)
        for pid in workers:
            stack.callback(end, pid)
        watcher, other = agents_apart(port)
        stack.enter_context(watcher)
        stack.enter_context(other)
        late, first = (workers[agent.register_answer["ext"]["worker"]] for agent in (watcher, other))
        discover(watcher, watch=True)
        assert dids(watcher.receive()["payload"]["agents"]) == sorted((watcher.did, other.did))
        for pid in (node.pid, late):
            send_signal(pid, signal.SIGSTOP)
        if is_missed:
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: not is_running(first))
        node.kill()
        wait_until(lambda: not is_running(node.pid) and not is_running(first))
        os.kill(late, signal.SIGCONT)
        assert watcher.read_to_end() == b""
        wait_until(lambda: not is_running(late))


def end(pid: int) -> None:
    if is_running(pid):
        os.kill(pid, signal.SIGKILL)


def test_a_second_signal_ends_a_drain_at_once(start_gateway):
    gateway = start_gateway("--workers", "2", "--drain-seconds", "600")
    with Agent(gateway.port) as agent:
        gateway.signal(signal.SIGTERM)
        assert agent.read_close().close_code == 4001
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0


def test_an_ordinary_stop_warns_of_nothing(start_gateway):
    gateway = start_gateway("--workers", "3")
    with Agent(gateway.port) as agent:
        gateway.signal(signal.SIGTERM)
        assert agent.read_close().close_code == 4001
    assert gateway.wait() == 0
    lines = gateway.log_lines()
    assert {line["level"] for line in lines} == {"info"}
    assert "worker lost" not in {line["event"] for line in lines}


def test_a_worker_that_dies_is_missed_by_the_others(start_gateway):
    gateway = start_gateway("--workers", "3")
    gateway.kill_worker(gateway.worker_pids[0])
    wait_until(lambda: [line["event"] for line in gateway.log_lines()].count("worker lost") == 2)
    assert {line["level"] for line in gateway.log_lines() if line["event"] == "worker lost"} == {"warning"}


def test_a_second_gateway_does_not_share_the_port_of_the_first(gateway):
    done = subprocess.run(
        [sys.executable, "-m", "gateway.server", "--port", str(gateway.port)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{gateway.port}: Address already in use" in done.stderr


def test_a_gateway_whose_workers_cannot_start_gives_up_and_says_so():
    code = """
import os, sys
from aiconexus.protocol import DIDKey
from gateway import log, supervisor
from gateway.config import Settings
log.configure("info", "json")
supervisor.Supervisor._be_worker = lambda *_: os._exit(3)
address = supervisor.reserve("127.0.0.1", 0)
sys.exit(supervisor.Supervisor(Settings(workers=2), DIDKey.generate(), address, lambda: None).run())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "giving up: a worker cannot start" in done.stderr
    assert done.stderr.count('"status": 3') >= 5
