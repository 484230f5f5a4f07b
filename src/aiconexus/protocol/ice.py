"""URLs of STUN and TURN servers: RFC 7064, RFC 7065."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_URL: Final = re.compile(
    r"(?P<scheme>stuns?|turns?):(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    r"(?:\?transport=(?P<transport>udp|tcp))?",
    re.ASCII | re.IGNORECASE,
)
_DEFAULT_PORTS: Final = {"stun": 3478, "turn": 3478, "stuns": 5349, "turns": 5349}


class IceUrl(NamedTuple):
    """Where a STUN or TURN server is.

    Attributes:
        scheme: "stun", "stuns", "turn" or "turns".
        host: A name or an address; IPv6 without brackets.
        port: The default one (RFC 7065 section 3.2) if the URL names none.
        transport: "udp" or "tcp", between the agent and the server.
    """

    scheme: str
    host: str
    port: int
    transport: str

    @property
    def is_turn(self) -> bool:
        """Whether it relays, and wants credentials."""
        return self.scheme in ("turn", "turns")


def parse_ice_url(url: str) -> IceUrl:
    """Read the URL of a STUN or TURN server.

    Raises:
        ValueError: It is none; the text says how one looks.
    """
    match = _URL.fullmatch(url)
    if match is None:
        hint = ": there is no // in these URLs" if "://" in url else ""
        raise ValueError(
            f"{url!r} is no URL such as stun:host:3478, turn:host:3478?transport=udp or turns:host:5349{hint}"
        )
    scheme = match["scheme"].lower()
    port = int(match["port"]) if match["port"] else _DEFAULT_PORTS[scheme]
    if not 0 < port <= 65_535:
        raise ValueError(f"no such port: {url!r}")
    if match["transport"] and scheme in ("stun", "stuns"):
        raise ValueError(f"{url!r}: only turn: and turns: URLs have a transport (RFC 7064)")
    transport = (match["transport"] or ("tcp" if scheme in ("stuns", "turns") else "udp")).lower()
    return IceUrl(scheme, match["host"].strip("[]"), port, transport)
