"""From a DID to an open connection: OFFER, ANSWER, ICE_CANDIDATE and ERROR by way of an untrusted gateway.

There is at most one attempt for each other agent. It belongs to whoever waits for it, whichever side's offer
it comes of. When both sides offer at once (glare), the offer of the lower DID wins: its side ignores the
other's, and the other side drops its own and answers. So both see one connection.

    connect() ──▶ offering ──ANSWER──▶ opening ──▶ opened
                     │ OFFER of a lower DID   ▲
                     ▼                        │
    OFFER ─────▶ answering ──────────────────┘
                     └─▶ offering, where the other side has given up its offer and somebody here waits

Whether a stranger's offer is answered at all, the agent decides (`admit`), unless it wants that connection
itself. An offer may have been withdrawn, or its agent started anew, when the ANSWER comes: that is told by
ERROR `declined`, so that the one who answers does not wait for nothing.

A message that is lost with a gateway is offered again: a second OFFER replaces the first at the other side.
An established connection is replaced only by one that has opened, so an old OFFER that somebody delayed
breaks nothing.

What is received here was verified before: the signature, that it is for this agent, that it is new.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, Generic, TypeVar

from aiconexus.client.deadline import within
from aiconexus.client.socket import short_did
from aiconexus.core.candidates import parse_candidate
from aiconexus.core.channel import Channel
from aiconexus.core.peer_connection import CANDIDATES_MAX, PeerConnection
from aiconexus.protocol.errors import (
    AIConexusError,
    ErrorCode,
    GatewayUnreachableError,
    MalformedMessageError,
    MessageError,
    PeerConnectError,
    PeerError,
    PeerIdentityError,
    ReplayedMessageError,
    remote_error,
)
from aiconexus.protocol.limits import CONNECT_TIMEOUT_SECONDS
from aiconexus.protocol.models import (
    AnswerPayload,
    ErrorPayload,
    IceCandidatePayload,
    Message,
    OfferPayload,
    Payload,
)
from aiconexus.protocol.serialization import loads

ATTEMPTS_MAX: Final = 128  # at the same time; each costs 120 KB, a descriptor and 30 ms of one core
EARLY_SENDERS_MAX: Final = 64  # agents whose candidates wait for their OFFER
BEGINS_MAX: Final = 8  # of one attempt; a stranger may offer anew for ever, at 30 ms of one core each
SENDS_MAX: Final = 5  # of one OFFER or ANSWER, where messages get lost
FAIR_SECONDS: Final = 5.0  # for a stranger to connect; then it gives way to others if there is no room
RETRY_SECONDS: Final = 0.2  # before a refused message is sent again, where the refusal names no time
ASK_SECONDS: Final = 2.0  # before a connect() gives up, for the gateway to say what it knows
CONTEST_SECONDS: Final = 6.0  # for the loser of a glare to answer; it may gather for 5 (aiortc)

# Causes that pass by themselves in a moment.
_PASSING: Final = frozenset({"rate_limited", "overloaded", "unreachable", "unconfirmed"})

# Why an OFFER was not answered, by what the gateway says of its receiver.
_UNANSWERED: Final = {
    "": "it has not answered the OFFER; it may be busy, or an ANSWER was lost: try again",
    "online": "it is online, but has not answered the OFFER; it may be busy: try again",
    "away": "it is away: its connection to the gateway is interrupted; try again, it may return",
    "offline": "it has not answered the OFFER, and is not online any more",
    "unknown": "it has not answered the OFFER, and the gateway does not answer either",
}

_log: Final = logging.getLogger("aiconexus.core")

Opened = TypeVar("Opened")


class _Attempt(Generic[Opened]):
    """One way to a connection with one agent.

    Attributes:
        result: What `Signaling.connect` waits for.
        pc: The connection in the making.
        is_offering: Whether it is this side's offer that counts.
        is_answered: Whether the other side has answered it.
        is_contested: Whether the other side has offered too, and lost.
        waiting: How many `connect()` wait for it.
        until: How long the last of them waits.
        signal: The payload and `correlation_id` that the other side must get, once it is known.
        sent_id: Id of the last message that carried it.
        status: What the gateway says of the other agent, see `_UNANSWERED`.
    """

    def __init__(self, did: str) -> None:
        self.did: Final = did
        self.result: Final[asyncio.Future[Opened]] = asyncio.get_running_loop().create_future()
        self.result.add_done_callback(self._over)
        self.waiting = 0
        self.sends = 0
        self.begins = 0
        self.until = 0.0
        self.task: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def begin(self, pc: PeerConnection, *, is_offering: bool) -> None:
        """Forget what came before: this connection counts now."""
        self._forget_timers()
        self.pc = pc
        self.begun_at = asyncio.get_running_loop().time()
        self.sends = 0
        self.begins += 1
        self.is_offering = is_offering
        self.is_answered = False
        self.is_contested = False
        self.is_retried = False
        self.signal: tuple[Payload, str | None] | None = None
        self.sent_id: str | None = None
        self.is_sending = False
        self.status = ""
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` after a time, unless it begins anew or is over by then."""
        self._timers.append(asyncio.get_running_loop().call_later(seconds, callback))

    def _forget_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def _over(self, result: asyncio.Future[Opened]) -> None:
        self._forget_timers()  # they would keep everything alive until they are due
        if not result.cancelled():
            result.exception()  # nobody may be waiting for it: that is no fault

    @property
    def is_sent(self) -> bool:
        """Whether the other side may have its signal."""
        return self.sent_id is not None and not self.is_sending

    def describe(self, lost_gateway: str = "") -> str:
        """Tell in words how far it came and what to do; `lost_gateway`: URL of one that is not there."""
        if not self.is_offering:
            stage = "its offer was answered, but the connection did not open"
        elif not self.is_answered and lost_gateway:
            what = "it may or may not have the OFFER" if self.is_sent else "the OFFER could not be sent"
            stage = f"the gateway {lost_gateway} is away, {what}; this agent returns to it: try again"
        elif not self.is_sent:
            stage = "the OFFER could not be sent yet: give it more time"
        elif not self.is_answered:
            stage = _UNANSWERED[self.status]
        else:
            stage = "it has answered, but the connection did not open"
        return f"{stage} ({self.pc.describe()})"


