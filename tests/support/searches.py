"""DISCOVER by a plain agent, and what comes back."""

from __future__ import annotations

import json
from typing import Any

from wire import Agent

from aiconexus.protocol import DiscoverPayload


def discover(agent: Agent, correlation_id: str | None = None, **query: Any) -> str:
    data = agent.message(agent.gateway_did, DiscoverPayload(**query), correlation_id=correlation_id)
    agent.send(data)
    id_: str = json.loads(data)["id"]
    return id_


def found(agent: Agent, **query: Any) -> list[dict[str, Any]]:
    """All pages."""
    agents: list[dict[str, Any]] = []
    cursor = None
    while True:
        id_ = discover(agent, cursor=cursor, **query)
        answer = agent.receive()
        assert (answer["type"], answer["correlation_id"]) == ("PRESENCE", id_), answer
        assert "partial" not in answer["payload"]
        assert len(answer["payload"]["agents"]) <= query.get("limit", 50)
        agents.extend(answer["payload"]["agents"])
        cursor = answer["payload"].get("cursor")
        if cursor is None:
            return agents


def dids(agents: list[dict[str, Any]]) -> list[str]:
    return [agent["did"] for agent in agents]
