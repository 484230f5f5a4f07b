"""Another agent at the other end of an open DataChannel: what to ask it, and what it asks of this one.

How a connection ends. An agent that goes says so first, with UNREGISTER and its reason, and then closes the
DataChannel; only after that the RTCPeerConnection. Chromium does not notice a bare `pc.close()` for seconds,
and with a goodbye the other side can tell a decision from an accident.

There is one connection for both sides, and both may have asked for it. So whoever leaves `async with` does
not close it over the other's head: it says by PING that it is done (`ext.done`), and the PONG tells whether
the other side is, too. Only then it is closed, unless this side has come to need it again meanwhile. A
connection that nobody holds any more, as its last calls have ended since, is asked about in the same way when
it falls silent. Whoever awaited it needs it as long as there are calls, and for a while after the last one.

What a peer can cost. So many of its calls run at a time; further ones are accepted and wait. A call counts
until its answer has left and what runs for it has ended; beyond a number of them, or while too many bytes
wait for a peer that does not read, a further one is told busy at once. Short replies are never left out: a
peer for which even these pile up is given up, as is one that takes nothing for a minute.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError
from typing_extensions import Never

from aiconexus.client.socket import short_did
from aiconexus.core.answers import Answers
from aiconexus.core.call import Call, check_seconds, time_left
from aiconexus.core.calls import Calls
from aiconexus.core.channel import Channel
from aiconexus.core.collection import Collection
from aiconexus.core.events import (
    Answered,
    ArgumentsArrived,
    CancelArrived,
    DoneArrived,
    Event,
    ExecutionArrived,
    Failed,
    InputArrived,
    InputEnded,
    IntentArrived,
    Left,
    PartArrived,
    PongArrived,
    ProgressArrived,
    Refused,
    Reply,
)
from aiconexus.core.input import Input
from aiconexus.core.intents import Intent, Quote
from aiconexus.core.keepalive import KeepAlive, Verdict
from aiconexus.core.peer_connection import Path, PeerConnection
from aiconexus.core.question import LateError, Question, forget
from aiconexus.protocol.attachments import Value
from aiconexus.protocol.errors import (
    CallBusyError,
    CallCancelledError,
    CallError,
    CallTimeoutError,
    CapabilityError,
    InvalidArgumentsError,
    MalformedMessageError,
    PeerError,
    PeerLostError,
)
from aiconexus.protocol.limits import (
    ATTACHMENTS_MAX_BYTES,
    CALL_TIMEOUT_SECONDS,
    INLINE_MAX_BYTES,
    PEER_IDLE_SECONDS,
    PEER_PING_INTERVAL_SECONDS,
    PEER_PONG_TIMEOUT_SECONDS,
    PEER_STALL_SECONDS,
    STREAM_TIMEOUT_SECONDS,
)
from aiconexus.protocol.models import IntentPayload
from aiconexus.protocol.receipts import Receipt
from aiconexus.protocol.security import DIDKey

GOODBYE_SECONDS: Final = 1.0  # for the other side to close its end too; a round trip is enough
GRACE_SECONDS: Final = 1.0  # for what is cancelled to end by itself, before its caller has its answer
RUNNING_MAX: Final = 256  # calls of one peer at a time; more would only share the same core
ACCEPTED_MAX: Final = 4_096  # calls of one peer that run or wait for that
ACCEPTED_MAX_BYTES: Final = ACCEPTED_MAX * INLINE_MAX_BYTES  # of their envelopes: what is longer is attached
UNREAD_MAX_BYTES: Final = ATTACHMENTS_MAX_BYTES  # of answers and parts; what runs may add its own
UNSENT_MAX_BYTES: Final = 4_194_304  # of short replies: 16 of the largest messages wait before them

_NO_ARGS: Final[Mapping[str, Any]] = MappingProxyType({})
_STREAMED: Final = object()  # the result of an execution whose parts have gone out

_log: Final = logging.getLogger("aiconexus.core")


class PeerState(str, Enum):
    """Where a Peer is."""

    OPEN = "open"
    CLOSING = "closing"  # not to be used any more; OPEN again if the other side still needs it
    CLOSED = "closed"


class _Execution:
    """A capability or `on_intent` that runs for the peer, until its answer has left and it has ended.

    Attributes:
        args: The arguments, once they are all there.
        input: The argument that is a stream, if one is.
        cancelled: Done when it was cancelled, with the `CallError.name` of the answer.
        task: What runs.
    """

    task: asyncio.Future[Any]

    def __init__(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        self.deadline = deadline
        self.args: asyncio.Future[dict[str, Value]] = loop.create_future()
        self.input: Input | None = None
        self.cancelled: asyncio.Future[str] = loop.create_future()

    def drop_args(self) -> None:
        """Keep them no longer: the answer may wait for its reader, and they do not count any more."""
        forget(self.args)
        self.args = self.args.get_loop().create_future()
        self.args.cancel()

    def end(self, reason: str) -> None:
        """Cancel it; the first reason counts."""
        if not self.cancelled.done():
            self.cancelled.set_result(reason)
        self.task.cancel()


class Peer:
    """Another agent, connected: what `Agent.connect` returns. Several tasks may use it at the same time.

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
        on_execute: Callable[[str, dict[str, Any]], Awaitable[Value] | AsyncGenerator[Value, None]],
        on_closed: Callable[[Peer, str], None],
        answers: Answers | None = None,
        idle_timeout: float = PEER_IDLE_SECONDS,
    ) -> None:
        self.did: Final = did
        self.refused = 0
        self._connection = connection
        self._channel = channel
        self._on_intent = on_intent
        self._on_execute = on_execute
        self._on_closed = on_closed
        self._calls = Calls(key, did, limit=connection.message_max_bytes, answers=answers)
        self._outbox = self._calls.outbox
        self._questions: dict[str, Question] = {}
        self._pongs: dict[str, asyncio.Future[bool]] = {}  # by their PINGs: whether the peer is done
        self._executions: dict[str, _Execution] = {}
        self._room = asyncio.Semaphore(RUNNING_MAX)
        self._serving: set[asyncio.Task[None]] = set()
        self._unread = 0  # bytes of answers and parts that wait for the peer
        self._is_pumping = False
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
        channel.on_writable(self._pump)
        self._outbox.ready = self._pump
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
        timeout: float | None = None,
    ) -> Quote:
        """Say what is wanted and return what the other agent says to it.

        Args:
            query: In natural language.
            task: Or by name.
            params: What belongs to the task, as JSON.
            context: Anything that helps, as JSON.
            timeout: Seconds; 60 if None. In a capability, never more than its own caller has left.

        Raises:
            CallTimeoutError: No answer in time; the other agent is told how much there is.
            RemoteError: The other agent's `on_intent` failed, or it is busy.
            PeerIdentityError: The answer was not signed by the other agent.
            PeerLostError: The connection went away.
            MalformedMessageError: It has no JSON form, or is too large for one message.
        """
        if query is None and task is None:
            raise TypeError("an intent needs a query or a task")
        if not isinstance(query, str | None) or not isinstance(task, str | None):
            raise TypeError("query and task are texts; what is structured goes into `params` or `context`")
        if not isinstance(params, dict | None):
            raise TypeError(f"params is a dict, not {type(params).__name__}")
        fields = {"query": query, "task": task, "params": params, "context": context}
        try:
            payload = IntentPayload(**{name: value for name, value in fields.items() if value is not None})
        except ValidationError as error:
            faulty = {str(fault["loc"][0]) for fault in error.errors()}
            raise MalformedMessageError(f"the intent has no JSON form: {', '.join(sorted(faulty))}") from None
        seconds = time_left(timeout, CALL_TIMEOUT_SECONDS)
        quote = await self._ask(Question(), lambda: self._calls.ask(payload, seconds), seconds)
        assert isinstance(quote, Quote)
        return quote

    async def execute(
        self,
        capability: str,
        /,
        *_positional: Never,
        timeout: float | None = None,
        on_progress: Callable[[Any], None] | None = None,
        on_receipt: Callable[[Receipt], None] | None = None,
        **args: Any,
    ) -> Any:
        """Execute a capability of the other agent and return its result: JSON, or bytes.

        Cancelling this task, and the timeout, cancel the execution there too. The parts of one that streams
        are collected over there, and come as a list, or joined if they are bytes; large ones want `stream`.

        Args:
            capability: Its name.
            timeout: Seconds; 60 if None. In a capability, never more than its own caller has left. The other
                agent is told.
            on_progress: Called with what the capability tells meanwhile (`Call.progress`), until it raises.
            on_receipt: Called with the signed request and the signed response, be that a result or an error.
                Whoever gives up, by a timeout or cancelled, has none.
            args: What it takes, by name: bytes, or anything pydantic can write as JSON. One may be an async
                iterable of bytes, which are sent as the other agent reads them.

        Raises:
            TypeError, ValueError: A positional argument, a timeout or a callback that is none.
            UnknownCapabilityError: The other agent has none of this name.
            InvalidArgumentsError: They do not fit, or cannot be sent.
            CapabilityError: It raised, or streams more than can be collected; the text tells what.
            CallTimeoutError: No result in time.
            CallCancelledError: The other agent cancelled it.
            CallBusyError: The other agent takes no more at present.
            PeerIdentityError: The answer was not signed by the other agent.
            PeerLostError: The connection went away; whether it was executed is not known.
        """
        if _positional:
            raise TypeError(f"arguments go by name: {capability!r} takes no positional ones")
        seconds = time_left(timeout, CALL_TIMEOUT_SECONDS)
        wants_progress = on_progress is not None
        return await self._ask(
            Question(on_progress, on_receipt),
            lambda: self._calls.execute(capability, args, seconds, is_stream=wants_progress),
            seconds,
            capability,
            args,
        )

    async def stream(
        self,
        capability: str,
        /,
        *_positional: Never,
        timeout: float | None = None,
        on_progress: Callable[[Any], None] | None = None,
        on_receipt: Callable[[Receipt], None] | None = None,
        **args: Any,
    ) -> AsyncGenerator[Any, None]:
        """Execute a capability of the other agent and yield its result in parts as they come: JSON or bytes.

        Whoever reads slowly slows the other agent down. Leaving the loop cancels the execution there; with
        `contextlib.aclosing` at once, else when the generator is collected. One that does not stream yields
        its result as a single part.

        Args:
            capability: Its name.
            timeout: Seconds until the last part must be there; an hour if None. In a capability, never more
                than its own caller has left.
            on_progress: As for `execute`.
            on_receipt: As for `execute`; the response has the digest of all parts.
            args: As for `execute`.

        Raises:
            As `execute`, also after some parts: then the result is not complete.
        """
        if _positional:
            raise TypeError(f"arguments go by name: {capability!r} takes no positional ones")
        seconds = time_left(timeout, STREAM_TIMEOUT_SECONDS)
        deadline = self._loop.time() + seconds
        question = Question(on_progress, on_receipt)
        id_ = self._begin(
            question, lambda: self._calls.execute(capability, args, seconds, is_stream=True), args
        )
        count = 0
        try:
            while (part := await question.next_part(deadline - self._loop.time())) is not None:
                self._calls.took(id_)
                count += 1
                yield part[0]
            answered: Answered = question.answer.result()
            if not answered.is_streamed and not count:
                yield answered.value
        except LateError:
            raise self._late(seconds, capability) from None
        finally:
            self._end_question(id_)

    async def ping(self, *, timeout: float = PEER_PONG_TIMEOUT_SECONDS) -> float:
        """Return the round trip time of a PING and its PONG in seconds.

        Raises:
            CallTimeoutError: No PONG in time.
            PeerLostError: The connection went away.
        """
        check_seconds(timeout)
        begin = self._loop.time()
        await self._ping(timeout)
        return self._loop.time() - begin

    async def close(self, reason: str = "it is done") -> None:
        """Say goodbye and close the connection for both sides; calls that run fail with PeerLostError."""
        if self._end is None:
            self._end = asyncio.ensure_future(self._close(reason))
        await asyncio.shield(self._end)

    async def _ask(
        self,
        question: Question,
        begin: Callable[[], str],
        timeout: float,
        capability: str = "",
        args: Mapping[str, Any] = _NO_ARGS,
    ) -> Any:
        deadline = self._loop.time() + timeout
        id_ = self._begin(question, begin, args)
        parts = Collection()
        try:
            while (part := await question.next_part(deadline - self._loop.time())) is not None:
                self._calls.took(id_)
                parts.add(part[0])
            answered: Answered = question.answer.result()
            return parts.join() if answered.is_streamed else answered.value
        except LateError:
            raise self._late(timeout, capability) from None
        finally:
            self._end_question(id_)

    def _begin(self, question: Question, begin: Callable[[], str], args: Mapping[str, Any]) -> str:
        self._check_open()
        id_ = begin()
        self._questions[id_] = question
        for value in args.values():
            if isinstance(value, AsyncIterable):
                question.feeding = asyncio.ensure_future(self._feed(id_, question, value))
        return id_

    async def _feed(self, id_: str, question: Question, source: AsyncIterable[bytes]) -> None:
        """Send the stream among the arguments; the next bytes are asked for when the last have left."""
        try:
            async for chunk in source:
                if not isinstance(chunk, bytes | bytearray | memoryview):
                    raise TypeError(f"a stream among the arguments has bytes, not {type(chunk).__name__}")
                # The answer may be there, or the connection gone, before whoever waits for it has run: then
                # nothing is in the way of a source that never waits, and nobody else would ever run again.
                if question.answer.done() or not self._calls.feed(id_, bytes(chunk)):
                    return
                await self._sent(id_)
            self._calls.end_feed(id_)
        except Exception as error:  # whatever it is, it is the caller's own
            question.fail(error)
        finally:
            if isinstance(source, AsyncGenerator):
                await source.aclose()

    def _late(self, timeout: float, capability: str) -> CallTimeoutError:
        return CallTimeoutError(f"no answer from {short_did(self.did)} in {timeout:g} s", capability)

    def _end_question(self, id_: str) -> None:
        self._questions.pop(id_).close()
        cancel = self._calls.abandon(id_)
        if cancel is not None and self._channel.is_open:
            self._channel.send(cancel)

    async def _ping(self, timeout: float, *, is_done: bool = False) -> bool:
        """Send a PING and return whether the peer is done, too; `is_done` asks for that."""
        self._check_open()
        id_, text = self._calls.ping(is_done=is_done)
        pong: asyncio.Future[bool] = self._loop.create_future()
        self._pongs[id_] = pong
        timer = self._loop.call_later(timeout, self._late_pong, pong, timeout)
        try:
            self._channel.send(text)
            return await pong
        finally:
            timer.cancel()
            del self._pongs[id_]
            self._calls.abandon(id_)
            forget(pong)

    def _late_pong(self, pong: asyncio.Future[bool], timeout: float) -> None:
        _fail(pong, self._late(timeout, ""))

    def _check_open(self) -> None:
        if not self._channel.is_open:
            raise PeerLostError(f"{short_did(self.did)} is not connected: {self._reason}", self.did)

    def _pump(self) -> None:
        """Give the channel what it has room for."""
        if self._is_pumping:  # what is sent may bring more
            return
        self._is_pumping = True
        try:
            while self._channel.is_open and not self._channel.is_congested:
                message = self._outbox.take()
                if message is None:
                    return
                self._channel.send(message)
        finally:
            self._is_pumping = False

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
            is_done = await self._ping(PEER_PONG_TIMEOUT_SECONDS, is_done=True)
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
        """Wait until nothing runs and nothing is asked, on either side. PINGs do not count."""
        while running := [
            each
            for each in (*self._serving, *(question.answer for question in self._questions.values()))
            if not each.done()
        ]:
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
        if len(self._executions) >= ACCEPTED_MAX:
            return f"{ACCEPTED_MAX} calls of yours run or wait, or their answers wait to be read"
        if self._calls.accepted_bytes > ACCEPTED_MAX_BYTES:
            return f"{self._calls.accepted_bytes} bytes of calls of yours run or wait"
        return self._too_much_unread

    @property
    def _too_much_unread(self) -> str:
        if self._unread <= UNREAD_MAX_BYTES:
            return ""
        return f"{self._unread:,} bytes of answers are on their way to you, or wait to be read"

    def _handle(self, event: Event) -> None:  # noqa: PLR0912  # one for each event
        match event:
            case PongArrived(id_, is_done) if id_ in self._pongs:
                if not self._pongs[id_].done():  # whoever waited may have been cancelled just now
                    self._pongs[id_].set_result(is_done)
            case Reply(text):
                self._reply(text)
            case Answered(id_, _, _, receipt) if id_ in self._questions:
                self._questions[id_].succeed(event, receipt)
            case Failed(id_, error, receipt) if id_ in self._questions:
                self._questions[id_].fail(error, receipt)
            case Failed(id_, error) if id_ in self._pongs:
                _fail(self._pongs[id_], error)
            case PartArrived(id_, value) if id_ in self._questions:
                self._questions[id_].add(value)
            case ProgressArrived(id_, value) if id_ in self._questions:
                self._questions[id_].progress(value)
            case IntentArrived():
                self._keep_open()
                self._serve_intent(event)
            case ExecutionArrived():
                self._keep_open()
                self._serve_execution(event)
            case ArgumentsArrived(id_, args, fault) if id_ in self._executions:
                self._take_args(self._executions[id_], args, fault)
            case InputArrived(id_, chunk) if id_ in self._executions:
                self._input_of(id_).add(chunk)
            case InputEnded(id_, fault) if id_ in self._executions:
                self._input_of(id_).end(fault)
            case CancelArrived(id_) if id_ in self._executions:
                self._executions[id_].end(CallCancelledError.name)
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
        if refused.cancelled in self._executions:
            self._executions[refused.cancelled].end(CallCancelledError.name)

    def _reply(self, text: str) -> None:
        if not self._channel.is_open:
            return
        self._channel.send(text)
        # What waits its turn does not count here: so much can only be replies.
        if self._channel.buffered > UNSENT_MAX_BYTES:
            self._lost("it sends without reading the replies")

    # --- what runs for the other side -----------------------------------------------------------

    def _serve_intent(self, asked: IntentArrived) -> None:
        execution = _Execution(self._loop.time() + asked.timeout)
        id_ = asked.id

        async def run() -> Quote:
            async with self._room:
                self._enter(id_, execution)
                return await self._on_intent(asked.intent)

        def answer(quote: Quote, _: float) -> None:
            self._calls.quote(id_, quote)

        self._serve(id_, execution, run(), asked.timeout, answer)

    def _serve_execution(self, asked: ExecutionArrived) -> None:
        execution = _Execution(self._loop.time() + asked.timeout)
        if asked.args is not None:
            execution.args.set_result(asked.args)
        id_, stream = asked.id, asked.input
        if stream is not None:
            execution.input = Input(
                partial(self._calls.took_input, id_), partial(self._calls.has_read_input, id_)
            )

        async def run() -> Any:
            args: dict[str, Any] = await execution.args
            if stream is not None:
                args = {**args, stream: execution.input}
            async with self._room:
                self._enter(id_, execution)
                work = self._on_execute(asked.capability, args)
                if not isinstance(work, AsyncGenerator):
                    return await work
                async with aclosing(work):
                    return await (self._stream(id_, work) if asked.is_stream else self._collect(work))

        def answer(result: Any, seconds: float) -> None:
            if result is _STREAMED:
                self._calls.finish(id_, seconds)
            else:
                self._calls.succeed(id_, result, seconds)

        self._serve(id_, execution, run(), asked.timeout, answer)

    def _input_of(self, id_: str) -> Input:
        stream = self._executions[id_].input
        assert stream is not None  # Calls lets only those through that were announced
        return stream

    def _take_args(self, execution: _Execution, args: dict[str, Value], fault: str) -> None:
        if execution.args.done():
            return
        if fault:
            execution.args.set_exception(InvalidArgumentsError(fault))
        else:
            execution.args.set_result(args)

    def _enter(self, id_: str, execution: _Execution) -> None:
        self._calls.start(id_)

        def progress(value: Any) -> None:
            self._calls.progress(id_, value)

        # The task has the call in its context, and keeps the result: it would never let go of itself.
        task = weakref.ref(execution.task)

        def is_over() -> bool:
            running = task()
            return running is None or running.done()

        Call(id_, self.did, execution.deadline, progress, is_over).enter()

    async def _stream(self, id_: str, parts: AsyncGenerator[Value, None]) -> object:
        """Send one part after the other; the next is made when the last has gone to the channel."""
        async for part in parts:
            if self._calls.part(id_, part):
                await self._delivered(id_)
        return _STREAMED

    async def _collect(self, parts: AsyncGenerator[Value, None]) -> Value:
        """Put the parts together for a peer that wants no stream; they count as what waits for it to read."""
        collection, counted = Collection(), 0
        try:
            async for part in parts:
                collection.add(part)
                self._unread += collection.size - counted
                counted = collection.size
                if self._too_much_unread:
                    raise CallBusyError(f"busy: {self._too_much_unread}; try again, or ask for a stream")
            return collection.join()
        finally:
            self._unread -= counted

    async def _delivered(self, id_: str) -> None:
        """Wait as `_sent` does, for what is to be read by the peer: so much of it is enough."""
        size = self._outbox.size(id_)
        self._unread += size
        try:
            await self._sent(id_)
        finally:
            self._unread -= size

    async def _sent(self, id_: str) -> None:
        """Wait until all that waits of a call was handed to the channel, or is dropped."""
        sent = asyncio.Event()
        self._outbox.when_sent(id_, sent.set)
        await sent.wait()

    def _serve(
        self,
        id_: str,
        execution: _Execution,
        run: Coroutine[Any, Any, Any],
        timeout: float,
        answer: Callable[[Any, float], None],
    ) -> None:
        self._used_at = self._loop.time()
        self._executions[id_] = execution
        execution.task = asyncio.ensure_future(run)
        task = asyncio.ensure_future(self._finish(id_, execution, timeout, answer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _finish(
        self, id_: str, execution: _Execution, timeout: float, answer: Callable[[Any, float], None]
    ) -> None:
        """See an execution to its end, whatever that is, and send its one answer."""
        begin = self._loop.time()
        task, cancelled = execution.task, execution.cancelled
        if not task.done():  # most are, before this begins
            await asyncio.wait({task, cancelled}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            execution.end(CallTimeoutError.name)  # if nobody cancelled it before
            await asyncio.wait({task}, timeout=GRACE_SECONDS)
        seconds = self._loop.time() - begin
        if cancelled.done() and cancelled.result() == CallTimeoutError.name:
            self._calls.fail(id_, CallTimeoutError.name, f"no result in {timeout:g} s", seconds)
        elif cancelled.done() or task.cancelled():
            self._calls.fail(id_, CallCancelledError.name, "the execution was cancelled", seconds)
        elif (error := task.exception()) is None:
            answer(task.result(), seconds)
        else:
            name = error.name if isinstance(error, CallError) else CapabilityError.name
            self._calls.fail(id_, name, str(error), seconds)
        execution.drop_args()
        await self._delivered(id_)
        if not task.done():
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # taken note of, also where the answer did not wait for it
        if execution.input is not None:
            execution.input.end("the call is over")
        del self._executions[id_]
        # Its exception has the frames that have the execution: only the garbage collector would end that.
        del execution.task

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
            silence = PEER_PING_INTERVAL_SECONDS + PEER_PONG_TIMEOUT_SECONDS
            self._lost(f"it was silent for {silence:g} s: it is gone, or its event loop is blocked")
            return
        if verdict is Verdict.STALLED:
            self._lost(f"it has read nothing for {PEER_STALL_SECONDS:g} s")
            return
        now = self._loop.time()
        if self._calls.open or self._serving:
            self._used_at = now
        elif now - self._used_at >= self._idle_timeout:
            self._awaited = 0
            self._pinging = self._leave()  # now: others may ping it so often that it is never silent
            self._used_at = now  # to ask again if the other side needs it now
        if verdict is Verdict.PING:
            self._pinging = self._leave() if self._is_done else asyncio.ensure_future(self._probe())
        self._timer = self._loop.call_at(self._keepalive.due, self._check)

    async def _probe(self) -> None:
        with suppress(CallError, PeerError):  # `_check` sees to a peer that does not answer
            await self.ping()

    def _lost(self, reason: str) -> None:
        if self._state is PeerState.CLOSED:
            return
        self._set_state(PeerState.CLOSED)
        self._reason = reason
        self._path = self.path
        self._timer.cancel()
        for question in self._questions.values():
            question.fail(self._gone(reason))
        for pong in self._pongs.values():
            _fail(pong, self._gone(reason))
        for execution in self._executions.values():
            execution.end(CallCancelledError.name)
        self._outbox.ready = self._outbox.clear
        self._outbox.clear()
        if self._end is None:
            self._end = asyncio.ensure_future(self._close(reason))
        self._on_closed(self, reason)

    def _gone(self, reason: str) -> PeerLostError:
        return PeerLostError(f"{short_did(self.did)} went away: {reason}", self.did)

    async def _close(self, reason: str) -> None:
        try:
            if self._state is not PeerState.CLOSED and self._channel.is_open:
                self._set_state(PeerState.CLOSING)
                self._reason = f"this side closed the connection: {reason}"
                self._is_expiring = False
                try:
                    self._channel.send(self._calls.leave(reason))
                except (ConnectionError, ValueError) as error:
                    _log.debug("%s hears no goodbye: %s", self.did, error)
                self._channel.close()
                await asyncio.wait({self._channel.closed}, timeout=GOODBYE_SECONDS)
        finally:
            self._lost(self._reason)
            if self._serving:
                await asyncio.wait(self._serving, timeout=GOODBYE_SECONDS)
            await self._connection.close()


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
