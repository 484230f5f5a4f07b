"""ICE candidates of the other side: how they are written, and which of them are tried.

A browser may name its addresses only as mDNS names (`….local`, draft-ietf-mmusic-mdns-ice-candidates), which
to resolve means to ask the whole local network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioice.mdns import is_mdns_hostname
from aiortc import RTCIceCandidate, RTCPeerConnection
from aiortc.sdp import candidate_from_sdp

from aiconexus.protocol.errors import MalformedMessageError

if TYPE_CHECKING:
    from aioice import Connection

_CANDIDATE = "a=candidate:"
_END_OF_CANDIDATES = "a=end-of-candidates"


def ice_connection(pc: RTCPeerConnection) -> Connection | None:
    """Return aioice's side of the DataChannel's transport; None before there is one."""
    return pc.sctp.transport.transport._connection if pc.sctp is not None else None


def take_out_mdns(sdp: str) -> tuple[str, list[str], bool]:
    """Take the mDNS names out of a session description.

    setRemoteDescription would wait for the resolution of each, and fail with it.

    Returns:
        The description without them, their candidates as a trickled one is written (RFC 8839
        section 5.1), and whether end-of-candidates has to follow them, as it was taken out, too.
    """
    lines = sdp.splitlines()
    names = [line for line in lines if line.startswith(_CANDIDATE) and is_mdns(parse_candidate(line[2:]))]
    if not names:
        return sdp, [], False
    rest = [line for line in lines if line not in names and line != _END_OF_CANDIDATES]
    return "\r\n".join([*rest, ""]), [line[2:] for line in names], _END_OF_CANDIDATES in lines


def parse_candidate(text: str) -> RTCIceCandidate:
    """Read a candidate such as `candidate:1 1 udp 2130706431 192.0.2.1 40000 typ host`.

    Raises:
        MalformedMessageError: It is none.
    """
    try:
        candidate = candidate_from_sdp(text.removeprefix("candidate:"))
    except (AssertionError, ValueError) as error:
        raise MalformedMessageError(
            f"not an ICE candidate (RFC 8839 section 5.1): {text[:200]!r}", field="payload.candidate"
        ) from error
    return candidate


def is_mdns(candidate: RTCIceCandidate) -> bool:
    """Tell whether the candidate hides its address behind an mDNS name."""
    return is_mdns_hostname(candidate.ip)
