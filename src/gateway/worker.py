"""One worker of the gateway: what to do with every message that the router does not simply forward."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from ipaddress import ip_address

import structlog
from picows import WSUpgradeRequest, WSUpgradeResponseWithListener, ws_create_server

from aiconexus import __version__
from aiconexus.protocol import (
    DIDError,
    DIDKey,
    InvalidSignatureError,
    MessageError,
    PingPayload,
    UnsupportedVersionError,
    decode,
    decode_did,
)
from aiconexus.protocol.errors import CAUSES
from aiconexus.protocol.limits import MESSAGE_MAX_BYTES, WRITE_QUEUE_MAX_BYTES
from gateway import replies, upgrade
from gateway._connection import Connection, Router
from gateway._frames import Scan, scan
from gateway.config import Settings
from gateway.handshake import Handshake, Registrar
from gateway.log import PicowsLog
from gateway.registry import Registry, Session

# A message over the limit is still read up to this size, so that its ERROR can name it.
READ_MAX_BYTES = 4 * MESSAGE_MAX_BYTES
# Every connection pays for it; most messages fit.
READ_BUFFER_BYTES = 2048
TICK_SECONDS = 0.1
# The most by which a tick moves the time: see `_tick`.
STALL_SECONDS = 1.0
# The time a client has to answer our CLOSE frame.
CLOSE_TIMEOUT_SECONDS = 2.0
DRAIN_SECONDS = 5.0
BACKLOG = 4096

_ROUTED = frozenset({"OFFER", "ANSWER", "ICE_CANDIDATE", "ERROR"})
_DATA_PLANE = frozenset({"INTENT", "EXEC_REQUEST", "EXEC_RESPONSE"})
# Of a refusal on a registered session: all others leave it alive.
_CLOSE_AFTER = {"binary_frame": 1003, "invalid_utf8": 1007, "too_large": 1009}


class Gateway:
    """The policy of one worker. `Router` calls the `on_*` methods; none of them awaits.

    Args:
        settings: What the operator set.
        key: The gateway's identity.
    """

    def __init__(self, settings: Settings, key: DIDKey) -> None:
        self.settings = settings
        self.did = key.did
        self.refused: Counter[str] = Counter()
        self.closed: Counter[int] = Counter()
        self._log = structlog.get_logger("gateway")
        self._registrar = Registrar(
            key,
            public_urls=settings.public_urls,
            register_timeout=settings.register_timeout,
            ping_interval=settings.ping_interval,
            away=settings.away,
        )
        self.router = Router(
            self,
            message_max=MESSAGE_MAX_BYTES,
            write_queue_max=WRITE_QUEUE_MAX_BYTES,
            ping_interval=settings.ping_interval,
            pong_timeout=settings.pong_timeout,
            idle_timeout=settings.idle_timeout,
            close_timeout=CLOSE_TIMEOUT_SECONDS,
        )
        self.registry = Registry(self.router.table, settings.away)
        self._started_at = time.monotonic()
        self._is_draining = False
        self._is_empty = asyncio.Event()
        # Messages on their way back to their senders. Returning one can close a slow sender, whose own
        # queue then goes back: a list, not a recursion as deep as there are slow agents.
        self._returning: deque[tuple[bytes, str]] = deque()

    # --- HTTP ----------------------------------------------------------------------------------

    def on_request(self, request: WSUpgradeRequest) -> WSUpgradeResponseWithListener:
        """Answer a request on the public port; called by picows."""
        if upgrade.path_of(request) == upgrade.HEALTH_PATH:
            return WSUpgradeResponseWithListener(upgrade.health(self.health()), None)
        refusal = upgrade.refuse(request)
        if refusal is None and self._is_draining:
            refusal = upgrade.response(
                HTTPStatus.SERVICE_UNAVAILABLE, "the gateway is being stopped", Retry_After="1"
            )
        if refusal is not None:
            self.refused[f"http_{refusal.status.value}"] += 1
            self._log.info("http refused", status=refusal.status.value, path=upgrade.path_of(request)[:128])
            return WSUpgradeResponseWithListener(refusal, None)
        handshake, first_message = self._registrar.begin(request.headers["Host"])
        return WSUpgradeResponseWithListener(
            upgrade.accept(request, first_message), Connection(self.router, handshake)
        )

    def health(self) -> dict[str, object]:
        """Return the state of this worker, for `GET /health`."""
        return {
            "status": "draining" if self._is_draining else "ok",
            "version": __version__,
            "did": self.did,
            "uptime_seconds": round(time.monotonic() - self._started_at, 1),
            "connections": self.router.connection_count,
            "sessions": len(self.registry),
            "away": self.registry.away_count,
            "counters": {
                **self.router.counters,
                "refused": dict(self.refused),
                "closed": {str(code): count for code, count in self.closed.items()},
            },
        }

    # --- messages ------------------------------------------------------------------------------

    def on_message(self, connection: Connection, data: bytes) -> None:
        """Take a message that the router did not forward."""
        found = scan(data)
        if found.status != "ok":
            self._refuse(connection, found.status, found=found)
            if connection.handshake is not None:
                code = 4505 if found.status == "unsupported_version" else 4500
                self._close(connection, _CLOSE_AFTER.get(found.status, code))
            elif found.status in _CLOSE_AFTER:
                self._close(connection, _CLOSE_AFTER[found.status], keep=True)
        elif connection.handshake is not None:
            self._register(connection, connection.handshake, data, found)
        elif connection.session is not None:
            self._dispatch(connection, connection.session, data, found)

    def _dispatch(self, connection: Connection, session: Session, data: bytes, found: Scan) -> None:
        kind = found.type
        if found.from_ != session.did:
            self._refuse(connection, "wrong_sender", found=found, field="from")
        elif kind in _ROUTED:
            self._deliver_elsewhere(connection, data, found)
        elif kind in _DATA_PLANE:
            self._refuse(connection, "data_plane_only", found=found, field="type")
        elif kind == "DISCOVER":
            self._refuse(connection, "not_offered", found=found, field="type")
        elif kind not in ("PING", "PONG", "UNREGISTER") or found.to != self.did:
            self._refuse(connection, "unexpected_type", found=found, field="type")
        else:
            try:
                message = decode(data)
            except MessageError as error:
                self._refuse(connection, error.cause.name, str(error), found=found, field=error.field)
                return
            if isinstance(message.payload, PingPayload):
                answer = replies.pong(self.did, session.did, message.id, message.payload.sequence)
                self._send(connection, answer)
            elif kind == "UNREGISTER":
                self._close(connection, 1000)

    def _deliver_elsewhere(self, connection: Connection, data: bytes, found: Scan) -> None:
        """Deal with a message whose target has no connection here."""
        assert found.to is not None
        target = self.registry.get(found.to)
        if target is not None:
            if not target.hold(data):
                self._refuse(connection, "away_full", found=found, field="to")
            return
        try:
            decode_did(found.to)
        except DIDError as error:
            self._refuse(connection, "bad_did", str(error), found=found, field="to")
        else:
            self._refuse(connection, "not_online", found=found, field="to")

    # --- sessions ------------------------------------------------------------------------------

    def _register(self, connection: Connection, handshake: Handshake, data: bytes, found: Scan) -> None:
        try:
            registration = self._registrar.check(handshake, data)
        except MessageError as error:
            self._refuse(connection, error.cause.name, str(error), found=found, field=error.field)
            if isinstance(error, InvalidSignatureError):
                code = 4502
            elif isinstance(error, UnsupportedVersionError):
                code = 4505
            else:
                code = 4500
            self._close(connection, code)
            return
        token = self._registrar.new_resume_token()
        done = self.registry.register(
            registration.did, connection, registration.capabilities, token, registration.resume_token
        )
        connection.register(done.session, registration.did.encode())
        if done.replaced is not None:
            done.replaced.forget_session()
            self._close(done.replaced, 4504)
        answer = self._registrar.accept(
            registration, session=done.session.id, resume_token=token, resumed=done.resumed
        )
        self._send(connection, answer)
        self.router.flush()  # what waited for the agent may fill the queue alone
        for message in done.held:
            if not done.resumed:
                self._return(message, "away_expired")
            elif scan(message).type in ("REGISTER", "PONG"):
                pass  # those belonged to the old connection
            elif not self._send(connection, message):
                self._return(message, "slow_consumer")
        self._log.debug("registered", did=registration.did, peer=connection.peer, resumed=done.resumed)

    def _end_session(self, connection: Connection, *, keep: bool) -> None:
        """Part a session from its connection; `keep` lets it be away for a while."""
        session = connection.session
        if session is None:
            return
        undelivered = connection.take_undelivered()
        connection.forget_session()
        if keep and self.settings.away > 0:
            if self.registry.drop(session):
                for message in undelivered:
                    if not session.hold(message):
                        self._return(message, "away_full")
        elif self.registry.remove(session):
            self._return_all(undelivered, "not_online")

    def _put_back(self, data: bytes) -> None:
        """Deal with a message that is older than all that waits for its target."""
        to = scan(data).to
        target = self.registry.get(to) if to is not None else None
        if target is None or target.connection is not None:
            self._return(data, "not_online")
        elif not target.hold_first(data):
            self._return(data, "away_full")

    def _return_all(self, messages: Iterable[bytes], name: str) -> None:
        for message in messages:
            self._return(message, name)

    def _return(self, data: bytes, name: str) -> None:
        """Tell the sender of a message that it was not delivered."""
        self._returning.append((data, name))
        if len(self._returning) > 1:
            return  # an outer call is at it
        while self._returning:
            data, name = self._returning[0]
            try:
                self._tell_sender(data, name)
            finally:
                self._returning.popleft()

    def _tell_sender(self, data: bytes, name: str) -> None:
        found = scan(data)
        if found.from_ is None or found.from_ == self.did:
            return
        self.refused[name] += 1
        self._log.info("undelivered", cause=name, id=found.id, did=found.from_, to=found.to)
        sender = self.registry.get(found.from_)
        if sender is None:
            return
        answer = replies.error(self.did, found.from_, name, field="to", correlation_id=found.id)
        if sender.connection is None or not self._send(sender.connection, answer):
            sender.hold(answer)

    # --- refusals ------------------------------------------------------------------------------

    def _refuse(
        self,
        connection: Connection,
        name: str,
        text: str = "",
        *,
        found: Scan | None = None,
        field: str | None = None,
    ) -> None:
        """Answer with an ERROR, count and log it once."""
        session = connection.session
        did = session.did if session is not None else found.from_ if found is not None else None
        message_id = found.id if found is not None else None
        if field is None and found is not None:
            field = found.field
        self.refused[name] += 1
        self._log.info(
            "refused",
            cause=name,
            field=field,
            id=message_id,
            did=did,
            peer=connection.peer,
            text=text or CAUSES[name].message,
        )
        answer = replies.error(
            self.did, did or self.did, name, message=text, field=field, correlation_id=message_id
        )
        self._send(connection, answer)

    def on_refused_frame(self, connection: Connection, name: str, code: int) -> None:
        """Close a connection whose frame breaks RFC 6455, or is binary."""
        if name in CAUSES:
            self._refuse(connection, name)
        else:
            self._count_protocol_error(connection, name)
        self._close(connection, code, keep=True)

    def _count_protocol_error(self, connection: Connection, name: str) -> None:
        self.refused[name] += 1
        session = connection.session
        did = session.did if session is not None else None
        self._log.info("protocol error", cause=name, did=did, peer=connection.peer)

    def on_slow_consumer(self, target: Connection, sender: Connection, data: bytes) -> None:
        """Close a connection that does not read, and tell who wrote to it."""
        self._close_slow_consumer(target)
        self._refuse(sender, "slow_consumer", found=scan(data), field="to")

    def _close_slow_consumer(self, connection: Connection) -> None:
        session = connection.session
        self._log.warning(
            "slow consumer",
            did=session.did if session is not None else None,
            peer=connection.peer,
            queued_bytes=connection.queued_bytes,
        )
        self._close(connection, 4003, keep=True)

    # --- connections ---------------------------------------------------------------------------

    def _send(self, connection: Connection, data: bytes) -> bool:
        """Queue a message; one that does not fit closes the connection. Tell whether it was queued."""
        if connection.send(data):
            return True
        if connection.is_open:
            self._close_slow_consumer(connection)
        return False

    def _close(
        self, connection: Connection, code: int, *, keep: bool = False, retry_after_ms: int | None = None
    ) -> None:
        if connection.is_open:
            self.closed[code] += 1
            connection.close(code, replies.close_reason(code, retry_after_ms))
        self._end_session(connection, keep=keep)

    def on_timeout(self, connection: Connection, name: str) -> None:
        """Close a connection whose deadline has passed."""
        if name == "register_timeout":
            self._refuse(connection, name)
            self._close(connection, 4007)
        elif name == "idle":
            self._close(connection, 4006)
        else:
            session = connection.session
            self._log.info("no pong", did=session.did if session is not None else None, peer=connection.peer)
            self._close(connection, 4004, keep=True)

    def on_fault(self, connection: Connection) -> None:
        """Give up a connection whose timer failed; called while the exception is handled."""
        self._log.exception("timer failed", peer=connection.peer)
        connection.abort()

    def on_closed(self, connection: Connection) -> None:
        """Clean up after a connection that is gone."""
        frames = connection.close_handshake
        by_agent = frames is not None and frames.recv is not None and frames.recv_then_sent
        if connection.close_code == 0:  # not closed by us
            if frames is not None and frames.sent is not None and not by_agent:
                # picows itself refused a frame: masking, length, opcode, size.
                code = int(frames.sent.code)
                self.closed[code] += 1
                self._count_protocol_error(connection, "too_large" if code == 1009 else "frame")
            else:
                self.closed[int(frames.recv.code) or 1005 if by_agent else 1006] += 1
        if connection.session is None and connection.handshake is None:
            # We closed a session, maybe with one frame half written: that did not get through.
            for message in connection.take_undelivered():
                self._put_back(message)
        # A client that says 1000 has finished; every other end may be followed by a resume.
        self._end_session(connection, keep=not (by_agent and int(frames.recv.code) in (0, 1000)))
        if self._is_draining and not self.router.connection_count:
            self._is_empty.set()

    # --- life ----------------------------------------------------------------------------------

    async def serve(self, on_ready: Callable[[int], None]) -> None:
        """Serve until SIGTERM or SIGINT; the second one ends it at once.

        Args:
            on_ready: Called with the port once connections are accepted.

        Raises:
            OSError: The address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        server = await ws_create_server(
            self.on_request,
            self.settings.host,
            self.settings.port,
            # aiofastnet costs 5 KiB a connection and routes no faster.
            use_aiofastnet=False,
            # Its pongs bypass on_ws_frame, and so the check of reserved bits and the time of the last sign.
            enable_auto_pong=False,
            max_frame_size=READ_MAX_BYTES,
            read_buffer_init_size=READ_BUFFER_BYTES,
            websocket_handshake_timeout=self.settings.register_timeout,
            logger_name=PicowsLog(),
            backlog=BACKLOG,
        )
        stop = asyncio.Event()
        stop_now = asyncio.Event()

        def on_signal() -> None:
            (stop_now if stop.is_set() else stop).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        ticking = loop.create_task(self._tick(loop))
        try:
            on_ready(server.sockets[0].getsockname()[1])
            self._log.info("listening", did=self.did)
            is_local = ip_address(server.sockets[0].getsockname()[0]).is_loopback
            if not self.settings.public_urls and not is_local:
                self._log.warning(
                    "no public URL",
                    hint="the audience that agents sign is only compared with their Host header, which a "
                    "relay in between can choose; name the address that they dial with --public-url",
                )
            await stop.wait()
            await self._drain(server, stop_now)
        finally:
            ticking.cancel()
            for connection in self.router.open_connections():
                connection.abort()
            server.close()
            self._log.info("stopped", counters=self.health()["counters"])

    async def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Move the timers: the only periodic work of a worker.

        Time in which this process did not run is nobody's silence: what came meanwhile is not read yet.
        """
        elapsed, last = 0.0, loop.time()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            elapsed += min(now - last, STALL_SECONDS)
            last = now
            try:
                self.router.advance(elapsed)
                for session in self.registry.expire():
                    self._return_all(session.release(), "away_expired")
                self.router.flush()
            except Exception:
                # One connection's fault must not stop the clock of all others.
                self._log.exception("timer failed")

    async def _drain(self, server: asyncio.Server, stop_now: asyncio.Event) -> None:
        """Send every agent away with a time to come back, spread so that they do not all come at once."""
        self._is_draining = True
        server.close()
        connections = self.router.open_connections()
        self._log.info("draining", connections=len(connections))
        # What cannot be delivered any more goes back while its senders are still there to be told.
        for session in self.registry.end_away():
            self._return_all(session.release(), "away_expired")
        self.router.flush()
        for connection in connections:
            self._return_all(connection.take_undelivered(), "not_online")
        self.router.flush()
        spread_ms = 500 + len(connections)  # a thousand returns a second
        for connection in connections:
            self._close(connection, 4001, retry_after_ms=500 + random.randrange(spread_ms))  # noqa: S311
        if self.router.connection_count:
            waiting = [asyncio.ensure_future(event.wait()) for event in (stop_now, self._is_empty)]
            await asyncio.wait(waiting, timeout=DRAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for waiter in waiting:
                waiter.cancel()
