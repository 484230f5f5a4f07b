"""Several nodes as one gateway, through a real Redis."""

from __future__ import annotations

import json

from wire import Agent, assert_exchange, wait_until

from aiconexus.protocol import DIDKey


def test_agents_at_different_nodes_exchange_exact_bytes(pair):
    first, second = pair
    with Agent(first.port) as one, Agent(second.port) as other:
        for _ in range(20):
            assert_exchange(one, other)
        big = one.offer(other.did, 65_536)
        one.send(big)
        assert other.read_text() == big


def test_who_has_its_answer_can_be_reached_from_the_other_node(pair):
    first, second = pair
    with Agent(first.port) as sender:
        for _ in range(20):
            with Agent(second.port) as fresh:
                assert_exchange(sender, fresh)


def test_an_agent_that_no_node_knows_is_unknown(pair):
    with Agent(pair[0].port) as agent:
        agent.send(agent.offer(DIDKey.generate().did))
        assert agent.receive()["payload"]["details"]["name"] == "not_online"


def test_a_takeover_at_another_node_closes_the_old_session_and_keeps_the_new_route(pair):
    with Agent(pair[0].port) as other:
        agent = Agent(pair[0].port)
        for turn in range(6):
            assert_exchange(agent, other)
            new = Agent(pair[(turn + 1) % 2].port, agent.key)
            close = agent.read_close()
            assert (close.close_code, close.close_reason["n"]) == (4504, "replaced")
            agent.drop()
            assert_exchange(new, other)
            agent = new
        agent.drop()


def test_what_waits_comes_along_to_another_node_in_order(pair):
    with Agent(pair[0].port) as sender:
        agent = Agent(pair[0].port)
        for turn in range(6):
            old, new = pair[turn % 2], pair[(turn + 1) % 2]
            agent.drop()
            wait_until(lambda old=old: old.health()["away"] == 1)
            sent = [sender.candidate(agent.did, number) for number in range(20)]
            sender.send(*sent)
            wait_until(lambda old=old: old.health()["waiting"] == 20)
            agent = Agent(new.port, agent.key, resume=agent.resume_token)
            assert agent.resumed
            assert [agent.read_text() for _ in sent] == sent
        agent.drop()


def test_an_agent_that_left_is_unknown_at_the_other_node_and_known_again_when_it_is_back(pair):
    with Agent(pair[0].port) as sender:
        key = DIDKey.generate()
        for node in (pair[1], pair[0], pair[1]):
            with Agent(node.port, key) as agent:
                assert_exchange(sender, agent)
                agent.close()
            wait_until(lambda: sum(each.health()["sessions"] for each in pair) == 1)
            data = sender.offer(agent.did)
            sender.send(data)
            answer = sender.receive()
            assert answer["payload"]["details"]["name"] == "not_online"
            assert answer["correlation_id"] == json.loads(data)["id"]


def test_who_is_asked_for_all_the_time_can_be_reached_as_soon_as_it_has_its_answer(pair):
    with Agent(pair[0].port) as sender:
        key = DIDKey.generate()
        for _ in range(5):
            for _ in range(3):
                data = sender.offer(key.did)
                sender.send(data)
                assert sender.receive()["correlation_id"] == json.loads(data)["id"]
            with Agent(pair[1].port, key) as agent:
                assert_exchange(sender, agent)
                agent.close()
            wait_until(lambda: pair[1].health()["sessions"] == 0)
