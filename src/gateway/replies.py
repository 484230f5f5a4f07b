"""Messages that the gateway itself sends to a registered agent.

They are not signed: the gateway could drop or invent them anyway. They are built without the models, for
an ERROR must stay cheap when somebody provokes many; a test checks them against the models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from aiconexus.protocol.errors import CAUSES, close_code
from aiconexus.protocol.models import MessageType, new_envelope


def _envelope(
    type_: MessageType, sender: str, to: str, correlation_id: str | None, payload: dict[str, Any]
) -> bytes:
    return orjson.dumps(new_envelope(sender, to, type_, payload, correlation_id=correlation_id))


def error(
    sender: str,
    to: str,
    name: str,
    *,
    message: str = "",
    field: str | None = None,
    correlation_id: str | None = None,
    retry_after_ms: int | None = None,
) -> bytes:
    """Return an ERROR for the cause `name`; `message` replaces the cause's text."""
    cause = CAUSES[name]
    details: dict[str, Any] = {"num": cause.num, "name": cause.name, "temporary": cause.temporary}
    if field is not None:
        details["field"] = field
    if retry_after_ms is not None:
        details["retry_after_ms"] = retry_after_ms
    payload = {"code": cause.code.value, "message": message or cause.message, "details": details}
    return _envelope(MessageType.ERROR, sender, to, correlation_id, payload)


def pong(sender: str, to: str, correlation_id: str, sequence: int | None) -> bytes:
    """Return the PONG to a PING."""
    return _envelope(
        MessageType.PONG, sender, to, correlation_id, {} if sequence is None else {"sequence": sequence}
    )


def presence(
    sender: str,
    to: str,
    correlation_id: str,
    agents: Sequence[bytes],
    *,
    cursor: str | None = None,
    event: str | None = None,
    partial: bool = False,
) -> bytes:
    """Return a PRESENCE; each of `agents` is JSON, see `agent`."""
    payload: dict[str, Any] = {"agents": [orjson.Fragment(agent) for agent in agents]}
    if cursor is not None:
        payload["cursor"] = cursor
    if event is not None:
        payload["event"] = event
    if partial:
        payload["partial"] = True
    return _envelope(MessageType.PRESENCE, sender, to, correlation_id, payload)


def agent(did: str, status: str, card: bytes) -> bytes:
    """Return what a PRESENCE says of one agent; `card` is JSON or empty."""
    entry: dict[str, Any] = {"did": did, "status": status}
    if card:
        entry["card"] = orjson.Fragment(card)
    return orjson.dumps(entry)


def close_reason(code: int, retry_after_ms: int | None = None) -> bytes:
    """Return the reason text of a CLOSE frame, which tells the client when to come back."""
    row = close_code(code)
    reason: dict[str, Any] = {"n": row.name}
    if row.reconnect:
        reason["r"] = row.retry_after_ms if retry_after_ms is None else retry_after_ms
    return orjson.dumps(reason)
