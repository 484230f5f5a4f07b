"""One RTCPeerConnection with one DataChannel, from nothing to open. It knows nothing of signaling.

Who the other end is follows from DTLS: the certificate must have the fingerprint in the session description
(RFC 8122), and that description came in a message signed by the other agent.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCIceCandidate,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from OpenSSL import SSL

from aiconexus.core.candidates import ice_connection, is_mdns, parse_candidate, take_out_mdns
from aiconexus.core.channel import Channel
from aiconexus.core.diagnosis import MEND_SERVERS, address, describe
from aiconexus.core.gathering import Gathering, read_ice_servers
from aiconexus.protocol.errors import MalformedMessageError, PeerConnectError, PeerIdentityError
from aiconexus.protocol.limits import DATA_CHANNEL_LABEL, DATA_MESSAGE_MAX_BYTES
from aiconexus.protocol.models import IceCandidatePayload

_DATA_CHANNEL_SECTION: Final = re.compile(r"m=application \d+ \S*DTLS/SCTP .+")  # RFC 8841 section 4

_MESSAGE_SIZE: Final = re.compile(r"a=max-message-size:([^\r\n]*)")  # RFC 8841 section 6
_OUR_MESSAGE_SIZE: Final = f"a=max-message-size:{DATA_MESSAGE_MAX_BYTES}"
_MESSAGE_SIZE_DEFAULT: Final = 65_536  # where the SDP names none

_log: Final = logging.getLogger("aiconexus.core")

CANDIDATES_MAX: Final = 100  # of one agent: each is sent STUN packets, wherever it points (RFC 8445 19.5.1)


@dataclass(frozen=True)
class Path:
    """The candidate pair that carries the data (RFC 8445 section 8).

    Attributes:
        local: Address and port on this side; at a relay, the relay's.
        remote: Address and port of the other side.
        protocol: "udp" or "tcp".
        kind: "host", "srflx", "prflx" or "relay"; both, as "host/relay", where they differ.
    """

    local: str
    remote: str
    protocol: str
    kind: str

    def __str__(self) -> str:
        return f"{self.local} ⇄ {self.remote} {self.protocol} {self.kind}"


class PeerConnection:
    """An attempt to open the DataChannel `ioap` with another agent, and the connection that comes of it.

    Attributes:
        opened: The open Channel, or a PeerError.
        message_max_bytes: How long a message the other end takes, once its description is known.
    """

    def __init__(
        self,
        *,
        host_addresses: Sequence[str] | None = None,
        ice_servers: Iterable[RTCIceServer | Mapping[str, Any]] = (),
        relay_only: bool = False,
    ) -> None:
        """Prepare a connection.

        Args:
            host_addresses: Addresses of this machine to offer; None offers all but loopback, as aioice
                does. Where they are chosen, mDNS names are not resolved: that would ask elsewhere.
            ice_servers: STUN and TURN servers as W3C RTCIceServer (`urls`, `username`, `credential`). If none
                of a kind answers, that delays the connection by 5 s.
            relay_only: Show the other side no address of this machine: all goes over a TURN server.

        Raises:
            ValueError: An ICE server is none.
        """
        self._gathering = Gathering(
            read_ice_servers(ice_servers), host_addresses=host_addresses, relay_only=relay_only
        )
        self._pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._host_addresses = host_addresses
        # To look a name up would show this machine to its network, or ask where it is told not to.
        self._looks_names_up = host_addresses is None and not relay_only
        self._early: list[IceCandidatePayload] | None = []
        self._candidates = 0
        self._end_withheld = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.message_max_bytes = _MESSAGE_SIZE_DEFAULT
        self.opened: Final[asyncio.Future[Channel]] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting when it fails: that is no fault.
        self.opened.add_done_callback(lambda opened: opened.cancelled() or opened.exception())
        self._pc.on("connectionstatechange", self._state_changed)
        self._pc.on("datachannel", self._channel_arrived)

    # --- offer and answer (RFC 8829) ------------------------------------------------------------

    async def create_offer(self) -> str:
        """Return the SDP of an offer, with all candidates of this side in it."""
        channel = self._pc.createDataChannel(DATA_CHANNEL_LABEL, ordered=True)
        opening = Channel(channel)
        channel.on("open", lambda: self._channel_opened(opening))
        return await self._set_local_description(await self._pc.createOffer())

    async def create_answer(self, offer: str) -> str:
        """Return the SDP of the answer to `offer`, with all candidates of this side in it.

        Raises:
            MalformedMessageError: `offer` is no offer of one DataChannel.
        """
        await self._set_remote_description(offer, "offer")
        return await self._set_local_description(await self._pc.createAnswer())

    async def accept_answer(self, answer: str) -> None:
        """Take the other side's answer to the offer; the connection opens, or fails, after it.

        Raises:
            MalformedMessageError: `answer` is no answer to it.
        """
        await self._set_remote_description(answer, "answer")

    def add_ice_candidate(self, payload: IceCandidatePayload) -> None:
        """Take a trickled candidate (RFC 8838); one that comes before its description waits for it.

        Raises:
            MalformedMessageError: It is none, or one too many.
        """
        candidate = parse_candidate(payload.candidate) if payload.candidate else None
        if candidate is not None:
            self._count(1)
        if self._early is None:
            self._add(candidate, payload.sdp_mid, payload.sdp_mline_index)
        elif candidate is not None:
            self._early.append(payload)
        # An early end-of-candidates may be of an offer that lost: it would cut off the real ones.

    def _count(self, more: int) -> None:
        self._candidates += more
        if self._candidates > CANDIDATES_MAX:
            raise MalformedMessageError(f"more than {CANDIDATES_MAX} candidates", field="payload.candidate")

    async def _set_local_description(self, description: RTCSessionDescription) -> str:
        _drop_what_comes_too_late(self._pc)
        connection = ice_connection(self._pc)
        assert connection is not None
        self._gathering.take_over(connection)
        # Shielded: gathering that is cut off would leave sockets that close() does not know.
        await asyncio.shield(self._spawn(self._pc.setLocalDescription(description)))
        if not self._gathering.candidates:
            if self._gathering.relay_only:
                raise PeerConnectError(self._no_relay())
            if self._host_addresses is None:
                raise PeerConnectError(
                    "this machine has no network interface but loopback; to connect agents on this machine "
                    'alone give host_addresses=["127.0.0.1"]'
                )
            raise PeerConnectError(f"no host address can be used: {list(self._host_addresses)}")
        # aiortc before 1.16, the last one for Python 3.10, takes 256 KiB and names 64.
        return _MESSAGE_SIZE.sub(_OUR_MESSAGE_SIZE, self._pc.localDescription.sdp)

    def _no_relay(self) -> str:
        faults = "; ".join(self._gathering.faults)
        if not self._gathering.turn_servers:
            return (
                "relay_only needs a TURN server, and none is known: give ice_servers with one, or the "
                "gateway --turn-url"
            )
        return f"relay_only needs a TURN server, and none can be used: {faults}; {MEND_SERVERS}"

    async def _set_remote_description(self, sdp: str, kind: str) -> None:
        self.message_max_bytes = _check_description(sdp)
        self._count(sdp.count("a=candidate:"))
        description, names, is_complete = take_out_mdns(sdp)
        try:
            await self._pc.setRemoteDescription(RTCSessionDescription(description, kind))
        except Exception as error:  # aiortc's parser has no error class of its own
            raise MalformedMessageError(f"no usable SDP {kind}: {error}", field="payload.sdp") from error
        for name in names:
            self._add(parse_candidate(name), None, 0)
        early, self._early = self._early or [], None
        for payload in early:
            self._add(parse_candidate(payload.candidate), payload.sdp_mid, payload.sdp_mline_index)
        if is_complete:
            self._add(None, None, 0)

    def _add(self, candidate: RTCIceCandidate | None, mid: str | None, index: int | None) -> None:
        # Of an end without any candidate aioice concludes that there is no way. But a browser that may not
        # tell its addresses has none, and its own checks tell where it is (RFC 8863).
        if candidate is None and (self._end_withheld or not self._candidates):
            return
        if candidate is not None:
            if is_mdns(candidate) and not self._looks_names_up:
                # Not even end-of-candidates then: it would fail a connection that the other side's checks
                # may still open (as peer reflexive, RFC 8445 section 7.3.1.3).
                self._end_withheld = True
                return
            candidate.sdpMid = mid
            candidate.sdpMLineIndex = 0 if mid is None and index is None else index
        self._spawn(self._add_now(candidate))

    async def _add_now(self, candidate: RTCIceCandidate | None) -> None:
        # A candidate that cannot be used is no reason to give up the others: a name that nobody resolves
        # (Python 3.10's asyncio.TimeoutError passes aioice), an address family that is not there.
        try:
            await self._pc.addIceCandidate(candidate)
        except Exception as error:
            _log.debug("candidate %s is not used: %s", candidate, error)

    # --- state ----------------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """Over which pair of addresses the data goes; None until ICE has found one."""
        connection = ice_connection(self._pc)
        pair = connection._nominated.get(1) if connection is not None else None
        if pair is None:
            return None
        local, remote = pair.local_candidate, pair.remote_candidate
        kind = local.type if local.type == remote.type else f"{local.type}/{remote.type}"
        return Path(address(pair.local_addr), address(pair.remote_addr), local.transport.lower(), kind)

    @property
    def received(self) -> int:
        """How many bytes of DTLS packets have come from the other end."""
        if self._pc.sctp is None:
            return 0
        stats = self._pc.sctp.transport._get_stats()
        return sum(report.bytesReceived for report in stats.values())

    def describe(self) -> str:
        """Tell in words what was tried, for the error of a connection that did not open."""
        connection = ice_connection(self._pc)
        state = f"ICE {self._pc.iceConnectionState}, connection {self._pc.connectionState}"
        if connection is None:
            return state
        return f"{state}; {describe(connection, self._gathering, hidden_names=self._end_withheld)}"

    async def close(self) -> None:
        """Close everything. The other side is not told: that is the Channel's part."""
        gathering = {task for task in self._tasks if not task.done()}
        if not self.opened.done():
            self.opened.set_exception(PeerConnectError("the connection was closed before it opened"))
        if gathering:
            await asyncio.wait(gathering)
        await self._pc.close()

    def _state_changed(self) -> None:
        state = self._pc.connectionState
        if self.opened.done() or state not in ("failed", "closed"):
            return
        dtls = self._pc.sctp.transport if self._pc.sctp is not None else None
        if dtls is not None and dtls.encrypted and dtls.state == "failed":
            self.opened.set_exception(
                PeerIdentityError(
                    "whoever answers at the other end has another certificate than the one whose "
                    "fingerprint was signed (RFC 8122): somebody sits between"
                )
            )
        else:
            self.opened.set_exception(PeerConnectError(f"no connection: {self.describe()}"))

    def _channel_arrived(self, channel: RTCDataChannel) -> None:
        usable = channel.ordered and channel.maxRetransmits is None and channel.maxPacketLifeTime is None
        if channel.label != DATA_CHANNEL_LABEL or not usable or self.opened.done():
            channel.close()
            return
        self._channel_opened(Channel(channel))

    def _channel_opened(self, channel: Channel) -> None:
        if not self.opened.done():
            self.opened.set_result(channel)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _drop_what_comes_too_late(pc: RTCPeerConnection) -> None:
    """Send nothing once DTLS is shut down, which a browser does the moment its page goes.

    SCTP would still acknowledge, in tasks that nobody waits for: asyncio logs a traceback of each.
    """
    assert pc.sctp is not None
    dtls = pc.sctp.transport
    send = dtls._send_data

    async def send_while_open(data: bytes) -> None:
        with suppress(ConnectionError, SSL.Error):
            await send(data)

    dtls._send_data = send_while_open  # type: ignore[method-assign]


