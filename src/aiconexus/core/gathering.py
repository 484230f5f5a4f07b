"""Gather ICE candidates (RFC 8445 section 5.1.1), and say which STUN and TURN servers failed, and how.

aioice would do it, but asks one STUN and one TURN server, waits 5 s for whichever does not answer, and keeps
its answer to itself. Here each that is named gets its turn and the first that answers counts: one that is
broken delays little while another works. Relay-only is done here, too: aiortc before 1.16 cannot, and Python
3.10 has no other.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from socket import SO_RCVBUF, SOL_SOCKET
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aioice import Candidate
from aioice.candidate import candidate_foundation, candidate_priority
from aioice.ice import StunProtocol, server_reflexive_candidate
from aioice.stun import TransactionError, TransactionFailed
from aioice.turn import (
    DEFAULT_ALLOCATION_LIFETIME,
    DEFAULT_CHANNEL_REFRESH_TIME,
    TurnClientMixin,
    TurnClientTcpProtocol,
    TurnClientUdpProtocol,
    TurnTransport,
)
from aiortc import RTCIceServer

from aiconexus.client.deadline import within
from aiconexus.protocol.ice import IceUrl, parse_ice_url
from aiconexus.protocol.limits import GATHER_TIMEOUT_SECONDS

if TYPE_CHECKING:
    from aioice import Connection

TURN_DELAY_SECONDS: Final = (
    0.25  # for one server to answer before the next is asked, too (RFC 8305 section 8)
)
STUN_GRACE_SECONDS: Final = 0.5  # for the other addresses of this machine, once one has its reflexive one
# Of one call 1 MiB may be in flight: twice as much to Linux, which counts the memory that its packets take.
# What does not fit is lost and sent anew; aioice's own 256 KiB lose a tenth of a fast stream. Linux grants no
# more than its net.core.rmem_max.
RECEIVE_BUFFER_BYTES: Final = 2_097_152
TURN_GOODBYE_SECONDS: Final = 1.0  # for the server to confirm that a relay is given up; aioice waits for 63

_SUPPORTED: Final = (("stun", "udp"), ("turn", "udp"), ("turn", "tcp"), ("turns", "tcp"))
_HIDDEN: Final = {4: ("0.0.0.0", 9), 6: ("::", 9)}  # noqa: S104 -- RFC 8839 section 5.1

_log: Final = logging.getLogger("aiconexus.core")

T = TypeVar("T")


@dataclass(frozen=True)
class IceServer:
    """One URL of a W3C RTCIceServer, with its credentials."""

    url: str
    where: IceUrl
    username: str | None = None
    credential: str | None = field(default=None, repr=False)


def read_ice_servers(servers: Iterable[RTCIceServer | Mapping[str, Any]]) -> list[IceServer]:
    """Take W3C RTCIceServers apart; what cannot be used here, STUN over TLS and TURN over DTLS, is left out.

    Raises:
        ValueError: One of them is none.
    """
    read = []
    for server in servers:
        fields = vars(server) if isinstance(server, RTCIceServer) else server
        urls = fields.get("urls")
        urls = [urls] if isinstance(urls, str) else urls
        if not isinstance(urls, Sequence) or not all(isinstance(url, str) for url in urls):
            raise ValueError("an ICE server has `urls`, a text or a list of texts")
        username, credential = fields.get("username"), fields.get("credential")
        for url in urls:
            where = parse_ice_url(url)
            if where.is_turn and not (isinstance(username, str) and isinstance(credential, str)):
                raise ValueError(f"{url} needs `username` and `credential`, which are texts")
            if (where.scheme, where.transport) in _SUPPORTED:
                read.append(IceServer(url, where, username, credential))
            else:
                _log.info("%s is not used: there is no support for it", url)
    return read


class Gathering:
    """Gathers the candidates of one connection.

    Attributes:
        servers: Which are asked.
        relay_only: Whether no address of this machine is offered.
        candidates: What was found.
        faults: For people: the servers that failed, each with its reason.
    """

    def __init__(
        self, servers: Sequence[IceServer], *, host_addresses: Sequence[str] | None, relay_only: bool
    ) -> None:
        self.servers: Final = servers
        self.relay_only: Final = relay_only
        self.candidates: list[Candidate] = []
        self.faults: list[str] = []
        self._host_addresses = host_addresses

    def take_over(self, connection: Connection) -> None:
        """Gather for `connection`, which knows no servers, in place of aioice.

        aioice offers every address but loopback, and has no option for it. This touches one connection only:
        two agents in a process may choose differently.
        """
        gather_hosts = connection.get_component_candidates

        async def gather(component: int, addresses: list[str], timeout: int = 5) -> list[Candidate]:
            if self.relay_only:
                self.candidates = await self._relayed(connection)
            else:
                chosen = addresses if self._host_addresses is None else list(self._host_addresses)
                hosts = await gather_hosts(component, chosen)
                for protocol in connection._protocols:
                    _enlarge_receive_buffer(protocol.transport)
                asked = await asyncio.gather(self._reflexive(connection), self._relayed(connection))
                self.candidates = [*hosts, *asked[0], *asked[1]]
            return self.candidates

        connection.get_component_candidates = gather  # type: ignore[method-assign]

    @property
    def turn_servers(self) -> list[IceServer]:
        """Those of the servers that relay."""
        return [server for server in self.servers if server.where.is_turn]

    async def _reflexive(self, connection: Connection) -> list[Candidate]:
        # Of IPv4 alone, as in aioice: IPv6 knows no such translation.
        hosts = [each for each in connection._protocols if ":" not in each.local_candidate.host]

        async def ask(protocol: StunProtocol, where: IceUrl) -> Candidate:
            candidate, _ = await server_reflexive_candidate(protocol, (where.host, where.port))
            return candidate

        attempts = [
            (server, partial(ask, protocol, server.where))
            for server in self.servers
            if not server.where.is_turn
            for protocol in hosts
        ]
        found = await self._first(attempts, delay=0.0, grace=STUN_GRACE_SECONDS)
        return list({(candidate.host, candidate.port): candidate for candidate in found}.values())

    async def _relayed(self, connection: Connection) -> list[Candidate]:
        # Not at once: a relay that comes too late would count against the agent's quota until it expires.
        attempts = [(server, partial(_allocate, connection, server)) for server in self.turn_servers]
        protocols = await self._first(attempts, delay=TURN_DELAY_SECONDS, grace=0.0)
        for protocol in protocols:
            connection._protocols.append(protocol)
            if self.relay_only:
                # It would show what this side does not want to show (RFC 9429 section 3.5.3).
                candidate = protocol.local_candidate
                candidate.related_address, candidate.related_port = _HIDDEN[6 if ":" in candidate.host else 4]
        return [protocol.local_candidate for protocol in protocols]

    async def _first(
        self, attempts: Sequence[tuple[IceServer, Callable[[], Awaitable[T]]]], *, delay: float, grace: float
    ) -> list[T]:
        """Attempt one after the other until one succeeds; note who failed.

        Args:
            attempts: In the order of preference.
            delay: Seconds after which the next begins beside those that have not answered.
            grace: Seconds to wait for others when the first has succeeded.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GATHER_TIMEOUT_SECONDS
        upcoming = deque(attempts)
        next_at = loop.time()
        tasks: dict[asyncio.Task[T], IceServer] = {}
        waiting: set[asyncio.Task[T]] = set()
        found: list[asyncio.Task[T]] = []
        try:
            while (waiting or upcoming) and loop.time() < deadline:
                while upcoming and loop.time() >= next_at:
                    server, begin = upcoming.popleft()
                    task = asyncio.ensure_future(begin())
                    tasks[task] = server
                    waiting.add(task)
                    next_at += delay
                until = min(deadline, next_at) if upcoming else deadline
                left = max(0.0, until - loop.time())
                done, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                succeeded = [task for task in done if task.exception() is None]
                if succeeded and not found:
                    deadline = min(deadline, loop.time() + grace)
                elif not waiting:
                    next_at = loop.time()
                found += succeeded
        finally:
            for task in waiting:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
        told = {tasks[task] for task in found}
        for task, server in tasks.items():
            fault = f"{server.url} {_reason(task)}"
            # One that was still waiting when another had answered has not failed.
            if server not in told and not (found and task.cancelled()):
                told.add(server)
                _log.warning("%s", fault)
                self.faults.append(fault)
        return [task.result() for task in found]


