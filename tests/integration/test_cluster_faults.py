"""What several nodes do when Redis, a node or the way between them fails: real faults, real processes."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from contextlib import ExitStack, suppress
from datetime import datetime
from typing import Any

import pytest
from flock import Flock
from network import (
    LOST,
    RECOVERY_SECONDS,
    STALE_SECONDS,
    assert_unreachable,
    entries,
    exchange_soon,
    first_of,
    redis_state,
    wait_until_confirmed,
)
from redis_server import RedisServer
from tcp_proxy import TcpProxy
from wire import Agent, assert_exchange, wait_until

from gateway.shared_registry import LEASE_SECONDS

# --- Redis -------------------------------------------------------------------------------------


def test_without_redis_a_node_goes_on_alone_and_joins_when_it_comes(own_redis, start_gateway):
    own_redis.kill()
    node = start_gateway("--redis", own_redis.url, "--workers", "2")
    node.forgive(*LOST)
    with Agent(node.port) as one, Agent(node.port) as other:
        assert_exchange(one, other)
        assert node.health()["status"] == "alone"
        own_redis.start()
        wait_until(lambda: redis_state(node) == "connected")
        wait_until(lambda: entries(own_redis) == 2)


def test_an_agent_at_two_nodes_that_have_started_without_redis_is_at_one_when_it_comes(
    own_redis, start_gateway, tmp_path
):
    own_redis.kill()
    options = ("--redis", own_redis.url, "--workers", "2", "--identity", str(tmp_path / "gateway.pem"))
    first, second = (start_gateway(*options) for _ in range(2))
    for node in (first, second):
        node.forgive(*LOST)
    with (
        Agent(first.port) as stays,
        Agent(first.port) as older,
        Agent(second.port, older.key) as newer,
    ):
        own_redis.start()
        close = older.read_close()
        assert (close.close_code, close.close_reason["n"]) == (4504, "replaced")
        exchange_soon(stays, newer)
        wait_until(lambda: entries(own_redis) == 2)
        wait_until(lambda: [node.health()["sessions"] for node in (first, second)] == [1, 1])


def test_redis_that_is_required_and_not_there_is_one_clear_sentence(own_redis, run_gateway):
    own_redis.kill()
    done = run_gateway("--redis", own_redis.url.replace("://", "://:secret@"), "--redis-required")
    assert done.returncode == 1
    assert f"cannot reach Redis at redis://:***@127.0.0.1:{own_redis.port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_redis_that_is_lost_stops_nobody_at_the_same_node(fault, own_redis, start_node):
    first, second = start_node(url=own_redis.url), start_node(url=own_redis.url)
    for node in (first, second):
        node.forgive(*LOST)
    with Agent(first.port) as one, Agent(first.port) as two, Agent(second.port) as far:
        assert_exchange(one, far)
        wait_until_confirmed(first, second)
        if fault == "killed":
            own_redis.kill()
        else:
            own_redis.signal(signal.SIGSTOP)
        try:
            assert_exchange(one, two)
            wait_until(lambda: redis_state(first) == redis_state(second) == "lost")
            for _ in range(10):
                assert_exchange(one, two)
                assert_unreachable(one, far.did, "unreachable")
            with Agent(first.port) as fresh:
                assert_exchange(fresh, one)
                fresh.close()
        finally:
            if fault == "killed":
                own_redis.start()
            else:
                own_redis.signal(signal.SIGCONT)
        exchange_soon(one, far)
        exchange_soon(two, far)
        wait_until(lambda: entries(own_redis) == 3)


def test_what_was_sent_when_redis_stopped_comes_back_unconfirmed(own_redis, start_node):
    first, second = start_node(url=own_redis.url), start_node(url=own_redis.url)
    for node in (first, second):
        node.forgive(*LOST)
    with Agent(first.port) as one, Agent(second.port) as far:
        assert_exchange(one, far)
        wait_until_confirmed(first, second)
        own_redis.signal(signal.SIGSTOP)
        try:
            sent = [one.candidate(far.did, number) for number in range(100)]
            one.send(*sent)
            for data in sent:
                one.receive_error("unconfirmed", json.loads(data)["id"])
        finally:
            own_redis.signal(signal.SIGCONT)


def test_many_messages_that_come_back_at_once_close_no_sender(own_redis, start_node):
    """All their ERRORs together would not fit into the queue of a sender."""
    first, second = start_node("--workers", "1", url=own_redis.url), start_node(url=own_redis.url)
    for node in (first, second):
        node.forgive(*LOST)
    with ExitStack() as stack:
        senders = [stack.enter_context(Agent(first.port)) for _ in range(2)]
        far = [stack.enter_context(Agent(second.port)) for _ in range(8)]
        for agent in far:
            assert_exchange(senders[0], agent)
        wait_until_confirmed(first, second)
        own_redis.signal(signal.SIGSTOP)
        try:
            left: set[str] = set()
            for number in range(12_000):
                sender = senders[number % 2]
                data = sender.candidate(far[number % 8].did, number)
                sender.send(data)
                left.add(json.loads(data)["id"])
            while left:
                error = json.loads(first_of(senders)[1])
                assert error["payload"]["details"]["name"] in ("unconfirmed", "overloaded", "unreachable")
                left.remove(error["correlation_id"])
        finally:
            own_redis.signal(signal.SIGCONT)


def test_slow_redis_is_slow_and_nothing_else(own_redis, make_proxy, start_node):
    proxy = make_proxy(own_redis.port)
    first, second = start_node(url=proxy.url), start_node(url=proxy.url)
    proxy.delay = 0.1  # each way
    with Agent(first.port) as one, Agent(first.port) as two, Agent(second.port) as far:
        for _ in range(3):
            assert_exchange(one, far)
        started = time.monotonic()
        for _ in range(10):
            assert_exchange(one, two)
        assert time.monotonic() - started < 0.2, "messages of one node waited for Redis"
        back = Agent(second.port, two.key, resume=two.resume_token)
        with back:
            assert back.resumed
            assert_exchange(one, back)


def test_a_replica_that_takes_over_is_brought_up_to_date(own_redis, tmp_path, make_proxy, start_node):
    (tmp_path / "replica").mkdir()
    replica = RedisServer(tmp_path / "replica", "--replicaof", "127.0.0.1", str(own_redis.port))
    try:
        proxy = make_proxy(own_redis.port)
        first, second = start_node(url=proxy.url), start_node(url=proxy.url)
        for node in (first, second):
            node.forgive(*LOST)
        with Agent(first.port) as one, Agent(second.port) as far:
            assert_exchange(one, far)
            # The replica stops following, and misses what comes next.
            replica.command("REPLICAOF NO ONE")
            with Agent(second.port) as late:
                wait_until_confirmed(first, second)
                own_redis.kill()
                proxy.redirect(replica.port)
                exchange_soon(one, late)
                exchange_soon(one, far)
                wait_until(lambda: entries(replica) == 3)
    finally:
        replica.kill()


# --- nodes -------------------------------------------------------------------------------------


def test_what_a_dead_node_owned_is_gone_within_fifteen_seconds(own_redis, start_node):
    first, second = start_node(url=own_redis.url), start_node(url=own_redis.url)
    with Agent(first.port) as one:
        far = [Agent(second.port) for _ in range(20)]
        for agent in far:
            assert_exchange(one, agent)
        wait_until_confirmed(first, second)
        second.kill()
        died_at = time.monotonic()
        for agent in far:
            agent.drop()
            # At first nobody knows that it is dead; what is sent to it is answered all the same.
            assert_unreachable(one, agent.did, "unconfirmed", "unreachable", "not_online")
        wait_until(lambda: entries(own_redis) == 1, STALE_SECONDS - (time.monotonic() - died_at))
        assert_unreachable(one, far[0].did, "not_online")
        wait_until(lambda: first.health()["cluster"]["others"] == {})
        # Its agents find their way to the other node, and to each other.
        with Agent(first.port, far[0].key) as back:
            assert_exchange(one, back)


def told_of(node: Any, event: str) -> list[str]:
    """Which nodes it has logged that of."""
    return [line["name"] for line in node.log_lines() if line["event"] == event]


def test_a_node_that_is_stopped_has_left_at_once_and_one_that_is_killed_is_gone(own_redis, start_node):
    first, second, third = (start_node(url=own_redis.url) for _ in range(3))
    with Agent(first.port) as one, Agent(second.port) as far, Agent(third.port) as other:
        assert_exchange(one, far)
        assert_exchange(far, other)
        second.stop()
        wait_until(
            lambda: list(first.health()["cluster"]["others"].values()) == ["node-2"], LEASE_SECONDS / 2
        )
        wait_until(lambda: "node-1" in told_of(third, "node left"))
        assert_unreachable(one, far.did, "not_online")
        third.kill()
        wait_until(lambda: told_of(first, "node gone"), STALE_SECONDS)
        wait_until(lambda: own_redis.command("KEYS *left*") == b"*0\r\n", STALE_SECONDS)
        assert set(told_of(first, "node gone")) == {"node-2"}
        assert set(told_of(first, "node left")) == {"node-1"}


def test_a_node_that_is_started_anew_does_not_meet_the_one_that_it_was(start_node):
    first, second = start_node(), start_node()
    met = len(told_of(second, "node met"))
    second.stop()
    second.start()
    wait_until(lambda: list(second.health()["cluster"]["others"].values()) == ["node-0"])
    wait_until(lambda: list(first.health()["cluster"]["others"].values()) == ["node-1"])
    assert set(told_of(second, "node met")[met:]) == {"node-0"}
    with Agent(first.port) as one, Agent(second.port) as other:
        assert_exchange(one, other)


def test_a_worker_that_alone_is_stopped_starts_again_and_its_node_has_not_left(own_redis, start_node):
    first, second = start_node(url=own_redis.url), start_node("--workers", "1", url=own_redis.url)
    second.forgive("worker died")
    before = second.worker_pids
    second.signal_workers(signal.SIGTERM)
    wait_until(lambda: second.worker_pids not in (before, []))
    wait_until(lambda: second.log.count('"event": "joined"') == 2)
    wait_until(lambda: own_redis.command("KEYS *left*") == b"*0\r\n")
    wait_until(lambda: list(first.health()["cluster"]["others"].values()) == ["node-1"])
    assert told_of(first, "node gone") == []


def test_a_worker_of_no_node_does_not_stay_among_those_that_have_left(own_redis, start_gateway):
    assert own_redis.command("SADD {aiconexus}:left 0123456789abcdef:0") == b":1\r\n"
    start_gateway("--redis", own_redis.url, "--workers", "1")
    wait_until(lambda: own_redis.command("KEYS *left*") == b"*0\r\n")


def test_what_waits_at_a_node_that_is_stopped_comes_back_once(start_node):
    first, second = start_node(), start_node()
    with Agent(first.port) as sender:
        agents = [Agent(second.port) for _ in range(4)]
        for agent in agents:
            agent.drop()
        wait_until(lambda: second.health()["away"] == len(agents))
        sent = [sender.candidate(agent.did, number) for agent in agents for number in range(30)]
        sender.send(*sent)
        wait_until(lambda: second.health()["waiting"] == len(sent))
        wait_until(lambda: first.health()["waiting_elsewhere"] == len(sent))
        second.stop()
        answers = [sender.receive() for _ in sent]
        assert {answer["correlation_id"] for answer in answers} == ids(sent)
        assert {answer["payload"]["details"]["name"] for answer in answers} == {"away_expired"}
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0, STALE_SECONDS)
        sender.ping()


def test_agents_of_a_node_that_nobody_has_met_are_asked_for_anew(own_redis, start_gateway):
    options = ("--redis", own_redis.url, "--workers", "1")
    dead = start_gateway(*options)
    with Agent(dead.port) as agent:
        wait_until(lambda: entries(own_redis) == 1)
        dead.kill()
    # Its lease ends before the others come, and what it owned is there until they are settled.
    assert (
        own_redis.command("EVAL \"return redis.call('DEL', redis.call('KEYS', '*:lease:*')[1])\" 0")
        == b":1\r\n"
    )
    first, second = start_gateway(*options), start_gateway(*options)
    for node in (first, second):
        wait_until(lambda node=node: len(node.health()["cluster"]["others"]) == 1)
    with Agent(first.port) as one:
        assert_unreachable(one, agent.did, "unconfirmed", "unreachable")
        wait_until(lambda: entries(own_redis) == 1, STALE_SECONDS)
        with Agent(second.port, agent.key) as back:
            exchange_soon(one, back)


def test_a_node_that_was_cut_off_does_not_keep_who_went_to_another(own_redis, make_proxy, start_node):
    proxy = make_proxy(own_redis.port)
    first, second = start_node(url=own_redis.url), start_node(url=proxy.url)
    second.forgive(*LOST)
    with Agent(first.port) as one, Agent(second.port) as stays, Agent(second.port) as roams:
        assert_exchange(one, stays)
        assert_exchange(one, roams)
        wait_until_confirmed(first, second)
        proxy.cut()
        wait_until(lambda: redis_state(second) == "lost")
        assert_exchange(stays, roams)
        moved = Agent(first.port, roams.key)
        with moved:
            assert_exchange(one, moved)
            assert_unreachable(moved, stays.did, "unreachable", "not_online", "unconfirmed")
            # The others take it for dead, and remove what it had.
            wait_until(lambda: entries(own_redis) == 2, STALE_SECONDS)
            assert_exchange(stays, roams)
            proxy.mend()
            mended_at = time.monotonic()
            close = roams.read_close()
            assert (close.close_code, close.close_reason["n"]) == (4504, "replaced")
            exchange_soon(stays, moved, RECOVERY_SECONDS - (time.monotonic() - mended_at))
            exchange_soon(stays, one)
            wait_until(lambda: entries(own_redis) == 3)


def test_nodes_whose_clocks_are_five_minutes_apart_work_together(own_redis, start_node):
    faketime = pytest.importorskip("libfaketime", reason="needs another clock: `pip install libfaketime`")
    _, environment = faketime.get_reload_information()
    first = start_node(url=own_redis.url)
    second = start_node(url=own_redis.url, environment={**environment, "FAKETIME": "+300s"})
    for node in (first, second):
        node.forgive(*LOST)
    with Agent(first.port) as one, Agent(second.port, clock=300) as ahead:
        with Agent(second.port, register=False) as refused:
            told = datetime.fromisoformat(refused.hello["timestamp"].replace("Z", "+00:00"))
            assert 290 < told.timestamp() - time.time() < 310
            refused.send(refused.signed(refused.registration()))
            error = refused.receive()["payload"]
            assert "clock" in error["message"]
        assert_exchange(one, ahead)
        with Agent(first.port) as late:  # what is not known is asked for, and known at once
            assert_exchange(ahead, late)
            late.close()
        # Longer than a lease: neither takes the other for dead.
        until = time.monotonic() + STALE_SECONDS
        wait_until(lambda: time.monotonic() > until, STALE_SECONDS + 1)
        assert_exchange(one, ahead)
        assert entries(own_redis) == 2
        wait_until_confirmed(first, second)
        own_redis.kill()
        wait_until(lambda: redis_state(first) == redis_state(second) == "lost")
        own_redis.start()
        exchange_soon(one, ahead)
        wait_until(lambda: entries(own_redis) == 2, RECOVERY_SECONDS)
    assert not {"node gone"} & {line["event"] for node in (first, second) for line in node.log_lines()}


def test_whoever_has_registered_last_keeps_the_agent_whatever_the_clocks_of_the_nodes_say(
    own_redis, start_node
):
    faketime = pytest.importorskip("libfaketime", reason="needs another clock: `pip install libfaketime`")
    _, environment = faketime.get_reload_information()
    first = start_node(url=own_redis.url)
    second = start_node(url=own_redis.url, environment={**environment, "FAKETIME": "+300s"})
    for node in (first, second):
        node.forgive(*LOST)
    with Agent(first.port) as stays, Agent(second.port, clock=300) as older:
        own_redis.kill()
        wait_until(lambda: redis_state(first) == redis_state(second) == "lost")
        with Agent(first.port, older.key) as newer:
            own_redis.start()
            close = older.read_close()
            assert (close.close_code, close.close_reason["n"]) == (4504, "replaced")
            assert_exchange(stays, newer)
            wait_until(lambda: entries(own_redis) == 2)
            wait_until(lambda: [node.health()["sessions"] for node in (first, second)] == [2, 0])


def test_a_worker_that_starts_again_with_a_clock_set_back_is_heard_at_once(own_redis, start_node, tmp_path):
    faketime = pytest.importorskip("libfaketime", reason="needs another clock: `pip install libfaketime`")
    _, environment = faketime.get_reload_information()
    clock = tmp_path / "clock"
    clock.write_text("+0s")
    environment.update(
        FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1", FAKETIME_DONT_FAKE_MONOTONIC="1"
    )
    first = start_node(url=own_redis.url)
    second = start_node(url=own_redis.url, environment=environment)
    with Agent(first.port) as one:
        with Agent(second.port) as agent:
            assert_exchange(one, agent)
            wait_until_confirmed(first, second)
            number = agent.register_answer["ext"]["worker"]
            clock.write_text("-300s")
            second.kill_worker(second.worker_pids[number])
        wait_until(lambda: len(second.worker_pids) == 2)
        behind = None
        while behind is None or behind.register_answer["ext"]["worker"] != number:
            if behind is not None:
                behind.drop()
            with suppress(ConnectionError, EOFError):  # the listener of the one that has died
                behind = Agent(second.port, clock=-300)
        with behind:
            told = datetime.fromisoformat(behind.hello["timestamp"].replace("Z", "+00:00"))
            assert -310 < told.timestamp() - time.time() < -290
            # What was sent to the last process with that number may come back; after that, nothing does.
            exchange_soon(one, behind)
            for _ in range(3):
                assert_exchange(one, behind)
                wait_until_confirmed(first, second)


def test_in_a_redis_cluster_a_node_goes_where_the_keys_are(tmp_path, start_gateway):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    one, two = (RedisServer(folder, "--cluster-enabled", "yes") for folder in folders)
    try:
        for first in (0, 8_192):
            slots = " ".join(str(slot) for slot in range(first, first + 8_192))
            assert two.command(f"CLUSTER ADDSLOTS {slots}") == b"+OK\r\n"
        assert one.command(f"CLUSTER MEET 127.0.0.1 {two.port}") == b"+OK\r\n"
        wait_until(lambda: b"cluster_state:ok" in one.command("CLUSTER INFO"))
        node = start_gateway("--redis", one.url, "--redis-required", "--workers", "2")
        node.forgive("Redis lost")
        wait_until(lambda: node.health()["cluster"]["redis"] == "connected", RECOVERY_SECONDS)
        with Agent(node.port) as agent, Agent(node.port) as other:
            assert_exchange(agent, other)
            assert two.command("DBSIZE") != b":0\r\n"
    finally:
        one.kill()
        two.kill()


def test_a_worker_that_is_killed_is_forgotten_at_the_other_node(pair):
    first, second = pair
    with Agent(first.port) as one:
        far = [Agent(second.port) for _ in range(10)]
        for agent in far:
            assert_exchange(one, agent)
        wait_until_confirmed(first, second)
        second.kill_worker(second.worker_pids[0])
        for agent in far:
            if agent.register_answer["ext"]["worker"] == 0:
                assert_unreachable(one, agent.did, "unconfirmed", "unreachable", "not_online")
            else:
                assert_exchange(one, agent)
            agent.drop()


def test_what_waits_at_a_worker_that_is_killed_comes_back_once_to_senders_here_and_there(pair):
    first, second = pair
    agent = Agent(second.port)
    number = agent.register_answer["ext"]["worker"]
    near = Agent(second.port)
    while near.register_answer["ext"]["worker"] == number:
        near.close()
        near = Agent(second.port)
    with Agent(first.port) as far, near:
        sent = {}
        for sender in (far, near):
            assert_exchange(sender, agent)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        for sender in (far, near):
            sent[sender] = [sender.candidate(agent.did, number) for number in range(20)]
            sender.send(*sent[sender])
        wait_until(lambda: second.health()["waiting"] == 40)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 20)
        wait_until_confirmed(first, second)
        second.kill_worker(second.worker_pids[number])
        for sender, messages in sent.items():
            answers = [sender.receive() for _ in messages]
            assert {answer["payload"]["details"]["name"] for answer in answers} == {"unconfirmed"}
            assert {answer["correlation_id"] for answer in answers} == ids(messages)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0)
        for sender in sent:
            sender.ping()


def test_a_sender_that_has_moved_on_is_told_where_it_is_now(own_redis, start_node):
    first, second, third = (start_node(url=own_redis.url) for _ in range(3))
    with Agent(first.port) as sender, Agent(second.port) as agent:
        assert_exchange(sender, agent)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        data = sender.offer(agent.did)
        sender.send(data)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 1)
        with Agent(third.port, sender.key, resume=sender.resume_token) as moved:
            assert moved.resumed
            wait_until_confirmed(first, second, third)
            second.kill()
            wait_until(lambda: first.health()["waiting_elsewhere"] == 0, STALE_SECONDS)
            moved.receive_error("unconfirmed", json.loads(data)["id"])
            moved.ping()


def fill(sender: Agent, slow: Agent, node, count: int) -> list[bytes]:
    """Send to an agent that reads nothing until `count` messages wait for it; return all."""
    sent: list[bytes] = []
    while node.health()["waiting"] < count:
        sent.append(sender.offer(slow.did, 8_000))
        sender.send(sent[-1])
    return sent


def read_what_came(agent: Agent) -> set[str]:
    """Return the ids of the messages that reached an agent before its gateway died."""
    got = set()
    try:
        while True:
            got.add(json.loads(agent.read_text())["id"])
    except (EOFError, ConnectionResetError):
        return got


def ids(messages: list[bytes]) -> set[str]:
    return {json.loads(data)["id"] for data in messages}


def test_what_waits_at_a_node_that_dies_comes_back_once_to_senders_at_another(own_redis, start_node):
    first, second = start_node(url=own_redis.url), start_node(url=own_redis.url)
    with (
        Agent(first.port) as one,
        Agent(first.port) as two,
        Agent(second.port) as away,
        Agent(second.port) as reader,
        Agent(second.port, receive_buffer=2048) as slow,
    ):
        for sender in (one, two):
            assert_exchange(sender, away)
            assert_exchange(sender, reader)
        away.drop()
        wait_until(lambda: second.health()["away"] == 1)
        sent = {sender: [sender.candidate(away.did, number) for number in range(20)] for sender in (one, two)}
        for sender, messages in sent.items():
            sender.send(*messages)
        to_slow = fill(one, slow, second, 40 + 10)
        assert_exchange(one, reader)
        wait_until_confirmed(first, second)
        wait_until(lambda: first.health()["waiting_elsewhere"] == second.health()["waiting"])
        second.kill()
        died_at = time.monotonic()
        got = read_what_came(slow)
        lost = {one: ids(sent[one]) | (ids(to_slow) - got), two: ids(sent[two])}
        answered: dict[Agent, list[str]] = {one: [], two: []}
        while any(len(answered[sender]) < len(lost[sender]) for sender in lost):
            agent, data = first_of([one, two], STALE_SECONDS - (time.monotonic() - died_at))
            error = json.loads(data)
            assert error["payload"]["details"]["name"] == "unconfirmed"
            answered[agent].append(error["correlation_id"])
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0)
        for sender in (one, two):
            sender.ping()  # nothing else came
            assert sorted(answered[sender]) == sorted(lost[sender])


def test_what_has_left_a_node_before_it_dies_does_not_come_back(own_redis, start_node):
    first, second = start_node(url=own_redis.url), start_node(url=own_redis.url)
    with Agent(first.port) as sender:
        agent, slow = Agent(second.port), Agent(second.port, receive_buffer=2048)
        assert_exchange(sender, agent)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        sent = [sender.candidate(agent.did, number) for number in range(20)]
        sender.send(*sent)
        to_slow = fill(sender, slow, second, 20 + 10)
        wait_until(lambda: first.health()["waiting_elsewhere"] == second.health()["waiting"] >= 30)
        with Agent(second.port, agent.key, resume=agent.resume_token) as back:
            assert [back.read_text() for _ in sent] == sent
            assert [slow.read_text() for _ in to_slow] == to_slow
            wait_until(lambda: first.health()["waiting_elsewhere"] == 0)
            wait_until_confirmed(first, second)
            second.kill()
            wait_until(lambda: first.health()["cluster"]["others"] == {}, STALE_SECONDS)
            wait_until(lambda: entries(own_redis) == 1, STALE_SECONDS)
            sender.ping()
        slow.drop()


def test_what_moved_on_to_a_third_node_comes_back_if_that_one_dies(own_redis, start_node):
    """Also when the node between is gone by then: it is the sender's node that answers."""
    first, second, third = (start_node(url=own_redis.url) for _ in range(3))
    with Agent(first.port) as sender:
        agent = Agent(second.port)
        assert_exchange(sender, agent)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        sent = [sender.offer(agent.did, 8_000) for _ in range(8)]
        sender.send(*sent)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 8)
        slow = Agent(third.port, agent.key, resume=agent.resume_token, receive_buffer=2048)
        assert slow.resumed
        sent += fill(sender, slow, third, 10)
        wait_until(lambda: second.health()["waiting"] == 0)
        wait_until(lambda: first.health()["waiting_elsewhere"] == third.health()["waiting"] >= 10)
        wait_until_confirmed(first, second, third)
        second.kill()
        wait_until(lambda: len(first.health()["cluster"]["others"]) == 1, STALE_SECONDS)
        sender.ping()
        waiting = third.health()["waiting"]
        third.kill()
        got = read_what_came(slow)
        slow.drop()
        returned = [sender.receive() for _ in range(waiting)]
        assert {answer["payload"]["details"]["name"] for answer in returned} == {"unconfirmed"}
        assert {answer["correlation_id"] for answer in returned} | got == ids(sent)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0)
        sender.ping()


