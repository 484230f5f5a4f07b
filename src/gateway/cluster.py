"""This node among others: what one worker does so that agents of several nodes reach each other.

Each worker has a line to Redis of its own. It registers its agents there (gateway.shared_registry), looks up
those of other nodes (gateway.locations) and exchanges with the workers of other nodes the same stream of
batches as with those of its own (ext/gateway/_mesh), in pieces that are published on one channel per worker.

Without Redis the node goes on alone: agents here reach each other, and who wants one of another node gets an
ERROR. When Redis is back, each worker announces its agents again, whatever happened meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import MovedError, RedisError

from gateway import replies
from gateway._connection import Router
from gateway._mesh import NODE_WORKERS, source_of
from gateway._routing import RoutingTable, TableBusyError
from gateway.directory import Offer, Query
from gateway.discovery import Page
from gateway.redis_line import LineLostError, RedisLine, close_client, is_loss, make_client, reason_of
from gateway.rights import RedisRefusalError, check_rights
from gateway.shared_registry import (
    HEARTBEAT_SECONDS,
    LEASE_SECONDS,
    REGISTER_SECONDS,
    STEPS_TOGETHER,
    Claim,
    Entry,
    Heartbeat,
    Member,
    Place,
    SharedRegistry,
    read_presence,
)
from gateway.tasks import end
from gateway.watches import Change

if TYPE_CHECKING:
    from gateway.registry import Registry, Session

# Between two attempts to reach Redis: random, or all workers of all nodes would come at once.
RETRY_MIN_SECONDS = 0.1
RETRY_MAX_SECONDS = 2.0
# Where nobody listens, what was said last is heard for so long, and until the next heartbeat.
DEAF_SECONDS = 1.0
# In one round trip, of agents that are announced again.
ANNOUNCE_COUNT = 200
# Heartbeats without a confirmation after which what another node's worker was sent goes back.
PATIENCE = 2
# After which a search gives back what it has found, with a cursor to go on from.
SEARCH_SECONDS = 1.0
# That a worker which ends waits for Redis.
CLOSE_SECONDS = 2.0
# Heartbeats in which the registry has other agents of this worker than this worker.
DOUBTS_MAX = 2


def terms_of(session: Session) -> tuple[str, ...]:
    """Return the indexes in which an agent is listed, see lua/register.lua."""
    if session.hidden:
        return ()
    names = {f"cap:{offer.name}" for offer in session.offers}
    tags = {f"tag:{tag}" for offer in session.offers for tag in offer.tags}
    return ("all", *sorted(names | tags))


def text_of(session: Session) -> str:
    """Return what a search for a text looks at, see lua/discover.lua."""
    return "" if session.hidden else "\n".join(offer.text for offer in session.offers)


def offers_of(card: bytes) -> tuple[Offer, ...]:
    """Return what a card offers that a node has checked."""
    if not card:
        return ()
    return tuple(
        Offer.read(capability["name"], capability.get("tags", ()), capability.get("description", ""))
        for capability in orjson.loads(card)["capabilities"]
    )


def fits(query: Query, did: str, card: bytes) -> bool:
    """Whether an agent of the registry is what is asked for."""
    return query.matches(did, offers_of(card) if query.names_capabilities else ())


class Cluster:
    """The part of one worker in a network of nodes.

    Args:
        url: Of Redis.
        prefix: What the keys of this network begin with.
        instance: Of this node: random, new at every start.
        did: Of this node.
        name: Of this node, for people.
        workers: How many it has.
        worker: Which one this is.
        router: Where the links to other nodes are kept.
        table: The routes of the node, where those of others are cached.
        sessions: Those of this worker.
        on_taken: Called with a session that another node has, and proven later.
        on_replaced: Called with a session that was found to replace one elsewhere, where that was, and the
            nodes that may look for it there.
        on_change: Called with what happens to agents of all nodes, while somebody here watches.
        on_doubt: Called when something of that may have been missed.
        on_members: Called with every heartbeat: numbers of the other nodes by their instance.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        instance: str,
        did: str,
        name: str,
        workers: int,
        worker: int,
        router: Router,
        table: RoutingTable,
        sessions: Registry,
        on_taken: Callable[[Session], None],
        on_replaced: Callable[[Session, Claim], None],
        on_change: Callable[[Change], None],
        on_doubt: Callable[[], None],
        on_members: Callable[[Mapping[str, int]], None],
    ) -> None:
        self._url = url
        self._prefix = prefix
        self._instance = instance
        self._did = did
        self._name = name
        self._workers = workers
        self._worker = worker
        self._router = router
        self._table = table
        self._sessions = sessions
        self._on_taken = on_taken
        self._on_replaced = on_replaced
        self._on_change = on_change
        self._on_doubt = on_doubt
        self._on_members = on_members
        self._log = structlog.get_logger("gateway.cluster").bind(worker=worker)
        self._line: RedisLine | None = None
        self._registry: SharedRegistry | None = None
        self._moved_to: tuple[str, int] | None = None
        self._has_connected = False
        self._told = ""  # of a Redis that cannot be used, since it could be
        self._is_watching = False
        self._watching_changed = asyncio.Event()
        self._searches: set[asyncio.Future[None]] = set()
        self._members: dict[int, Member] = {}
        # By worker of another node: what it had confirmed at the last heartbeat, and for how many of them.
        self._links: dict[int, tuple[int, int]] = {}
        self._deaf: dict[int, float] = {}  # workers of other nodes that do not listen, and since when
        self._joined_at = 0.0
        self._clock_offset = 0.0  # time of Redis minus the monotonic one, in ms
        self._beat: Heartbeat | None = None  # the last one
        self._has_beaten = asyncio.Event()
        self._settled: asyncio.Event | None = None
        self._pending = 0  # registrations and their ends that Redis has not answered

    # --- what it is ----------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether Redis answers, and the node has joined."""
        return self._registry is not None

    @property
    def is_settled(self) -> bool:
        """Whether who is not there is gone: just after Redis is back, others may only not be back yet."""
        return self.is_connected and time.monotonic() - self._joined_at > LEASE_SECONDS

    @property
    def number(self) -> int:
        """The number of this node; 0 if it has not joined."""
        return self._registry.number if self._registry is not None else 0

    @property
    def members(self) -> Iterable[Member]:
        """The other nodes that are there."""
        return (member for member in self._members.values() if not member.has_left)

    def instance_of(self, number: int) -> str | None:
        """Return the instance of another node; None if it is not there."""
        member = self._members.get(number)
        return member.instance if member is not None else None

    def name_of(self, worker: int) -> int:
        """Return the number by which other nodes know a worker."""
        return self.number * NODE_WORKERS + worker if worker < NODE_WORKERS else worker

    def number_of(self, name: int) -> int:
        """Return the number by which this node knows a worker."""
        return name % NODE_WORKERS if name // NODE_WORKERS == self.number else name

    def workers_of(self, nodes: Iterable[int]) -> list[int]:
        """Return the workers of some of the other nodes, as far as they are alive."""
        return [
            worker
            for number in nodes
            if (member := self._members.get(number)) is not None
            for worker in member.worker_numbers()
        ]

    # --- agents --------------------------------------------------------------------------------

    def register(self, session: Session, done: Callable[[Claim | None], None]) -> None:
        """Register a session that has proven itself just now; `done` gets None if Redis is lost."""
        if self._registry is None:
            done(None)
            return
        deadline = self._shared_time(time.monotonic() + REGISTER_SECONDS)
        self._claim(session, round(deadline), done)

    def update(self, session: Session) -> None:
        """Show another card of a session; not if its agent has proven itself elsewhere since."""
        if self._registry is not None:
            self._claim(session, None, partial(self._announced, session))

    def _announced(self, session: Session, claim: Claim | None) -> None:
        if claim is not None and claim.outcome == "kept":
            self._on_taken(session)
        elif claim is not None and claim.before is not None and claim.before.epoch != session.epoch:
            self._on_replaced(session, claim)

    def _claim(self, session: Session, deadline: int | None, done: Callable[[Claim | None], None]) -> None:
        assert self._registry is not None

        def decide(answer: Any) -> None:
            self._count_down()
            if isinstance(answer, Claim):
                done(self._known(answer))
                return
            if not isinstance(answer, LineLostError):
                self._log.error("registration refused", did=session.did, reason=str(answer))
            done(None)

        self._pending += 1
        self._registry.register(
            Entry(
                did=session.did,
                connection=session.connection.index if session.connection is not None else 0,
                epoch=session.epoch,
                proven_at=int(self._shared_time(session.proven_at)),
                is_away=session.connection is None,
                card=session.card,
                hidden=session.hidden,
                terms=terms_of(session),
                text=text_of(session),
            ),
            deadline,
            decide,
        )

    def _count_down(self) -> None:
        self._pending -= 1
        if self._pending == 0 and self._settled is not None:
            self._settled.set()

    def _known(self, claim: Claim) -> Claim:
        """Return a claim with the numbers of this node's own workers."""
        if claim.before is None:
            return claim
        before = Place(self.number_of(claim.before.worker), claim.before.connection, claim.before.epoch)
        asked = tuple(number for number in claim.asked if number != self.number)
        return Claim(claim.outcome, before, asked)

    def unregister(self, session: Session, done: Callable[[tuple[int, ...]], None]) -> None:
        """Forget a session; `done` gets the other nodes that may look for it here."""
        if self._registry is None:
            return

        def decide(answer: Any) -> None:
            self._count_down()
            if isinstance(answer, tuple):
                done(tuple(number for number in answer if number != self.number))

        self._pending += 1
        self._registry.unregister(session.did, session.epoch, decide)

    def set_away(self, session: Session) -> None:
        """Say that an agent is away."""
        if self._registry is not None:
            self._registry.set_away(session.did, session.epoch)

    def locate(self, did: str, done: Callable[[Place | Exception | None], None]) -> None:
        """Find out where an agent is; `done` gets its place, None, or the exception that came instead."""
        if self._registry is None:
            done(LineLostError("Redis is lost"))
            return

        def decide(answer: Place | Exception | None) -> None:
            if isinstance(answer, Place):
                answer = Place(self.number_of(answer.worker), answer.connection, answer.epoch)
            done(answer)

        self._registry.locate(did, decide)

    # --- the directory -------------------------------------------------------------------------

    def discover(self, query: Query, cursor: str, limit: int, done: Callable[[Page | None], None]) -> None:
        """Find agents of all nodes; `done` gets None if Redis is lost."""
        assert self._registry is not None
        task = asyncio.ensure_future(self._discover(self._registry, query, cursor, limit, done))
        self._searches.add(task)
        task.add_done_callback(self._searches.discard)

    async def _discover(
        self,
        registry: SharedRegistry,
        query: Query,
        cursor: str,
        limit: int,
        done: Callable[[Page | None], None],
    ) -> None:
        try:
            await registry.settle()
            done(await self._find(registry, query, cursor, limit))
        except (LineLostError, RedisError) as error:
            if not isinstance(error, LineLostError):
                self._log.error("search refused", reason=str(error))
            done(None)

    async def _find(self, registry: SharedRegistry, query: Query, cursor: str, limit: int) -> Page:
        if query.dids is not None:
            described = sorted(await registry.describe([did for did in query.dids if did > cursor]))
            fitting = [agent for agent in described if fits(query, agent[0], agent[2])]
            return Page.of(((did, replies.agent(did, status, card)) for did, status, card in fitting), limit)
        if query.capability is not None:
            term = f"cap:{query.capability}"
        elif query.tag is not None:
            term = f"tag:{query.tag}"
        else:
            term = "all"
        found: list[tuple[str, bytes]] = []
        deadline = time.monotonic() + SEARCH_SECONDS
        while len(found) < limit and time.monotonic() < deadline:
            cursor, agents = await registry.discover(term, cursor, limit, query.text or "")
            found.extend(
                (did, replies.agent(did, status, card))
                for did, status, card in agents
                if fits(query, did, card)
            )
            if not cursor:
                break
        return Page.of(found, limit, cursor)

    def watch(self, wanted: bool) -> None:
        """Hear what happens to agents, or no longer."""
        self._is_watching = wanted
        self._watching_changed.set()

    async def _listen(self, pubsub: PubSub, channel: str) -> None:
        """Subscribe to the presence channel whenever somebody watches."""
        is_subscribed = False
        while True:
            self._watching_changed.clear()
            if self._is_watching != is_subscribed:
                is_subscribed = self._is_watching
                await (pubsub.subscribe if is_subscribed else pubsub.unsubscribe)(channel)
            await self._watching_changed.wait()

    # --- messages ------------------------------------------------------------------------------

    def reach(self, worker: int) -> bool:
        """Have a link to a worker of another node; False if there can be none now."""
        if self._registry is None or worker in self._deaf:
            return False
        if worker in self._links:
            return True
        self._router.add_remote_link(worker, self.number, self._publish)
        self._links[worker] = (0, 0)
        return True

    def begin_anew(self, worker: int) -> None:
        """Begin another stream to a worker of another node, if there is one."""
        if worker in self._links and worker not in self._deaf:
            self._links[worker] = (0, 0)
            self._router.begin_anew(worker)

    def _publish(self, worker: int, piece: bytes) -> None:
        if self._line is not None and self._registry is not None:
            channel = self._registry.channel(worker)
            opposite = self._router.opposite(worker)
            self._line.send("PUBLISH", channel, piece, done=partial(self._published, worker, opposite))

    def _published(self, worker: int, opposite: int, answer: Any) -> None:
        # An exception is the end of the line, and with it of all links.
        if answer == 0 and worker not in self._deaf:
            if worker in self._links:
                if self._router.opposite(worker) != opposite:
                    return  # it has begun to speak since, and so to listen
                self._log_lost(worker, "nobody listens")
                # What it said last may still be on its way here, also that it has got what it was sent.
                self._router.fall_silent(worker)
            self._deaf[worker] = time.monotonic()
            # A node that was gone before this one could meet it is never told of as gone.
            with suppress(TableBusyError):
                self._table.purge(worker)

    def _hear(self, worker: int, piece: bytes) -> None:
        """Take a piece of a stream.

        Whoever did not listen and begins another stream, or asks for another, listens now. One that has left
        only goes on with what it had begun.
        """
        if worker not in self._links:
            self._deaf.pop(worker, None)
            if not self.reach(worker):
                return
        opposite = self._router.opposite(worker)
        must_begin = not self._router.take(worker, piece)
        if worker in self._deaf and self._router.opposite(worker) != opposite:
            must_begin = True
        if must_begin:
            self._deaf.pop(worker, None)
            self._log.info("stream begins anew", node=worker // NODE_WORKERS, to=worker % NODE_WORKERS)
            self.begin_anew(worker)
            self._router.settle()

    def _unlink(self, worker: int, reason: str) -> None:
        if self._links.pop(worker, None) is not None:
            if worker not in self._deaf:
                self._log_lost(worker, reason)
            self._router.lose_remote_link(worker)

    def _log_lost(self, worker: int, reason: str) -> None:
        self._log.info("link lost", node=worker // NODE_WORKERS, to=worker % NODE_WORKERS, reason=reason)

    async def _read(self, pubsub: PubSub, channel: bytes) -> None:
        while True:
            message = await pubsub.get_message(timeout=HEARTBEAT_SECONDS)
            if message is None:
                continue
            if message["type"] != "message":
                if message["channel"] == channel:
                    self._on_doubt()  # until now nothing was heard
                    self._router.settle()
                continue
            piece = message["data"]
            if message["channel"] == channel:
                event, did, status, before, now = read_presence(piece)
                self._on_change(Change(event, did, status, 0, before, now))
                self._router.settle()
                continue
            source = source_of(piece)
            if source is None or source // NODE_WORKERS in (0, self.number):
                self._log.error("not a piece of a stream", channel=message["channel"], size=len(piece))
            else:
                self._hear(source, piece)

    # --- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Stay connected with Redis until cancelled."""
        while True:
            event, reason = "Redis lost", ""
            try:
                await self._connection()
            except (
                MovedError
            ) as error:  # of a Redis Cluster; all keys have one slot, so one node has them all
                self._moved_to, reason = (error.host, error.port), str(error)
            except Exception as error:
                if is_loss(error):
                    if isinstance(error, RedisRefusalError):
                        event = "Redis refuses"
                    reason = reason_of(error)
                    self._moved_to = None
                else:
                    self._log.exception("fault")
            if event != self._told:
                self._log.error(event, reason=reason)
                self._told = event
            await asyncio.sleep(random.uniform(RETRY_MIN_SECONDS, RETRY_MAX_SECONDS))  # noqa: S311

    def _go_on_alone(self) -> None:
        if self._registry is None:
            return
        self._line = self._registry = None
        for worker in list(self._links):
            self._unlink(worker, "Redis lost")
        self._deaf.clear()
        # Who is where, and under which number, is asked anew then.
        self._members = {}
        with suppress(TableBusyError):
            self._table.forget_others()
        self._on_doubt()
        self._router.settle()

    async def _connection(self) -> None:
        """Serve one connection with Redis, until it breaks."""
        client = make_client(self._url, self._moved_to)
        line = RedisLine(client, self._router.settle)
        searches = RedisLine(client, self._router.settle, STEPS_TOGETHER)
        tasks = [asyncio.create_task(each.serve()) for each in (line, searches)]
        pubsub = client.pubsub()
        try:
            if self._has_connected:
                # To this Redis says in a sentence what it wants before, such as a password; to a script not.
                await client.ping()
            else:
                await check_rights(client, self._prefix)
            registry = SharedRegistry(
                line,
                searches,
                prefix=self._prefix,
                instance=self._instance,
                did=self._did,
                name=self._name,
                workers=self._workers,
                worker=self._worker,
            )
            beat = await self._ask_heartbeat(registry)
            registry.number = beat.number
            await pubsub.subscribe(registry.channel(beat.number * NODE_WORKERS + self._worker))
            if await pubsub.get_message(timeout=LEASE_SECONDS) is None:
                raise LineLostError("Redis does not answer a SUBSCRIBE")
            if not self._has_connected:
                # Of a process that had the number of this worker and has died.
                await registry.purge(self._instance, self._worker)
                self._has_connected = True
            self._line, self._registry = line, registry
            self._told = ""
            self._joined_at = time.monotonic()
            self._log.info("joined", node=beat.number, term=beat.term)
            channel = registry.presence_channel
            tasks.append(asyncio.create_task(self._read(pubsub, channel.encode())))
            tasks.append(asyncio.create_task(self._listen(pubsub, channel)))
            tasks.append(asyncio.create_task(self._stay(registry, beat)))
            tasks.append(asyncio.create_task(self._repair(registry)))
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended.pop().result()
        finally:
            self._go_on_alone()  # first: to end a connection can take as long as to make it
            await end(tasks)
            await pubsub.aclose()  # type: ignore[no-untyped-call]
            await close_client(client)

    async def _ask_heartbeat(self, registry: SharedRegistry) -> Heartbeat:
        beat = await registry.heartbeat()
        self._clock_offset = beat.time - time.monotonic() * 1000
        return beat

    def _shared_time(self, seconds: float) -> float:
        """Return the time of Redis in ms at a monotonic time of this node: the clock that all nodes share."""
        return seconds * 1000 + self._clock_offset

    async def _stay(self, registry: SharedRegistry, beat: Heartbeat) -> None:
        """Renew the lease, and look who else is there."""
        while True:
            self._meet(beat.members)
            self._look_after_links()
            self._on_members({member.instance: member.number for member in self._members.values()})
            self._router.settle()
            self._beat = beat
            self._has_beaten.set()
            await asyncio.sleep(HEARTBEAT_SECONDS * random.uniform(0.9, 1.1))  # noqa: S311
            beat = await self._ask_heartbeat(registry)
            if beat.number != registry.number:
                raise LineLostError("the node has another number now")

    async def _repair(self, registry: SharedRegistry) -> None:
        """Put right what Redis has wrong. With many agents it takes longer than a lease lives."""
        term, doubts = 0, 0
        while True:
            await self._has_beaten.wait()
            self._has_beaten.clear()
            beat = self._beat
            assert beat is not None
            is_right = self._pending > 0 or beat.owned == len(self._sessions)
            doubts = 0 if is_right else doubts + 1
            if beat.term != term or doubts > DOUBTS_MAX:
                term, doubts = beat.term, 0
                await self._announce(registry)
            if self.is_settled:
                await self._bury(registry, beat.members)

    def _meet(self, members: Iterable[Member]) -> None:
        """Take note of the nodes that are there, and forget what is known of those that are not.

        A node that has left counts as one that is there until its lease ends: what it said last may still be
        on its way here, and its agents, if it was stopped at once, are only then removed.
        """
        alive = {
            member.number: member
            for member in members
            if member.is_alive and member.instance != self._instance
        }
        for number, member in self._members.items():
            if number not in alive or alive[number].instance != member.instance:
                if not member.has_left:
                    self._log.warning("node gone", node=number, name=member.name)
                numbers = member.worker_numbers()
                for worker in numbers:
                    self._unlink(worker, "the node is gone")
                with suppress(TableBusyError):
                    self._table.purge(numbers.start, len(numbers))
        for number, member in alive.items():
            known = self._members.get(number)
            was_there = known is not None and not known.has_left
            if was_there and member.has_left:
                self._log.info("node left", node=number, name=member.name)
            if not was_there and not member.has_left:
                self._log.info("node met", node=number, name=member.name, workers=member.workers)
                if member.did != self._did:
                    self._log.warning(
                        "node with another identity",
                        node=number,
                        name=member.name,
                        did=member.did,
                        hint="agents that come from there cannot resume here: give all nodes one --identity",
                    )
        self._members = alive
        self._router.settle()

    async def _bury(self, registry: SharedRegistry, members: Iterable[Member]) -> None:
        """Remove what dead nodes owned. Every worker does, and they share the work."""
        for member in members:
            if not member.is_alive:
                for worker in range(member.workers):
                    await registry.purge(member.instance, worker)
                await registry.bury(member.number, member.instance)

    async def _announce(self, registry: SharedRegistry) -> None:
        """Register every session of this worker, and nothing else."""
        owned = await registry.owned()
        sessions = self._sessions.all()
        for start in range(0, len(sessions), ANNOUNCE_COUNT):
            await self._announce_some(
                [
                    session
                    for session in sessions[start : start + ANNOUNCE_COUNT]
                    if self._sessions.get(session.did) is session
                ]
            )
        gone = [did for did in owned if did not in self._sessions]
        for start in range(0, len(gone), ANNOUNCE_COUNT):
            # One that has come back meanwhile was registered behind what is asked here.
            await registry.disown(
                [did for did in gone[start : start + ANNOUNCE_COUNT] if did not in self._sessions]
            )
        if sessions or gone:
            self._log.info("announced", agents=len(sessions), forgotten=len(gone))

    async def _announce_some(self, sessions: list[Session]) -> None:
        futures = []

        def decide(session: Session, future: asyncio.Future[None], claim: Claim | None) -> None:
            if not future.done():
                future.set_result(None)
            self._announced(session, claim)

        for session in sessions:
            future = asyncio.get_running_loop().create_future()
            futures.append(future)
            self._claim(session, None, partial(decide, session, future))
        await asyncio.gather(*futures)

    def _look_after_links(self) -> None:
        """Give back what a worker of another node does not confirm."""
        for worker in [each for each, since in self._deaf.items() if time.monotonic() - since > DEAF_SECONDS]:
            self._unlink(worker, "nobody listens")
            del self._deaf[worker]
        for worker, (confirmed, times) in list(self._links.items()):
            if worker in self._deaf:
                continue
            base, waiting = self._router.progress(worker)
            if not waiting or base != confirmed:
                self._links[worker] = (base, 0)
            elif times + 1 < PATIENCE:
                self._links[worker] = (base, times + 1)
            else:
                self._log.warning(
                    "not confirmed", node=worker // NODE_WORKERS, to=worker % NODE_WORKERS, bytes=waiting
                )
                self.begin_anew(worker)
        self._router.settle()

    async def close(self) -> None:
        """Wait until Redis has what other nodes are told, and knows who has gone and that this is the end."""
        self._router.settle(confirm_now=True)
        if self._pending and self._registry is not None:
            self._settled = asyncio.Event()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._settled.wait(), CLOSE_SECONDS)
        if self._registry is not None:
            with suppress(LineLostError, RedisError, asyncio.TimeoutError):
                await asyncio.wait_for(self._registry.leave(), CLOSE_SECONDS)
