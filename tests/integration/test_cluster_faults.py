"""What several nodes do when Redis, a node or the way between them fails: real faults, real processes."""

from __future__ import annotations

import json
import signal
import time
from contextlib import ExitStack, suppress
from datetime import datetime
from typing import Any

import pytest
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
        # Twenty messages, each of which would take 0.2 s.
        assert time.monotonic() - started < 2, "messages of one node waited for Redis"
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


def test_a_node_that_speaks_is_heard_and_told_so_though_it_did_not_listen_just_now(
    own_redis, make_proxy, start_node
):
    proxy = make_proxy(own_redis.port)
    first, second = (start_node("--workers", "1", url=url) for url in (own_redis.url, proxy.url))
    second.forgive(*LOST)
    with Agent(first.port) as one, Agent(second.port) as other:
        assert_exchange(one, other)
        wait_until_confirmed(first, second)
        proxy.cut()
        wait_until(lambda: redis_state(second) == "lost")
        proxy.held = b"SUBSCRIBE"
        proxy.mend()
        assert proxy.is_holding.wait(10)  # it has joined again, and does not listen yet
        missing = one.offer(other.did)
        one.send(missing)
        wait_until(lambda: "nobody listens" in first.log)
        proxy.release()
        wait_until(lambda: redis_state(second) == "connected")
        spoken = other.offer(one.did)
        other.send(spoken)
        got = [one.read_text() for _ in range(2)]
        got.remove(spoken)
        error = json.loads(got[0])
        assert error["correlation_id"] == json.loads(missing)["id"]
        assert error["payload"]["details"]["name"] == "unconfirmed"
        assert_exchange(other, one)
        wait_until_confirmed(first, second)
        other.ping()  # nothing came back


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
