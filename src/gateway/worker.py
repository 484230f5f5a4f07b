"""One worker of the gateway: what to do with every message that the router does not simply forward."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from itertools import islice

import structlog
from picows import WSUpgradeRequest, WSUpgradeResponseWithListener

from aiconexus import __version__
from aiconexus.protocol import (
    DIDError,
    DIDKey,
    DiscoverPayload,
    InvalidSignatureError,
    Message,
    MessageError,
    PingPayload,
    RegisterPayload,
    UnregisterPayload,
    UnsupportedVersionError,
    decode,
    decode_did,
)
from aiconexus.protocol.errors import CAUSES
from aiconexus.protocol.limits import MESSAGE_MAX_BYTES, WRITE_QUEUE_MAX_BYTES
from gateway import descriptors, replies, upgrade
from gateway._connection import Connection, Router
from gateway._frames import Scan, scan
from gateway._mesh import NODE_WORKERS, ROUTED_KIND
from gateway._routing import TableBusyError, TableFullError
from gateway.cluster import Cluster, offers_of
from gateway.config import Settings
from gateway.custody import Custody
from gateway.debts import Debts
from gateway.directory import Query, View
from gateway.discovery import Discovery, Page
from gateway.handshake import Handshake, Registrar, Registration, read_shown
from gateway.ice import IceServers
from gateway.kinds import ANSWER, ASK, CHANGED, CUSTODY_KINDS, GIVEN_BACK, MESSAGE_KINDS, WATCHING
from gateway.locations import Locations, Waiting
from gateway.losses import Losses
from gateway.moves import Moves, is_lasting
from gateway.node import Node, Tally
from gateway.registry import Registered, Registry, Session
from gateway.shared_registry import Claim, Place
from gateway.tasks import end
from gateway.watches import WATCHES_MAX, Change, Watch, Watches

# A message over the limit is still read up to this size, so that its ERROR can name it.
FRAME_MAX_BYTES = 4 * MESSAGE_MAX_BYTES
# Of a client that was refused because there is no room.
RETRY_AFTER_SECONDS = 10
TICK_SECONDS = 0.1
# Sessions that were away for too long: 10 ms. A network that fails may have taken thousands at once.
EXPIRED_PER_TICK = 500
# The most by which a tick moves the time: see `_tick`.
STALL_SECONDS = 1.0
# The time a client has to answer our CLOSE frame.
CLOSE_TIMEOUT_SECONDS = 2.0
# Of the drain time: for other workers to give back what waits there; of what is left then, the time in which
# the closes are spread; and how many leave in one tick at least.
GIVE_BACK_SHARE = 0.5
DRAIN_SHARE = 0.8
DRAIN_STEP_MIN = 20
# In which every connection is looked at once.
SWEEP_TICKS = 100
# For a worker to fetch a session whose route it has: Redis is asked before, perhaps twice. With many
# connections it takes the sweep up to 20 s more.
FETCH_SECONDS = 10.0
BACKLOG = 4096

_FOR_US = frozenset({"PING", "PONG", "UNREGISTER", "DISCOVER", "REGISTER"})
_ROUTED = frozenset({"OFFER", "ANSWER", "ICE_CANDIDATE", "ERROR"})
_DATA_PLANE = frozenset({"INTENT", "EXEC_REQUEST", "EXEC_RESPONSE"})
# Why an agent that is there cannot be reached for now.
_PASSING = frozenset({"unreachable", "unconfirmed", "overloaded"})
# Of a refusal on a registered session: all others leave it alive.
_CLOSE_AFTER = {"binary_frame": 1003, "invalid_utf8": 1007, "too_large": 1009}


class Gateway:
    """The policy of one worker. `Router` calls the `on_*` methods; none of them awaits.

    Args:
        settings: What the operator set.
        key: The gateway's identity.
        node: What this worker shares with the others.
        worker: Its number.
    """

    def __init__(self, settings: Settings, key: DIDKey, node: Node, worker: int = 0) -> None:
        self.settings = settings
        self.did = key.did
        self.node = node
        self.worker = worker
        self._tally = Tally(node.counters, worker)
        self._log = structlog.get_logger("gateway")
        if node.workers > 1:
            self._log = self._log.bind(worker=worker)
        self._registrar = Registrar(
            key,
            public_urls=settings.public_url,
            register_timeout=settings.register_timeout,
            ping_interval=settings.ping_interval,
            away=settings.away,
            message_rate=settings.message_rate,
            message_burst=settings.message_burst,
            ice=IceServers(
                settings.stun_url,
                settings.turn_url,
                settings.turn_secret.get_secret_value() if settings.turn_secret is not None else "",
                settings.turn_ttl,
            ),
            worker=worker,
        )
        self.router = Router(
            self,
            table=node.table,
            counters=node.counters,
            ledger=node.ledger,
            addresses=node.addresses,
            worker=worker,
            message_max=MESSAGE_MAX_BYTES,
            frame_max=FRAME_MAX_BYTES,
            write_queue_max=WRITE_QUEUE_MAX_BYTES,
            message_rate=settings.message_rate,
            message_burst=settings.message_burst,
            ping_interval=settings.ping_interval,
            pong_timeout=settings.pong_timeout,
            idle_timeout=settings.idle_timeout,
            close_timeout=CLOSE_TIMEOUT_SECONDS,
        )
        self.registry = Registry(node.table, node.ledger, worker, settings.away, self._on_away, self._on_gone)
        self.cluster = self._make_cluster(settings, node, worker)
        self.locations = None
        self.custody = None
        if self.cluster is not None:
            self.custody = Custody(
                node.instance,
                self.router,
                node.ledger,
                self.cluster,
                answer=partial(self._answer_sender, name="unconfirmed"),
            )
            self.locations = Locations(
                self.cluster,
                node.table,
                node.ledger,
                deliver=self._deliver_found,
                refuse=lambda _, waiting, cause: self._return(waiting.data, cause),
            )
        self._losses = Losses(node.ledger, after=self.router.settle)
        self._debts = Debts(
            node.ledger,
            pay=self._send_error,
            on_dropped=lambda: node.counters.add(worker, "errors_dropped"),
        )
        self.discovery = Discovery(
            worker,
            self.registry.directory,
            self.registry,
            self.cluster,
            others=self._siblings,
            tell=self._tell,
            reply=self._send_page,
            settle=self.router.settle,
        )
        self.watches = Watches(
            worker,
            read_offers=offers_of,
            others=self._siblings,
            tell=self._tell,
            notify=self._notify,
            on_wanted=self.cluster.watch if self.cluster is not None else lambda _: None,
        )
        self.moves = Moves(
            worker,
            self.router,
            self.registry,
            node.table,
            node.ledger,
            cluster=self.cluster,
            tell=self._tell,
            pass_on=self._pass_on,
            origin_of=self.custody.origin_of if self.custody is not None else lambda _: None,
            admit=self._admit,
            give=self._give,
            give_back=self._return,
            replace=self._replace,
            tell_arrival=self._publish_arrival,
        )
        self._started_at = time.monotonic()
        self._connections_max = descriptors.connections_per_worker()
        self._opening_max = descriptors.requests_per_worker()
        self._is_draining = False
        self._given_back: set[int] = set()  # workers of this node that end, and keep no message any more
        self._sweep_at = 0
        self._opening = 0  # connections whose request is not answered yet
        self._generations: dict[int, int] = {}
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        # Messages on their way back to their senders. Returning one can close a slow sender, whose own
        # queue then goes back: a list, not a recursion as deep as there are slow agents.
        self._returning: deque[tuple[bytes, str]] = deque()

    def _make_cluster(self, settings: Settings, node: Node, worker: int) -> Cluster | None:
        if settings.redis is None:
            return None
        return Cluster(
            settings.redis,
            prefix=settings.redis_prefix,
            instance=node.instance,
            did=self.did,
            name=settings.node_name,
            workers=node.workers,
            worker=worker,
            router=self.router,
            table=node.table,
            sessions=self.registry,
            on_taken=self._on_taken,
            on_replaced=self._on_replaced,
            on_change=lambda change: self.watches.take(change, is_ordered=True),
            on_doubt=self._doubt,
            on_members=self._on_members,
        )

    # --- HTTP ----------------------------------------------------------------------------------

    def on_request(self, request: WSUpgradeRequest, address: str) -> WSUpgradeResponseWithListener:
        """Answer a request on the public port; called by picows.

        Args:
            request: What was asked.
            address: IP address of the client.
        """
        try:
            return self._on_request(request, address)
        except Exception:
            self._log.exception("fault", address=address)
            self._tally.fault()
            self._tally.refused("http_500")
            fault = upgrade.response(HTTPStatus.INTERNAL_SERVER_ERROR, "the gateway met a fault")
            return WSUpgradeResponseWithListener(fault, None)

    def _on_request(self, request: WSUpgradeRequest, address: str) -> WSUpgradeResponseWithListener:
        path = upgrade.path_of(request)
        if path in (upgrade.HEALTH_PATH, upgrade.READY_PATH):
            is_well = path == upgrade.HEALTH_PATH or self._is_ready()
            return WSUpgradeResponseWithListener(upgrade.health(self.health(), is_well), None)
        place = self.node.addresses.place(address)
        refusal = upgrade.refuse(request)
        if refusal is None and (reason := self._is_full(place)):
            # The time to come back is random, or all that were refused would come at once.
            seconds = str(random.randint(1, RETRY_AFTER_SECONDS))  # noqa: S311
            refusal = upgrade.response(HTTPStatus.SERVICE_UNAVAILABLE, reason, Retry_After=seconds)
        if refusal is not None:
            self._tally.refused(f"http_{refusal.status.value}")
            self._log.info(
                "http refused",
                status=refusal.status.value,
                path=upgrade.printable(upgrade.path_of(request)[:128]),
                address=address,
                text=(refusal.body or b"").decode().strip(),
            )
            return WSUpgradeResponseWithListener(refusal, None)
        handshake, first_message = self._registrar.begin(request.headers["Host"])
        return upgrade.accept(request, first_message, Connection(self.router, handshake, place))

    def _on_accepted(self, address: str) -> bool:
        """Count a connection whose request is still to come; tell whether it may come."""
        limit = self.settings.max_connections_per_address
        place = self.node.addresses.place(address)
        self.node.addresses.add(self.worker, place, 1)
        self._opening += 1
        # One more than the limit is heard, to be told why it is refused.
        if self._opening <= self._opening_max and not (
            limit and self.node.addresses.count(place) > limit + 1
        ):
            return True
        self._tally.refused("http_503")
        self._log.info("http refused", status=503, address=address, text="too many unfinished requests")
        return False

    def _on_tls(self, address: str) -> None:
        self._tally.refused("http_400")
        self._log.info("http refused", status=400, address=address, text="TLS is not spoken here")

    def _on_request_over(self, address: str) -> None:
        self.node.addresses.add(self.worker, self.node.addresses.place(address), -1)
        self._opening -= 1

    def _is_full(self, place: int) -> str:
        """Say why no further connection is taken, if none is."""
        if self._is_draining:
            return "the gateway is being stopped"
        if (
            self.node.counters.total("connections") >= self.settings.max_connections
            or self.router.connection_count >= self._connections_max
        ):
            return "the gateway has as many connections as it takes"
        limit = self.settings.max_connections_per_address
        # The one that asks is counted already.
        if limit and self.node.addresses.count(place) > limit:
            return f"there are {limit} connections from this address already"
        return ""

    def _is_ready(self) -> bool:
        """Whether new agents should come here."""
        is_alone = self.settings.redis_required and self.cluster is not None and not self.cluster.is_connected
        return not self._is_draining and not is_alone

    def _status(self) -> str:
        if self._is_draining:
            return "draining"
        return "alone" if self.cluster is not None and not self.cluster.is_connected else "ok"

    def _cluster_health(self) -> dict[str, object]:
        assert self.cluster is not None
        return {
            "node": self.cluster.number,
            "redis": "connected" if self.cluster.is_connected else "lost",
            "others": {
                str(member.number): member.name
                for member in sorted(self.cluster.members, key=lambda member: member.number)
            },
            "cached_routes": self.node.table.cached,
        }

    def health(self) -> dict[str, object]:
        """Return the state of the node, for `GET /health`."""
        total = self.node.counters.total
        return {
            "status": self._status(),
            "version": __version__,
            "did": self.did,
            "uptime_seconds": round(time.monotonic() - self._started_at, 1),
            "workers": self.node.workers,
            "worker": {"number": self.worker, "pid": os.getpid()},
            "connections": total("connections"),
            "sessions": total("sessions"),
            "away": total("away"),
            "routes": len(self.node.table),
            "waiting": total("waiting"),
            "waiting_elsewhere": total("waiting_elsewhere"),
            "unconfirmed_bytes": total("unconfirmed_bytes"),
            **({} if self.cluster is None else {"cluster": self._cluster_health()}),
            "counters": self.node.totals(),
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
        elif kind not in _FOR_US or found.to != self.did:
            self._refuse(connection, "unexpected_type", found=found, field="type")
        else:
            try:
                message = decode(data)
                self._answer(connection, session, message, found)
            except MessageError as error:
                self._refuse(connection, error.cause.name, str(error), found=found, field=error.field)

    def _answer(self, connection: Connection, session: Session, message: Message, found: Scan) -> None:
        """Do what an agent asks of the gateway itself."""
        payload = message.payload
        if isinstance(payload, PingPayload):
            answer = replies.pong(self.did, session.did, message.id, payload.sequence)
            self._send(connection, answer)
        elif isinstance(payload, DiscoverPayload):
            self._discover(connection, session, message, payload, found)
        elif isinstance(payload, RegisterPayload):
            shown = read_shown(message)
            self._send(connection, self._registrar.note(message))
            if (session.card, session.hidden) == (shown.card, shown.hidden):
                return  # it wanted new TURN credentials: nobody sees anything else
            before = session.view
            self.registry.show(session, shown)
            if self.cluster is not None:
                self.cluster.update(session)
            self._publish(Change("update", session.did, session.status, session.epoch, before, session.view))
        elif isinstance(payload, UnregisterPayload):
            self._close(connection, 1000)

    def _discover(
        self,
        connection: Connection,
        session: Session,
        message: Message,
        payload: DiscoverPayload,
        found: Scan,
    ) -> None:
        if payload.watch is False:
            if message.correlation_id is not None:
                self.watches.remove(session, message.correlation_id)
            self._send_page(session, message.id, Page(), False)
            return
        # What happens after the question was asked is told by the watch.
        if payload.watch and not self.watches.add(session, message.id, Query.of(payload)):
            text = f"an agent watches {WATCHES_MAX} times at most"
            self._refuse(connection, "overloaded", text, found=found, field="payload.watch")
        elif not self.discovery.ask(session, message.id, payload):
            self.watches.remove(session, message.id)
            text = "too many searches at the same time: wait for the answers"
            self._refuse(connection, "overloaded", text, found=found, field="type", retry_after_ms=1_000)

    def _send_page(self, session: Session, message_id: str, page: Page, is_partial: bool) -> None:
        if session.connection is None:
            return
        agents = [data for _, data in page.agents]
        answer = replies.presence(
            self.did, session.did, message_id, agents, cursor=page.cursor or None, partial=is_partial
        )
        self._send(session.connection, answer)

    def _notify(self, watch: Watch, event: str, agents: list[bytes]) -> None:
        if watch.session.connection is not None:
            answer = replies.presence(self.did, watch.session.did, watch.id, agents, event=event)
            self._send(watch.session.connection, answer)

    def _doubt(self) -> None:
        """Tell whoever watches that something may have been missed."""
        self.watches.doubt()

    def _publish(self, change: Change) -> None:
        """Tell whoever watches what has happened to an agent; with Redis, its scripts do."""
        if self.cluster is None or not self.cluster.is_connected:
            self.watches.publish(change)

    def _publish_arrival(self, did: str, epoch: int, before: View | None, now: View) -> None:
        """Tell whoever watches that an agent has registered."""
        self._publish(Change("join" if before is None else "update", did, "online", epoch, before, now))

    def _deliver_elsewhere(self, connection: Connection, data: bytes, found: Scan) -> None:
        """Deal with a message that the router did not deliver: its target is away, elsewhere or nowhere."""
        assert found.to is not None
        if found.to not in self.registry:
            try:
                decode_did(found.to)
            except DIDError as error:
                self._refuse(connection, "bad_did", str(error), found=found, field="to")
                return
        cause = self._deliver(found.to, data, connection)
        if cause is not None:
            self._refuse(connection, cause, found=found, field="to")

    def _deliver(self, did: str, data: bytes, sender: Connection | None) -> str | None:
        """Send a message on its way; return the cause if that cannot be."""
        if self.locations is not None and did in self.locations:
            return self.locations.search(did, data, sender)
        target = self.registry.get(did)
        if target is not None and target.move is not None:
            self.moves.hold(target, self.worker, data)
            return None
        if target is not None:
            return self._hand_to(target, data)
        # The session may have gone to another worker just now.
        is_forwarded = self.router.forward(did.encode(), data)
        if is_forwarded:
            return None
        if is_forwarded is None:
            return "not_online" if self.locations is None else self.locations.search(did, data, sender)
        route = self.node.table.get(did.encode())
        if route is None or route[0] in self.router.linked_workers():
            return "overloaded"
        if route[0] < NODE_WORKERS or self.cluster is None or not self.cluster.reach(route[0]):
            return "unreachable"
        return None if self.router.forward(did.encode(), data) else "unreachable"

    def _deliver_found(self, did: str, waiting: Waiting) -> None:
        """Send a message on its way whose target was looked up."""
        cause = self._deliver(did, waiting.data, None)
        if cause is not None:
            self._return(waiting.data, cause)

    def _hand_to(self, session: Session, data: bytes) -> str | None:
        """Deliver a message to a session of this worker; return the cause if that cannot be."""
        if session.connection is None:
            return None if session.hold(data) else "away_full"
        if not self._send(session.connection, data):
            return "slow_consumer"
        self.node.counters.add(self.worker, "messages_routed")
        self.node.counters.add(self.worker, "bytes_routed", len(data))
        return None

    def _give(self, session: Session, data: bytes) -> None:
        """Deliver a message to a session of this worker, or give it back to its sender."""
        cause = self._hand_to(session, data)
        if cause is not None:
            self._return(data, cause)

    def _tell(self, worker: int, kind: int, origin: int, epoch: int, data: bytes) -> bool:
        """Send a record to another worker; False if it cannot be reached or is behind."""
        if worker >= NODE_WORKERS and (self.cluster is None or not self.cluster.reach(worker)):
            return False
        return self.router.tell(worker, kind, origin, epoch, data)

    def _pass_on(self, worker: int, kind: int, origin: int, epoch: int, data: bytes) -> bool:
        """Send a message on to another worker, see `_tell`; until it is there, this one answers for it."""
        if worker >= NODE_WORKERS and (self.cluster is None or not self.cluster.reach(worker)):
            return False
        return self.router.pass_on(worker, kind, origin, epoch, data)

    # --- other workers -------------------------------------------------------------------------

    def on_moving(self, target: Connection, origin: int, data: bytes) -> None:
        """Take a message for a session that is on its way to this worker."""
        if target.session is not None:
            self.moves.hold(target.session, origin, data)
        else:
            self._return(data, "not_online")

    def on_stray(self, origin: int, epoch: int, data: bytes) -> None:
        """Take a message for a session that has dropped, or is no longer here."""
        self.moves.on_stray(origin, epoch, data)

    def add_link(self, worker: int, generation: int, fd: int) -> None:
        """Talk to another worker.

        Args:
            worker: Its number.
            generation: How many processes have had that number before.
            fd: A socket that leads to it.
        """
        self.router.add_link(worker, fd)
        self._generations[worker] = generation
        self.watches.on_link(worker)

    def on_record(self, worker: int, kind: int, origin: int, epoch: int, data: bytes) -> None:
        """Take what another worker says to this one."""
        if kind == ASK:
            self.discovery.on_ask(worker, epoch, data)
        elif kind == ANSWER:
            self.discovery.on_answer(worker, epoch, data)
        elif kind == WATCHING:
            self.watches.on_watching(worker, data)
        elif kind == CHANGED:
            self.watches.on_changed(data)
        elif kind == GIVEN_BACK:
            self._given_back.add(worker)
        elif kind in CUSTODY_KINDS:
            assert self.custody is not None
            self.custody.on_record(worker, kind, data)
            self._count_waiting_elsewhere()
        elif kind in MESSAGE_KINDS and self.custody is not None:
            self._take_passed_on(worker, kind, origin, epoch, data)
        else:
            self.moves.on_record(worker, kind, origin, epoch, data)
            self._count_sessions()

    def _take_passed_on(self, worker: int, kind: int, origin: int, epoch: int, data: bytes) -> None:
        """Take a message that another worker had; who answers for it may be a third."""
        assert self.custody is not None
        ledger = self.node.ledger
        before, source = ledger.source, self.custody.source_of(origin, worker)
        if source == before:
            self.moves.on_record(worker, kind, origin, epoch, data)
            return
        # What is queued is written down with its source only when it turns out to wait.
        self.router.flush()
        ledger.source = source
        try:
            self.moves.on_record(worker, kind, origin, epoch, data)
            self.router.flush()
        finally:
            ledger.source = before

    def on_stream(self, worker: int, is_new: bool) -> None:
        """A stream to a worker of another node begins."""
        assert self.custody is not None
        self.custody.on_stream(worker, is_new)

    def on_news(self, kept: list[tuple[int, bytes]], freed: list[tuple[int, bytes]]) -> None:
        """Messages from other nodes wait, or do no longer."""
        assert self.custody is not None
        self.custody.on_news(kept, freed)

    def _on_members(self, alive: Mapping[str, int]) -> None:
        assert self.cluster is not None
        assert self.custody is not None
        self.custody.look_after(alive, self.cluster.is_settled)
        if self.cluster.is_settled:
            self._debts.fall_due()

    def _count_waiting_elsewhere(self) -> None:
        assert self.custody is not None
        self.node.counters.set(self.worker, "waiting_elsewhere", len(self.custody))

    def on_link_lost(self, worker: int, records: list[tuple[int, int, int, bytes]]) -> None:
        """Another worker has gone: tell the senders of what it had not confirmed."""
        self.node.lifeline.follow()
        if worker < NODE_WORKERS and self.node.is_draining(worker):
            self._log.debug("worker left", left=worker, unconfirmed=len(records))
        elif worker < NODE_WORKERS:
            self._log.warning("worker lost", lost=worker, unconfirmed=len(records))
        lost = [data for kind, _, _, data in records if kind == ROUTED_KIND or kind in MESSAGE_KINDS]
        for data in lost:
            self._losses.add(partial(self._return, data, "unconfirmed"), data)
        self.moves.on_link_lost(worker)
        self.discovery.on_link_lost(worker)
        self.router.flush()
        if worker >= NODE_WORKERS:
            return
        self.watches.on_link_lost(worker)
        self._given_back.discard(worker)
        told = {scan(data).id for data in lost}
        # What it had confirmed, and kept for agents that were away or slow. What came from another node is
        # answered for there, and senders that have gone to another node by one of the workers that are left.
        is_first = self.cluster is not None and self.worker < min(self._siblings(), default=NODE_WORKERS)
        for sender, target, message_id, source in self.node.ledger.read(
            worker, self._generations.pop(worker, 0)
        ):
            if source or message_id in told:
                continue
            if sender in self.registry or (is_first and self._is_afar(sender)):
                self._losses.add(partial(self._answer_sender, sender, target, message_id, "unconfirmed"))

    # --- sessions ------------------------------------------------------------------------------

    def _register(self, connection: Connection, handshake: Handshake, data: bytes, found: Scan) -> None:
        if self._is_draining:
            self._send_away(connection)
            return
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
        before = self.registry.get(registration.did)
        if before is not None:
            self.moves.give_up(before)
        try:
            done = self.registry.register(
                registration.did,
                connection,
                registration.shown,
                self._registrar.new_resume_token(),
                registration.resume_token,
            )
        except (TableFullError, TableBusyError) as error:
            self._refuse(connection, "gateway_full", str(error), found=found)
            self._close(connection, 1013)
            return
        self._count_sessions()
        session = done.session
        connection.register(session, registration.did.encode(), session.epoch)
        if done.replaced is not None:
            self._replace(done.replaced)
        self.moves.prepare(session, registration)
        if self.cluster is None:
            self._begin_session(session, registration, done, None)
        else:
            self.cluster.register(session, partial(self._begin_session, session, registration, done))

    def _begin_session(
        self, session: Session, registration: Registration, done: Registered, claim: Claim | None
    ) -> None:
        """Go on with a registration once the shared registry has answered, if there is one.

        Args:
            session: The new session.
            registration: To be answered.
            done: What this node had of the agent.
            claim: What the others had; None if that is not known.
        """
        if self.registry.get(session.did) is not session:
            self._return_all(done.held.take(), "away_expired")
            return  # it was replaced meanwhile, and its REGISTER answered
        if claim is not None and claim.outcome == "late" and self.cluster is not None:
            # Redis took long. Whoever is still here has not gone elsewhere.
            if session.connection is not None:
                self.cluster.register(session, partial(self._begin_session, session, registration, done))
                return
            claim = None
        remote: list[int] = []
        elsewhere = done.elsewhere
        if claim is not None and self.cluster is not None:
            remote = self.cluster.workers_of(claim.asked)
            elsewhere = self._last_place(session, elsewhere, claim.before, remote)
        if elsewhere is None or elsewhere[0] >= NODE_WORKERS:
            self._publish_arrival(session.did, session.epoch, done.before, session.view)
        if elsewhere is None:
            held = done.held.take()
            if not done.resumed:
                self._return_all(held, "away_expired")
            self.moves.end(
                session,
                resumed=done.resumed,
                held=[message for message in held if done.resumed and is_lasting(message)],
            )
        else:
            self._return_all(done.held.take(), "away_expired")
            self.moves.begin(session, registration, *elsewhere, remote)

    def _last_place(
        self, session: Session, near: tuple[int, int] | None, known: Place | None, remote: list[int]
    ) -> tuple[int, int] | None:
        """Return worker and epoch of the session before, if it was not here.

        Args:
            session: The new one.
            near: What the table of this node says.
            known: What the shared registry says.
            remote: Workers of other nodes that may have cached where it was.
        """
        if near is not None and near[0] >= NODE_WORKERS:
            near = None  # what was cached; the registry knows better
        if known is None:
            return near
        if known.worker >= NODE_WORKERS or (near is None and known.worker != self.worker):
            return known.worker, known.epoch
        if near is None:
            for worker in remote:
                self.moves.correct(worker, session.did, known.epoch, session)
        return near

    def _on_taken(self, session: Session) -> None:
        """Close a session whose agent registered at another node later, as this node only now hears."""
        self._log.warning("session taken", did=session.did)
        self.moves.give_up(session)
        connection = session.connection
        undelivered = connection.take_undelivered() if connection is not None else []
        self.registry.remove(session)
        self._return_all([*undelivered, *session.release()], "away_expired")
        if connection is not None:
            self._replace(connection)

    def _on_replaced(self, session: Session, claim: Claim) -> None:
        """Tell where an older session of the same agent was, at another node, that it has ended."""
        assert claim.before is not None
        self.moves.dismiss(session, claim.before.worker, claim.before.epoch)

    def _siblings(self) -> list[int]:
        """Return the other workers of this node."""
        return [worker for worker in self.router.linked_workers() if worker < NODE_WORKERS]

    def _on_away(self, session: Session) -> None:
        view = session.view
        self._publish(Change("away", session.did, "away", session.epoch, view, view))
        if self.cluster is not None:
            self.cluster.set_away(session)

    def _on_gone(self, session: Session) -> None:
        self._publish(Change("leave", session.did, "offline", session.epoch, session.view, None))
        if self.cluster is not None:
            self.cluster.unregister(session, partial(self._tell_gone, session.did, session.epoch))

    def _tell_gone(self, did: str, epoch: int, asked: tuple[int, ...]) -> None:
        """Let the nodes that asked where an agent was forget it."""
        assert self.cluster is not None
        for number in asked:
            for worker in self.cluster.workers_of([number])[:1]:
                self.moves.correct(worker, did, epoch, None)

    def _admit(self, session: Session, registration: Registration, resumed: bool) -> None:
        """Answer a REGISTER: the agent can be reached."""
        connection = session.connection
        if connection is None:
            return  # it has gone again
        answer = self._registrar.accept(
            registration, session=session.id, resume_token=session.resume_token, resumed=resumed
        )
        self._send(connection, answer)
        self._log.debug("registered", did=session.did, peer=connection.peer, resumed=resumed)

    def _send_away(self, connection: Connection) -> None:
        """Close a connection as the gateway stops, with a time to come back that others do not have, too."""
        self._close(connection, 4001, retry_after_ms=500 + random.randrange(1_000))  # noqa: S311

    def _replace(self, connection: Connection) -> None:
        """Close the connection of an agent that has registered anew."""
        if connection.session is not None:
            self.watches.remove(connection.session)
        connection.forget_session()
        self._close(connection, 4504)

    def _end_session(self, connection: Connection, *, keep: bool) -> None:
        """Part a session from its connection; `keep` lets it be away for a while, unless this worker ends."""
        session = connection.session
        if session is None:
            return
        self.watches.remove(session)
        undelivered = connection.take_undelivered()
        connection.forget_session()
        if keep and self.settings.away > 0 and not self._is_draining:
            if self.registry.drop(session):
                for message in undelivered:
                    if not session.hold(message):
                        self._return(message, "away_full")
        elif self.registry.remove(session):
            self.moves.give_up(session)
            self._return_all([*undelivered, *session.release()], "not_online")
        self._count_sessions()

    def _put_back(self, data: bytes, epoch: int) -> None:
        """Deal with a message of a session of this epoch that is older than all that waits there.

        A later session of the same agent may have got those already.
        """
        to = scan(data).to
        target = self.registry.get(to) if to is not None else None
        if target is None or target.epoch != epoch or target.connection is not None:
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
            except Exception:
                # The fault with one must not keep the others from going back.
                self._log.exception("fault", cause=name)
                self._tally.fault()
            self._returning.popleft()

    def _tell_sender(self, data: bytes, name: str) -> None:
        found = scan(data)
        if found.from_ == self.did and found.to is not None:
            self._keep_error(found.to, data, name)
        elif found.from_ is not None:
            self._answer_sender(found.from_, found.to, found.id, name)

    def _is_afar(self, did: str) -> bool:
        """Tell whether an agent is at no worker of this node."""
        route = self.node.table.get(did.encode())
        return route is None or route[0] >= NODE_WORKERS

    def _answer_sender(self, did: str, to: str | None, message_id: str | None, name: str) -> None:
        self._tally.refused(name)
        self._log.info("undelivered", cause=name, id=message_id, did=did, to=to)
        answer = replies.error(self.did, did, name, field="to", correlation_id=message_id)
        self._send_error(did, answer)

    def _send_error(self, did: str, data: bytes) -> None:
        sender = self.registry.get(did)
        cause = self._deliver(did, data, None)
        if cause == "slow_consumer" and sender is not None:
            sender.hold(data)
        elif cause is not None:
            self._keep_error(did, data, cause)

    def _keep_error(self, did: str, data: bytes, cause: str) -> None:
        """Keep an ERROR that could not be delivered, unless nobody is there who waits for it."""
        may_be_elsewhere = self.cluster is not None and not self.cluster.is_settled
        if cause in _PASSING or (cause == "not_online" and may_be_elsewhere):
            self._debts.owe(did, data)

    # --- refusals ------------------------------------------------------------------------------

    def _refuse(
        self,
        connection: Connection,
        name: str,
        text: str = "",
        *,
        found: Scan | None = None,
        field: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        """Answer with an ERROR, count and log it once."""
        session = connection.session
        did = session.did if session is not None else found.from_ if found is not None else None
        message_id = found.id if found is not None else None
        if field is None and found is not None:
            field = found.field
        self._tally.refused(name)
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
            self.did,
            did or self.did,
            name,
            message=text,
            field=field,
            correlation_id=message_id,
            retry_after_ms=retry_after_ms,
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
        self._tally.refused(name)
        session = connection.session
        did = session.did if session is not None else None
        self._log.info("protocol error", cause=name, did=did, peer=connection.peer)

    def on_slow_consumer(self, target: Connection, sender: Connection | None, data: bytes) -> None:
        """Close a connection that does not read, and tell who wrote to it, here or at another worker."""
        self._close_slow_consumer(target)
        if sender is not None:
            self._refuse(sender, "slow_consumer", found=scan(data), field="to")
        else:
            self._return(data, "slow_consumer")

    def on_too_fast(self, connection: Connection, data: bytes, retry_after_ms: int, is_last: bool) -> None:
        """Refuse a message over the rate of the session; close one that goes on all the same."""
        self._refuse(connection, "rate_limited", found=scan(data), retry_after_ms=retry_after_ms)
        if is_last:
            self._close(connection, 4005, keep=True)

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
            self._tally.closed(code)
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

    def on_fault(self, connection: Connection | None) -> None:
        """Log and count a fault of this program; close the connection that met it, if one did."""
        self._tally.fault()
        if connection is None:
            self._log.exception("fault")
            return
        session = connection.session
        self._log.exception("fault", did=session.did if session is not None else None, peer=connection.peer)
        if not connection.is_open:
            connection.abort()
            return
        try:
            self._close(connection, 4002, keep=True)
        except Exception:
            self._log.exception("fault", peer=connection.peer)
            connection.abort()

    def on_goodbye(self, connection: Connection) -> None:
        """End the session of a client that has sent CLOSE: the next message that is read may be for it."""
        # Who says 1000 has finished; every other end may be followed by a resume.
        self._end_session(connection, keep=connection.received_code not in (1000, 1005))

    def on_closed(self, connection: Connection) -> None:
        """Clean up after a connection that is gone."""
        if connection.close_code == 0:  # not closed by us
            self._tally.closed(connection.received_code or 1006)
        if connection.session is None and connection.handshake is None:
            # The session ended before its socket, maybe with a frame half written: that did not get through.
            for message in connection.take_undelivered():
                self._put_back(message, connection.epoch)
        self._end_session(connection, keep=True)

    # --- life ----------------------------------------------------------------------------------

    async def serve(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serve on a bound socket until `stop` is called.

        Args:
            listener: Bound, not listening yet; closed when it ends.
            on_ready: Called once connections are accepted.
        """
        loop = asyncio.get_running_loop()
        loop.add_reader(self.router.fileno(), self.router.run_pass)
        tasks = [loop.create_task(self._tick(loop))]
        if self.cluster is not None:
            tasks.append(loop.create_task(self.cluster.run()))
        server = await loop.create_server(
            # The time is for the whole request: a client that sends byte by byte gets no more.
            lambda: upgrade.RequestProtocol(
                self.on_request,
                self.settings.register_timeout,
                self._on_accepted,
                self._on_tls,
                self._on_request_over,
            ),
            sock=listener,
            backlog=BACKLOG,
        )
        try:
            self._log.debug("listening")
            on_ready()
            await self._stop.wait()
            await self._drain(server)
            if self.cluster is not None:
                await self.cluster.close()
        finally:
            await end(tasks)
            for connection in self.router.open_connections():
                connection.abort()
            self.router.run_pass()
            loop.remove_reader(self.router.fileno())
            server.close()
            self._log.debug("stopped")

    def stop(self) -> None:
        """Send every agent away and end; called again, end at once."""
        (self._stop_now if self._stop.is_set() else self._stop).set()

    async def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Move the timers: the only periodic work of a worker.

        Time in which this process did not run is nobody's silence: what came meanwhile is not read yet.
        """
        elapsed, last = 0.0, loop.time()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            elapsed += min(now - last, STALL_SECONDS)
            last, last_run = now, last
            try:
                for session in islice(self.registry.expire(), EXPIRED_PER_TICK):
                    for data in session.release():
                        self._losses.add(partial(self._return, data, "away_expired"), data)
                self.moves.expire()
                self.discovery.expire()
                self.watches.catch_up()
                if self.custody is None:
                    self._debts.fall_due()
                else:
                    self.custody.answer_some()
                    self._count_waiting_elsewhere()
                self._debts.pay_some()
                # After a stall, what other workers have to say of their sessions is not read yet.
                if self.node.workers > 1 and now - last_run < STALL_SECONDS:
                    self._look_for_taken_sessions()
                self._count_sessions()
                self.router.advance(elapsed)
            except Exception:
                # One connection's fault must not stop the clock of all others.
                self._log.exception("fault", cause="timer")
                self._tally.fault()

    def _count_sessions(self) -> None:
        self._tally.sessions(len(self.registry), self.registry.away_count)

    def _look_for_taken_sessions(self) -> None:
        """Close connections whose agent has registered at another worker that could not tell us.

        That worker asks for the session; this finds those that it was unable to ask for, once the time for
        that is up. A few are looked at in every tick.
        """
        now = time.monotonic()
        size = self.router.size
        count = size // SWEEP_TICKS + 1
        for connection in self.router.open_connections(self._sweep_at, self._sweep_at + count):
            session = connection.session
            if session is None or session.move is not None:
                continue
            route = self.node.table.get(session.did.encode())
            if route is not None and route[2] == session.epoch:
                continue
            if session.missed_at is None:
                session.missed_at = now
            elif session.missed_at + FETCH_SECONDS <= now:
                self._log.warning("session taken", did=session.did)
                self.registry.give(session.did, session.epoch)
                self._return_all([*connection.take_undelivered(), *session.release()], "away_expired")
                self._replace(connection)
        self._sweep_at = self._sweep_at + count if self._sweep_at + count < size else 0

    async def _drain(self, server: asyncio.Server) -> None:
        """Send every agent away with a time to come back, spread so that they do not all come at once."""
        self._is_draining = True
        self.node.set_draining(self.worker, True)
        deadline = time.monotonic() + self.settings.drain_seconds
        connections = self.router.open_connections()
        self._log.info("draining", connections=len(connections), seconds=self.settings.drain_seconds)
        # What cannot be delivered any more goes back while its senders are still there to be told.
        for session in self.registry.end_away():
            self._return_all(session.release(), "away_expired")
        # Who has connected but is not accepted yet gets an answer, not a reset.
        is_stopped = await self._is_stopped(TICK_SECONDS)
        # Of what was lost before, a few are told at a time.
        while self._losses and not is_stopped and time.monotonic() < deadline:
            is_stopped = await self._is_stopped(TICK_SECONDS / 10)
        is_stopped = is_stopped or await self._wait_for_siblings()
        server.close()
        if is_stopped:
            return
        random.shuffle(connections)
        # The last ones keep some of the time for their CLOSE handshake.
        steps = max(int((deadline - time.monotonic()) * DRAIN_SHARE / TICK_SECONDS), 1)
        size = max(-(-len(connections) // steps), DRAIN_STEP_MIN)
        for start in range(0, len(connections), size):
            for connection in connections[start : start + size]:
                if connection.is_open:
                    self._send_away(connection)
            self.router.flush()
            if start + size < len(connections) and await self._is_stopped(TICK_SECONDS):
                return
        # Requests that are on their way get their 503, too.
        patience = min(time.monotonic() + CLOSE_TIMEOUT_SECONDS, deadline)
        while self.router.connection_count or self._opening:
            until = deadline if self.router.connection_count else patience
            if time.monotonic() > until or await self._is_stopped(TICK_SECONDS / 10):
                return

    async def _wait_for_siblings(self) -> bool:
        """Let the workers that end with this one give back what waits there: its senders may be here.

        Returns:
            Whether the end is to be at once.
        """
        until = time.monotonic() + self.settings.drain_seconds * GIVE_BACK_SHARE
        told: set[int] = set()
        while True:
            siblings = self._siblings()
            told |= {
                worker
                for worker in siblings
                if worker not in told and self.router.tell(worker, GIVEN_BACK, self.worker, 0, b"")
            }
            self.router.settle()
            late = [
                worker
                for worker in siblings
                if worker not in told or (self.node.is_draining(worker) and worker not in self._given_back)
            ]
            if not late:
                return False
            if time.monotonic() > until:
                self._log.warning("not given back", workers=late)
                return False
            if await self._is_stopped(TICK_SECONDS / 10):
                return True

    async def _is_stopped(self, seconds: float) -> bool:
        """Wait; tell at once if the end is to be at once."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stop_now.wait(), seconds)
        return self._stop_now.is_set()