def test_what_waits_at_a_node_that_dies_while_redis_is_lost_comes_back_when_redis_is_back(
    own_redis, start_node
):
    first, second = start_node(url=own_redis.url), start_node(url=own_redis.url)
    for node in (first, second):  # the one that is killed may have had the time to say it
        node.forgive(*LOST)
    with Agent(first.port) as sender:
        agent = Agent(second.port)
        assert_exchange(sender, agent)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        data = sender.offer(agent.did)
        sender.send(data)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 1)
        wait_until_confirmed(first, second)
        own_redis.kill()
        second.kill()
        wait_until(lambda: redis_state(first) == "lost")
        own_redis.start()
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0, 2 * RECOVERY_SECONDS)
        sender.receive_error("unconfirmed", json.loads(data)["id"])
        sender.ping()


def test_what_comes_back_while_redis_is_lost_reaches_its_sender_when_redis_is_back(own_redis, start_node):
    first, second = (start_node("--away", "2", url=own_redis.url) for _ in range(2))
    for node in (first, second):
        node.forgive(*LOST)
    with Agent(first.port) as sender, Agent(second.port) as agent:
        assert_exchange(sender, agent)
        wait_until_confirmed(first, second)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        sent = [sender.candidate(agent.did, number) for number in range(3)]
        sender.send(*sent)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 3)
        wait_until_confirmed(first, second)
        own_redis.kill()
        wait_until(lambda: second.health()["away"] == 0)
        own_redis.start()
        deadline = time.monotonic() + 2 * RECOVERY_SECONDS
        answers = [json.loads(first_of([sender], deadline - time.monotonic())[1]) for _ in sent]
        assert [answer["correlation_id"] for answer in answers] == [json.loads(data)["id"] for data in sent]
        assert {answer["payload"]["details"]["name"] for answer in answers} == {"away_expired"}
        sender.ping()
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0)


