"""DISCOVER and watches on real gateways: one worker, several, and several nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from searches import dids, discover, found
from wire import Agent, wait_until

from aiconexus.protocol import DIDKey, RegisterPayload
from aiconexus.protocol.cards import sign_card, verify_card

ADD = {"name": "add", "description": "Adds numbers.", "tags": ["math"]}
SUB = {"name": "sub", "tags": ["math", "slow"]}


@pytest.fixture(params=["one worker", "three workers", "two nodes"])
def ports(request: pytest.FixtureRequest, start_gateway: Callable[..., Any]) -> list[int]:
    """Where agents may register to be in one network."""
    if request.param == "two nodes":
        start_node = request.getfixturevalue("start_node")
        return [start_node().port, start_node().port]
    workers = "1" if request.param == "one worker" else "3"
    return [start_gateway("--workers", workers, "--message-rate", "0").port]


def agent_with(port: int, *capabilities: dict[str, Any], **ext: Any) -> Agent:
    return registered(Agent(port, register=False), *capabilities, **ext)


def registered(agent: Agent, *capabilities: dict[str, Any], **ext: Any) -> Agent:
    card = sign_card(list(capabilities), agent.key)
    agent.send(agent.signed(agent.registration(ext={"card": card, **ext})))
    answer = agent.receive()
    assert answer["type"] == "REGISTER", answer
    agent.register_answer = answer
    agent.resume_token = answer["ext"]["resume_token"]
    return agent


def event_of(agent: Agent, watch: str) -> tuple[str, dict[str, Any]]:
    message = agent.receive()
    assert (message["type"], message["correlation_id"]) == ("PRESENCE", watch), message
    return message["payload"]["event"], (message["payload"]["agents"] or [{}])[0]


def test_agents_are_found_by_what_they_can_do(ports):
    some = [agent_with(ports[number % len(ports)], ADD) for number in range(6)]
    other = agent_with(ports[-1], SUB)
    hidden = agent_with(ports[-1], ADD, hidden=True)
    with Agent(ports[0]) as asker:
        answer = found(asker, capability="add")
        assert dids(answer) == sorted(agent.did for agent in some)
        for entry in answer:
            assert entry["status"] == "online"
            assert verify_card(entry["card"], entry["did"]).capabilities[0].description == "Adds numbers."
        assert dids(found(asker, tag="slow")) == dids(found(asker, text="UB")) == [other.did]
        assert dids(found(asker, capability="add", tag="slow")) == []
        assert len(found(asker, tag="math", limit=2)) == 7
        asked = [hidden.did, some[0].did, asker.did]
        assert dids(found(asker, dids=asked)) == sorted(asked)
        assert "card" not in found(asker, dids=[asker.did])[0]
        assert len(found(asker)) == 8  # with the one that asks
    for agent in (*some, other, hidden):
        agent.drop()


DESCRIBED = {
    "street": "Findet jede Straße.",
    "flash": "Un ÉCLAIR au café",
    "decomposed": "un e\u0301clair",  # the same letter in two code points is another text
    "istanbul": "İSTANBUL'da bul",
    "odyssey": "ΟΔΥΣΣΕΥΣ",
    "file": "\ufb01le of 5 \u212aelvin",
    "quote": 'says "hi" \\o/',
    "lines": "one\ntwo\tthree\u2028four",
    "smile": "\U0001f600 is told of, and \U00010400 too",
    "pattern": "%a+ [x] .* ^$ -",
    "plain": "",
}
# Text, and who of the above is found by it.
SEARCHED = [
    ("strasse", {"street"}),
    ("STRASSE", {"street"}),
    ("straße", {"street"}),
    ("ss", {"street", "odyssey"}),
    ("éclair", {"flash"}),
    ("ÉCLAIR", {"flash"}),
    ("E\u0301CLAIR", {"decomposed"}),
    ("clair", {"flash", "decomposed"}),
    ("i\u0307stanbul", {"istanbul"}),
    ("istanbul", {"istanbul"}),
    ("οδυσσευς", {"odyssey"}),
    ("ΣΕΥΣ", {"odyssey"}),
    ("FILE OF", {"file"}),
    ("kelvin", {"file"}),
    ('"HI"', {"quote"}),
    ("\\O/", {"quote"}),
    ("one\nTWO\t", {"lines"}),
    ("\u2028", {"lines"}),
    ("lines\none", {"lines"}),
    ("\U0001f600", {"smile"}),
    ("\U00010428", {"smile"}),
    ("%A+", {"pattern"}),
    ("[x]", {"pattern"}),
    (".*", {"pattern"}),
    ("\n", set(DESCRIBED)),
    ("plain\nfile", set()),
    ("absent", set()),
]


def test_a_text_is_found_among_two_nodes_as_at_one(gateway, pair):
    keys = {name: DIDKey.from_seed(name.encode().ljust(32)) for name in DESCRIBED}
    names = {key.did: name for name, key in keys.items()}
    with ExitStack() as stack:
        askers = [stack.enter_context(Agent(node.port)) for node in (gateway, *pair)]
        for number, (name, description) in enumerate(DESCRIBED.items()):
            capability = {"name": name, "description": description, "tags": ["told"]}
            for port in (gateway.port, pair[number % 2].port):
                agent = stack.enter_context(Agent(port, keys[name], register=False))
                registered(agent, capability, {"name": "other", "tags": ["rest"]})
        for text, expected in SEARCHED:
            for query in ({}, {"tag": "told"}, {"limit": 1}):
                answers = [dids(found(asker, text=text, **query)) for asker in askers]
                assert {names[did] for did in answers[0]} == expected, (text, query)
                assert answers == [sorted(answers[0])] * 3, (text, query)
            for name in DESCRIBED:
                answers = [dids(found(asker, text=text, capability=name)) for asker in askers]
                assert answers == [[keys[name].did] if name in expected else []] * 3, (text, name)


def test_large_cards_come_in_pages_that_fit(ports):
    big = {"name": "big", "metadata": {"x": "y" * 8_000}}
    agents = [agent_with(ports[number % len(ports)], big) for number in range(20)]
    with Agent(ports[0]) as asker:
        assert dids(found(asker, capability="big")) == sorted(agent.did for agent in agents)
    for agent in agents:
        agent.drop()


def test_an_agent_is_away_when_its_connection_breaks_and_another_when_its_card_is(ports):
    agent = agent_with(ports[-1], ADD)
    with Agent(ports[0]) as asker:
        agent.drop()
        wait_until(lambda: [entry["status"] for entry in found(asker, capability="add")] == ["away"])
        with Agent(ports[0], agent.key, register=False) as back:
            ext = {"card": sign_card([SUB], back.key), "resume": agent.resume_token}
            back.send(back.signed(back.registration(ext=ext)))
            assert back.receive()["ext"]["resumed"]
            assert [entry["status"] for entry in found(asker, capability="sub")] == ["online"]
            assert found(asker, capability="add") == []
            payload = RegisterPayload(public_key=back.key.public_key_base58)
            update = back.message(back.gateway_did, payload, ext={"card": sign_card([ADD], back.key)})
            back.send(update)
            assert back.receive()["correlation_id"] == json.loads(update)["id"]
            wait_until(lambda: dids(found(asker, capability="add")) == [back.did])
            assert found(asker, capability="sub") == []


def test_a_watch_tells_who_comes_changes_drops_and_goes(ports):
    with Agent(ports[0]) as watcher:
        watch = discover(watcher, tag="math", watch=True)
        # With several nodes, what came before Redis was heard may have been missed.
        answers = [watcher.receive()["payload"] for _ in range(len(ports))]
        assert sorted(answer.get("event", "page") for answer in answers) == ["missed", "page"][-len(ports) :]
        for port in ports:
            agent = agent_with(port, ADD)
            event, entry = event_of(watcher, watch)
            assert (event, entry["did"], entry["status"]) == ("join", agent.did, "online")
            verify_card(entry["card"], agent.did)
            other = agent_with(port, {"name": "else"})
            payload = RegisterPayload(public_key=agent.key.public_key_base58)
            ext = {"card": sign_card([SUB], agent.key)}
            agent.send(agent.message(agent.gateway_did, payload, ext=ext))
            assert agent.receive()["type"] == "REGISTER"
            event, entry = event_of(watcher, watch)
            assert (event, entry["card"]["capabilities"]) == ("update", [SUB])
            agent.drop()
            assert event_of(watcher, watch)[0] == "away"
            back = agent_with_key(agent, port)
            assert event_of(watcher, watch)[0] == "update"
            back.close()
            event, entry = event_of(watcher, watch)
            assert (event, entry["status"]) == ("leave", "offline")
            other.drop()
        discover(watcher, correlation_id=watch, watch=False)
        assert watcher.receive()["payload"]["agents"] == []
        with agent_with(ports[-1], ADD) as late:
            assert dids(found(watcher, tag="math")) == [late.did]  # and nothing came before


def test_an_agent_that_is_not_what_a_watch_asks_for_any_more_leaves_it(ports):
    with ExitStack() as stack:
        watcher = stack.enter_context(Agent(ports[0]))
        watch = discover(watcher, tag="math", watch=True)
        for _ in range(len(ports)):
            watcher.receive()
        agent = stack.enter_context(agent_with(ports[0], ADD))
        assert event_of(watcher, watch)[0] == "join"
        show(agent, {"name": "else"})
        event, entry = event_of(watcher, watch)
        assert (event, entry) == ("leave", {"did": agent.did, "status": "offline"})
        show(agent, SUB)
        event, entry = event_of(watcher, watch)
        assert (event, entry["card"]["capabilities"]) == ("join", [SUB])
        show(agent, SUB, hidden=True)
        assert event_of(watcher, watch)[0] == "leave"
        show(agent, SUB)
        assert event_of(watcher, watch)[0] == "join"
        # It registers anew, at a worker of the kernel's choice, or another node.
        for number, capability in enumerate([{"name": "else"}, ADD] * 6):
            agent = stack.enter_context(Agent(ports[number % len(ports)], agent.key, register=False))
            registered(agent, capability)
            event, entry = event_of(watcher, watch)
            assert (event, entry["did"]) == ("join" if capability is ADD else "leave", agent.did)
        agent.close()
        assert event_of(watcher, watch)[0] == "leave"


def show(agent: Agent, *capabilities: dict[str, Any], **ext: Any) -> None:
    payload = RegisterPayload(public_key=agent.key.public_key_base58)
    ext = {"card": sign_card(list(capabilities), agent.key), **ext}
    agent.send(agent.message(agent.gateway_did, payload, ext=ext))
    assert agent.receive()["type"] == "REGISTER"


def agent_with_key(agent: Agent, port: int) -> Agent:
    back = Agent(port, agent.key, register=False)
    ext = {"card": sign_card([SUB], back.key), "resume": agent.resume_token}
    back.send(back.signed(back.registration(ext=ext)))
    assert back.receive()["type"] == "REGISTER"
    return back


def test_a_worker_that_dies_makes_watchers_ask_again(start_gateway):
    gateway = start_gateway("--workers", "3")
    with Agent(gateway.port) as watcher:
        own = watcher.register_answer["ext"]["worker"]
        watch = discover(watcher, capability="add", watch=True)
        assert watcher.receive()["payload"]["agents"] == []
        while True:
            agent = agent_with(gateway.port, ADD)
            assert event_of(watcher, watch)[0] == "join"
            if agent.register_answer["ext"]["worker"] != own:
                break
            agent.close()
            assert event_of(watcher, watch)[0] == "leave"
        gateway.kill_worker(gateway.worker_pids[agent.register_answer["ext"]["worker"]])
        assert event_of(watcher, watch)[0] == "missed"
        wait_until(lambda: found(watcher, capability="add") == [])
        agent.drop()
        wait_until(lambda: len(gateway.worker_pids) == 3)


def test_who_asks_too_much_at_the_same_time_is_refused(ports):
    with Agent(ports[0]) as asker:
        for _ in range(16):
            discover(asker, watch=True, capability="add")
            answer = asker.receive()
            while answer["payload"].get("event") == "missed":
                answer = asker.receive()
            assert answer["type"] == "PRESENCE"
        id_ = discover(asker, watch=True, capability="add")
        answer = asker.receive()
        while answer["type"] == "PRESENCE":
            answer = asker.receive()
        assert (answer["type"], answer["correlation_id"]) == ("ERROR", id_)
        assert answer["payload"]["details"]["name"] == "overloaded"
        assert answer["payload"]["details"]["field"] == "payload.watch"
