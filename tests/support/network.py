"""What tests of several nodes ask of them and of their Redis."""

from __future__ import annotations

import json
import select
import time
from typing import Any

from redis_server import RedisServer
from wire import Agent, wait_until

# What a node logs as an error when a test takes its Redis away.
LOST = ("Redis lost",)
# "After recovery both nodes agree within 10 s", "no stale presence after 15 s".
RECOVERY_SECONDS = 10.0
STALE_SECONDS = 15.0


def redis_state(node: Any) -> str:
    return str(node.health()["cluster"]["redis"])


def entries(redis: RedisServer) -> int:
    """How many agents the registry has."""
    listed = redis.command("EVAL \"return #redis.call('KEYS', '*:agent:*')\" 0")
    return int(listed.strip(b":\r\n"))


def assert_unreachable(sender: Agent, did: str, *causes: str) -> None:
    data = sender.offer(did)
    sender.send(data)
    answer = sender.receive()
    assert answer["correlation_id"] == json.loads(data)["id"]
    details = answer["payload"]["details"]
    assert details["name"] in causes
    assert details["temporary"]


def exchange_soon(one: Agent, other: Agent, seconds: float = RECOVERY_SECONDS) -> None:
    """Wait until two agents reach each other; refusals on the way are temporary."""
    deadline = time.monotonic() + seconds
    for sender, receiver in ((one, other), (other, one)):
        sent = [sender.offer(receiver.did)]
        sender.send(sent[-1])
        while True:
            agent, got = first_of([sender, receiver])
            if agent is receiver:
                assert got in sent
                if got == sent[-1]:
                    break
                continue  # it was given back as unconfirmed, and has arrived
            error = json.loads(got)
            assert error["payload"]["details"]["temporary"], error
            assert time.monotonic() < deadline, error
            if error["correlation_id"] == json.loads(sent[-1])["id"]:
                time.sleep(0.05)
                sent.append(sender.offer(receiver.did))
                sender.send(sent[-1])


def wait_until_confirmed(*nodes: Any) -> None:
    """What was delivered is known to have been, so that it does not come back when something fails."""
    wait_until(lambda: all(node.health()["unconfirmed_bytes"] == 0 for node in nodes))


def first_of(agents: list[Agent], seconds: float = 10.0) -> tuple[Agent, bytes]:
    """Return who gets the next message, and the message."""
    for agent in agents:
        if agent.buffer:
            return agent, agent.read_text()
    ready, _, _ = select.select([agent.socket for agent in agents], [], [], seconds)
    assert ready, "nobody got anything"
    agent = next(agent for agent in agents if agent.socket is ready[0])
    return agent, agent.read_text()