def test_what_was_given_up_at_a_node_that_dies_while_it_looks_for_the_sender_comes_back(
    own_redis, start_node
):
    away_seconds = 4.0
    first = start_node(url=own_redis.url)
    second = start_node("--workers", "1", "--away", str(away_seconds), url=own_redis.url)
    for node in (first, second):
        node.forgive(*LOST)
    with Agent(first.port) as sender, Agent(second.port) as near, Agent(second.port) as agent:
        agent.drop()
        expires_at = time.monotonic() + away_seconds
        wait_until(lambda: second.health()["away"] == 1)
        sent = [sender.candidate(agent.did, number) for number in range(20)]
        sender.send(*sent)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 20)
        wait_until_confirmed(first, second)
        while time.monotonic() < expires_at - 0.3:
            near.ping()
        # Redis is asked where the sender is, and does not answer before this node is dead; what else it is
        # told meanwhile, it passes on after that.
        own_redis.signal(signal.SIGSTOP)
        try:
            wait_until(lambda: second.health()["away"] == 0)
            near.ping()
            second.kill()
        finally:
            own_redis.signal(signal.SIGCONT)
        deadline = time.monotonic() + 2 * RECOVERY_SECONDS
        answered = set()
        while answered != ids(sent):
            error = json.loads(first_of([sender], deadline - time.monotonic())[1])
            assert error["payload"]["details"]["name"] in ("unconfirmed", "away_expired")
            answered.add(error["correlation_id"])
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0)
        sender.ping()


