"""AIConexus: agents find each other, prove who they are and talk directly.

Names are imported when they are first used (PEP 562): `aiconexus.protocol` alone must not load aiortc,
which costs 400 ms and 50 MiB.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiconexus.client import Found, GatewayClient, PresenceEvent
    from aiconexus.core import Agent, Call, Intent, Peer, Quote, capability, current_call
    from aiconexus.protocol import DIDKey, Message, Receipt
    from aiconexus.protocol.errors import AIConexusError

__version__ = "0.1.0"

_HOME = {
    "AIConexusError": "aiconexus.protocol.errors",
    "Agent": "aiconexus.core",
    "Call": "aiconexus.core",
    "DIDKey": "aiconexus.protocol",
    "Found": "aiconexus.client",
    "GatewayClient": "aiconexus.client",
    "Intent": "aiconexus.core",
    "Message": "aiconexus.protocol",
    "Peer": "aiconexus.core",
    "PresenceEvent": "aiconexus.client",
    "Quote": "aiconexus.core",
    "Receipt": "aiconexus.protocol",
    "capability": "aiconexus.core",
    "current_call": "aiconexus.core",
}

__all__ = [
    "AIConexusError",
    "Agent",
    "Call",
    "DIDKey",
    "Found",
    "GatewayClient",
    "Intent",
    "Message",
    "Peer",
    "PresenceEvent",
    "Quote",
    "Receipt",
    "capability",
    "current_call",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
