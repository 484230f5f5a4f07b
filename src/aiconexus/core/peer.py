"""Another agent at the other end of an open DataChannel: what to ask it, and what it asks of this one.

How a connection ends. An agent that goes says so first, with UNREGISTER and its reason, and then closes the
DataChannel; only after that the RTCPeerConnection. Chromium does not notice a bare `pc.close()` for seconds,
and with a goodbye the other side can tell a decision from an accident.

There is one connection for both sides, and both may have asked for it. So whoever leaves `async with` does
not close it over the other's head: it says by PING that it is done (`ext.done`), and the PONG tells whether
the other side is, too. Only then it is closed, unless this side has come to need it again meanwhile. A
connection that nobody holds any more, as its last calls have ended since, is asked about in the same way when
it falls silent. Whoever awaited it needs it as long as there are calls, and for a while after the last one.

What a peer can cost. A request counts until its answer has left and what runs for it has ended; beyond a
number of them, or while too many bytes wait for a peer that does not read, a further one is told busy at
once. Short replies are never left out: a peer for which even these pile up is given up, as is one that takes
nothing for a minute.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum
from typing import Any, Final

from pydantic import JsonValue, ValidationError

from aiconexus.client.deadline import within
from aiconexus.client.socket import short_did
from aiconexus.core.calls import (
    Answered,
    Calls,
    CancelArrived,
    DoneArrived,
    Event,
    ExecutionArrived,
    Failed,
    IntentArrived,
    Left,
    Refused,
    Reply,
)
from aiconexus.core.channel import Channel
from aiconexus.core.intents import Intent, Quote
from aiconexus.core.keepalive import KeepAlive, Verdict
from aiconexus.core.peer_connection import Path, PeerConnection
from aiconexus.protocol.errors import (
    CallCancelledError,
    CallError,
    CallTimeoutError,
    CapabilityError,
    MalformedMessageError,
    PeerError,
    PeerLostError,
)
from aiconexus.protocol.limits import (
    CALL_TIMEOUT_SECONDS,
    PEER_IDLE_SECONDS,
    PEER_PING_INTERVAL_SECONDS,
    PEER_PONG_TIMEOUT_SECONDS,
    PEER_STALL_SECONDS,
)
from aiconexus.protocol.models import IntentPayload
from aiconexus.protocol.security import DIDKey

GOODBYE_SECONDS: Final = 1.0  # for the other side to close its end too; a round trip is enough
GRACE_SECONDS: Final = 1.0  # for what is cancelled to end by itself, before its caller has its answer
EXECUTIONS_MAX: Final = 256  # for one peer; more would only share the same core
UNSENT_MAX_BYTES: Final = 4_194_304  # for one peer: 16 of the largest messages; what runs may add its answers

_log: Final = logging.getLogger("aiconexus.core")


class PeerState(str, Enum):
    """Where a Peer is."""

    OPEN = "open"
    CLOSING = "closing"  # not to be used any more; OPEN again if the other side still needs it
    CLOSED = "closed"


class _Execution:
    """A capability or `on_intent` that runs for the peer, until its answer has left and it has ended.

    Attributes:
        cancelled: Done when it was cancelled, with the `CallError.name` of the answer.
    """

    def __init__(self, work: Awaitable[Any]) -> None:
        self.task = asyncio.ensure_future(work)
        self.cancelled: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self, reason: str) -> None:
        """Cancel it; the first reason counts."""
        if not self.cancelled.done():
            self.cancelled.set_result(reason)
        self.task.cancel()


class Peer:
    """Another agent, connected. Several tasks may use it at the same time.

    Attributes:
        did: Its DID, which the connection has proven.
        refused: How many of its messages were not accepted.
    """

    def __init__(
        self,
        key: DIDKey,
        did: str,
        connection: PeerConnection,
        channel: Channel,
        *,
        on_intent: Callable[[Intent], Awaitable[Quote]],
        on_execute: Callable[[str, dict[str, JsonValue]], Awaitable[JsonValue]],
        on_closed: Callable[[Peer, str], None],
        idle_timeout: float = PEER_IDLE_SECONDS,
    ) -> None:
        self.did: Final = did
        self.refused = 0
        self._connection = connection
        self._channel = channel
        self._on_intent = on_intent
        self._on_execute = on_execute
        self._on_closed = on_closed
        self._calls = Calls(key, did, limit=connection.message_max_bytes)
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._executions: dict[str, _Execution] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._unsent = 0  # characters of answers that wait until they may be sent
        self._pinging: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._state = PeerState.OPEN
        self._settled = asyncio.Event()
        self._is_expiring = False  # both sides are done, and the other is to close
        self._holders = 0  # `async with` blocks
        self._awaited = 0  # `await`s, which end when it is idle
        self._idle_timeout = idle_timeout
        self._path = connection.path
        self._reason = "the connection broke"
        self._loop = asyncio.get_running_loop()
        self._used_at = self._loop.time()
        self._keepalive = KeepAlive(self._loop.time())
        self._timer = self._loop.call_at(self._keepalive.due, self._check)
        self._end: asyncio.Task[None] | None = None
        channel.closed.add_done_callback(lambda _: self._lost(self._reason))
        channel.receive(self._receive)

    # --- what it is -----------------------------------------------------------------------------

    @property
    def state(self) -> PeerState:
        """Where it is."""
        return self._state

    @property
    def path(self) -> Path | None:
        """Over which addresses it is connected, such as `127.0.0.1:43321 ⇄ 127.0.0.1:50111 udp host`."""
        self._path = self._connection.path or self._path
        return self._path

    def __repr__(self) -> str:
        return f"<Peer {short_did(self.did)} {self._state.value} {self.path}>"

    # --- what this side asks --------------------------------------------------------------------

    async def intent(
        self,
        query: str | None = None,
        /,
        *,
        task: str | None = None,
        params: dict[str, Any] | None = None,
        context: Any = None,
        timeout: float = CALL_TIMEOUT_SECONDS,
    ) -> Quote:
        """Say what is wanted and return what the other agent says to it.

        Args:
            query: In natural language.
            task: Or by name.
            params: What belongs to the task, as JSON.
            context: Anything that helps, as JSON.
            timeout: Seconds.

        Raises:
            CallTimeoutError: No answer in time; the other agent is told how much there is.
            RemoteError: The other agent's `on_intent` failed, or it is busy.
            PeerLostError: The connection went away.
            MalformedMessageError: It has no JSON form, or is too large for one message.
        """
        if query is None and task is None:
            raise TypeError("an intent needs a query or a task")
        fields = {"query": query, "task": task, "params": params, "context": context}
        try:
            payload = IntentPayload(**{name: value for name, value in fields.items() if value is not None})
        except ValidationError as error:
            raise MalformedMessageError(f"the intent has no JSON form: {error}") from None
        quote = await self._ask(lambda: self._calls.ask(payload, timeout), timeout)
        assert isinstance(quote, Quote)
        return quote

    async def execute(self, capability: str, /, *, timeout: float = CALL_TIMEOUT_SECONDS, **args: Any) -> Any:
        """Execute a capability of the other agent and return its result as JSON.

        Cancelling this task, and the timeout, cancel the execution there too.

        Args:
            capability: Its name.
            timeout: Seconds; the other agent is told.
            args: What it takes, by name: anything pydantic can write as JSON.

        Raises:
            UnknownCapabilityError: The other agent has none of this name.
            InvalidArgumentsError: They do not fit, or cannot be sent.
            CapabilityError: It raised; the text tells what.
            CallTimeoutError: No result in time.
            CallCancelledError: The other agent cancelled it.
            CallError: Another failure there: it is busy.
            PeerIdentityError: The answer was not signed by the other agent.
            PeerLostError: The connection went away; whether it was executed is not known.
        """
        return await self._ask(lambda: self._calls.execute(capability, args, timeout), timeout, capability)

    async def ping(self, *, timeout: float = PEER_PONG_TIMEOUT_SECONDS) -> float:
        """Return the round trip time of a PING and its PONG in seconds.

        Raises:
            CallTimeoutError: No PONG in time.
            PeerLostError: The connection went away.
        """
        begin = self._loop.time()
        await self._ask(self._calls.ping, timeout)
        return self._loop.time() - begin

    async def close(self, reason: str = "it is done") -> None:
        """Say goodbye and close the connection for both sides; calls that run fail with PeerLostError."""
        if self._end is None:
            self._end = asyncio.ensure_future(self._close(reason))
        await asyncio.shield(self._end)

    async def _ask(self, begin: Callable[[], tuple[str, str]], timeout: float, capability: str = "") -> Any:
        if not self._channel.is_open:
            raise PeerLostError(f"{short_did(self.did)} is not connected: {self._reason}", self.did)
        deadline = self._loop.time() + timeout
        id_, text = begin()
        answer = self._waiting[id_] = self._loop.create_future()
        try:
            with suppress(asyncio.TimeoutError):
                await within(self._channel.send(text), timeout)
                await asyncio.wait({answer}, timeout=deadline - self._loop.time())
            if not answer.done():
                text = f"no answer from {short_did(self.did)} in {timeout:g} s"
                raise CallTimeoutError(text, capability)
            return answer.result()
        except ConnectionError:
            raise PeerLostError(f"{short_did(self.did)} went away: {self._reason}", self.did) from None
        finally:
            del self._waiting[id_]
            if not answer.cancel():
                answer.exception()  # taken note of, also where sending failed first
            cancel = self._calls.abandon(id_)
            if cancel is not None and self._channel.is_open:
                self._channel.send_now(cancel)

    # --- who needs it ---------------------------------------------------------------------------

    def hold(self, *, in_block: bool = False) -> None:
        """Need the connection until `release`; unless it is in a block, at most until it is idle."""
        if in_block:
            self._holders += 1
        else:
            self._awaited += 1
            self._used_at = self._loop.time()

    async def release(self, *, in_block: bool = False) -> None:
        """Need it no longer; close it if the other side does not need it either."""
        if in_block:
            self._holders -= 1
        else:
            self._awaited = max(0, self._awaited - 1)
        # Whoever leaves may be cancelled; the other side has been asked by then, and acts on its answer.
        await asyncio.shield(self._leave())

    def _leave(self) -> asyncio.Task[None]:
        if self._leaving is None or self._leaving.done():
            self._leaving = asyncio.ensure_future(self._close_if_done())
        return self._leaving

    async def _close_if_done(self) -> None:
        if not self._is_done or self._state is not PeerState.OPEN:
            return
        self._set_state(PeerState.CLOSING)
        is_done = False
        with suppress(CallError, PeerError):  # `_check` sees to a peer that does not answer
            is_done = await self._ask(lambda: self._calls.ping(is_done=True), PEER_PONG_TIMEOUT_SECONDS)
        # Asked for anew while the PONG was on its way, the connection stays: the request has told the other.
        if is_done and self._is_done:
            await self.close()
        elif self.state is PeerState.CLOSING and self._end is None and not self._is_expiring:
            self._set_state(PeerState.OPEN)

    async def settled(self) -> PeerState:
        """Wait until it is OPEN or CLOSED, and return which."""
        while self._state is PeerState.CLOSING:
            await self._settled.wait()
        return self._state

    async def quiet(self) -> None:
        """Wait until nothing runs and nothing is asked, on either side."""
        while running := [each for each in (*self._serving, *self._waiting.values()) if not each.done()]:
            await asyncio.wait(running)

    @property
    def _is_done(self) -> bool:
        return self._holders == self._awaited == self._calls.open == 0

    # --- what arrives ---------------------------------------------------------------------------

    def _receive(self, data: str | bytes) -> None:
        if self._state is PeerState.CLOSED:
            return
        self._keepalive.heard(self._loop.time())
        if self._calls.open:
            self._used_at = self._loop.time()
        event = self._calls.receive(data, is_done=self._is_done, busy=self._busy)
        if event is not None:
            self._handle(event)

    @property
    def _busy(self) -> str:
        if len(self._executions) >= EXECUTIONS_MAX:
            return f"{EXECUTIONS_MAX} calls of yours run, or their answers wait to be read"
        if self._unsent > UNSENT_MAX_BYTES:
            return f"{self._unsent} bytes of answers wait for you to read them"
        return ""

    def _handle(self, event: Event) -> None:
        match event:
            case Answered(id_, value) if id_ in self._waiting:
                self._waiting[id_].set_result(value)
            case Failed(id_, error) if id_ in self._waiting:
                self._waiting[id_].set_exception(error)
            case IntentArrived(intent, seconds):
                self._keep_open()
                self._serve(intent.id, self._on_intent(intent), seconds, self._quote)
            case ExecutionArrived(id_, capability, args, timeout):
                self._keep_open()
                self._serve(id_, self._on_execute(capability, args), timeout, self._calls.succeed)
            case CancelArrived(id_) if id_ in self._executions:
                self._executions[id_].end(CallCancelledError.name)
            case Reply(text):
                self._reply(text)
            case Refused():
                self._refuse(event)
            case DoneArrived(reply, is_done):
                self._reply(reply)
                if is_done and self._state is not PeerState.CLOSED:
                    self._set_state(PeerState.CLOSING)
                    self._timer.cancel()
                    late = self._loop.time() + PEER_PONG_TIMEOUT_SECONDS
                    self._timer = self._loop.call_at(late, self._lost, "it did not close")
                    self._is_expiring = True
            case Left(reason):
                self._set_state(PeerState.CLOSING)
                self._reason = f"it closed the connection: {reason}"
                self._channel.close()

    def _keep_open(self) -> None:
        """Take back that the connection is at its end: the peer, which was done, has asked for something."""
        if self._is_expiring:
            self._is_expiring = False
            self._set_state(PeerState.OPEN)
            self._timer.cancel()
            self._timer = self._loop.call_at(self._keepalive.due, self._check)

    def _refuse(self, refused: Refused) -> None:
        self.refused += 1
        level = logging.WARNING if self.refused == 1 else logging.DEBUG
        _log.log(level, "a message of %s is refused: %s", self.did, refused.error)
        if refused.reply is not None:
            self._reply(refused.reply)
        if refused.failed is not None:
            self._handle(refused.failed)

    def _reply(self, text: str) -> None:
        if not self._channel.is_open:
            return
        self._channel.send_now(text)
        # What waits its turn does not count here: so much can only be replies.
        if self._channel.buffered > UNSENT_MAX_BYTES:
            self._lost("it sends without reading the replies")

    # --- what runs for the other side -----------------------------------------------------------

    def _serve(
        self,
        id_: str,
        work: Awaitable[Any],
        timeout: float,
        answer: Callable[[str, Any, float], str | None],
    ) -> None:
        self._used_at = self._loop.time()
        execution = self._executions[id_] = _Execution(work)
        task = asyncio.ensure_future(self._finish(id_, execution, timeout, answer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def _quote(self, id_: str, quote: Quote, seconds: float) -> str | None:
        return self._calls.quote(id_, quote)

    async def _finish(
        self,
        id_: str,
        execution: _Execution,
        timeout: float,
        answer: Callable[[str, Any, float], str | None],
    ) -> None:
        """See an execution to its end, whatever that is, and send its one answer."""
        begin = self._loop.time()
        task, cancelled = execution.task, execution.cancelled
        await asyncio.wait({task, cancelled}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            execution.end(CallTimeoutError.name)  # if nobody cancelled it before
            await asyncio.wait({task}, timeout=GRACE_SECONDS)
        seconds = self._loop.time() - begin
        if cancelled.done() and cancelled.result() == CallTimeoutError.name:
            text = self._calls.fail(id_, CallTimeoutError.name, f"no result in {timeout:g} s", seconds)
        elif cancelled.done() or task.cancelled():
            text = self._calls.fail(id_, CallCancelledError.name, "the execution was cancelled", seconds)
        elif (error := task.exception()) is None:
            text = answer(id_, task.result(), seconds)
        else:
            name = error.name if isinstance(error, CallError) else CapabilityError.name
            text = self._calls.fail(id_, name, str(error), seconds)
        if text is not None:
            await self._send_answer(id_, text)
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # taken note of, also where the answer did not wait for it
        del self._executions[id_]

    async def _send_answer(self, id_: str, text: str) -> None:
        self._unsent += len(text)
        try:
            await self._channel.send(text)
        except ConnectionError as error:
            _log.debug("the answer to %s of %s cannot be sent: %s", id_, self.did, error)
        finally:
            self._unsent -= len(text)

    # --- its state and its end ------------------------------------------------------------------

    def _set_state(self, state: PeerState) -> None:
        self._state = state
        if state is PeerState.CLOSING:
            self._settled.clear()
        else:
            self._settled.set()

    def _check(self) -> None:
        """Ping a silent peer, give up a dead one."""
        verdict = self._keepalive.check(
            self._loop.time(),
            received=self._connection.received,
            taken=self._channel.taken,
            is_congested=self._channel.is_congested,
        )
        if verdict is Verdict.DEAD:
            self._lost(f"it was silent for {PEER_PING_INTERVAL_SECONDS + PEER_PONG_TIMEOUT_SECONDS:g} s")
            return
        if verdict is Verdict.STALLED:
            self._lost(f"it has read nothing for {PEER_STALL_SECONDS:g} s")
            return
        if self._calls.open or self._serving:
            self._used_at = self._loop.time()
        elif self._loop.time() - self._used_at >= self._idle_timeout:
            self._awaited = 0
        if verdict is Verdict.PING:
            self._pinging = self._leave() if self._is_done else asyncio.ensure_future(self._ping())
        self._timer = self._loop.call_at(self._keepalive.due, self._check)

    async def _ping(self) -> None:
        with suppress(CallError, PeerError):  # `_check` sees to a peer that does not answer
            await self.ping()

    def _lost(self, reason: str) -> None:
        if self._state is PeerState.CLOSED:
            return
        self._set_state(PeerState.CLOSED)
        self._reason = reason
        self._path = self.path
        self._timer.cancel()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(PeerLostError(f"{short_did(self.did)} went away: {reason}", self.did))
        for execution in self._executions.values():
            execution.end(CallCancelledError.name)
        if self._end is None:
            self._end = asyncio.ensure_future(self._close(reason))
        self._on_closed(self, reason)

    async def _close(self, reason: str) -> None:
        try:
            if self._state is not PeerState.CLOSED and self._channel.is_open:
                self._set_state(PeerState.CLOSING)
                self._reason = f"this side closed the connection: {reason}"
                self._is_expiring = False
                try:
                    self._channel.send_now(self._calls.leave(reason))
                except (ConnectionError, ValueError) as error:
                    _log.debug("%s hears no goodbye: %s", self.did, error)
                self._channel.close()
                await asyncio.wait({self._channel.closed}, timeout=GOODBYE_SECONDS)
        finally:
            self._lost(self._reason)
            if self._serving:
                await asyncio.wait(self._serving, timeout=GOODBYE_SECONDS)
            await self._connection.close()