class Signaling(Generic[Opened]):
    """The connection attempts of one agent.

    Args:
        did: Of this agent.
        gateway: URL, for error texts.
        gateway_did: Returns the DID that the gateway has proven.
        has_gateway: Tells whether this agent is registered there now.
        status_of: Asks the gateway for so many seconds whether an agent is "online", "away" or "offline".
        send: Signs and sends a message by the gateway; may wait for a gateway that is away.
        new_connection: Makes a PeerConnection.
        admit: Says whether a stranger may connect: None, or the cause of its refusal.
        opened: Is given every connection that has opened; what it returns is what `connect` returns.
    """

    def __init__(
        self,
        did: str,
        gateway: str,
        gateway_did: Callable[[], str | None],
        has_gateway: Callable[[], bool],
        status_of: Callable[[str, float], Awaitable[str]],
        send: Callable[[Message], Awaitable[object]],
        new_connection: Callable[[], PeerConnection],
        admit: Callable[[str], Awaitable[str | None]],
        opened: Callable[[str, PeerConnection, Channel], Opened],
    ) -> None:
        self._did = did
        self._gateway = gateway
        self._gateway_did = gateway_did
        self._has_gateway = has_gateway
        self._status_of = status_of
        self._send = send
        self._new_connection = new_connection
        self._admit = admit
        self._opened = opened
        self._asking: dict[str, asyncio.Task[None]] = {}  # strangers that may be admitted
        self._answered: deque[str] = deque(maxlen=ATTEMPTS_MAX)  # ids of the last OFFERs that were
        self._attempts: dict[str, _Attempt[Opened]] = {}
        # With the time of the first, for an OFFER that does not come after all.
        self._early: OrderedDict[str, tuple[float, list[IceCandidatePayload]]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()  # connections; not to be cancelled

    @property
    def strangers(self) -> int:
        """How many others are about to connect that this side does not wait for."""
        return len(self._asking) + sum(not attempt.waiting for attempt in self._attempts.values())

    async def connect(self, did: str, *, timeout: float) -> Opened:
        """Open a connection with `did`, or wait for the one that is being opened.

        Raises:
            UnknownAgentError: It is not online.
            PeerRefusedError: It takes no connection.
            PeerIdentityError: Somebody else answered for it.
            PeerConnectError: No connection in `timeout` seconds; it says what was tried.
            GatewayError: The gateway cannot be asked.
        """
        attempt = self._attempts.get(did)
        if attempt is None:
            attempt = _Attempt(did)
            self._offer(attempt)
        attempt.waiting += 1
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        attempt.until = max(attempt.until, until)
        try:
            await asyncio.wait({attempt.result}, timeout=timeout - min(ASK_SECONDS, timeout / 2))
            if not attempt.result.done():
                self._ask_gateway(attempt)
                await asyncio.wait({attempt.result}, timeout=max(0.0, until - loop.time()))
            if attempt.result.done():
                return attempt.result.result()
            state = attempt.describe("" if self._has_gateway() else self._gateway)
            raise PeerConnectError(f"no connection to {short_did(did)} in {timeout:.3g} s: {state}", did)
        finally:
            attempt.waiting -= 1
            # The other side's wish to connect is not ours to give up.
            if not attempt.waiting and attempt.is_offering and not attempt.result.done():
                self._end(attempt, PeerConnectError("nobody waits for it any more", did))

    async def close(self) -> None:
        """Give up all attempts."""
        for attempt in list(self._attempts.values()):
            self._end(attempt, PeerConnectError("this agent was closed", attempt.did))
        for task in self._tasks:
            task.cancel()
        while tasks := self._tasks | self._closing:
            await asyncio.wait(tasks)

    # --- what arrives ---------------------------------------------------------------------------

    def receive(self, message: Message) -> None:
        """Take a verified OFFER, ANSWER, ICE_CANDIDATE or ERROR."""
        match message.payload:
            case OfferPayload():
                self._receive_offer(message)
            case AnswerPayload() as answer:
                self._receive_answer(message, answer)
            case IceCandidatePayload() as candidate:
                self._receive_candidate(message, candidate)
            case ErrorPayload() as error:
                self._receive_error(message, error)

    def rejected(self, error: MessageError, data: str | bytes) -> None:
        """Take note of a message that did not verify: it may be the ANSWER that somebody waits for."""
        if isinstance(error, ReplayedMessageError):
            return
        try:
            attempt = self._attempt_of(loads(data).get("correlation_id"))
        except MalformedMessageError:
            return
        if attempt is None or not attempt.is_offering or attempt.is_answered:
            return
        if error.is_forged:
            text = f"what came in answer to the OFFER is not from {short_did(attempt.did)}: {error}"
            self._end(attempt, PeerIdentityError(text, attempt.did))
        else:
            text = f"the answer of {short_did(attempt.did)} to the OFFER cannot be used: {error}"
            self._end(attempt, PeerConnectError(text, attempt.did))

    def gateway_returned(self) -> None:
        """Signal again what may have got lost with the connection to the gateway."""
        for attempt in list(self._attempts.values()):
            self._signal_again(attempt)

    def _receive_offer(self, offer: Message, *, is_admitted: bool = False) -> None:
        did = offer.from_
        attempt = self._attempts.get(did)
        if not is_admitted and (attempt is None or not attempt.waiting):
            self._ask(offer)
            return
        if attempt is None:
            attempt = _Attempt(did)
        elif attempt.is_offering and not attempt.is_answered and self._did < did:
            # Glare, and ours wins. Should the other side never have got ours (it was started anew since),
            # it waits for nothing: offer again.
            if not attempt.is_contested:
                attempt.is_contested = True
                attempt.later(CONTEST_SECONDS, partial(self._signal_again, attempt))
            return
        elif attempt.begins >= BEGINS_MAX:
            self._reply(offer, ErrorPayload.for_cause("busy"))
            return
        try:
            self._answer(attempt, offer)
        except PeerConnectError as error:
            _log.warning("an OFFER of %s cannot be answered: %s", did, error)
            self._reply(offer, ErrorPayload.for_cause("internal", "this agent can make no connection"))
            if did in self._attempts:
                self._end(attempt, error)

    def _ask(self, offer: Message) -> None:
        """Ask the agent whether it admits a stranger; the last OFFER of each counts."""
        did = offer.from_
        asked = self._asking.pop(did, None)
        if asked is not None:
            asked.cancel()
        elif not self._has_room():
            self._reply(offer, ErrorPayload.for_cause("busy"))
            return

        async def ask() -> None:
            refusal: str | None = "declined"
            try:
                refusal = await within(self._admit(did), CONNECT_TIMEOUT_SECONDS)
            except Exception:
                _log.exception("whether %s may connect cannot be told", did)
            finally:
                if self._asking.get(did) is asyncio.current_task():
                    del self._asking[did]
            attempt = self._attempts.get(did)
            if refusal is None or (attempt is not None and attempt.waiting):
                self._receive_offer(offer, is_admitted=True)
            else:
                self._reply(offer, ErrorPayload.for_cause(refusal))

        self._asking[did] = self._spawn(ask())

    def _has_room(self) -> bool:
        """Tell whether one more may try; for it a stranger that has had its time is given up."""
        if len(self._attempts) + len(self._asking) < ATTEMPTS_MAX:
            return True
        late = asyncio.get_running_loop().time() - FAIR_SECONDS
        for attempt in self._attempts.values():
            if not attempt.waiting and attempt.begun_at <= late:
                self._end(attempt, PeerConnectError("others wait for its place", attempt.did))
                return True
        return False

    def _receive_answer(self, message: Message, answer: AnswerPayload) -> None:
        attempt = self._attempt_of(message.correlation_id)
        if attempt is None:
            self._decline_answer(message)
        elif not attempt.is_offering or attempt.is_answered:
            _log.debug("an ANSWER of %s is not waited for", message.from_)
        elif message.from_ != attempt.did:
            text = f"{message.from_} answered the OFFER to {attempt.did}"
            self._end(attempt, PeerIdentityError(text, attempt.did))
        else:
            attempt.is_answered = True
            assert attempt.sent_id is not None
            self._answered.append(attempt.sent_id)
            attempt.answer.set_result(answer.sdp)

    def _decline_answer(self, message: Message) -> None:
        """Tell who answers an OFFER that was given up: nothing will come of it."""
        attempt = self._attempts.get(message.from_)
        is_known = (message.correlation_id or "").lower() in self._answered
        # A copy of an ANSWER that was used; or it crosses our next OFFER, which replaces it.
        if is_known or (attempt is not None and attempt.is_offering):
            _log.debug("an ANSWER of %s is not waited for", message.from_)
        else:
            self._reply(
                message, ErrorPayload.for_cause("declined", "the OFFER that this answers was given up")
            )

    def _receive_candidate(self, message: Message, candidate: IceCandidatePayload) -> None:
        attempt = self._attempts.get(message.from_)
        try:
            if candidate.candidate:
                parse_candidate(candidate.candidate)
            if attempt is not None:
                attempt.pc.add_ice_candidate(candidate)
                if not attempt.is_offering or attempt.is_answered:
                    return
        except MalformedMessageError as error:
            self._reply(message, ErrorPayload.for_error(error))
            return
        # Its OFFER may be on the way, also while it has ours: should its own win, they belong to that.
        now = asyncio.get_running_loop().time()
        while self._early and next(iter(self._early.values()))[0] < now - CONNECT_TIMEOUT_SECONDS:
            self._early.popitem(last=False)
        _, early = self._early.setdefault(message.from_, (now, []))
        if len(early) < CANDIDATES_MAX:
            early.append(candidate)
        if len(self._early) > EARLY_SENDERS_MAX:
            self._early.popitem(last=False)

    def _receive_error(self, message: Message, payload: ErrorPayload) -> None:
        attempt = self._attempt_of(message.correlation_id)
        if attempt is None:
            _log.debug("an ERROR that nobody waits for: %s", payload.message)
            return
        if message.from_ not in (attempt.did, self._gateway_did()):
            _log.debug("an ERROR of %s is not its business: %s", message.from_, payload.message)
            return
        name = payload.details.name if payload.details is not None else None
        if name in _PASSING and self._retry(attempt, payload):
            return
        # Contested: the other side is there, it has just offered.
        unknown = payload.code is ErrorCode.UNKNOWN_AGENT
        if attempt.sends < SENDS_MAX and unknown and attempt.is_contested:
            self._signal_again(attempt)
            return
        error = self._error_of(attempt.did, payload, name)
        if name == "declined" and not attempt.is_offering:
            self._answered_in_vain(attempt, error)
        else:
            self._end(attempt, error)

    def _retry(self, attempt: _Attempt[Opened], payload: ErrorPayload) -> bool:
        """Send it once more after a moment; tell whether there is time for it."""
        asked = payload.details.retry_after_ms if payload.details is not None else None
        seconds = RETRY_SECONDS if asked is None else asked / 1e3
        seconds += random.uniform(0, RETRY_SECONDS)  # noqa: S311 -- so that not all come at once
        now = asyncio.get_running_loop().time()
        until = attempt.until if attempt.waiting else attempt.begun_at + CONNECT_TIMEOUT_SECONDS
        if attempt.is_retried or now + seconds >= until:
            return False
        attempt.is_retried = True
        attempt.later(seconds, partial(self._signal_again, attempt))
        return True

    def _error_of(self, did: str, payload: ErrorPayload, name: str | None) -> AIConexusError:
        details = payload.details.model_dump(exclude_none=True) if payload.details is not None else None
        if payload.code is ErrorCode.INVALID_SIGNATURE and name != "stale_timestamp":
            text = f"{short_did(did)} refused the OFFER, it was altered on its way: {payload.message}"
            return PeerIdentityError(text, did)
        if payload.code is ErrorCode.UNKNOWN_AGENT:
            what = "is not online" if name == "not_online" else f"cannot be reached: {payload.message}"
            return remote_error(payload.code, f"{short_did(did)} {what} (asked {self._gateway})", details)
        if payload.code is ErrorCode.CONNECTION_REFUSED:
            return remote_error(payload.code, f"{short_did(did)}: {payload.message}", details)
        what = "try again" if payload.details is not None and payload.details.temporary else "it was refused"
        text = f"the OFFER to {short_did(did)} came back: {payload.message}; {what}"
        return PeerConnectError(text, did)

    # --- attempts -------------------------------------------------------------------------------

    def _offer(self, attempt: _Attempt[Opened]) -> None:
        self._begin(attempt, is_offering=True)

        async def negotiate() -> None:
            sdp = await attempt.pc.create_offer()
            attempt.signal = OfferPayload(sdp=sdp), None
            try:
                await self._signal(attempt)
            except MalformedMessageError as error:
                text = f"the OFFER cannot be sent: {error}; choose fewer host_addresses"
                raise PeerConnectError(text) from error
            answer = await attempt.answer
            try:
                await attempt.pc.accept_answer(answer)
            except MalformedMessageError as error:
                raise PeerConnectError(f"its ANSWER cannot be used: {error}") from error

        attempt.task = self._spawn(self._open(attempt, negotiate))

    def _answer(self, attempt: _Attempt[Opened], offer: Message) -> None:
        self._begin(attempt, is_offering=False)
        payload = offer.payload
        assert isinstance(payload, OfferPayload)
        pc = attempt.pc

        async def negotiate() -> None:
            try:
                sdp = await pc.create_answer(payload.sdp)
            except MalformedMessageError as error:
                self._reply(offer, ErrorPayload.for_error(error))
                raise PeerConnectError(f"its OFFER cannot be used: {error}") from error
            except PeerConnectError as error:
                _log.warning("an OFFER of %s cannot be answered: %s", attempt.did, error)
                text = "no connection can be made from there: it has no TURN server or address to use"
                self._reply(offer, ErrorPayload.for_cause("declined", text))
                raise
            attempt.signal = AnswerPayload(sdp=sdp), offer.id
            await self._signal(attempt)

        def expire() -> None:
            self._answered_in_vain(attempt, PeerConnectError(attempt.describe(), attempt.did))

        attempt.later(CONNECT_TIMEOUT_SECONDS, expire)
        attempt.task = self._spawn(self._open(attempt, negotiate))

    def _answered_in_vain(self, attempt: _Attempt[Opened], error: AIConexusError) -> None:
        """Offer in place of the other side, if somebody here still waits."""
        if not attempt.waiting or attempt.begins >= BEGINS_MAX:
            self._end(attempt, error)
            return
        _log.debug("%s has given up its offer: %s", attempt.did, error)
        try:
            self._offer(attempt)
        except PeerConnectError as fault:
            self._end(attempt, fault)

    def _begin(self, attempt: _Attempt[Opened], *, is_offering: bool) -> None:
        try:
            pc = self._new_connection()
        except Exception as error:  # ICE servers come from the user, or from a gateway nobody trusts
            text = f"no connection can be made: {type(error).__name__}: {error}; check the ice_servers"
            raise PeerConnectError(text, attempt.did) from error
        if attempt.task is not None:
            if attempt.task is not asyncio.current_task():
                attempt.task.cancel()
            self._spawn(attempt.pc.close(), self._closing)
        attempt.begin(pc, is_offering=is_offering)
        self._attempts[attempt.did] = attempt
        if is_offering:
            return  # what came early belongs to an OFFER of the other side
        since, early = self._early.pop(attempt.did, (0.0, []))
        if since >= asyncio.get_running_loop().time() - CONNECT_TIMEOUT_SECONDS:
            for candidate in early:
                attempt.pc.add_ice_candidate(candidate)

    async def _open(self, attempt: _Attempt[Opened], negotiate: Callable[[], Awaitable[None]]) -> None:
        try:
            await negotiate()
            channel = await asyncio.shield(attempt.pc.opened)
        except PeerError as error:
            error.did = attempt.did
            error.args = (f"{short_did(attempt.did)}: {error}",)
            if attempt.is_offering or isinstance(error, PeerIdentityError):
                self._end(attempt, error)
            else:
                self._answered_in_vain(attempt, error)
        except AIConexusError as error:
            self._end(attempt, error)
        except Exception as error:
            _log.exception("the connection with %s failed", attempt.did)
            text = f"{short_did(attempt.did)}: {type(error).__name__}: {error}"
            self._end(attempt, PeerConnectError(text, attempt.did))
        else:
            del self._attempts[attempt.did]
            attempt.result.set_result(self._opened(attempt.did, attempt.pc, channel))

    def _end(self, attempt: _Attempt[Opened], error: AIConexusError) -> None:
        if attempt.result.done():
            return
        _log.debug("no connection with %s: %s", attempt.did, error)
        del self._attempts[attempt.did]
        attempt.result.set_exception(error)
        if attempt.task is not None and attempt.task is not asyncio.current_task():
            attempt.task.cancel()
        self._spawn(attempt.pc.close(), self._closing)

    def _ask_gateway(self, attempt: _Attempt[Opened]) -> None:
        """Find out what to tell of an OFFER that is not answered."""
        if not attempt.is_offering or not attempt.is_sent or attempt.is_answered:
            return
        attempt.status = "unknown"
        begins = attempt.begins

        async def ask() -> None:
            status = ""
            try:
                status = await self._status_of(attempt.did, ASK_SECONDS)
            except GatewayUnreachableError:
                status = "unknown"
            except AIConexusError as error:
                _log.debug("the gateway does not say where %s is: %s", attempt.did, error)
            if attempt.begins == begins:
                attempt.status = status

        self._spawn(ask())

    def _attempt_of(self, message_id: object) -> _Attempt[Opened] | None:
        """Return the attempt whose last OFFER or ANSWER has this id."""
        if not isinstance(message_id, str):
            return None
        found = (a for a in self._attempts.values() if a.sent_id == message_id.lower())
        return next(found, None)

    # --- messages -------------------------------------------------------------------------------

    async def _signal(self, attempt: _Attempt[Opened]) -> None:
        assert attempt.signal is not None
        payload, correlation_id = attempt.signal
        message = Message.create(self._did, attempt.did, payload, correlation_id=correlation_id)
        attempt.sent_id = message.id
        attempt.sends += 1
        attempt.is_sending = True
        try:
            await self._send(message)
        finally:
            attempt.is_sending = False

    def _signal_again(self, attempt: _Attempt[Opened]) -> None:
        if attempt.result.done() or attempt.is_answered or attempt.is_sending or attempt.signal is None:
            return

        async def signal() -> None:
            try:
                await self._signal(attempt)
            except AIConexusError as error:
                self._end(attempt, error)

        self._spawn(signal())

    def _reply(self, message: Message, payload: ErrorPayload) -> None:
        async def reply() -> None:
            try:
                await self._send(message.reply(payload))
            except AIConexusError as error:
                _log.debug("%s was not told that it is refused: %s", message.from_, error)

        self._spawn(reply())

    def _spawn(
        self, coroutine: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]] | None = None
    ) -> asyncio.Task[None]:
        tasks = self._tasks if tasks is None else tasks
        task = asyncio.ensure_future(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task
