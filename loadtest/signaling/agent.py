"""One agent: its key, its connection, the greenlet that reads."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event
from gevent.lock import BoundedSemaphore
from websocket import WebSocketTimeoutException

from aiconexus.client.backoff import Backoff, retry_after
from aiconexus.protocol import (
    AIConexusError,
    DIDKey,
    ErrorPayload,
    Message,
    MessageError,
    MessageType,
    Payload,
    ReplayGuard,
    decode,
    encode,
    sign_message,
    verify_message,
)
from aiconexus.protocol.errors import close_code
from signaling.connection import ABNORMAL, DRAINING, NETWORK_ERRORS, SILENCE_MAX, Connection, TurnedAwayError
from signaling.exchange import Exchange
from signaling.ledger import DeliveryError, Sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiconexus.client.handshake import Resume
    from signaling.swarm import Swarm

GOODBYE_TIMEOUT = 5.0  # s, until the gateway has noticed that a connection ends
AWAY_MAX = 2.0  # s; the gateway keeps a dropped session for 30
NORMAL = 1000  # the close code of who has finished
DRAIN_MEMORY = 30.0  # s after a drain's CLOSE in which absences, lost sessions and HTTP 503 are part of it
# What the gateway says of an agent that has gone.
ABSENT = frozenset({"not_online", "away_expired", "away_full", "unreachable"})
NOTICE_MAX = 2.0  # s; an agent may meet the end of another, or of the gateway, before a CLOSE is read


class RoutingError(Exception):
    """The gateway answered a message by ERROR."""


class SessionError(Exception):
    """A connection ended that should have lasted, or a session that should have been kept is gone."""


class Agent:
    """An identity that registers, talks and comes back, until it is told to leave.

    Attributes:
        did: Its address.
        exchanges: Those that it takes part in.
        ended_at: When its last connection ended by no wish of its own, by the monotonic clock.
        left_at: When it left for good.
        registered_at: When it registered last.
    """

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.exchanges: dict[Exchange, None] = {}
        self.ended_at = self.registered_at = float("-inf")
        self.left_at = float("inf")
        self._key = DIDKey.generate()
        self.did = self._key.did
        self._guard = ReplayGuard()
        self._backoff = Backoff()
        self._connection: Connection | None = None
        self._reader: gevent.Greenlet | None = None
        self._gateway: str | None = None
        self._resume: Resume | None = None
        self._is_stepping_aside = False
        self._expects_end = False
        self._sending = BoundedSemaphore()
        self._idle = Event()
        self._idle.set()
        swarm.agents[self.did] = self

    @property
    def is_ready(self) -> bool:
        """Whether it can begin something now."""
        return self._connection is not None and not self._is_stepping_aside

    @property
    def _is_drain(self) -> bool:
        """Whether a gateway stops, or just did. It and its successor know nothing of each other."""
        return time.monotonic() < self.swarm.drained_at + DRAIN_MEMORY

    # --- connection ----------------------------------------------------------------------------

    def enter(self) -> None:
        """Register, however often that must be tried, and begin to read."""
        self._connect("new")
        self._start_reading()

    def leave(self) -> None:
        """Say goodbye for good; `wait_until_gone` ends it."""
        self.left_at = time.monotonic()
        self._is_stepping_aside = self._expects_end = True
        self.swarm.remove(self)
        self.swarm.agents.pop(self.did, None)
        for exchange in list(self.exchanges):
            exchange.interrupt(is_reported=True)
        if self._connection is not None:
            self._connection.say_goodbye()
        elif self._reader is not None:
            self._reader.kill()

    def wait_until_gone(self) -> None:
        """Wait for the gateway's answer to the goodbye, and close."""
        if self._reader is not None:
            self._reader.join(GOODBYE_TIMEOUT)
            self._reader.kill()
        if self._connection is not None:
            self._connection.abandon()
            self._connection = None

    def close_and_return(self) -> None:
        """End the session, stay away for a moment, and register anew."""
        connection = self._step_aside()
        if connection is None:
            return
        connection.say_goodbye()
        self._resume = None
        delay = self._wait_for_end(connection)
        gevent.sleep(random.random() * AWAY_MAX)  # noqa: S311
        self._return("returned", delay)

    def break_and_resume(self) -> None:
        """Lose the connection, be sent an OFFER while away, resume the session and answer it."""
        connection = self._step_aside()
        if connection is None:
            return
        connection.break_off()
        delay = self._wait_for_end(connection)
        if delay:  # sent away in that moment: there is no session to resume
            self._return("returned", delay)
            return
        friend = self.swarm.partner(self)
        exchange = Exchange(friend, self, self.swarm.options.candidates, was_away=True) if friend else None
        try:
            if exchange is not None:
                exchange.begin()
            gevent.sleep(random.random() * AWAY_MAX)  # noqa: S311
            self._return("resumed", 0.0)
            if exchange is not None:
                exchange.finish()
        finally:
            if exchange is not None:
                exchange.close()

    def _step_aside(self) -> Connection | None:
        """Let nobody begin something new, and wait until nothing is on its way to or from this agent.

        So nobody is sent to who is not there: every UNKNOWN_AGENT is the gateway's fault.

        Returns:
            The connection to end; None if it ended by itself meanwhile.
        """
        self._is_stepping_aside = True
        self.swarm.remove(self)
        self._idle.wait()
        if self._connection is None:  # its reader brings it back
            self._is_stepping_aside = False
            return None
        self._expects_end = True
        return self._connection

    def _wait_for_end(self, connection: Connection) -> float:
        """Wait until the gateway has noticed; return the seconds to stay away if it said something else."""
        assert self._reader is not None
        if not self._reader.join(GOODBYE_TIMEOUT) and not self._reader.ready():
            self._reader.kill()
            self.swarm.statistics.closed(
                "not noticed", GOODBYE_TIMEOUT, SessionError("the gateway ignored the end")
            )
        connection.abandon()
        self._connection = None
        code, _ = connection.received_close or (NORMAL, "")
        if code == NORMAL:
            return 0.0
        return self._account_end(connection, "") or 0.0

    def _return(self, how: str, delay: float) -> None:
        self._connect(how, delay)
        self._expects_end = self._is_stepping_aside = False
        self._start_reading()

    def _connect(self, how: str, delay: float = 0.0) -> None:
        statistics = self.swarm.statistics
        if delay:
            gevent.sleep(self._backoff.next(delay))
        while True:
            began = time.monotonic()
            try:
                connection = Connection(
                    self.swarm.target,
                    self._key,
                    source=self.swarm.next_source(),
                    gateway=self._gateway,
                    resume=self._resume,
                )
                break
            except TurnedAwayError as error:
                if error.is_drain:
                    self.swarm.drained_at = began
                statistics.turned_away(time.monotonic() - began, None if self._is_drain else error)
                delay = error.retry_after
            except (*NETWORK_ERRORS, AIConexusError) as error:
                statistics.not_registered(how, time.monotonic() - began, error)
                delay = 0.0
            gevent.sleep(self._backoff.next(delay))
        self._connection = connection
        self.registered_at = time.monotonic()
        self._gateway, self._resume = connection.gateway, connection.resume
        elapsed = self.registered_at - began
        if how != "resumed" or connection.resumed:
            statistics.registered(how, elapsed)
        else:
            self.swarm.judges.spawn(self._judge_lost_session, elapsed)

    def _start_reading(self) -> None:
        self._reader = gevent.spawn(self._read)
        self.swarm.add(self)

    def _read(self) -> None:
        """Read until the connection ends; come back if it should have lasted."""
        while True:
            connection = self._connection
            assert connection is not None
            try:
                while True:
                    self._take(connection.read())
            except WebSocketTimeoutException:
                text = f"nothing heard for {SILENCE_MAX:g} s"
            except NETWORK_ERRORS as error:
                text = str(error)
            if self._expects_end:
                return
            connection.abandon()
            self._connection = None
            self.swarm.remove(self)
            delay = self._account_end(connection, text)
            if delay is None:
                return
            self._connect("returned", delay)
            if not self._is_stepping_aside:
                self.swarm.add(self)

    def _account_end(self, connection: Connection, text: str) -> float | None:
        """Report an end that was not ours; return the seconds to stay away, or None for ever."""
        code, reason = connection.received_close or (ABNORMAL, "")
        row = close_code(code)
        self.ended_at = time.monotonic()
        lived = self.ended_at - self.registered_at
        self._backoff.ended(lived)
        if code == DRAINING:
            self.swarm.drained_at = self.ended_at
            self.swarm.statistics.closed(row.name, lived, None)
        else:
            self.swarm.statistics.closed(row.name, lived, SessionError(text or row.meaning))
        for exchange in list(self.exchanges):
            exchange.interrupt()
        return retry_after(row, reason) if row.reconnect else None

    # --- messages ------------------------------------------------------------------------------

    def join(self, exchange: Exchange) -> None:
        """Take part in an exchange."""
        self.exchanges[exchange] = None
        self._idle.clear()

    def release(self, exchange: Exchange) -> None:
        """Take part in it no longer."""
        self.exchanges.pop(exchange, None)
        if not self.exchanges:
            self._idle.set()

    def send(self, target: Agent, payload: Payload, exchange: Exchange, correlation_id: str | None) -> str:
        """Sign and send a message of an exchange, unless that is over; return its id."""
        message = sign_message(
            Message.create(self.did, target.did, payload, correlation_id=correlation_id), self._key
        )
        with self._sending:  # the ledger's order is that of the wire
            connection = self._connection
            if connection is None or exchange.is_over:
                return message.id
            sent = Sent(message.id, self.did, target.did, message.type.value, time.monotonic(), exchange)
            self.swarm.ledger.send(sent)
            exchange.sent(sent)
            try:
                connection.write(encode(message))
            except NETWORK_ERRORS:  # the reader finds the end, too, and reports it
                self.swarm.ledger.excuse(sent)
        return message.id

    def _take(self, data: bytes) -> None:
        """Check a message and pass it to its exchange."""
        statistics, ledger = self.swarm.statistics, self.swarm.ledger
        try:
            message = verify_message(data, recipient=self.did, guard=self._guard)
        except MessageError as error:
            self._take_unproven(data, error)
            return
        now = time.monotonic()
        try:
            sent, overtaken = ledger.arrive(message.from_, self.did, message.id)
        except DeliveryError as failure:
            statistics.undelivered(message.type.value, failure)
            return
        for other in overtaken:
            failure = DeliveryError(f"{other.kind} lost, or overtaken by a later message")
            statistics.undelivered(other.kind, failure, was_away=other.exchange.was_away)
            other.exchange.fail()
        exchange: Exchange = sent.exchange
        if message.type is MessageType.OFFER:
            exchange.answer(message.id)
        elif message.type is MessageType.ANSWER:
            since = max(
                exchange.offered_at, sent.at if not exchange.was_away else exchange.responder.registered_at
            )
            statistics.answered(now - since, len(data), was_away=exchange.was_away)
        else:
            since = max(sent.at, self.registered_at)  # while it was away nothing could be delivered
            statistics.delivered(now - since, len(data))
        exchange.arrived(sent)

    def _take_unproven(self, data: bytes, error: MessageError) -> None:
        """Take a message without a valid signature: only the gateway's own ERROR, PING and PONG have none."""
        try:
            message = decode(data)
        except MessageError:
            self.swarm.statistics.undelivered("unreadable", error)
            return
        if message.from_ != self._gateway or error.cause.name != "missing_signature":
            self.swarm.statistics.undelivered(message.type.value, error)
        elif isinstance(message.payload, ErrorPayload):
            self._take_error(message, message.payload)
        elif message.type not in (MessageType.PING, MessageType.PONG):
            self.swarm.statistics.undelivered(message.type.value, error)

    def _take_error(self, message: Message, payload: ErrorPayload) -> None:
        now = time.monotonic()
        name = (payload.details and payload.details.name) or payload.code.value
        sent = self.swarm.ledger.give_back(message.correlation_id or "")
        if sent is None:
            failure = RoutingError(f"{payload.code.value} {name}: {payload.message}")
            self.swarm.statistics.routing_error(name, 0.0, failure)
            return
        exchange: Exchange = sent.exchange
        exchange.returned(sent)
        target = self.swarm.agents.get(sent.target)
        if name in ABSENT and target is None:
            # Only a user that was stopped takes its agents away under a running exchange.
            self.swarm.statistics.routing_error(f"{name}: partner had left", now - sent.at, None)
        elif name in ABSENT and target is not None:
            exchange.fail()
            self.swarm.judges.spawn(self._judge, sent, target, name, payload, now)
        else:
            exchange.fail()
            failure = RoutingError(f"{payload.code.value} {name}: {payload.message}")
            self.swarm.statistics.routing_error(name, now - sent.at, failure)

    def _judge(self, sent: Sent, target: Agent, name: str, payload: ErrorPayload, arrived_at: float) -> None:
        """Find out whether an agent was really gone."""
        failure: RoutingError | None = RoutingError(f"{payload.code.value} {name}: {payload.message}")
        if _comes_true(lambda: self._is_drain or target.ended_at >= sent.at):
            name, failure = f"{name}: {'drain' if self._is_drain else 'partner was lost'}", None
        self.swarm.statistics.routing_error(name, arrived_at - sent.at, failure)

    def _judge_lost_session(self, elapsed: float) -> None:
        """Find out whether it ended in a drain: one worker of a gateway may have begun it, others not yet."""
        if _comes_true(lambda: self._is_drain):
            self.swarm.statistics.registered("not resumed: drain", elapsed)
        else:
            failure = SessionError("the gateway did not keep the session")
            self.swarm.statistics.not_registered("resumed", elapsed, failure)


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Wait for what another greenlet may read a little later."""
    until = time.monotonic() + NOTICE_MAX
    while not condition():
        if time.monotonic() > until:
            return False
        gevent.sleep(0.05)
    return True