def _enlarge_receive_buffer(transport: asyncio.BaseTransport) -> None:
    with suppress(OSError):  # BSD refuses what Linux cuts down
        transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_RCVBUF, RECEIVE_BUFFER_BYTES)


def _reason(task: asyncio.Future[Any]) -> str:
    """Say in words what became of an attempt that failed."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, TransactionFailed):
        code, text = error.response.attributes.get("ERROR-CODE", (0, "no reason"))
        what = "refused the credentials" if code == 401 else "refused"  # RFC 8489 section 9.2.4
        return f"{what} ({code} {text})"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"has no certificate that can be trusted: {error.verify_message}"
    if isinstance(error, ConnectionError):
        return f"cannot be reached: {os.strerror(error.errno or errno.ECONNREFUSED)}"
    if isinstance(error, OSError):
        return f"cannot be reached: {error.strerror or error}"
    if error is None or isinstance(error, TransactionError):
        return f"did not answer in {GATHER_TIMEOUT_SECONDS:g} s"
    return f"failed: {error!r}"


class _InTime(TurnClientMixin):
    """Gives a relay up in bounded time, also if its server is gone: `close()` waits for it."""

    async def delete(self) -> None:
        try:
            await within(super().delete(), TURN_GOODBYE_SECONDS)
        except asyncio.TimeoutError:
            _log.info("the relay at %s was not given up in time", self.server)
        finally:
            self.transport.close()


class _TurnOverTcp(_InTime, TurnClientTcpProtocol):
    pass


class _TurnOverUdp(_InTime, TurnClientUdpProtocol):
    pass


async def _allocate(connection: Connection, server: IceServer) -> StunProtocol:
    """Get a relay at a TURN server (RFC 8656 section 7), and its candidate.

    As aioice does it; but its version for Python 3.10 leaks the socket if this is cancelled.

    Raises:
        TransactionError, OSError: The server refuses, or does not answer.
    """
    loop, where = asyncio.get_running_loop(), server.where
    address = where.host, where.port
    options = (
        address,
        server.username,
        server.credential,
        DEFAULT_ALLOCATION_LIFETIME,
        DEFAULT_CHANNEL_REFRESH_TIME,
    )
    transport: asyncio.BaseTransport
    inner: _TurnOverTcp | _TurnOverUdp
    if where.transport == "tcp":
        is_tls = True if where.scheme == "turns" else None
        transport, inner = await loop.create_connection(lambda: _TurnOverTcp(*options), *address, ssl=is_tls)
    else:
        transport, inner = await loop.create_datagram_endpoint(
            lambda: _TurnOverUdp(*options), remote_addr=address
        )
        _enlarge_receive_buffer(transport)
    try:
        protocol = StunProtocol(connection)
        relay = TurnTransport(inner)
        await relay._connect(protocol)
    except BaseException:
        transport.close()
        raise
    host, port = relay.get_extra_info("sockname")
    related_host, related_port = relay.get_extra_info("related_address")
    protocol.local_candidate = Candidate(
        foundation=candidate_foundation("relay", "udp", host),
        component=1,
        transport="udp",
        priority=candidate_priority(1, "relay"),
        host=host,
        port=port,
        type="relay",
        related_address=related_host,
        related_port=related_port,
    )
    return protocol