def _check_description(sdp: str) -> int:
    """Accept one DataChannel and nothing else: no media codec of ours is to meet a stranger's input.

    Returns:
        How many bytes a message to the other end may have.
    """
    media = [line for line in sdp.splitlines() if line.startswith("m=")]
    if len(media) != 1 or not _DATA_CHANNEL_SECTION.fullmatch(media[0]):
        raise MalformedMessageError(
            "the SDP must hold exactly one m=application section", field="payload.sdp"
        )
    if "a=fingerprint:" not in sdp:
        raise MalformedMessageError("the SDP names no DTLS fingerprint", field="payload.sdp")
    sizes = [_message_size(text) for text in _MESSAGE_SIZE.findall(sdp)]
    return min([*sizes, DATA_MESSAGE_MAX_BYTES]) if sizes else _MESSAGE_SIZE_DEFAULT


def _message_size(text: str) -> int:
    """Read `a=max-message-size`: 0 means any. Below 64 KiB not even an ERROR would be sure to fit."""
    text = text.strip()
    size = int(text) if re.fullmatch(r"[0-9]{1,20}", text) else -1
    if size == 0:
        return DATA_MESSAGE_MAX_BYTES
    if size < _MESSAGE_SIZE_DEFAULT:
        raise MalformedMessageError(
            f"a=max-message-size must be 0 or at least {_MESSAGE_SIZE_DEFAULT}", field="payload.sdp"
        )
    return size
