"""Why a connection did not open: what ICE has tried, in words, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from aioice import Connection

    from aiconexus.core.gathering import Gathering

MEND_SERVERS: Final = (
    "see that these servers run, and that their credentials (of the gateway: --turn-secret) are right"
)
LISTED_MAX: Final = 6  # candidates, or pairs of them: more would hide the rest of the sentence

_STATES: Final = {
    "FROZEN": "not tried",
    "WAITING": "not tried",
    "IN_PROGRESS": "no answer yet",
    "SUCCEEDED": "works",
    "FAILED": "failed",
}


def address(pair: tuple[str, int]) -> str:
    """Write an address and port as people do."""
    host, port = pair
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def describe(connection: Connection, gathering: Gathering, *, hidden_names: bool) -> str:
    """Tell which candidates there are, which pairs of them were tried, and what to do.

    Args:
        connection: aioice's side of it.
        gathering: Of its local candidates.
        hidden_names: Whether mDNS names of the other side were left out.
    """
    # aioice forgets its own when ICE fails.
    local, remote = gathering.candidates, connection.remote_candidates
    pairs = [
        f"{address(pair.local_addr)} → {address(pair.remote_addr)} {_STATES[pair.state.name]}"
        for pair in connection._check_list
    ]
    sentences = [f"local candidates: {_candidates(local)}", f"remote candidates: {_candidates(remote)}"]
    if connection.remote_username is not None:
        sentences.append(f"pairs tried: {_list(pairs)}")
    sentences += gathering.faults
    advice = _advice(connection, gathering, hidden_names=hidden_names)
    return "; ".join([*sentences, *([advice] if advice else [])])


def _advice(connection: Connection, gathering: Gathering, *, hidden_names: bool) -> str:
    local, remote = gathering.candidates, connection.remote_candidates
    if connection._nominated:
        return "a path was found, but DTLS has not finished over it: try again"
    if connection.remote_username is None:
        return ""  # the other side has not been heard yet
    if not remote and hidden_names:
        return (
            "the other side names only mDNS addresses, as browsers do, which are not looked up here: "
            "one of the two needs a TURN server"
        )
    if not remote:
        return "the other side has named no candidate: has it a network?"
    if not gathering.turn_servers:
        return (
            "no TURN server is configured: behind two NATs, or where UDP is blocked, there is no path "
            "without one; give ice_servers, or the gateway --turn-url"
        )
    if gathering.faults:
        return MEND_SERVERS
    if any(candidate.type == "relay" for candidate in (*local, *remote)):
        return "not even a relay reaches the other side: does a firewall, or the TURN server, deny it?"
    return ""


def _candidates(candidates: Sequence[Any]) -> str:
    return _list(
        [f"{address((candidate.host, candidate.port))} {candidate.type}" for candidate in candidates]
    )


def _list(items: Iterable[str]) -> str:
    items = list(items)
    more = [f"{len(items) - LISTED_MAX} more"] if len(items) > LISTED_MAX else []
    return ", ".join([*items[:LISTED_MAX], *more]) or "none"
