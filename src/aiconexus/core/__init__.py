"""Agents: who they are, what they can do, and how they talk to each other over WebRTC."""

from aiconexus.core.agent import Agent, Connecting
from aiconexus.core.call import Call, current_call
from aiconexus.core.capabilities import capability
from aiconexus.core.intents import Intent, Quote
from aiconexus.core.peer import Peer, PeerState
from aiconexus.core.peer_connection import Path

__all__ = [
    "Agent",
    "Call",
    "Connecting",
    "Intent",
    "Path",
    "Peer",
    "PeerState",
    "Quote",
    "capability",
    "current_call",
]
