"""The connection between an agent and its gateway: register, send, receive, and come back after a drop.

Under it is `websockets`: picows' client takes less CPU for a message sent and one received (48-78 µs against
120-124) and to connect (520-590 µs against 720-770), but to sign and verify that message costs 370 µs beside
either (`bench/client_socket.py`). For so little it would leave to this module what `websockets` brings, held
against RFC 6455: fragments, UTF-8 and close-code checks, the closing handshake, backpressure, and also the
proxies of the environment.

What becomes of a message that arrives::

    verify ─▶ waiting request() ─▶ PING: answered ─▶ handlers of its type ─▶ queue ─▶ receive(), async for
      └─▶ rejected: dropped, counted, logged, on_rejected, perhaps answered (verification.py)

The queue and the running handlers are bounded. A message that does not fit is refused with CONNECTION_REFUSED
(`slow_consumer`, temporary), so its sender knows. Not reading the socket instead would stall the answers of
`request()`, pings and every other handler behind the one type that nobody reads.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import ssl as tls
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType
from typing import Final, TypeVar

from typing_extensions import Self

from aiconexus.client import directory, handshake
from aiconexus.client.backoff import Backoff
from aiconexus.client.connection import CLOSE_TIMEOUT_SECONDS, Connection, ConnectionEnded, closed_for_good
from aiconexus.client.deadline import within
from aiconexus.client.directory import Found, PresenceEvent
from aiconexus.client.handshake import CapabilityLike, Resume, Session, Shown
from aiconexus.client.verification import Verifier
from aiconexus.protocol import (
    AIConexusError,
    DIDKey,
    ErrorCode,
    ErrorPayload,
    MalformedMessageError,
    Message,
    MessageError,
    MessageType,
    Payload,
    PingPayload,
    PongPayload,
    PresencePayload,
    RegisterPayload,
    RemoteError,
    ReplayGuard,
    UnregisterPayload,
    decode,
    decode_did,
    encode,
    sign_message,
    verify_message,
)
from aiconexus.protocol.errors import (
    GatewayClosedError,
    GatewayError,
    GatewayUnreachableError,
    NotConnectedError,
    RemoteTimeoutError,
    remote_error,
)
from aiconexus.protocol.limits import MESSAGE_MAX_BYTES, REGISTER_TIMEOUT_SECONDS, REQUEST_TIMEOUT_SECONDS

INBOX_MAX_MESSAGES: Final = 1024  # unread in the queue; 64 MiB of the largest ones
HANDLERS_MAX: Final = 1024  # coroutines of handlers that run at the same time
ANSWERS_MAX: Final = 1024  # PONGs and ERRORs on their way out; beyond it they are left out
FAULTS_MAX: Final = 1024  # senders and causes that are logged apart
RENEWAL_SHARE: Final = (0.2, 0.4)  # of the life of TURN credentials: one renewal may fail, or two
RENEWAL_MIN_SECONDS: Final = 0.2  # no gateway can make this client busy with it
ANSWER_IDS: Final = 64  # remembered of the latest answers

_DATA_PLANE = frozenset({MessageType.INTENT, MessageType.EXEC_REQUEST, MessageType.EXEC_RESPONSE})

_log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[Message], "Awaitable[None] | None"]


class ClientState(str, Enum):
    """Where a GatewayClient is.

    ::

        DISCONNECTED ──register()──▶ CONNECTING ──▶ REGISTERED ◀──▶ RECONNECTING
              ◀──────────────────────── refused, or unregister()
        any ──close(), or a terminal close code──▶ CLOSED
    """

    DISCONNECTED = "disconnected"
    CONNECTING = "connecting"
    REGISTERED = "registered"
    RECONNECTING = "reconnecting"
    CLOSED = "closed"


_SETTLED = frozenset({ClientState.REGISTERED, ClientState.DISCONNECTED, ClientState.CLOSED})
_NOT_REGISTERED = frozenset(ClientState) - {ClientState.REGISTERED}


@dataclass
class ClientStats:
    """Counters of one client since it was made."""

    sent: int = 0  # messages written to a connection
    received: int = 0  # messages that verified
    rejected: int = 0  # messages that did not
    cards_rejected: int = 0  # agents that the gateway named, but whose card did not verify
    refused: int = 0  # messages that verified, but found queue or handlers full
    reconnects: int = 0  # registrations after the first


@dataclass
class _Pending:
    """A request that waits for its answer. `written` tells whether the gateway may have it."""

    message: Message
    answer: asyncio.Future[Message]
    written: bool = False


def short_did(did: str) -> str:
    """Abbreviate a DID for people: `did:key:z6Mk…q3`."""
    return f"{did[:12]}…{did[-2:]}"


class GatewayClient:
    """An agent's connection to its gateway.

    ::

        client = GatewayClient("ws://127.0.0.1:8000/ws", DIDKey.generate())
        async with client:
            await client.register(["translate"])
            async for message in client:
                ...

    After a drop it connects, registers and resumes by itself, until `close()` or a terminal close code.
    It belongs to one event loop; several tasks may use it at the same time.
    """

    def __init__(
        self,
        gateway_url: str,
        did_key: DIDKey,
        *,
        gateway_did: str | None = None,
        reconnect: bool = True,
        ssl: tls.SSLContext | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        """Make a client that is not connected yet.

        Args:
            gateway_url: `ws://host:port/ws` or `wss://host/ws`.
            did_key: The agent's identity.
            gateway_did: The DID that the gateway must prove. Without it, TLS alone says which gateway this
                is: another one that answers after a drop is taken, and logged. With it, that one is refused,
                and the client goes on trying.
            reconnect: Whether to come back after a drop; if not, the first drop closes the client.
            ssl: For `wss`; the system's certificates if None.
            backoff: When to come back.

        Raises:
            ValueError: `gateway_url` is not a WebSocket URL, or `ssl` is given for `ws`.
            DIDError: `gateway_did` is no did:key.
        """
        self.url: Final = handshake.audience(gateway_url)  # without userinfo: this one is shown
        if ssl is not None and self.url.startswith("ws:"):
            raise ValueError(f"ssl is for wss:// URLs, not for {self.url}")
        if gateway_did is not None:
            decode_did(gateway_did)
        self.stats: Final = ClientStats()
        self._dialled_url = gateway_url
        self._key = did_key
        self._gateway_did = gateway_did
        self._reconnect = reconnect
        self._ssl = ssl
        self._backoff = backoff if backoff is not None else Backoff()
        self._verifier = Verifier(did_key.did)

        self._state = ClientState.DISCONNECTED
        self._session: Session | None = None
        self._resume: Resume | None = None
        self._shown = Shown()
        # Set exactly while the state is REGISTERED.
        self._connection: Connection | None = None
        self._runner: asyncio.Task[None] | None = None
        self._last_error: GatewayError | None = None
        self._is_leaving = False  # unregister() or close() runs: the end of the connection is no drop
        self._is_closing = False
        self._closed_for_good: GatewayClosedError | None = None

        self._inbox: deque[Message] = deque()
        self._arrival = asyncio.Event()  # the inbox is not empty, or nothing more will come
        self._pending: dict[str, _Pending] = {}
        self._handlers: dict[MessageType, list[Handler]] = {}
        self._state_handlers: list[Callable[[ClientState], None]] = []
        self._rejection_handlers: list[Callable[[MessageError, str | bytes], None]] = []
        self._state_waiters: list[tuple[frozenset[ClientState], asyncio.Future[ClientState]]] = []
        self._handling: set[asyncio.Future[None]] = set()
        self._answering: set[asyncio.Future[None]] = set()
        self._faults: set[tuple[str | None, str]] = set()  # of messages that were dropped and logged
        # Should one of them not be deliverable, that is not the application's business.
        self._answer_ids: deque[str] = deque(maxlen=ANSWER_IDS)

    # --- what it is ----------------------------------------------------------------------------

    @property
    def did(self) -> str:
        """The agent's DID."""
        return self._key.did

    @property
    def state(self) -> ClientState:
        """Where the client is now; `on_state` and `wait_for` tell of every change."""
        return self._state

    @property
    def session(self) -> Session | None:
        """The session, also while the client reconnects; None before `register` and after the end."""
        return self._session

    def __repr__(self) -> str:
        return f"<GatewayClient {short_did(self.did)} {self._state.value} {self.url}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # --- register and leave --------------------------------------------------------------------

    async def register(
        self,
        capabilities: Iterable[CapabilityLike] = (),
        *,
        hidden: bool = False,
        timeout: float = REGISTER_TIMEOUT_SECONDS,
    ) -> Session:
        """Connect and prove this agent's DID to the gateway.

        One attempt: what fails here is most often a wrong URL, and no wait mends that. Only a client that was
        registered once reconnects by itself.

        Args:
            capabilities: What others can discover; a string is a capability with a name only.
            hidden: Whether only those can find this agent who know its DID.
            timeout: Seconds for all of it, from the DNS lookup to the answer.

        Raises:
            MalformedMessageError: The capabilities do not fit.
            GatewayUnreachableError: No connection, or no answer in time.
            GatewayIdentityError: The gateway did not prove its key.
            RegistrationError: The gateway refused; `cause` is its ERROR.
            GatewayClosedError: The client was closed for good before.
            NotConnectedError: `close()` came in between, or before.
            RuntimeError: It is registered already.
        """
        if self._state is ClientState.CLOSED:
            raise self._closed_error()
        if self._runner is not None or self._is_leaving:
            raise RuntimeError(f"the client is {self._state.value}: register once, or unregister first")
        self._shown = handshake.show(capabilities, self._key, hidden=hidden)
        started: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        self._runner = runner = asyncio.create_task(self._run(started, timeout), name=f"{self!r} connection")
        try:
            return await started
        except asyncio.CancelledError:
            await _end(runner)
            self._detach()
            raise

    async def update(
        self,
        capabilities: Iterable[CapabilityLike] = (),
        *,
        hidden: bool = False,
        timeout: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        """Show others something else of this registered agent; arguments and errors as for `register`."""
        shown = handshake.show(capabilities, self._key, hidden=hidden)
        deadline = self._deadline(timeout)
        await self._connected(deadline)
        assert self._session is not None
        handshake.check_limits(shown, self._session.limits)
        self._shown = shown
        await self._register_again(self._left(deadline))

    async def _register_again(self, timeout: float) -> None:
        """REGISTER on the session: others see what is to be shown, and the ICE servers are new."""
        assert self._session is not None
        payload = RegisterPayload(public_key=self._key.public_key_base58)
        message = Message.create(self.did, self._session.gateway_did, payload, ext=self._shown.ext())
        answer = await self.request(message, timeout=timeout)
        if self._session is not None and "ice_servers" in answer.ext:
            self._session = replace(self._session, **handshake.read_ice_servers(answer))

    async def _renew_ice_servers(self) -> None:
        """Ask for new TURN credentials before the last ones expire, as long as this connection lasts."""
        while self._session is not None and (ttl := self._session.ice_servers_ttl) is not None:
            share = random.uniform(*RENEWAL_SHARE)  # noqa: S311 -- so that not all come at once
            await asyncio.sleep(max(share * ttl, RENEWAL_MIN_SECONDS))
            try:
                await self._register_again(REQUEST_TIMEOUT_SECONDS)
            except AIConexusError as error:
                _log.warning("%s: no new TURN credentials: %s", self.url, error)

    def discover(
        self,
        *,
        capability: str | None = None,
        tag: str | None = None,
        text: str | None = None,
        dids: Sequence[str] | None = None,
        limit: int | None = None,
        timeout: float = REQUEST_TIMEOUT_SECONDS,
    ) -> AsyncGenerator[Found, None]:
        """Find agents: `async for found in client.discover(tag="legal")`.

        They come in the order of their DIDs. `capability`, `tag` and `text` must hold for one and the same
        capability. Each card was signed by its agent; an agent whose card was not is left out.

        Args:
            capability: Name of a capability.
            tag: Of a capability.
            text: Part of the name or the description of a capability, in any case.
            dids: Only these; also those that are hidden.
            limit: How many agents at most, in all and not per page; None for all that there are.
            timeout: Seconds for each page of the answer.

        Raises:
            DIDError: One of `dids` is no did:key.
            RemoteError: The gateway refuses, or has no directory.
            GatewayUnreachableError: It did not answer in time.
            IncompleteAnswerError: Behind the agents it found: there may be more, not all could be asked.
            NotConnectedError: This client is not registered, or lost its connection.
        """
        query = directory.question(capability, tag, text, dids)
        return directory.discover(self, query, limit, timeout)

    def watch(
        self,
        *,
        capability: str | None = None,
        tag: str | None = None,
        text: str | None = None,
        dids: Sequence[str] | None = None,
        timeout: float = REQUEST_TIMEOUT_SECONDS,
    ) -> AsyncGenerator[PresenceEvent, None]:
        """Be told who comes and goes: `async for event in client.watch(tag="legal")`.

        The first events are "join" for those that are there. After a drop it watches again, and tells what
        has changed meanwhile. So it does once 1,024 events wait to be read: whoever reads slowly is told how
        it is, not all that was in between. A gateway that does not answer is asked again; otherwise arguments
        and errors are those of `discover`. It ends when it is closed (`aclose`).
        """
        query = directory.question(capability, tag, text, dids)
        return directory.watch(self, query, timeout)

    async def unregister(self, reason: str | None = None) -> None:
        """End the session: the gateway forgets this agent, nothing waits for it.

        The client is then DISCONNECTED and may register again.
        """
        await self._leave(reason)

    async def close(self) -> None:
        """End the session and everything that this client started. What was received stays readable.

        Iterators end when the queue is empty; whoever waits for an answer gets NotConnectedError.
        """
        if self._is_closing:
            await self._until(frozenset({ClientState.CLOSED}), None)
            return
        self._is_closing = True
        try:
            await self._leave(None)
        finally:
            # close() may be called by one of the handlers.
            tasks = (self._handling | self._answering) - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            self._finish(None)
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_SECONDS)

    # --- send ----------------------------------------------------------------------------------

    async def send(self, message: Message, *, timeout: float = REQUEST_TIMEOUT_SECONDS) -> Message:
        """Send a message and return it as it was sent, signed.

        It is checked first, by the rules of its receiver. While the client reconnects, it waits. That it was
        sent says nothing about its arrival: an ERROR with its `id` as `correlation_id` may follow, see `on`.

        Args:
            message: From this agent; it is signed if it is not yet.
            timeout: Seconds to wait for a connection and for room in its write buffer.

        Raises:
            MessageError: The receiver would refuse it.
            NotConnectedError: No connection in time, or none to wait for.
            GatewayClosedError: The gateway closed the connection for good.
        """
        message = self._prepare(message)
        await self._write(encode(message), self._deadline(timeout))
        return message

    async def request(self, message: Message, *, timeout: float = REQUEST_TIMEOUT_SECONDS) -> Message:
        """Send a message and return its answer: the next with its `id` as `correlation_id`.

        Only the agent that was asked can answer, and the gateway by ERROR.

        Args:
            message: As for `send`.
            timeout: Seconds for all of it.

        Raises:
            RemoteError: The answer is an ERROR; UnknownAgentError if the agent is not online.
            RemoteTimeoutError: The agent did not answer in time (is a TimeoutError).
            GatewayUnreachableError: The gateway did not answer in time.
            NotConnectedError: Not sent; or sent, but its answer was lost with the connection.
            GatewayClosedError: The gateway closed the connection for good.
            MessageError: The receiver would refuse it.
        """
        deadline = self._deadline(timeout)
        message = self._prepare(message)
        id_ = message.id.lower()  # RFC 9562 section 4: as UUIDs are compared
        if id_ in self._pending:
            raise ValueError(f"a request with the id {message.id} is waiting already: make a new message")
        pending = _Pending(message, asyncio.get_running_loop().create_future())
        self._pending[id_] = pending
        try:
            await self._write(encode(message), deadline)
            pending.written = True
            answer = await within(pending.answer, self._left(deadline))
        except asyncio.TimeoutError:
            raise self._no_answer(message, timeout) from None
        finally:
            del self._pending[id_]
            if not pending.answer.cancel() and not pending.answer.cancelled():
                pending.answer.exception()  # taken note of, also where the write failed first
        if isinstance(answer.payload, ErrorPayload):
            raise self._remote_error(message, answer, answer.payload)
        return answer

    async def ask_gateway(
        self, payload: Payload, *, timeout: float = REQUEST_TIMEOUT_SECONDS, id_: str | None = None
    ) -> Message:
        """Ask the gateway itself, and return its answer; else as `request`.

        Whoever waits for a connection does not know yet which gateway it will be: one that was started anew
        may have another key.
        """
        deadline = self._deadline(timeout)
        await self._connected(deadline)
        assert self._session is not None
        message = Message.create(self.did, self._session.gateway_did, payload)
        if id_ is not None:
            message = message.model_copy(update={"id": id_})
        return await self.request(message, timeout=self._left(deadline))

    async def ping(self, *, timeout: float = REQUEST_TIMEOUT_SECONDS) -> float:
        """Return the round trip to the gateway and back in seconds, by PING and PONG.

        Raises:
            GatewayUnreachableError: No PONG in time.
            NotConnectedError: No connection in time, or none to wait for.
            GatewayClosedError: The gateway closed the connection for good.
        """
        loop = asyncio.get_running_loop()
        await self._connected(self._deadline(timeout))
        begin = loop.time()
        await self.ask_gateway(PingPayload(), timeout=timeout)
        return loop.time() - begin

    # --- receive -------------------------------------------------------------------------------

    async def receive(self, *, timeout: float | None = None) -> Message:
        """Return the next message that neither a handler nor a request took.

        Args:
            timeout: Seconds; None waits until a message comes or the client is closed.

        Raises:
            TimeoutError: None came in time.
            NotConnectedError: The client was closed, and the queue is empty.
            GatewayClosedError: The gateway closed the connection for good, and the queue is empty.
        """
        deadline = None if timeout is None else self._deadline(timeout)
        while not self._inbox:
            if self._state is ClientState.CLOSED:
                raise self._closed_error()
            self._arrival.clear()
            try:
                await within(self._arrival.wait(), None if deadline is None else self._left(deadline))
            except asyncio.TimeoutError:
                raise TimeoutError(f"no message came within {timeout:g} s") from None
        return self._inbox.popleft()

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        """Return the next message as `receive` does; end after `close()`.

        Raises:
            GatewayClosedError: The gateway closed the connection for good.
        """
        try:
            return await self.receive()
        except NotConnectedError:
            raise StopAsyncIteration from None

    def on(self, type: MessageType, handler: Handler) -> Callable[[], None]:  # noqa: A002 -- the field's name
        """Give every message of a type to `handler`, instead of the queue; return what takes it off again.

        Handlers are called in the order of arrival. Coroutines start in that order and then run side by side;
        `close()` cancels them. What a handler raises is logged and harms nothing else. PINGs never get here:
        the client answers them. ERRORs do if no request waits for them: that is how one learns that a message
        sent by `send` was refused.
        """
        return _add(self._handlers.setdefault(type, []), handler)

    def on_rejected(self, handler: Callable[[MessageError, str | bytes], None]) -> Callable[[], None]:
        """Call `handler(error, data)` for every message that failed verification; return what takes it off.

        `data` is whatever somebody sent. It proves nothing.
        """
        return _add(self._rejection_handlers, handler)

    # --- state ---------------------------------------------------------------------------------

    def on_state(self, handler: Callable[[ClientState], None]) -> Callable[[], None]:
        """Call `handler(state)` at every change of state, in order; return what takes it off again.

        At REGISTERED, `session.resumed` tells whether anything was missed.
        """
        return _add(self._state_handlers, handler)

    async def wait_for(self, state: ClientState, *, timeout: float) -> None:
        """Wait until the client is in `state`; a state that is left again at once counts too.

        Args:
            state: The state.
            timeout: In seconds.

        Raises:
            TimeoutError: It was not reached in time.
            NotConnectedError: The client was closed.
            GatewayClosedError: The gateway closed the connection for good.
        """
        try:
            reached = await self._until(frozenset({state, ClientState.CLOSED}), self._deadline(timeout))
        except asyncio.TimeoutError:
            raise TimeoutError(
                f"the client is {self._state.value}, not {state.value}, after {timeout:g} s{self._why()}"
            ) from None
        if reached is not state:
            raise self._closed_error()

    async def _until(self, states: frozenset[ClientState], deadline: float | None) -> ClientState:
        """Wait for one of `states`; raises asyncio.TimeoutError at the deadline."""
        if self._state in states:
            return self._state
        waiter = states, asyncio.get_running_loop().create_future()
        self._state_waiters.append(waiter)
        try:
            return await within(waiter[1], None if deadline is None else self._left(deadline))
        finally:
            self._state_waiters.remove(waiter)

    def _set_state(self, state: ClientState) -> None:
        if self._state in (state, ClientState.CLOSED):
            return
        _log.info("%s: %s -> %s", self.url, self._state.value, state.value)
        self._state = state
        for states, waiter in self._state_waiters:
            if state in states and not waiter.done():
                waiter.set_result(state)
        for handler in tuple(self._state_handlers):
            _call(handler, state)

    # --- the connection ------------------------------------------------------------------------

    async def _run(self, started: asyncio.Future[Session], timeout: float) -> None:
        """Own the connection for all its life: open it, read it, open it again.

        Args:
            started: Gets the first session, or the reason why there is none.
            timeout: Seconds for the first attempt.
        """
        try:
            self._set_state(ClientState.CONNECTING)
            while True:
                end = await self._connect_and_read(started, timeout)
                if self._is_leaving:
                    return
                self._last_error = end.error
                if not end.close.reconnect:
                    self._finish(self._closed_for_good_by(end))
                elif not started.done():
                    self._set_state(ClientState.DISCONNECTED)
                elif not self._reconnect:
                    text = f"{end.error}; this client does not reconnect"
                    self._finish(GatewayClosedError(text, end.close))
                else:
                    self._dropped()
                    delay = self._backoff.next(end.retry_after)
                    _log.warning("%s; next attempt in %.1f s", end.error, delay)
                    await asyncio.sleep(delay)
                    timeout = REGISTER_TIMEOUT_SECONDS
                    continue
                if not started.done():
                    started.set_exception(end.error)
                return
        finally:
            self._runner = None
            if not started.done():
                started.set_exception(NotConnectedError(f"the client was closed before {self.url} answered"))

    async def _connect_and_read(self, started: asyncio.Future[Session], timeout: float) -> ConnectionEnded:
        """Hold one connection, from the dial until it ends; return how it ended."""
        loop = asyncio.get_running_loop()
        connection = Connection(self._dialled_url, self._ssl)
        registered_at: float | None = None
        renewing: asyncio.Task[None] | None = None
        try:
            await connection.open(
                self._key,
                gateway_did=self._gateway_did,
                shown=self._shown,
                resume=self._resume,
                guard=self._verifier.guard,
                timeout=timeout,
            )
            registered_at = loop.time()
            self._registered(connection)
            renewing = asyncio.ensure_future(self._renew_ice_servers())
            if not started.done():
                started.set_result(connection.session)
            while True:
                self._take(await connection.receive(), connection.session.gateway_did)
        except ConnectionEnded as end:
            return end
        except Exception as error:  # a fault of ours costs the connection, not the client
            _log.exception("%s: unexpected fault", self.url)
            text = f"a fault of this client, report it: {error!r}"
            return ConnectionEnded(GatewayUnreachableError(text, temporary=False))
        finally:
            if renewing is not None:
                renewing.cancel()
            connection.abort()
            if registered_at is not None:
                self._backoff.ended(loop.time() - registered_at)

    def _registered(self, connection: Connection) -> None:
        if self._session is not None:
            self.stats.reconnects += 1
            before, now = self._session.gateway_did, connection.session.gateway_did
            if before != now:
                _log.warning("%s: another gateway answers, %s in place of %s", self.url, now, before)
            if not connection.session.resumed:
                self._fail_pending("the session could not be resumed", lambda pending: pending.written)
        self._connection = connection
        self._session, self._resume = connection.session, connection.resume
        self._set_state(ClientState.REGISTERED)

    def _dropped(self) -> None:
        self._connection = None
        # Agents' answers wait at the gateway for our return; its own were lost with the connection.
        gateway = self._session.gateway_did if self._session is not None else ""
        self._fail_pending(
            "the connection broke", lambda pending: pending.written and pending.message.to == gateway
        )
        self._set_state(ClientState.RECONNECTING)

    def _closed_for_good_by(self, end: ConnectionEnded) -> GatewayClosedError:
        if isinstance(end.error, GatewayClosedError):
            return end.error
        return closed_for_good(self.url, str(end.error), end.close)

    async def _leave(self, reason: str | None) -> None:
        """End the session, with UNREGISTER and a closing handshake where there is a connection."""
        connection, session, runner = self._connection, self._session, self._runner
        self._is_leaving = True
        try:
            self._detach()
            if connection is not None and session is not None:
                payload = UnregisterPayload() if reason is None else UnregisterPayload(reason=reason)
                goodbye = self._prepare(Message.create(self.did, session.gateway_did, payload))
                with suppress(ConnectionEnded, asyncio.TimeoutError):
                    await within(connection.send(encode(goodbye)), CLOSE_TIMEOUT_SECONDS)
                    await connection.close()
        finally:
            if runner is not None:
                await _end(runner)
            self._is_leaving = False

    def _detach(self) -> None:
        """Forget the session: nothing is sent any more, nothing is waited for."""
        self._connection = self._session = self._resume = None
        self._fail_pending("the client left", lambda _: True)
        self._set_state(ClientState.DISCONNECTED)

    def _finish(self, error: GatewayClosedError | None) -> None:
        """Enter CLOSED: because of `error`, or by ourselves if it is None."""
        if self._state is ClientState.CLOSED:
            return
        if error is not None:
            _log.warning("%s", error)
        self._closed_for_good = error
        self._connection = self._session = self._resume = None
        self._fail_pending("the client was closed", lambda _: True)
        self._set_state(ClientState.CLOSED)
        self._arrival.set()

    def _closed_error(self) -> GatewayError:
        """Build what everybody gets who waits for a closed client; each gets its own traceback."""
        if self._closed_for_good is not None:
            return GatewayClosedError(str(self._closed_for_good), self._closed_for_good.close_code)
        return NotConnectedError("this client was closed: make a new one")

    def _fail_pending(self, why: str, which: Callable[[_Pending], bool]) -> None:
        for pending in self._pending.values():
            if not which(pending) or pending.answer.done():
                continue
            if self._closed_for_good is not None:
                pending.answer.set_exception(self._closed_error())
                continue
            kind, name = pending.message.type.value, self._name(pending.message.to)
            text = f"{why} before {name} answered {kind}; it may or may not have arrived: ask again"
            pending.answer.set_exception(NotConnectedError(text, temporary=True))

    # --- sending -------------------------------------------------------------------------------

    def _prepare(self, message: Message) -> Message:
        """Sign a message and read it as its receiver will; raises MessageError if that would refuse it."""
        if message.type in _DATA_PLANE:
            raise MalformedMessageError(
                f"{message.type.value} travels on the DataChannel between agents, not through the gateway: "
                "use Agent.connect()",
                name="data_plane_only",
                field="type",
                message_id=message.id,
            )
        is_ours = message.signature is None
        if is_ours:
            message = sign_message(message, self._key)
        announced = self._session.limits.get("message_max_bytes") if self._session is not None else None
        limit = min(announced, MESSAGE_MAX_BYTES) if isinstance(announced, int) else MESSAGE_MAX_BYTES
        data = encode(message, limit=limit)
        if is_ours:
            decode(data)  # a model that was made by model_construct() has not been checked yet
        else:
            verify_message(data, recipient=message.to, sender=self.did, guard=ReplayGuard())
        return message

    async def _write(self, data: bytes, deadline: float) -> None:
        """Write to the connection there is, or to the next one: a second copy is refused by its id."""
        while True:
            connection = await self._connected(deadline)
            try:
                await within(connection.send(data), self._left(deadline))
            except asyncio.TimeoutError:
                raise NotConnectedError(
                    f"{self.url} did not take the message in time: the network or the gateway is too slow",
                    temporary=True,
                ) from None
            except ConnectionEnded:
                if self._connection is connection:  # the task that reads it has not noticed yet
                    with suppress(asyncio.TimeoutError):
                        await self._until(_NOT_REGISTERED, deadline)
                continue
            self.stats.sent += 1
            return

    async def _connected(self, deadline: float) -> Connection:
        while self._connection is None:
            if self._state is ClientState.CLOSED:
                raise self._closed_error()
            if self._state is ClientState.DISCONNECTED:
                raise NotConnectedError(f"not registered with {self.url}: call register() first")
            try:
                await self._until(_SETTLED, deadline)
            except asyncio.TimeoutError:
                raise NotConnectedError(
                    f"no connection to {self.url} in time, the client is {self._state.value}{self._why()}",
                    temporary=True,
                ) from None
        return self._connection

    def _answer(self, message: Message) -> None:
        """Send a PONG or an ERROR of our own accord, beside the reading."""
        if len(self._answering) < ANSWERS_MAX:
            self._answer_ids.append(message.id.lower())
            task = asyncio.ensure_future(self._send_answer(message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _send_answer(self, message: Message) -> None:
        try:
            await self.send(message)
        except AIConexusError as error:
            _log.debug("%s to %s was not sent: %s", message.type.value, message.to, error)

    # --- receiving -----------------------------------------------------------------------------

    def _take(self, data: str | bytes, gateway: str) -> None:
        """Verify what arrived and give it to whom it is for."""
        try:
            message = self._verifier.verify(data, gateway)
        except MessageError as error:
            self._reject(error, data)
            return
        self.stats.received += 1
        asked = (message.correlation_id or "").lower()
        pending = self._pending.get(asked)
        if pending is not None and not pending.answer.done() and _answers(message, pending.message, gateway):
            pending.answer.set_result(message)
        elif isinstance(message.payload, PingPayload):
            sequence = message.payload.sequence
            self._answer(message.reply(PongPayload() if sequence is None else PongPayload(sequence=sequence)))
        elif message.type is MessageType.ERROR and asked in self._answer_ids:
            _log.debug("an answer of this client was refused: %s", message.payload)
        else:
            self._deliver(message)

    def _reject(self, error: MessageError, data: str | bytes) -> None:
        self.stats.rejected += 1
        sender = self._verifier.sender_to_answer(error, data)
        # Once for each cause of a proven sender; the rest is of nobody. Nobody can fill the log.
        fault = (sender if len(self._faults) < FAULTS_MAX else None), error.cause.name
        level = logging.DEBUG if fault in self._faults else logging.WARNING
        self._faults.add(fault)
        _log.log(level, "%s: a message was dropped (%s): %s", self.url, error.cause.name, error)
        for handler in tuple(self._rejection_handlers):
            _call(handler, error, data)
        if sender is not None:
            refusal = ErrorPayload.for_error(error)
            self._answer(Message.create(self.did, sender, refusal, correlation_id=error.message_id))

    def _deliver(self, message: Message) -> None:
        handlers = self._handlers.get(message.type)
        if handlers:
            if len(self._handling) >= HANDLERS_MAX:
                self._refuse(message, "handlers are busy")
                return
            for handler in tuple(handlers):
                result = _call(handler, message)
                if inspect.isawaitable(result):
                    task = asyncio.ensure_future(result)
                    self._handling.add(task)
                    task.add_done_callback(self._handled)
        elif len(self._inbox) >= INBOX_MAX_MESSAGES:
            self._refuse(message, "the queue is full")
        else:
            self._inbox.append(message)
            self._arrival.set()

    def _handled(self, task: asyncio.Future[None]) -> None:
        self._handling.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a handler failed", exc_info=task.exception())

    def _refuse(self, message: Message, why: str) -> None:
        self.stats.refused += 1
        _log.warning("%s from %s was refused: %s", message.type.value, message.from_, why)
        is_agent = self._session is not None and message.from_ != self._session.gateway_did
        if is_agent and message.type is not MessageType.ERROR:
            self._answer(message.reply(ErrorPayload.for_cause("slow_consumer")))

    # --- words ---------------------------------------------------------------------------------

    def _name(self, did: str) -> str:
        is_gateway = self._session is not None and did == self._session.gateway_did
        return f"the gateway {self.url}" if is_gateway else short_did(did)

    def _why(self) -> str:
        return f": {self._last_error}" if self._last_error is not None else ""

    def _no_answer(self, message: Message, timeout: float) -> AIConexusError:
        text = f"{self._name(message.to)} did not answer {message.type.value} within {timeout:g} s"
        if self._session is not None and message.to == self._session.gateway_did:
            return GatewayUnreachableError(text)
        return RemoteTimeoutError(
            ErrorCode.TIMEOUT,
            f"{text}; it may or may not have arrived",
            {"name": "deadline", "temporary": True},
        )

    def _remote_error(self, message: Message, answer: Message, payload: ErrorPayload) -> RemoteError:
        details = payload.details.model_dump(exclude_none=True) if payload.details is not None else {}
        if payload.code is ErrorCode.UNKNOWN_AGENT:
            is_offline = details.get("name", "not_online") == "not_online"
            what = "is not online" if is_offline else f"cannot be reached: {payload.message}"
            text = f"{short_did(message.to)} {what} (asked {self.url})"
        else:
            text = f"{self._name(answer.from_)} refused {message.type.value}: {payload.message}"
        return remote_error(payload.code, text, details)

    # --- time ----------------------------------------------------------------------------------

    @staticmethod
    def _deadline(timeout: float) -> float:
        return asyncio.get_running_loop().time() + timeout

    @staticmethod
    def _left(deadline: float) -> float:
        return max(0.0, deadline - asyncio.get_running_loop().time())


def _answers(message: Message, request: Message, gateway: str) -> bool:
    """Tell whether `message`, which names `request`, comes from whom it must come."""
    if isinstance(message.payload, PresencePayload) and message.payload.event is not None:
        return False  # of a watch: it names the DISCOVER, too, but does not answer it
    return message.from_ == request.to or (message.from_ == gateway and message.type is MessageType.ERROR)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


def _add(handlers: list[T], handler: T) -> Callable[[], None]:
    handlers.append(handler)

    def remove() -> None:
        with suppress(ValueError):
            handlers.remove(handler)

    return remove


def _call(handler: Callable[..., T], *arguments: object) -> T | None:
    """Call what the application gave us; what it raises is its own matter."""
    try:
        return handler(*arguments)
    except Exception:
        _log.exception("the handler %r failed", handler)
        return None
