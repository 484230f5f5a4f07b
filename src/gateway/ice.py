"""The STUN and TURN servers that agents are told, with credentials that expire.

A TURN server that shares a secret with the gateway (coturn: `use-auth-secret`) accepts every credential that
the gateway makes with it, and neither asks the other: draft-uberti-behave-turn-rest-00.

The user in a credential is the agent's whole DID. The 67 characters that come of it are far from the 508
bytes that USERNAME may have (RFC 8489 section 14.3), a TURN server splits at the first colon, and so its log,
its quota per user (coturn: `user-quota`) and the gateway's log name an agent alike.
"""

from __future__ import annotations

import hmac
import time
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue


@dataclass(frozen=True, slots=True)
class IceServers:
    """What agents are told.

    Attributes:
        stun_urls: RFC 7064.
        turn_urls: RFC 7065; all of them know `secret`.
        secret: Shared with the TURN servers.
        ttl: How long a credential can be used, in seconds.
    """

    stun_urls: Sequence[str] = ()
    turn_urls: Sequence[str] = ()
    secret: str = ""
    ttl: int = 0

    def __repr__(self) -> str:
        return f"<IceServers {[*self.stun_urls, *self.turn_urls]}>"

    def ext(self, did: str, now: float | None = None) -> dict[str, JsonValue]:
        """Return what stands of them in `ext` of an answer to REGISTER.

        Args:
            did: Of the agent.
            now: Seconds since the epoch; the system's clock if None.
        """
        servers: list[JsonValue] = []
        if self.stun_urls:
            servers.append({"urls": list(self.stun_urls)})
        if not self.turn_urls:
            return {"ice_servers": servers}
        expiry = int(time.time() if now is None else now) + self.ttl
        username = f"{expiry}:{did}"
        credential = b64encode(hmac.digest(self.secret.encode(), username.encode(), "sha1")).decode()
        servers.append({"urls": list(self.turn_urls), "username": username, "credential": credential})
        return {"ice_servers": servers, "ice_servers_ttl_ms": self.ttl * 1000}