def test_what_waits_is_answered_for_after_redis_came_back_empty(own_redis, start_node):
    first, second = start_node(url=own_redis.url), start_node(url=own_redis.url)
    for node in (first, second):
        node.forgive(*LOST)
    with Agent(first.port) as sender:
        agent = Agent(second.port)
        assert_exchange(sender, agent)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        data = sender.offer(agent.did)
        sender.send(data)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 1)
        wait_until_confirmed(first, second)
        own_redis.kill()
        wait_until(lambda: redis_state(first) == redis_state(second) == "lost")
        own_redis.start()
        wait_until(lambda: len(first.health()["cluster"]["others"]) == 1)
        sender.ping()
        assert first.health()["waiting_elsewhere"] == 1
        second.kill()
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0, 2 * RECOVERY_SECONDS)
        sender.receive_error("unconfirmed", json.loads(data)["id"])
        sender.ping()


def test_what_waits_at_the_only_worker_of_a_node_comes_back_if_that_is_killed(own_redis, start_node):
    first, second = start_node(url=own_redis.url), start_node("--workers", "1", url=own_redis.url)
    with Agent(first.port) as sender:
        agent = Agent(second.port)
        assert_exchange(sender, agent)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        sent = [sender.candidate(agent.did, number) for number in range(20)]
        sender.send(*sent)
        wait_until(lambda: first.health()["waiting_elsewhere"] == 20)
        wait_until_confirmed(first, second)
        second.kill_worker(second.worker_pids[0])
        assert {sender.receive()["correlation_id"] for _ in sent} == ids(sent)
        sender.ping()
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0)


