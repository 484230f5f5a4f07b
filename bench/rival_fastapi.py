"""The gateway that one writes first: FastAPI, a dict of sockets, a registry, 60 lines.

What makes it grow: the sockets are the keys of the dict, because a socket is what one holds when it closes.
So `route` finds the target by going over the connections, half of them on average, for each message.

Usage: `uvicorn bench.rival_fastapi:app`
"""

import asyncio
import json
from datetime import datetime, timezone
from typing import Any, Literal

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, Field


class Envelope(BaseModel):
    """A message between two agents."""

    id: str
    correlation_id: str | None = None
    timestamp: str
    from_: str = Field(alias="from")
    to: str
    type: Literal["OFFER", "ANSWER", "ICE_CANDIDATE"]
    payload: dict[str, Any]
    version: str = "1.0"
    signature: str


class Entry(BaseModel):
    """What the registry knows about an agent."""

    agent_id: str
    connected_at: datetime
    last_activity: datetime


class Registry:
    """Agents and when they were last active."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.lock = asyncio.Lock()

    async def register(self, agent_id: str) -> None:
        """Add an agent."""
        now = datetime.now(timezone.utc)
        async with self.lock:
            self.entries[agent_id] = Entry(agent_id=agent_id, connected_at=now, last_activity=now)

    async def unregister(self, agent_id: str) -> None:
        """Forget an agent."""
        async with self.lock:
            self.entries.pop(agent_id, None)

    async def touch(self, agent_id: str) -> None:
        """Note that an agent is active."""
        async with self.lock:
            if entry := self.entries.get(agent_id):
                entry.last_activity = datetime.now(timezone.utc)


app = FastAPI()
registry = Registry()
agents: dict[WebSocket, str] = {}


async def route(envelope: Envelope) -> bool:
    """Send a message to its target; tell whether that is connected."""
    for websocket, agent_id in agents.items():
        if agent_id == envelope.to:
            await websocket.send_json(envelope.model_dump(by_alias=True))
            await registry.touch(agent_id)
            return True
    return False


@app.websocket("/ws/{agent_id}")
async def connect(websocket: WebSocket, agent_id: str) -> None:
    """Serve an agent until it goes."""
    await websocket.accept()
    await registry.register(agent_id)
    agents[websocket] = agent_id
    await websocket.send_json({"type": "REGISTERED", "to": agent_id})
    try:
        while True:
            envelope = Envelope(**json.loads(await websocket.receive_text()))
            await registry.touch(agent_id)
            if not await route(envelope):
                await websocket.send_json({"type": "ERROR", "payload": {"code": "UNKNOWN_AGENT"}})
    except WebSocketDisconnect:
        pass
    finally:
        del agents[websocket]
        await registry.unregister(agent_id)
