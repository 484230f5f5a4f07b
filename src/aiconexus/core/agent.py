"""`Agent`: the class that agents derive from."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import ssl as tls
from collections import OrderedDict
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing, suppress
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Final

from aiortc import RTCIceServer
from typing_extensions import Self

from aiconexus.client.backoff import Backoff
from aiconexus.client.deadline import within
from aiconexus.client.directory import Found, PresenceEvent
from aiconexus.client.socket import ClientState, GatewayClient, short_did
from aiconexus.core.answers import Answers
from aiconexus.core.call import check_seconds
from aiconexus.core.capabilities import CapabilityMethod, capabilities_of
from aiconexus.core.channel import Channel
from aiconexus.core.gathering import read_ice_servers
from aiconexus.core.input import BrokenInputError
from aiconexus.core.intents import Intent, Quote
from aiconexus.core.peer import Peer, PeerState
from aiconexus.core.peer_connection import PeerConnection
from aiconexus.core.signaling import Signaling
from aiconexus.protocol.attachments import Value
from aiconexus.protocol.did import DID_PREFIX, decode_did
from aiconexus.protocol.errors import (
    CapabilityError,
    GatewayClosedError,
    NotConnectedError,
    PeerConnectError,
    UnknownCapabilityError,
)
from aiconexus.protocol.limits import CALL_TIMEOUT_SECONDS, CONNECT_TIMEOUT_SECONDS, PEER_IDLE_SECONDS
from aiconexus.protocol.models import Message, MessageType
from aiconexus.protocol.security import DIDKey

_SIGNALING: Final = (
    MessageType.OFFER,
    MessageType.ANSWER,
    MessageType.ICE_CANDIDATE,
    MessageType.ERROR,
)

PEERS_MAX: Final = 512  # each costs a descriptor, of which a process has 1,024 by default, and 120 KB
ANSWERED_MAX: Final = 1_024  # agents whose last requests are remembered, most of them without a connection
HOOK_SECONDS: Final = 1.0  # for a hook that still runs when the agent stops

_log: Final = logging.getLogger("aiconexus.core")


class Agent:
    """An agent: derive from it, decorate what it can do with `capability`, and let it `run`.

    ::

        class Notary(Agent):
            @capability(tags=["legal"])
            async def extract_clauses(self, text: str, kinds: list[str]) -> list[str]: ...

        Notary(gateway="ws://127.0.0.1:8000/ws", identity="notary.key").run()

    Or as it is, to talk to others::

        async with Agent(gateway="ws://127.0.0.1:8000/ws") as me:
            async with me.connect(did) as peer:
                result = await peer.execute("extract_clauses", text=text, kinds=["compete"])

    What it says to others and what others say to it goes from agent to agent. The gateway only helps them to
    find each other: connections outlive it, and the agent returns to it by itself.
    """

    def __init__(
        self,
        gateway: str,
        identity: str | os.PathLike[str] | DIDKey | None = None,
        *,
        passphrase: str | None = None,
        host_addresses: Sequence[str] | None = None,
        ice_servers: Iterable[RTCIceServer | Mapping[str, Any]] | None = None,
        relay_only: bool = False,
        gateway_did: str | None = None,
        ssl: tls.SSLContext | None = None,
        backoff: Backoff | None = None,
        idle_timeout: float | None = PEER_IDLE_SECONDS,
        peers_max: int = PEERS_MAX,
        hidden: bool = False,
    ) -> None:
        """Make an agent; it registers when it is started.

        Args:
            gateway: URL of the gateway, such as `ws://127.0.0.1:8000/ws`.
            identity: Its key; or the path of its key file, which is made if there is none; None for a new
                key.
            passphrase: Of the key file, if it is encrypted.
            host_addresses: Addresses of this machine that others may connect to; None for all but loopback.
            ice_servers: STUN and TURN servers as W3C RTCIceServer (`urls`, `username`, `credential`); None
                for those that the gateway names, if any.
            relay_only: Whether no other agent may learn an address of this machine: all goes over a TURN
                server.
            gateway_did: The DID that the gateway must prove.
            ssl: For a `wss` gateway; the system's certificates if None.
            backoff: When to come back to a gateway that was lost.
            idle_timeout: After how many seconds without a call a connection is let go that no `async with`
                holds; None for never. It is closed if the other side does not need it either.
            peers_max: How many may be connected when another agent asks to connect; the next is told busy.
            hidden: Whether only those can find it who know its DID.

        Raises:
            TypeError, ValueError: A capability cannot be announced, or an argument is wrong.
            KeyFileError: The key file cannot be used.
        """
        if isinstance(host_addresses, str):
            raise TypeError("host_addresses is a list of addresses, not one string")
        if isinstance(identity, str) and identity.startswith(DID_PREFIX):
            raise ValueError("identity is a DIDKey or the path of a key file; a DID does not prove itself")
        if isinstance(identity, DIDKey):
            self._key = identity
        elif identity is None:
            self._key = DIDKey.generate()
        else:
            self._key = DIDKey.load_or_create(identity, passphrase)
        self._gateway = gateway
        self._host_addresses = None if host_addresses is None else tuple(host_addresses)
        self._ice_servers = None if ice_servers is None else tuple(ice_servers)
        read_ice_servers(self._ice_servers or ())
        self._relay_only = relay_only
        self._capabilities: dict[str, CapabilityMethod] = capabilities_of(self, Agent)
        self._client = GatewayClient(gateway, self._key, gateway_did=gateway_did, ssl=ssl, backoff=backoff)
        self._idle_timeout = math.inf if idle_timeout is None else idle_timeout
        self._peers_max = peers_max
        self._hidden = hidden
        self._signaling: Signaling[Peer] = Signaling(
            self.did,
            self._client.url,
            self._gateway_did,
            self._has_gateway,
            self._status_of,
            self._send,
            self._new_connection,
            self._admit,
            self._opened,
        )
        self._peers: dict[str, Peer] = {}
        self._answers: OrderedDict[str, Answers] = OrderedDict()
        self._all_peers: set[Peer] = set()  # also those that are still closing
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Future[None] | None = None
        for type_ in _SIGNALING:
            self._client.on(type_, self._signaling.receive)
        self._client.on_rejected(self._signaling.rejected)
        self._client.on_state(self._client_state_changed)

    # --- what it is -----------------------------------------------------------------------------

    @property
    def did(self) -> str:
        """Its DID."""
        return self._key.did

    @property
    def name(self) -> str:
        """For people: the name of its class."""
        return type(self).__name__

    @property
    def client(self) -> GatewayClient:
        """Its connection to the gateway."""
        return self._client

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The agents it is connected with, by DID."""
        return MappingProxyType(self._peers)

    def __repr__(self) -> str:
        return f"<{self.name} {short_did(self.did)} at {self._client.url}>"

    # --- for subclasses -------------------------------------------------------------------------

    async def on_intent(self, intent: Intent) -> Quote:
        """Say what an intent would take. Override it; by default nothing is understood."""
        return Quote(status="not_understood")

    async def on_offer(self, did: str) -> bool:
        """Say whether another agent may connect. Override it if needed; by default everybody may.

        It learns the addresses of this agent only then. Not asked about an agent that this one is connecting
        with by itself.
        """
        return True

    async def on_peer(self, peer: Peer) -> None:
        """Take note of a new connection, whoever asked for it. Override it if needed."""

    async def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """Take note of a connection that ended. Override it if needed."""

    # --- its life -------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Register at the gateway; from then on others can find it and connect.

        Raises:
            GatewayError: The gateway cannot be reached, does not prove its DID, or refuses.
        """
        announced = [method.announced for method in self._capabilities.values()]
        await self._client.register(announced, hidden=self._hidden)

    async def close(self, reason: str = "the agent stops") -> None:
        """Say goodbye to the gateway and to all peers, and end everything that it started.

        A capability or a hook may call it, too.
        """
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close(reason, asyncio.current_task()))
        await asyncio.shield(self._closing)

    async def _close(self, reason: str, caller: asyncio.Task[Any] | None) -> None:
        await self._client.close()
        await self._signaling.close()
        if self._all_peers:
            await asyncio.wait([asyncio.ensure_future(peer.close(reason)) for peer in self._all_peers])
        if tasks := self._tasks - {caller}:
            await asyncio.wait(tasks, timeout=HOOK_SECONDS)
        # Others may have come meanwhile, as the hooks of peers that were lost.
        tasks = self._tasks - {caller}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def serve_forever(self) -> None:
        """Register, if that is not done, and serve until this task is cancelled; close then.

        Raises:
            GatewayClosedError: The gateway closed the connection for good, for example because the same
                DID has registered elsewhere.
            GatewayError: It could not register.
        """
        try:
            if self._client.state is ClientState.DISCONNECTED:
                await self.start()
            async for message in self._client:
                _log.debug("%s of %s is for nobody here", message.type.value, message.from_)
        except GatewayClosedError:
            # It is gone for good, and has no part in what runs with other agents: let that end.
            with suppress(asyncio.TimeoutError):
                await within(asyncio.gather(*(p.quiet() for p in self._peers.values())), CALL_TIMEOUT_SECONDS)
            raise
        finally:
            await self.close()

    def run(self) -> None:
        """Run until SIGINT or SIGTERM: for a program that is this agent and nothing else."""

        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, task.cancel)
            try:
                await self.serve_forever()
            except asyncio.CancelledError:
                _log.info("%r stopped", self)

        asyncio.run(main())

    # --- others ---------------------------------------------------------------------------------

    def discover(
        self,
        *,
        capability: str | None = None,
        tag: str | None = None,
        text: str | None = None,
        dids: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[Found, None]:
        """Find agents: `async for found in me.discover(tag="legal")`; see `GatewayClient.discover`.

        `limit` is how many at most, in all; None for all that there are.
        """
        _check_texts(capability=capability, tag=tag, text=text)
        return self._client.discover(capability=capability, tag=tag, text=text, dids=dids, limit=limit)

    def watch(
        self,
        *,
        capability: str | None = None,
        tag: str | None = None,
        text: str | None = None,
        dids: Sequence[str] | None = None,
    ) -> AsyncGenerator[PresenceEvent, None]:
        """Be told who comes and goes: `async for event in me.watch()`; see `GatewayClient.watch`.

        An "update" is that an agent is back, from being away or at another place, or shows another card
        (`GatewayClient.update`); see `PresenceEvent`.
        """
        _check_texts(capability=capability, tag=tag, text=text)
        return self._client.watch(capability=capability, tag=tag, text=text, dids=dids)

    # --- peers ----------------------------------------------------------------------------------

    def connect(self, did: str, *, timeout: float = CONNECT_TIMEOUT_SECONDS) -> Connecting:
        """Connect with another agent; await it, or use it with `async with`.

        There is one connection with an agent, whoever asked for it first. `async with` needs it until it is
        left; `await` until it was idle for `idle_timeout` or the Peer is closed.

        Args:
            did: Of the other agent.
            timeout: Seconds.

        Raises:
            DIDError: `did` is no did:key.
            UnknownAgentError: It is not online.
            PeerRefusedError: It takes no connection.
            PeerIdentityError: Somebody else answered for it.
            RemoteError: It, or the gateway, answered by another ERROR.
            PeerConnectError: No connection in time; the text says what was tried, and what the gateway knows.
            NotConnectedError: This agent is not registered at a gateway.
        """
        decode_did(did)
        check_seconds(timeout)
        if did == self.did:
            raise ValueError("an agent does not connect with itself")
        return Connecting(partial(self._connect, did, timeout))

    async def _connect(self, did: str, timeout: float) -> Peer:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        peer = self._peers.get(did)
        try:
            # One that is about to close may still turn out to be needed by the other side.
            is_open = peer is not None and await within(peer.settled(), timeout) is PeerState.OPEN
        except asyncio.TimeoutError:
            text = f"the last connection with {short_did(did)} has not ended in {timeout:g} s"
            raise PeerConnectError(text, did) from None
        if peer is None or not is_open:
            if self._client.state is ClientState.DISCONNECTED:
                raise NotConnectedError(f"{self!r} is not registered: use `async with`, or start() it first")
            peer = await self._signaling.connect(did, timeout=max(0.0, deadline - loop.time()))
            if peer.state is PeerState.CLOSED:
                raise PeerConnectError(f"{short_did(did)} went away at once", did)
        return peer

    def _new_connection(self) -> PeerConnection:
        servers = self._ice_servers
        if servers is None:
            session = self._client.session
            servers = () if session is None else tuple(session.ice_servers)
        return PeerConnection(
            host_addresses=self._host_addresses, ice_servers=servers, relay_only=self._relay_only
        )

    async def _admit(self, did: str) -> str | None:
        # One that is connected already was started anew: it replaces its connection.
        count = len(self._all_peers) + self._signaling.strangers
        if did not in self._peers and count > self._peers_max:
            _log.warning("%s is told busy: %d agents are connected or about to be", did, count - 1)
            return "busy"
        return None if await self.on_offer(did) else "declined"

    def _opened(self, did: str, connection: PeerConnection, channel: Channel) -> Peer:
        replaced = self._peers.get(did)
        peer = self._peers[did] = Peer(
            self._key,
            did,
            connection,
            channel,
            on_intent=self._answer_intent,
            on_execute=self._execute,
            on_closed=self._peer_closed,
            answers=self._answers_to(did),
            idle_timeout=self._idle_timeout,
        )
        self._all_peers.add(peer)
        if replaced is not None:
            self._spawn(replaced.close("a newer connection takes its place"))
        self._spawn(self._call_hook(self.on_peer(peer)))
        return peer

    def _answers_to(self, did: str) -> Answers:
        """Return what was answered to an agent before, for requests that it may repeat."""
        answers = self._answers.pop(did, None) or Answers()
        self._answers[did] = answers
        if len(self._answers) > ANSWERED_MAX:
            self._answers.popitem(last=False)
        return answers

    def _peer_closed(self, peer: Peer, reason: str) -> None:
        if self._peers.get(peer.did) is peer:
            del self._peers[peer.did]
        self._spawn(self._call_hook(self.on_peer_lost(peer, reason)))
        self._spawn(self._bury(peer))

    async def _bury(self, peer: Peer) -> None:
        try:
            await peer.close()
        finally:
            self._all_peers.discard(peer)

    # --- what others ask ------------------------------------------------------------------------

    async def _answer_intent(self, intent: Intent) -> Quote:
        try:
            quote = await self.on_intent(intent)
            if not isinstance(quote, Quote):
                raise TypeError(f"on_intent must return a Quote, not {type(quote).__name__}")
        except (Exception, SystemExit) as error:
            raise self._failure("on_intent", error) from error
        return quote

    def _execute(self, name: str, args: dict[str, Value]) -> Awaitable[Value] | AsyncGenerator[Value, None]:
        method = self._capabilities.get(name)
        if method is None:
            known = ", ".join(self._capabilities) or "none"
            raise UnknownCapabilityError(f"no capability {name!r}; there is: {known}", name)
        work = method.call(args)
        return self._parts_of(name, method, work) if method.is_stream else self._result_of(name, method, work)

    async def _result_of(self, name: str, method: CapabilityMethod, work: Awaitable[Any]) -> Value:
        try:
            result = await work
        except BrokenInputError:
            raise
        except (Exception, SystemExit) as error:  # the latter would end the whole program
            raise self._failure(name, error) from error
        return method.serialize(result)

    async def _parts_of(
        self, name: str, method: CapabilityMethod, work: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Value, None]:
        async with aclosing(work):
            while True:
                try:
                    part = await anext(work)
                except StopAsyncIteration:
                    return
                except BrokenInputError:
                    raise
                except (Exception, SystemExit) as error:
                    raise self._failure(name, error) from error
                yield method.serialize(part)

    def _failure(self, name: str, error: BaseException) -> CapabilityError:
        _log.warning("%s of %r failed", name, self, exc_info=error)
        # One that names no capability is no other agent's: it tells of this call, as of its progress.
        is_own = type(error) is CapabilityError and not error.capability
        kind, text = type(error).__name__, str(error)
        return CapabilityError(text if is_own else f"{kind}: {text}" if text else kind, name)

    # --- the gateway ----------------------------------------------------------------------------

    def _gateway_did(self) -> str | None:
        return self._client.session.gateway_did if self._client.session is not None else None

    def _has_gateway(self) -> bool:
        return self._client.state is ClientState.REGISTERED

    async def _status_of(self, did: str, timeout: float) -> str:
        async with aclosing(self._client.discover(dids=[did], timeout=timeout)) as agents:
            async for found in agents:
                return found.status
        return "offline"

    async def _send(self, message: Message) -> None:
        await self._client.send(message, timeout=CONNECT_TIMEOUT_SECONDS)

    def _client_state_changed(self, state: ClientState) -> None:
        if state is ClientState.REGISTERED:
            self._signaling.gateway_returned()

    # --- hooks ----------------------------------------------------------------------------------

    async def _call_hook(self, hook: Coroutine[Any, Any, None]) -> None:
        try:
            await hook
        except Exception:
            _log.exception("a hook of %r failed", self)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_texts(**words: str | None) -> None:
    for name, word in words.items():
        if not isinstance(word, str | None):
            raise TypeError(f"{name} is one text, not {word!r}")


class Connecting:
    """What `Agent.connect` returns: awaitable, and an asynchronous context manager."""

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, Peer]]) -> None:
        self._connect = connect
        self._peer: Peer | None = None

    def __await__(self) -> Generator[Any, None, Peer]:
        return self._awaited().__await__()

    async def _awaited(self) -> Peer:
        peer = await self._connect()
        peer.hold()
        return peer

    async def __aenter__(self) -> Peer:
        self._peer = await self._connect()
        self._peer.hold(in_block=True)
        return self._peer

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._peer is not None
        await self._peer.release(in_block=True)