class Outage:
    """A fault that begins and ends while two nodes are under load.

    Args:
        fault: Which one.
        redis: Which they share.
        replica: That takes over from it, if it is to fail over.
        proxies: Between each node and Redis, if the way is what fails.
        nodes: The nodes.
    """

    def __init__(
        self,
        fault: str,
        redis: RedisServer,
        replica: RedisServer | None,
        proxies: list[TcpProxy],
        nodes: list[Any],
    ) -> None:
        self.fault = fault
        self.redis = redis
        self.replica = replica
        self.proxies = proxies
        self.nodes = nodes

    @property
    def lets_nodes_hear(self) -> bool:
        """Whether nodes hear of each other meanwhile."""
        return self.fault in ("none", "redis slow", "node killed")

    def begin(self) -> None:
        if self.fault == "redis killed":
            self.redis.kill()
        elif self.fault == "redis stopped":
            self.redis.signal(signal.SIGSTOP)
        elif self.fault == "redis slow":
            for proxy in self.proxies:
                proxy.delay = 0.1  # each way
        elif self.fault == "redis fails over":
            assert self.replica is not None
            self.redis.kill()
            self.replica.command("REPLICAOF NO ONE")
            for proxy in self.proxies:
                proxy.redirect(self.replica.port)
        elif self.fault == "node cut off":
            self.proxies[1].cut()
        elif self.fault == "node killed":
            self.nodes[1].kill()

    def end(self) -> None:
        if self.fault == "redis killed":
            self.redis.start()
        elif self.fault == "redis stopped":
            self.redis.signal(signal.SIGCONT)
        elif self.fault == "redis slow":
            for proxy in self.proxies:
                proxy.delay = 0
        elif self.fault == "node cut off":
            self.proxies[1].mend()


