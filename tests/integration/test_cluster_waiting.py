"""What waits for an agent at a node or a worker that stops or dies comes back to its sender, once."""

from __future__ import annotations

import json
import signal
import time

from network import (
    LOST,
    RECOVERY_SECONDS,
    STALE_SECONDS,
    entries,
    first_of,
    redis_state,
    wait_until_confirmed,
)
from wire import Agent, agents_at, assert_exchange, wait_until


def let_wait(sender: Agent, agent: Agent, first, second) -> bytes:
    """Return an OFFER of `sender`, at `first`, that waits for `agent`, which is away from `second` now."""
    agent.drop()
    wait_until(lambda: second.health()["away"] == 1)
    data = sender.offer(agent.did)
    sender.send(data)
    wait_until(lambda: first.health()["waiting_elsewhere"] == 1)
    return data


def fill(sender: Agent, slow: Agent, node, count: int) -> list[bytes]:
    """Send to an agent that reads nothing until `count` messages wait at its node; return all.

    A neighbour at its worker shows that each has arrived: if 100 more waited than are meant to, its gateway
    would take the agent for too slow.
    """
    sent: list[bytes] = []
    (neighbour,) = agents_at(node.port, slow.register_answer["ext"]["worker"], 1)
    while node.health()["waiting"] < count:
        sent.append(sender.offer(slow.did, 8_000))
        sender.send(sent[-1], sender.candidate(neighbour.did, len(sent)))
        neighbour.read_text()
    neighbour.close()
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


def test_what_a_node_says_last_arrives_though_others_hear_first_that_it_has_left(
    redis_server, make_proxy, start_node
):
    proxy = make_proxy(redis_server.port)
    first, second = start_node("--workers", "1", url=proxy.url), start_node("--workers", "1")
    with Agent(first.port) as sender, Agent(second.port) as agent, Agent(second.port) as other:
        assert_exchange(sender, other)
        agent.drop()
        wait_until(lambda: second.health()["away"] == 1)
        sent = [sender.candidate(agent.did, number) for number in range(20)]
        sender.send(*sent)
        wait_until(lambda: first.health()["waiting_elsewhere"] == len(sent))
        wait_until_confirmed(first, second)
        # What Redis hands over to those who listen is late; what it answers is not.
        proxy.held = b"message\r\n"
        delivered, last = sender.offer(other.did), other.offer(sender.did)
        sender.send(delivered)
        assert other.read_text() == delivered
        other.send(last)
        assert proxy.is_holding.wait(10)
        second.stop()
        wait_until(lambda: "nobody listens" in first.log)
        proxy.release()
        assert sender.read_text() == last
        answers = [sender.receive() for _ in sent]
        assert {answer["correlation_id"] for answer in answers} == ids(sent)
        assert {answer["payload"]["details"]["name"] for answer in answers} == {"away_expired"}
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0)
        wait_until_confirmed(first)
        wait_until(lambda: first.health()["cluster"]["others"] == {}, STALE_SECONDS)
        sender.ping()  # nothing else came


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


def test_a_sender_that_has_moved_on_is_told_where_it_is_now(own_redis, start_node):
    first, second, third = (start_node(url=own_redis.url) for _ in range(3))
    with Agent(first.port) as sender, Agent(second.port) as agent:
        assert_exchange(sender, agent)
        data = let_wait(sender, agent, first, second)
        with Agent(third.port, sender.key, resume=sender.resume_token) as moved:
            assert moved.resumed
            wait_until_confirmed(first, second, third)
            second.kill()
            wait_until(lambda: first.health()["waiting_elsewhere"] == 0, STALE_SECONDS)
            moved.receive_error("unconfirmed", json.loads(data)["id"])
            moved.ping()


def test_what_waits_at_a_node_that_dies_while_redis_is_lost_comes_back_when_redis_is_back(
    own_redis, start_node
):
    first, second = start_node(url=own_redis.url), start_node(url=own_redis.url)
    for node in (first, second):  # the one that is killed may have had the time to say it
        node.forgive(*LOST)
    with Agent(first.port) as sender:
        agent = Agent(second.port)
        assert_exchange(sender, agent)
        data = let_wait(sender, agent, first, second)
        wait_until_confirmed(first, second)
        own_redis.kill()
        second.kill()
        wait_until(lambda: redis_state(first) == "lost")
        own_redis.start()
        wait_until(lambda: first.health()["waiting_elsewhere"] == 0, 2 * RECOVERY_SECONDS)
        sender.receive_error("unconfirmed", json.loads(data)["id"])
        sender.ping()


def test_what_comes_back_while_redis_is_lost_reaches_its_sender_when_redis_is_back(own_redis, start_node):
    first, second = (start_node("--away", "4", url=own_redis.url) for _ in range(2))
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
        data = let_wait(sender, agent, first, second)
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
