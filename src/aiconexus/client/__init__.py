"""The agent's connection to its gateway: register, signal, come back after a drop."""

import logging

from aiconexus.client.backoff import Backoff
from aiconexus.client.directory import Found, PresenceEvent
from aiconexus.client.handshake import Session
from aiconexus.client.socket import ClientState, ClientStats, GatewayClient, short_did

__all__ = [
    "Backoff",
    "ClientState",
    "ClientStats",
    "Found",
    "GatewayClient",
    "PresenceEvent",
    "Session",
    "short_did",
]

# Silent until the application asks for logs; otherwise `logging` would print warnings to stderr.
logging.getLogger("aiconexus").addHandler(logging.NullHandler())