@pytest.fixture
def make_outage(own_redis, make_proxy, start_node, tmp_path):
    """Start two nodes for a fault that is to come."""
    replicas: list[RedisServer] = []

    def make(fault: str) -> Outage:
        if fault == "redis fails over":
            (tmp_path / "replica").mkdir()
            primary = ("--replicaof", "127.0.0.1", str(own_redis.port))
            replicas.append(RedisServer(tmp_path / "replica", *primary))
        way_fails = fault in ("redis slow", "redis fails over", "node cut off")
        proxies = [make_proxy(own_redis.port) for _ in range(2 * way_fails)]
        nodes = [start_node(url=each.url) for each in proxies or (own_redis, own_redis)]
        for node in nodes:
            node.forgive(*LOST)
        return Outage(fault, own_redis, replicas[-1] if replicas else None, proxies, nodes)

    yield make
    for replica in replicas:
        replica.kill()


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "fault",
    [
        "none",
        "redis killed",
        "redis stopped",
        "redis slow",
        "redis fails over",
        "node cut off",
        "node killed",
    ],
)
async def test_nodes_under_load_lose_no_message_in_silence(fault, make_outage):
    """2,000 agents at two nodes of two workers, some of them away; each may come back to the other node."""
    outage = await asyncio.to_thread(make_outage, fault)
    nodes = outage.nodes
    alive = list(nodes)
    flock = Flock([node.port for node in nodes], 2_000, seed=7)
    await flock.start()
    total: Counter[str] = Counter()
    waited = 0
    for turn in range(6):
        is_faulty = turn in (2, 3)
        sent = []
        for step in range(4_000):
            if step == 2_000:
                waited += sum(node.health()["waiting_elsewhere"] for node in alive)
            if step == 2_000 and turn == 2:
                await asyncio.to_thread(outage.begin)
                if fault == "node killed":
                    flock.ports.remove(nodes[1].port)
                    alive.remove(nodes[1])
            if step % 100 == 50 and (not is_faulty or fault == "redis slow"):
                flock.roam()
            # Nobody hears what becomes of what waits elsewhere while Redis is lost.
            if step % 20 == 0 and (not is_faulty or outage.lets_nodes_hear):
                flock.rest(2.0)
            message = flock.send()
            if message is not None:
                sent.append(message)
            if step % 100 == 99:
                await asyncio.sleep(0.01)
        total.update(await flock.settle(sent, 30))
        if turn == 3:
            await asyncio.to_thread(outage.end)
    assert total["delivered"] > 10_000
    assert waited > 0
    redis = outage.replica or outage.redis
    deadline = time.monotonic() + STALE_SECONDS
    while entries(redis) != 2_000 or sum(node.health()["sessions"] for node in alive) != 2_000:
        assert time.monotonic() < deadline, (entries(redis), [node.health() for node in alive])
        await asyncio.sleep(0.1)
    await flock.leave()
